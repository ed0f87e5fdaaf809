"""The environment that the launcher, ``--env`` and the Python API make."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flockshim
from flockshim import launch, preload_link

MODULE = [sys.executable, "-m", "flockshim"]
LIBRARY = str(Path(flockshim.__path__[0]) / "libflockshim.so")
FRESH = {
    name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and not name.startswith("FLOCKSHIM_")
}
# Inside a run, so that one environment is like the other.
BASE = {**FRESH, "FLOCKSHIM_RUN": "0123456789abcdef"}

# Every kind of byte that a shell gives a meaning to, and two that are no UTF-8.
ODD = "/a b'\"\\$(x)`y`\n*~#;&|é\udcff\udc81\t!"


def run(*arguments: str, env: dict[str, str] | None = None, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*MODULE, *arguments], env=BASE if env is None else env, capture_output=True, check=check)


def seen(done: subprocess.CompletedProcess[bytes]) -> dict[str, str]:
    """The variables that concern the shim in the output of ``env -0``."""
    pairs = [os.fsdecode(entry).partition("=") for entry in done.stdout.split(b"\0") if entry]
    return {name: value for name, _, value in pairs if name in launch.VARIABLES}


def launched(*options: str, env: dict[str, str] | None = None) -> dict[str, str]:
    return seen(run(*options, "env", "-0", env=env))


def test_defaults() -> None:
    assert launched() == {
        "LD_PRELOAD": LIBRARY,
        "FLOCKSHIM_MODE": "auto",
        "FLOCKSHIM_ERRNO": "38,95,37,524",
        "FLOCKSHIM_PYTHON": sys.executable,
        "FLOCKSHIM_HOME": flockshim.__path__[0],
        "FLOCKSHIM_RUN": BASE["FLOCKSHIM_RUN"],
    }


def test_each_run_has_a_name_of_its_own() -> None:
    runs = [launched(env=FRESH)["FLOCKSHIM_RUN"] for _ in range(2)]
    runs.append(evaluated("sh", [], FRESH)["FLOCKSHIM_RUN"])
    assert len(set(runs)) == 3
    assert all(re.fullmatch("[0-9a-f]{16}", run) for run in runs)
    for run in runs:
        assert launched(env={**FRESH, "FLOCKSHIM_RUN": run})["FLOCKSHIM_RUN"] == run


@pytest.mark.parametrize("wrong", ["", "../up", "0" * 33, "ABC"])
def test_a_name_that_the_shim_would_not_take_is_replaced(wrong: str) -> None:
    """It becomes part of a file's name."""
    run = launched(env={**FRESH, "FLOCKSHIM_RUN": wrong})["FLOCKSHIM_RUN"]
    assert run != wrong and re.fullmatch("[0-9a-f]{16}", run)


def test_options_and_variables_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    options = ["--mode", "success", "--errno", "EIO, 524,ENOTSUPP,5"]
    options += ["--simulate", f"EIO:{tmp_path}/link/../{tmp_path.name}", "--verbose"]
    variables = {
        "FLOCKSHIM_MODE": "success",
        "FLOCKSHIM_ERRNO": "EIO, 524,ENOTSUPP,5",
        "FLOCKSHIM_SIMULATE": f"EIO:{tmp_path}/link",
        "FLOCKSHIM_VERBOSE": "1",
    }
    given = launched(*options)
    assert given == launched(env={**BASE, **variables})
    assert given == launched(env={**BASE, **given})
    assert given["FLOCKSHIM_ERRNO"] == "5,524"
    assert given["FLOCKSHIM_SIMULATE"] == f"5:{tmp_path}"


