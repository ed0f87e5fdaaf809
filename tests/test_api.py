"""``flockshim.run`` and ``flockshim.environ``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flockshim

BASE = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and not name.startswith("FLOCKSHIM_")}


def exports(*options: str, env: dict[str, str]) -> dict[str, str]:
    command = [sys.executable, "-m", "flockshim", *options, "env", "-0"]
    output = subprocess.run(command, env=env, capture_output=True, check=True).stdout
    pairs = [os.fsdecode(entry).partition("=") for entry in output.split(b"\0") if entry]
    return {name: value for name, _, value in pairs}


def test_environ_is_what_the_command_sets(tmp_path: Path) -> None:
    base = {**BASE, "FLOCKSHIM_RUN": "0123456789abcdef"}
    assert flockshim.environ(base=base) == exports(env=base)
    options = ["--mode", "fail", "--errno", "EIO,37", "--simulate", f"ENOSYS:{tmp_path}"]
    made = flockshim.environ(mode="fail", errno=["EIO", 37], simulate=f"ENOSYS:{tmp_path}", quiet=True, base=base)
    assert made == exports(*options, "--quiet", env=base)
    assert made == flockshim.environ(base=made)


def test_environ_builds_on_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VARIABLE", "value")
    before = dict(os.environ)
    assert flockshim.environ()["SOME_VARIABLE"] == "value"
    assert dict(os.environ) == before


def test_settings_given_win_over_variables() -> None:
    base = {**BASE, "FLOCKSHIM_MODE": "success", "FLOCKSHIM_FORCE": "1", "FLOCKSHIM_QUIET": "1"}
    kept = flockshim.environ(base=base)
    assert kept["FLOCKSHIM_MODE"] == "success"
    assert kept["FLOCKSHIM_FORCE"] == "1"
    changed = flockshim.environ(mode="auto", force=False, quiet=False, base=base)
    assert changed["FLOCKSHIM_MODE"] == "auto"
    assert not {"FLOCKSHIM_FORCE", "FLOCKSHIM_QUIET"} & set(changed)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"errno": "ENOSUCH"}, "'ENOSUCH'"),
        ({"errno": []}, "--errno"),
        ({"simulate": "ENOSYS:/no/such"}, "'/no/such'"),
        ({"quiet": True, "verbose": True}, "exclude each other"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(flockshim.FlockshimError, match=words):
        flockshim.environ(base=BASE, **settings)
    with pytest.raises(flockshim.FlockshimError, match=words):
        flockshim.run(["true"], env=BASE, **settings)


def test_run_is_subprocess_run_under_the_shim() -> None:
    done = flockshim.run(
        ["sh", "-c", "cat /proc/self/maps; echo $FLOCKSHIM_MODE; exit 3"],
        mode="host",
        capture_output=True,
        text=True,
    )
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 3
    assert "libflockshim.so" in done.stdout and done.stdout.endswith("\nhost\n")
    with pytest.raises(subprocess.CalledProcessError):
        flockshim.run(["false"], check=True)
    with pytest.raises(subprocess.TimeoutExpired):
        flockshim.run(["sleep", "60"], timeout=0.01)


def test_run_takes_every_kind_of_argument(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexit 5\n")
    program.chmod(0o755)
    assert flockshim.run(program).returncode == 5
    assert flockshim.run(str(program)).returncode == 5
    assert flockshim.run([os.fsencode(program), "x"]).returncode == 5
    assert flockshim.run(["./program"], cwd=tmp_path).returncode == 5
    assert flockshim.run(["any name"], executable=program).returncode == 5
    assert flockshim.run("exit 6", shell=True).returncode == 6
    assert flockshim.run(["program"], env={"PATH": str(tmp_path)}).returncode == 5


def test_run_refuses_what_the_command_refuses() -> None:
    script = ["env", "-i", "true"]
    command = [sys.executable, "-m", "flockshim", "--via", "preload", *script]
    shown = subprocess.run(command, env=BASE, capture_output=True, text=True, check=False).stderr
    with pytest.raises(flockshim.FlockshimError) as caught:
        flockshim.run(script, via="preload", env=BASE)
    assert f"flockshim: {caught.value}\n" == shown
    assert flockshim.run(script, via="preload", mode="fail", env=BASE).returncode == 0


@pytest.fixture
def static(tmp_path: Path) -> Path:
    source = tmp_path / "static.c"
    source.write_text("int main(int argc, char **argv) { return argv[0][0] == '.' ? 8 : 5 + argc; }\n")
    program = tmp_path / "static"
    subprocess.run(["gcc", "-static", "-o", program, source], check=True)
    return program


def test_run_starts_what_needs_a_supervisor_by_the_launcher(static: Path) -> None:
    directory = static.parent
    assert flockshim.run(static).returncode == 6
    assert flockshim.run(os.fsencode(static)).returncode == 6
    assert flockshim.run([static, "--mode", "--"], via="auto").returncode == 8
    assert flockshim.run(["./static"], cwd=directory).returncode == 8
    assert flockshim.run(["static"], env={"PATH": str(directory)}).returncode == 6
    with pytest.raises(subprocess.CalledProcessError):
        flockshim.run([static], check=True)
    with pytest.raises(flockshim.FlockshimError, match="statically linked, so the lock shim cannot work in it"):
        flockshim.run([static], via="preload")
    with pytest.raises(flockshim.FlockshimError, match="executable="):
        flockshim.run(["any name"], executable=static)
    assert flockshim.run([static], mode="fail").returncode == 6


def test_run_under_a_supervisor() -> None:
    grep = ["grep", "^Seccomp:", "/proc/self/status"]
    for way, found in ("seccomp", "2"), ("preload", "0"), (None, "0"):
        done = flockshim.run(grep, via=way, env=BASE, capture_output=True, text=True)
        assert done.stdout.split() == ["Seccomp:", found]
        done = flockshim.run(" ".join(grep), shell=True, via=way, env=BASE, capture_output=True, text=True)
        assert done.stdout.split() == ["Seccomp:", found]
    assert flockshim.run(["env", "-i", *grep], env=BASE, capture_output=True, text=True).stdout.split()[1] == "2"
    done = flockshim.run("exit 6", shell=True, executable="/bin/bash", via="seccomp", env=BASE)
    assert done.returncode == 6
    done = flockshim.run(grep, env={**BASE, "FLOCKSHIM_VIA": "seccomp"}, capture_output=True, text=True)
    assert done.stdout.split()[1] == "2"


def test_run_of_what_cannot_be_executed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        flockshim.run(["no-such-command"])
    with pytest.raises(PermissionError):
        flockshim.run([tmp_path])
    with pytest.raises(IndexError):
        flockshim.run([])


def test_module_has_only_its_names() -> None:
    for name in flockshim.__all__:
        assert getattr(flockshim, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        flockshim.no_such_name  # noqa: B018
