"""util-linux flock(1), every form of its manual page: the same exit status in both worlds."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Union

import pytest
from support.driver import BUSY, EX, OK, SH, UN, Driver, Fleet
from support.proc import await_true, children
from support.worlds import World

from flockshim.pytest_plugin import require

Word = Union[str, "os.PathLike[str]"]

EX_USAGE, EX_DATAERR, EX_NOINPUT, EX_UNAVAILABLE = 64, 65, 66, 69  # sysexits.h


@pytest.fixture(autouse=True)
def _there_is_flock() -> None:
    require(shutil.which("flock"), "no flock(1)", "apt install util-linux")


@pytest.fixture
def holder(world: World) -> Iterator[tuple[Driver, int]]:
    """A process with the file open, which holds nothing yet."""
    yield world.opened()


def _run(world: World, *words: Word) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=world.environment, cwd=world.directory, capture_output=True, text=True, check=False
    )


def _status(world: World, *words: Word) -> int:
    done = _run(world, "flock", *words)
    assert "flockshim" not in done.stderr
    return done.returncode


def test_the_command_s_own_status(world: World) -> None:
    path = world.file()
    assert _status(world, path, "true") == 0
    assert _status(world, path, "false") == 1
    assert _status(world, path, "sh", "-c", "exit 7") == 7
    assert world.free(path)


def test_the_file_is_made(world: World) -> None:
    assert _status(world, "new", "true") == 0
    assert (world.directory / "new").exists()


def test_a_directory(world: World) -> None:
    assert _status(world, world.directory, "true") == 0
    assert _status(world, world.directory, "flock", "-n", world.directory, "true") == 1


@pytest.mark.parametrize("option", ["-c", "--command"])
def test_a_command_string(world: World, option: str) -> None:
    assert _status(world, world.file(), option, "exit 3") == 3
    assert _status(world, world.file(), option, "exit 3", "surplus") == EX_USAGE


@pytest.mark.parametrize("option", ["-x", "-e", "--exclusive", None])
def test_exclusive(world: World, holder: tuple[Driver, int], option: str | None) -> None:
    words = [option] if option else []
    driver, fd = holder
    assert driver.flock(fd, SH) == OK
    assert _status(world, *words, "-n", world.file(), "true") == 1
    assert driver.flock(fd, UN) == OK
    assert _status(world, *words, "-n", world.file(), "true") == 0


@pytest.mark.parametrize("option", ["-s", "--shared"])
def test_shared(world: World, holder: tuple[Driver, int], option: str) -> None:
    driver, fd = holder
    assert driver.flock(fd, SH) == OK
    assert _status(world, option, "-n", world.file(), "true") == 0
    assert driver.flock(fd, EX) == OK
    assert _status(world, option, "-n", world.file(), "true") == 1


@pytest.mark.parametrize("option", ["-n", "--nb", "--nonblock"])
@pytest.mark.parametrize("code", [None, 0, 17, 255])
def test_conflict_exit_code(world: World, holder: tuple[Driver, int], option: str, code: int | None) -> None:
    driver, fd = holder
    words = [] if code is None else ["-E", str(code)]
    assert driver.flock(fd, EX) == OK
    assert _status(world, option, *words, world.file(), "true") == (1 if code is None else code)


@pytest.mark.parametrize("option", ["-w", "--wait", "--timeout"])
@pytest.mark.parametrize("seconds", ["0", "0.05"])
def test_timeout(world: World, holder: tuple[Driver, int], option: str, seconds: str) -> None:
    """The alarm's handler is installed without SA_RESTART, so flock(2) says EINTR."""
    driver, fd = holder
    assert _status(world, option, seconds, world.file(), "true") == 0
    assert driver.flock(fd, EX) == OK
    assert _status(world, option, seconds, world.file(), "true") == 1
    assert _status(world, option, seconds, "-E", "9", world.file(), "true") == 9
    assert driver.flock(fd, UN) == OK
    assert world.free(world.file())


def test_a_timeout_that_is_not_reached(world: World, holder: tuple[Driver, int]) -> None:
    driver, fd = holder
    assert driver.flock(fd, EX) == OK
    waiting = _waiting(world, "-w", "600", world.file(), "sh", "-c", "exit 5")
    assert driver.flock(fd, UN) == OK
    assert waiting.wait() == 5


def test_waiting(world: World, holder: tuple[Driver, int]) -> None:
    driver, fd = holder
    assert driver.flock(fd, EX) == OK
    waiting = _waiting(world, world.file(), "sh", "-c", "exit 5")
    driver.close(fd)
    assert waiting.wait() == 5


def _waiting(world: World, *words: Word) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(["flock", *words], env=world.environment)
    world.await_process_blocked(process.pid)
    return process