def test_option_wins_over_its_variable() -> None:
    variables = {
        "FLOCKSHIM_MODE": "nonsense",
        "FLOCKSHIM_ERRNO": "ENONSENSE",
        "FLOCKSHIM_SIMULATE": "ENONSENSE",
        "FLOCKSHIM_QUIET": "1",
    }
    options = ["--mode", "fail", "--errno", "ENOSYS", "--simulate", "ENOLCK", "--verbose"]
    given = launched(*options, env={**BASE, **variables})
    assert given["FLOCKSHIM_MODE"] == "fail"
    assert given["FLOCKSHIM_ERRNO"] == "38"
    assert given["FLOCKSHIM_SIMULATE"] == "37"
    assert given["FLOCKSHIM_VERBOSE"] == "1" and "FLOCKSHIM_QUIET" not in given
    silent = launched("--quiet", env={**BASE, "FLOCKSHIM_VERBOSE": "1"})
    assert silent["FLOCKSHIM_QUIET"] == "1" and "FLOCKSHIM_VERBOSE" not in silent


def test_last_of_an_option_given_twice_counts() -> None:
    assert launched("--mode", "host", "--mode=success")["FLOCKSHIM_MODE"] == "success"


def test_variable_set_beforehand_counts_and_zero_is_off() -> None:
    assert launched(env={**BASE, "FLOCKSHIM_FORCE": "1"})["FLOCKSHIM_FORCE"] == "1"
    off = {"FLOCKSHIM_FORCE": "0", "FLOCKSHIM_QUIET": "", "FLOCKSHIM_MODE": ""}
    assert launched(env={**BASE, **off}) == launched()


def test_nested_runs_do_not_stack() -> None:
    outer = ["--errno", "EIO", "--quiet"]
    nested = seen(run(*outer, *MODULE, "--mode", "host", *MODULE, "env", "-0"))
    assert nested == launched(*outer, "--mode", "host")


def test_what_was_preloaded_stays_behind_ours() -> None:
    before = "/x/first.so:/elsewhere/libflockshim.so second.so  :/x/third.so"
    # ld.so(8) warns of each that is missing, on stderr, and goes on.
    given = launched(env={**BASE, "LD_PRELOAD": before})
    assert given["LD_PRELOAD"] == f"{LIBRARY}:/x/first.so:second.so:/x/third.so"


