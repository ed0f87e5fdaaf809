"""Signals all the time, at every moment of a call, in processes that share descriptions: tests/programs/storm.c."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from support.proc import await_true, children
from support.programs import static_program
from support.supervision import LAUNCHER
from support.worlds import ON_FUSE, ON_KERNEL, World

WORLDS = ["supervised", ON_KERNEL, ON_FUSE]
SA_RESTART = 0x10000000
GROUPS, MEMBERS = 3, 3
DEADLINE = 60.0


@contextmanager
def _storm(world: World, rounds: int, microseconds: int, flags: int) -> Iterator[subprocess.Popen[str]]:
    """A storm that has had ROUNDS rounds when the block is left, or is ended."""
    numbers = [GROUPS, MEMBERS, rounds, microseconds, flags, 3]
    command = [*world.command("storm"), str(world.file()), *(str(number) for number in numbers)]
    process = subprocess.Popen(
        command, env=world.environment, stdout=subprocess.PIPE, stderr=world.fleet.stderr, text=True
    )
    try:
        yield process
        output = process.communicate(timeout=DEADLINE)[0]
    finally:
        for pid in [*_descendants(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    assert (process.returncode, world.fleet.errors()) == (0, "")
    words = output.split()
    assert int(words[5]) == GROUPS * rounds
    assert not flags or words[:4] == ["locks", str(GROUPS * MEMBERS * rounds), "interruptions", "0"]
    assert world.free(world.file())


def _descendants(pid: int) -> list[int]:
    return [each for child in children(pid) for each in (child, *_descendants(child))]


@pytest.mark.parametrize(
    ("flags", "microseconds"), [(0, 500), (0, 3000), (SA_RESTART, 1000)], ids=["EINTR quickly", "EINTR", "SA_RESTART"]
)
def test_nothing_is_lost_and_nothing_left_over(world: World, flags: int, microseconds: int) -> None:
    with _storm(world, 150, microseconds, flags):
        pass


@pytest.mark.parametrize("flags", [0, SA_RESTART], ids=["EINTR", "SA_RESTART"])
def test_a_supervisor_that_is_stopped_time_and_again(world: World, flags: int) -> None:
    """So that signals find calls in states that else last but some microseconds."""
    with _storm(world, 40 if world.emulated else 200, 3000, flags) as process:
        await_true(lambda: bool(children(process.pid)), "the supervisor")
        supervisor = children(process.pid)[0]
        stops = 0
        while process.poll() is None:
            for number in signal.SIGSTOP, signal.SIGCONT:
                with suppress(ProcessLookupError):
                    os.kill(supervisor, number)
                children(supervisor)  # takes some milliseconds
            stops += 1
        assert stops > 1


@pytest.mark.parametrize("world", [ON_KERNEL], indirect=True)
def test_the_check_sees_what_happens_without_a_lock(world: World) -> None:
    command = [*LAUNCHER[:-1], "--mode", "success", "--quiet", "--", str(static_program("storm")), str(world.file())]
    done = subprocess.run(
        [*command, "3", "3", "100000", "3000", "0", "0"],
        env=world.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )
    assert "another group is inside" in done.stderr