def test_by_descriptor(world: World) -> None:
    """The form for shell scripts: the lock is the shell's, whatever becomes of flock(1)."""
    script = """
    exec 9>"$0" 8>"$0"
    flock -n 9; echo $?; flock -n 8; echo $?; flock -n -E 4 8; echo $?
    flock -s 9; echo $?; flock -n -s 8; echo $?; flock -n -x 8; echo $?
    flock -u 9; echo $?; flock -n -x 8; echo $?; flock -n 9; echo $?
    exec 8>&-
    flock -n 9; echo $?; flock --unlock 9; flock -n 7 2>/dev/null; echo $?
    """
    done = _run(world, "bash", "-c", script, world.file())
    expected = [0, 1, 4, 0, 0, 1, 0, 0, 1, 0, EX_DATAERR]
    assert ([int(word) for word in done.stdout.split()], done.stderr) == (expected, "")
    assert world.free(world.file())


def test_unlock_within_the_command(world: World) -> None:
    path = world.file()
    script = 'flock -u 9; flock -n "$0" true'
    done = _run(world, "bash", "-c", f'exec 9>"$0"; flock 9; bash -c \'{script}\' "$0"', path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("option", ["-o", "--close"])
def test_close_before_the_command(world: World, option: str) -> None:
    """The command has no descriptor of the file, and yet the lock is held while it runs."""
    path = world.file()
    script = 'ls -l /proc/self/fd | grep -c -- "-> $0\\$"; flock -n "$0" true; echo $?'
    done = _run(world, "flock", option, path, "sh", "-c", script, path)
    assert done.stdout.split() == ["0", "1"]
    done = _run(world, "flock", path, "sh", "-c", script, path)
    assert done.stdout.split() == ["1", "1"]


def test_a_background_child_keeps_the_lock_without_close(world: World) -> None:
    """What -o is for: a daemon started by the command would keep the lock."""
    for option, free in (["-o"], True), ([], False):
        fleet = Fleet(world.environment)
        try:
            driver = fleet.start(None, "flock", *option, str(world.file()))
            child = driver.spawn()
            driver.kill()
            (flock,) = fleet.processes
            flock.wait()
            assert world.free(world.file()) is free
            child.kill()
            assert world.free(world.file())
        finally:
            fleet.end()


@pytest.mark.parametrize("option", ["-F", "--no-fork"])
def test_no_fork(world: World, option: str) -> None:
    path = world.file()
    words: list[Word] = ["flock", option, path, "sh", "-c", "echo $$; read line"]
    with subprocess.Popen(words, env=world.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert int(process.stdout.readline()) == process.pid
        assert children(process.pid) == []
        assert world.probe(path, SH) == BUSY
        process.stdin.close()
    assert world.free(path)
    assert _status(world, option, "-o", path, "true") == EX_USAGE


def test_verbose(world: World) -> None:
    done = _run(world, "flock", "--verbose", world.file(), "true")
    assert done.returncode == 0
    assert "flock: getting lock took" in done.stdout
    assert "flock: executing true" in done.stdout
    done = _run(world, "flock", world.file(), "flock", "--verbose", "-n", world.file(), "true")
    assert (done.returncode, done.stderr.strip()) == (1, "flock: failed to get lock")


def test_killed_flock_leaves_the_lock_to_its_command(world: World) -> None:
    path = world.file()
    process = subprocess.Popen(
        ["flock", path, "sh", "-c", "echo; read line; :"],
        env=world.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        (command,) = children(process.pid)
        process.kill()
        process.wait()
        assert world.probe(path, SH) == BUSY
        process.stdin.close()
        await_true(lambda: world.free(path), f"{command} to end")


def test_a_script_that_locks_itself(world: World) -> None:
    """The boilerplate of flock(1)'s examples: a second copy ends at once."""
    script = world.directory / "script"
    script.write_text(
        '#!/bin/sh\n[ "$LOCKED" != "$0" ] && exec env LOCKED="$0" flock -en "$0" "$0" "$@" || :\n'
        'if [ $# = 0 ]; then exit 0; fi\nLOCKED= "$0" && echo twice || echo once\n'
    )
    script.chmod(0o755)
    done = _run(world, script, "first")
    assert (done.returncode, done.stdout) == (0, "once\n")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["no/such/file", "true"], EX_NOINPUT),
        (["file", "no-such-command"], EX_UNAVAILABLE),
        (["-w", "soon", "file", "true"], EX_USAGE),
        (["-E", "many", "file", "true"], EX_USAGE),
        (["--no-such-option"], EX_USAGE),
        ([], EX_USAGE),
        (["77"], EX_DATAERR),
        (["--help"], 0),
        (["--version"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(world: World, words: list[str], status: int) -> None:
    world.file()
    assert _status(world, *words) == status
