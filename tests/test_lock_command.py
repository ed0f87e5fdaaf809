"""``flockshim --lock PATH COMMAND``: whom it excludes, for how long, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.driver import BUSY, EX, OK, SH, UN, Driver
from support.lockcommand import FLOCKSHIM, HOLD, Job, await_waiting, job, one_line, run, settings, status
from support.proc import await_end, await_true, children
from support.worlds import World

BUSY_STATUS = 75  # EX_TEMPFAIL of sysexits.h
OUTLIVES = ["sh", "-c", "exec 3<&0; cat <&3 >/dev/null 2>&1 & echo $!"]
"""A COMMAND that leaves a process running, until the job's standard input is closed, and says which."""


file_only = pytest.mark.parametrize("path", ["file"], indirect=True)


@pytest.fixture(params=["file", "directory"])
def path(request: pytest.FixtureRequest, world: World) -> Path:
    """What is locked: of these four only the file in the emulated world is not locked by the kernel."""
    if request.param == "file":
        return world.file()
    (world.directory / "directory").mkdir()
    return world.directory / "directory"


@pytest.fixture
def holder(world: World, path: Path) -> Iterator[tuple[Driver, int]]:
    """A process that has an exclusive lock on PATH."""
    driver = world.start()
    fd = driver.open(path, os.O_RDONLY)
    assert driver.flock(fd, EX) == OK
    yield driver, fd


def test_the_lock_is_held_while_command_runs(world: World, path: Path) -> None:
    with job(world, "--lock", path) as running:
        running.began()
        assert world.probe(path, SH) == BUSY
        assert status(world, "--lock", path, "--no-wait", "true") == BUSY_STATUS
        assert status(world, "--lock", path, "--no-wait", "--shared", "true") == BUSY_STATUS
        assert running.finish(5) == (5, "")
    assert world.free(path)


def test_it_waits_for_the_lock(world: World, path: Path, holder: tuple[Driver, int]) -> None:
    with job(world, "--lock", path) as running:
        await_waiting(world, path, running.pid)
        assert children(running.pid) == []
        assert holder[0].flock(holder[1], UN) == OK
        running.began()
        assert world.probe(path, SH) == BUSY
        assert running.finish() == (0, "")


def test_shared(world: World, path: Path, holder: tuple[Driver, int]) -> None:
    driver, fd = holder
    assert status(world, "--lock", path, "--shared", "--no-wait", "true") == BUSY_STATUS
    assert driver.flock(fd, SH) == OK
    assert status(world, "--lock", path, "--no-wait", "true") == BUSY_STATUS
    with job(world, "--lock", path, "--shared") as running:
        running.began()
        assert driver.flock(fd, UN) == OK
        assert world.probe(path, SH) == OK
        assert world.probe(path, EX) == BUSY
        assert running.finish() == (0, "")
    assert world.free(path)


def test_flock1_and_python_exclude_it_and_are_excluded(world: World, path: Path) -> None:
    in_python = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def others() -> list[int]:
        commands = [["flock", "-n", str(path), "true"], [sys.executable, "-c", in_python, str(path)]]
        done = [subprocess.run(words, env=world.environment, capture_output=True, check=False) for words in commands]
        return [each.returncode for each in done]

    with job(world, "--lock", path) as running:
        running.began()
        assert others() == [1, 1]
        assert running.finish() == (0, "")
    assert others() == [0, 0]
    within = ["flock", str(path), *FLOCKSHIM, "--lock", str(path), "--no-wait", "true"]
    assert subprocess.run(within, env=world.environment, capture_output=True, check=False).returncode == BUSY_STATUS


def test_no_wait_says_who_holds(world: World, path: Path, holder: tuple[Driver, int]) -> None:
    done = run(world, "--lock", path, "--no-wait", "touch", "ran")
    assert (done.returncode, done.stdout) == (BUSY_STATUS, "")
    assert one_line(done.stderr).startswith(f"cannot lock '{path}': held by pid {holder[0].pid} (lockdriver-cc ")
    assert not (world.directory / "ran").exists()


@file_only
def test_timeout(world: World, path: Path, holder: tuple[Driver, int]) -> None:
    begin = time.monotonic()
    done = run(world, "--lock", path, "--timeout", "0.3", "touch", "ran")
    assert time.monotonic() - begin >= 0.3
    assert (done.returncode, done.stdout) == (BUSY_STATUS, "")
    assert one_line(done.stderr).startswith(
        f"cannot lock '{path}': timed out (--timeout), held by pid {holder[0].pid} (lockdriver-cc "
    )
    assert not (world.directory / "ran").exists()
    # It has left the queue.
    assert holder[0].flock(holder[1], UN) == OK
    assert world.free(path)