def evaluated(shell: str, options: list[str], env: dict[str, str]) -> dict[str, str]:
    """What a program sees that the shell starts after it has evaluated what --env prints."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} here: install the package {shell}")
    command = " ".join(shlex.quote(word) for word in [*MODULE, *options, "--env"])
    script = f'set -eu; eval "$({command})"; exec env -0'
    done = subprocess.run([program, "-c", script], env=env, capture_output=True, check=True)
    return seen(done)


@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
def test_evaluated_output_is_the_environment(shell: str, tmp_path: Path) -> None:
    directory = f"{tmp_path}{ODD}"
    os.makedirs(directory)
    env = {
        **BASE,
        "LD_PRELOAD": "/x/it's.so:/é\udcff.so",
        "FLOCKSHIM_DIR": directory,
        "FLOCKSHIM_QUIET": "1",
    }
    options = ["--simulate", f"ENOSYS:{directory}", "--verbose"]
    given = evaluated(shell, options, env)
    assert given == launched(*options, env=env)
    assert given["FLOCKSHIM_SIMULATE"] == f"38:{directory}"
    assert given["FLOCKSHIM_DIR"] == directory
    assert given["LD_PRELOAD"] == f"{LIBRARY}:/x/it's.so:/é\udcff.so"
    assert evaluated(shell, [], given | BASE) == given


def test_evaluated_output_unsets_what_does_not_apply() -> None:
    lines = run("--env").stdout.decode()
    stale = {name: "stale" for name in launch.VARIABLES if name != "LD_PRELOAD"}
    script = f"{lines}\nexec env -0"
    done = subprocess.run(["sh", "-c", script], env=BASE | stale, capture_output=True, check=True)
    assert seen(done) == launched()


def test_missing_library_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HOME", str(tmp_path))
    with pytest.raises(flockshim.FlockshimError, match=r"libflockshim.so. is missing"):
        launch.environment(BASE)


@pytest.mark.parametrize("name", ["a space", "a:colon", "a\ttab", "$LIB", "new\nline"])
def test_path_that_ld_preload_cannot_carry(name: str, tmp_path: Path) -> None:
    home = tmp_path / name / "flockshim"
    shutil.copytree(flockshim.__path__[0], home, ignore=shutil.ignore_patterns("__pycache__"))
    program = "import sys; sys.path.insert(0, sys.argv.pop(1));from flockshim.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, str(home.parent)]
    rendezvous = tmp_path / "rendezvous"
    env = {**BASE, "FLOCKSHIM_DIR": str(rendezvous)}
    for _ in range(2):  # the link is made, then found
        maps = subprocess.check_output([*command, "cat", "/proc/self/maps"], env=env, text=True)
        shown = str(home / "libflockshim.so").replace("\n", "\\012")  # as proc_pid_maps(5) does
        assert shown in maps
    (link,) = rendezvous.iterdir()
    assert os.readlink(link) == str(home)
    assert rendezvous.stat().st_mode & 0o777 == 0o700
    given = seen(subprocess.run([*command, "env", "-0"], env=env, capture_output=True, check=True))
    assert given["LD_PRELOAD"] == f"{link}/libflockshim.so"
    assert given["FLOCKSHIM_HOME"] == str(home)
    nested = [*command, *command, "env", "-0"]
    assert seen(subprocess.run(nested, env=env, capture_output=True, check=True)) == given


def test_many_at_once_agree_on_the_link(tmp_path: Path) -> None:
    program = "import sys; from flockshim import preload_link; print(preload_link.to(*sys.argv[1:]))"
    command = [sys.executable, "-c", program, "/some where", str(tmp_path / "rendezvous")]
    started = [subprocess.Popen(command, env=BASE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    assert len({process.communicate()[0] for process in started}) == 1
    assert [process.returncode for process in started] == [0] * 8
    assert len(list((tmp_path / "rendezvous").iterdir())) == 1


def test_link_is_made_only_in_a_private_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last resort, /tmp, is somebody else's here, so that only the directory asked for is left.
    monkeypatch.setattr(preload_link, "LAST_RESORT", str(tmp_path / "no" / "such"))
    good = tmp_path / "good"
    good.mkdir(mode=0o700)
    assert preload_link.to("/some where", str(good)).startswith(f"{good}/home-")
    open_to_others = tmp_path / "open"
    open_to_others.mkdir()
    open_to_others.chmod(0o750)
    symlink = tmp_path / "symlink"
    symlink.symlink_to(good)
    file = tmp_path / "file"
    file.touch()
    refused = [open_to_others, symlink, file]
    if os.geteuid() == 0:
        refused.append(tmp_path / "somebody's")
        refused[-1].mkdir(mode=0o700)
        os.chown(refused[-1], 65534, 65534)
    for place in refused:
        with pytest.raises(flockshim.FlockshimError, match="FLOCKSHIM_DIR"):
            preload_link.to("/some where", str(place))
    assert not list(open_to_others.iterdir())


def test_link_of_that_name_that_leads_elsewhere_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload_link, "LAST_RESORT", str(tmp_path / "no" / "such"))
    place = tmp_path / "rendezvous"
    link = Path(preload_link.to("/some where", str(place)))
    link.unlink()
    link.symlink_to("/somewhere/else")
    with pytest.raises(flockshim.FlockshimError, match="leads elsewhere"):
        preload_link.to("/some where", str(place))


def test_rendezvous_that_ld_preload_cannot_carry_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "last").mkdir()
    monkeypatch.setattr(preload_link, "LAST_RESORT", str(tmp_path / "last"))
    assert preload_link.to("/some where", f"{tmp_path}/a b").startswith(
        f"{tmp_path}/last/flockshim-{os.geteuid()}/home-"
    )
    assert not (tmp_path / "a b").exists()
