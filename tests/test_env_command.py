"""``env`` as COMMAND or in a script's first line: the program that it starts is looked at too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flockshim
from flockshim import executable


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the programs ``good``, which is dynamic, and ``bad``, which is not."""
    directory = tmp_path_factory.mktemp("bin")
    source = directory / "program.c"
    source.write_text("int main(void) { return 7; }\n")
    subprocess.run(["gcc", "-o", directory / "good", source], check=True)
    subprocess.run(["gcc", "-static", "-o", directory / "bad", source], check=True)
    return directory


@pytest.fixture
def programs(binaries: Path) -> dict[str, str]:
    """An environment in whose PATH they are."""
    return {"PATH": f"{binaries}:{os.environ['PATH']}"}


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "arguments",
    [
        "good",
        "-- good",
        "A=1 B= good x bad",
        "-u A --unset=B --unset C good",
        "-v good",
        "-C / good",
        "--default-signal=PIPE good",
        "--help",
        "",
        "A=1",
    ],
)
def test_env_that_starts_a_good_program(arguments: str, programs: dict[str, str]) -> None:
    words = arguments.split()
    assert executable.protected(["env", *words], programs)[1] == ["env", *words]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("bad", "statically linked"),
        ("A=1 bad", "statically linked"),
        ("-u A -C / bad", "statically linked"),
        ("-vuA bad", "statically linked"),
        ("env env bad", "statically linked"),
        ("-S bad", "statically linked"),
        ("-SA=1\tbad\tx", "statically linked"),
        ("--split-string=bad", "statically linked"),
        ("-Sbad\v\fx", "statically linked"),
        ("-i good", "-i clears"),
        ("- good", "-i clears"),
        ("-vi good", "-i clears"),
        ("--ignore-environment good", "-i clears"),
        ("-u LD_PRELOAD good", "LD_PRELOAD is unset"),
        ("-uLD_PRELOAD good", "LD_PRELOAD is unset"),
        ("LD_PRELOAD=/x good", "LD_PRELOAD is set anew"),
        ("-S${HOME}/good", "cannot tell"),
        ("-S'good'", "cannot tell"),
        ("--new-option good", "cannot tell"),
        ("-Z good", "cannot tell"),
    ],
)
def test_env_that_takes_the_shim_away_is_refused(arguments: str, reason: str, programs: dict[str, str]) -> None:
    with pytest.raises(flockshim.FlockshimError, match=reason):
        executable.protected(["env", *arguments.split(" ")], programs)


def test_env_searches_in_the_path_that_it_sets(binaries: Path, programs: dict[str, str]) -> None:
    with pytest.raises(flockshim.FlockshimError, match="statically linked"):
        executable.protected(["env", f"PATH={binaries}", "bad"], {"PATH": os.environ["PATH"]})
    with pytest.raises(FileNotFoundError):
        executable.protected(["env", "PATH=/no/such", "bad"], programs)
    with pytest.raises(flockshim.FlockshimError, match="statically linked"):
        executable.protected(["env", "-C", str(binaries), "./bad"], programs)


@pytest.mark.parametrize("line", ["env bad", "env -S A=1 bad x", "env -S bad 'x y' $Z"])
def test_script_that_env_finds_the_interpreter_of(line: str, programs: dict[str, str], tmp_path: Path) -> None:
    path = script(tmp_path / "s", f"#!/usr/bin/{line}\n")
    with pytest.raises(flockshim.FlockshimError, match="bad' is statically linked"):
        executable.protected([path], programs)
    path = script(tmp_path / "s", f"#!/usr/bin/{line.replace('bad', 'good')}\n")
    assert executable.protected([path, "x"], programs) == (path, [path, "x"])


def test_scripts_that_start_each_other_without_end(tmp_path: Path) -> None:
    path = script(tmp_path / "s", f"#!/usr/bin/env {tmp_path}/s\n")
    command = [sys.executable, "-m", "flockshim", path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 126
    assert result.stderr.startswith("flockshim: ") and "env" in result.stderr