@file_only
def test_a_timeout_of_nothing(world: World, path: Path, holder: tuple[Driver, int]) -> None:
    for words, environment in (["--timeout", "0"], {}), ([], {"FLOCKSHIM_TIMEOUT": "0"}):
        done = run(world, "--lock", path, *words, "true", env=settings(world, **environment))
        assert done.returncode == BUSY_STATUS
        assert f"held by pid {holder[0].pid} " in one_line(done.stderr)
    assert holder[0].flock(holder[1], UN) == OK
    assert status(world, "--lock", path, "--timeout", "0", "true") == 0


@file_only
def test_a_timeout_that_is_not_reached(world: World, path: Path, holder: tuple[Driver, int]) -> None:
    with job(world, "--lock", path, "--timeout", "600") as running:
        await_waiting(world, path, running.pid)
        assert holder[0].flock(holder[1], UN) == OK
        running.began()
        assert running.finish(3) == (3, "")


@file_only
def test_quiet(world: World, path: Path, holder: tuple[Driver, int]) -> None:
    for words in (["--no-wait"], ["--timeout", "0"]):
        done = run(world, "--quiet", "--lock", path, *words, "true")
        assert (done.returncode, done.stdout, done.stderr) == (BUSY_STATUS, "", "")


def test_what_command_leaves_running_does_not_keep_the_lock(world: World, path: Path) -> None:
    with job(world, "--lock", path, command=OUTLIVES) as running:
        left = running.began()
        assert running.ended() == (0, "")
        os.kill(left, 0)
        assert status(world, "--lock", path, "--no-wait", "true") == 0
        assert world.free(path)


def await_free(world: World, path: Path) -> None:
    """For a lock whose last holder has ended. That of a directory is the kernel's too, and the keeper's to close."""
    await_true(lambda: world.free(path), "the lock to be given back")


def test_inherit_keeps_it(world: World, path: Path) -> None:
    with job(world, "--lock", path, "--inherit", command=OUTLIVES) as running:
        left = running.began()
        assert running.ended() == (0, "")
        assert status(world, "--lock", path, "--no-wait", "true") == BUSY_STATUS
        os.kill(left, 0)
        running.process.communicate()
        await_end(left)
        await_free(world, path)


@file_only
def test_inherit_becomes_command(world: World, path: Path) -> None:
    with job(world, "--lock", path, "--inherit") as running:
        assert running.began() == running.pid
        assert world.probe(path, SH) == BUSY
        assert running.finish(7) == (7, "")
    assert world.free(path)


def test_the_lock_survives_its_launcher(world: World, path: Path) -> None:
    with job(world, "--lock", path) as running:
        command = running.began()
        running.process.kill()
        await_end(running.pid)
        assert world.probe(path, SH) == BUSY
        running.tell("0")
        await_end(command)
        await_free(world, path)


@file_only
def test_killed_while_waiting(world: World, path: Path, holder: tuple[Driver, int]) -> None:
    with job(world, "--lock", path) as killed, job(world, "--lock", path) as behind:
        await_waiting(world, path, killed.pid, behind.pid)
        killed.process.kill()
        await_end(killed.pid)
        assert holder[0].flock(holder[1], UN) == OK
        behind.began()
        assert behind.finish() == (0, "")
    assert world.free(path)


@file_only
def test_a_command_that_cannot_be_run_is_told_before_waiting(
    world: World, path: Path, holder: tuple[Driver, int]
) -> None:
    plain = world.file("plain")
    for command, expected in ("no-such-command", 127), (plain, 126):
        done = run(world, "--lock", path, command)
        assert done.returncode == expected
        assert str(command) in one_line(done.stderr)


@file_only
def test_nested(world: World, path: Path) -> None:
    inner = world.file("inner")
    with job(world, "--lock", path, command=[*FLOCKSHIM, "--lock", str(inner), *HOLD]) as running:
        running.began()
        assert world.probe(path, SH) == world.probe(inner, SH) == BUSY
        assert running.finish(9) == (9, "")
    assert world.free(path) and world.free(inner)


@file_only
def test_nested_on_the_same_path(world: World, path: Path) -> None:
    """Two opens are two descriptions, as in flock(2): the inner one would wait for itself."""
    again = [*FLOCKSHIM, "--lock", str(path), "--no-wait", "--shared", "true"]
    done = run(world, "--lock", path, *again)
    assert done.returncode == BUSY_STATUS
    assert "held by pid" in one_line(done.stderr)
    assert status(world, "--lock", path, "--shared", *again) == 0


@file_only
def test_the_descriptors_of_command(world: World, path: Path) -> None:
    shell = ["sh", "-c", 'exec 7</dev/null; exec "$@"', "sh"]
    shown = ["sh", "-c", 'cd /proc/$$/fd; for n in *; do echo "$n $(readlink /proc/$$/fd/$n)"; done']

    def seen(*words: str) -> dict[int, str]:
        command = [*shell, *FLOCKSHIM, *words, *shown]
        done = subprocess.run(command, env=settings(world), stdout=subprocess.PIPE, text=True, check=True)
        return {int(line.split()[0]): line.split()[1] for line in done.stdout.splitlines() if "/dev/" in line} | {
            int(line.split()[0]): line.split()[1] for line in done.stdout.splitlines() if str(path) in line
        }

    plain = seen()
    for words in ["--lock", str(path)], ["--lock", str(path), "--inherit"]:
        more = {number: name for number, name in seen(*words).items() if number not in plain}
        assert list(more.values()) == [str(path)]
        assert min(more) >= 99


@file_only
def test_standard_streams_are_commands_own(world: World, path: Path) -> None:
    data = "one\ntwo\n" * 1000
    done = subprocess.run(
        [*FLOCKSHIM, "--lock", path, "sh", "-c", "cat; echo error >&2"],
        input=data,
        env=settings(world),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, data, "error\n")


@file_only
def test_no_standard_streams(world: World, path: Path) -> None:
    """The lock's descriptor must not become COMMAND's standard input or output."""
    script = 'exec 0<&- 1<&- 2<&-; exec "$@"'
    inner = "for n in 0 1 2; do [ -e /proc/$$/fd/$n ] && exit 1; done; exit 5"
    command = ["sh", "-c", script, "sh", *FLOCKSHIM, "--lock", str(path), "sh", "-c", inner]
    done = subprocess.run(command, env=settings(world), check=False)
    assert done.returncode == 5


def test_one_child_and_nothing_else(fresh_world: World) -> None:
    """The keeper that the launcher has started is nobody's child, and no zombie is left."""
    path = fresh_world.file()
    with job(fresh_world, "--lock", path) as running:
        command = running.began()
        assert children(running.pid) == [command]
        assert children(command) == []
        assert running.finish() == (0, "")
    with job(fresh_world, "--lock", path, "--inherit") as running:
        assert children(running.began()) == []
        assert running.finish() == (0, "")


def test_the_environment_of_command_is_that_without_lock(world: World) -> None:
    path = world.file()
    inside = settings(world, FLOCKSHIM_RUN="0123456789abcdef")
    assert run(world, "--lock", path, "env", env=inside).stdout == run(world, "env", env=inside).stdout
    assert "FLOCKSHIM_TIMEOUT=2.5\n" in run(world, "--lock", path, "--timeout", "2.50", "env").stdout


def test_modes(emulated: World) -> None:
    """What the kernel refuses and no mode gives, is not pretended; and mode success says that it pretends."""
    path = emulated.file()
    done = run(emulated, "--mode", "fail", "--lock", path, "touch", "ran")
    assert done.returncode == 125
    assert "Function not implemented" in one_line(done.stderr)
    assert not (emulated.directory / "ran").exists()
    done = run(emulated, "--mode", "success", "--lock", path, "sh", "-c", "exit 3")
    assert done.returncode == 3
    assert "nothing is safe" in one_line(done.stderr)


def test_simulated_and_forced(world: World, path: Path) -> None:
    """Both of them emulated, and so they exclude each other whatever the kernel can do."""
    words = ["--simulate", "ENOLCK"] if path.is_file() else ["--force"]
    with job(world, *words, "--lock", path) as running:
        running.began()
        assert status(world, "--force", "--lock", path, "--no-wait", "true") == BUSY_STATUS
        assert running.finish() == (0, "")
    assert status(world, "--force", "--lock", path, "--no-wait", "true") == 0


@file_only
def test_few_descriptors_are_enough(world: World, path: Path) -> None:
    inner = ["flock", "-n", str(path), "true"]
    command = ["sh", "-c", 'ulimit -n 50; exec "$@"', "sh", *FLOCKSHIM, "--lock", str(path), *inner]
    done = subprocess.run(command, env=settings(world), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


@file_only
def test_many_at_once_run_one_after_another(world: World, path: Path) -> None:
    """COMMAND is no atomic operation: it reads, and writes one more."""
    counter = world.directory / "counter"
    counter.write_text("0\n")
    script = "read n <counter; : >counter; echo $((n + 1)) >counter"
    jobs = [Job(world, "--lock", path, command=["sh", "-c", script]) for _ in range(10)]
    try:
        assert [each.ended() for each in jobs] == [(0, "")] * len(jobs)
    finally:
        for each in jobs:
            each.end()
    assert counter.read_text() == f"{len(jobs)}\n"
