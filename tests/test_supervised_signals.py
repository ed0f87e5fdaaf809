"""A supervised lock call is interrupted, stopped or killed in each of its states.

The states: before the supervisor has read of the call; while it waits at the keeper, or in the kernel. (At the grant:
test_supervised_storm.py, and what all worlds have in common: test_signals.py.)
"""

from __future__ import annotations

import errno
import os
import signal

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN, Call
from support.proc import await_true, thread_state
from support.states import await_in_flock, held, stop
from support.supervision import Supervision
from support.worlds import ON_FUSE, ON_KERNEL, World

SA_RESTART = 0x10000000
WORLDS = ["supervised", ON_KERNEL, ON_FUSE]


# Before the supervisor has read of the call: it is stopped.


@pytest.mark.parametrize("taken", [False, True], ids=["free", "held"])
def test_interrupted_before_it_was_read(world: World, supervision: Supervision, taken: bool) -> None:
    """A call that need not wait can be interrupted too: a documented difference."""
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, 0)
    other, other_fd = world.opened()
    if taken:
        assert other.flock(other_fd, EX) == OK
    stop(supervision.pid)
    call = driver.start("flock", fd, EX)
    await_in_flock(call)
    driver.signal(signal.SIGUSR1)
    assert call.result() == errno.EINTR
    os.kill(supervision.pid, signal.SIGCONT)
    assert other.flock(other_fd, EX | NB) == OK
    assert driver.flock(fd, EX | NB) == BUSY


def test_restarted_before_it_was_read(world: World, supervision: Supervision) -> None:
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, SA_RESTART)
    stop(supervision.pid)
    call = driver.start("flock", fd, EX)
    for _ in range(3):
        await_in_flock(call)
        state = thread_state(driver.pid, call.tid)
        assert state is not None
        driver.signal(signal.SIGUSR1)
        await_true(lambda: _switches(call) > state.switches, "the handler to run")  # noqa: B023
    await_in_flock(call)
    os.kill(supervision.pid, signal.SIGCONT)
    assert call.result() == OK
    assert driver.ask("sigcount", signal.SIGUSR1) == 3
    assert not world.free(world.file())
    assert driver.flock(fd, UN) == OK
    assert world.free(world.file())


def _switches(call: Call) -> int:
    state = thread_state(call.driver.pid, call.tid)
    assert state is not None
    return state.switches


def test_killed_before_it_was_read(world: World, supervision: Supervision) -> None:
    driver, fd = world.opened()
    stop(supervision.pid)
    call = driver.start("flock", fd, EX)
    await_in_flock(call)
    driver.kill()
    os.kill(supervision.pid, signal.SIGCONT)
    assert world.free(world.file())


def test_stopped_before_it_was_read(world: World, supervision: Supervision) -> None:
    driver, fd = world.opened()
    stop(supervision.pid)
    call = driver.start("flock", fd, EX)
    await_in_flock(call)
    stop(driver.pid)
    os.kill(supervision.pid, signal.SIGCONT)
    assert world.free(world.file())
    driver.signal(signal.SIGCONT)
    assert call.result() == OK
    assert not world.free(world.file())


def test_the_supervisor_has_closed_its_duplicate_when_the_program_goes_on(world: World) -> None:
    """Else a description that is closed at once would be found open, and keep its lock."""
    driver = world.start()
    for _ in range(20):
        fd = driver.open(world.file())
        assert driver.flock(fd, EX) == OK
        driver.close(fd)
        assert world.free(world.file())


# While it waits.


def test_a_stopped_waiter_lets_others_go_on(world: World) -> None:
    holder, held_fd = held(world)
    stopped, stopped_fd = world.opened()
    second, second_fd = world.opened()
    first_call = stopped.flock_later(stopped_fd, EX)
    world.await_blocked(first_call)
    second_call = second.flock_later(second_fd, EX)
    world.await_blocked(second_call)
    stop(stopped.pid)
    assert holder.flock(held_fd, UN) == OK
    assert second_call.result() == OK
    assert world.probe(world.file(), SH) == BUSY
    assert second.flock(second_fd, UN) == OK
    assert world.free(world.file())
    stopped.signal(signal.SIGCONT)
    assert first_call.result() == OK
    assert not world.free(world.file())


def test_what_was_interrupted_is_over_at_once(world: World) -> None:
    """Whoever could not have the lock alone, and now reads instead, is not disturbed by what it has given up."""
    reader, reader_fd = world.opened()
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, 0)
    third, third_fd = world.opened()
    assert reader.flock(reader_fd, SH) == OK
    for _ in range(20):
        call = driver.start("flock", fd, EX)
        world.await_blocked(call)
        driver.signal(signal.SIGUSR1)
        assert call.result() == errno.EINTR
        assert driver.flock(fd, SH | NB) == OK
        assert reader.flock(reader_fd, UN) == OK
        assert third.flock(third_fd, EX | NB) == BUSY
        assert reader.flock(reader_fd, SH) == OK
        assert driver.flock(fd, UN) == OK


def test_who_was_interrupted_is_in_nobody_s_way(world: World) -> None:
    """A reader need not wait for a writer that has given up; nor do hundreds of tries pile up anywhere."""
    reader, reader_fd = world.opened()
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, 0)
    assert reader.flock(reader_fd, SH) == OK
    for _ in range(300):
        call = driver.start("flock", fd, EX)
        await_in_flock(call)
        driver.signal(signal.SIGUSR1)
        assert call.result() == errno.EINTR
    late, late_fd = world.opened()
    assert late.flock(late_fd, SH) == OK
    assert reader.flock(reader_fd, UN) == OK
    assert late.flock(late_fd, UN) == OK
    assert world.free(world.file())


def test_killed_while_one_of_its_threads_waits(world: World) -> None:
    holder, held_fd = held(world)
    victim, victim_fd = world.opened()
    other, other_fd = world.opened("another")
    assert victim.flock(victim.open(world.directory / "another"), EX) == OK
    calls = [victim.flock_later(victim_fd, operation) for operation in (EX, SH)]
    world.await_blocked(*calls)
    waiting = other.flock_later(other_fd, EX)
    world.await_blocked(waiting)
    victim.kill()
    assert waiting.result() == OK
    assert holder.flock(held_fd, UN) == OK
    assert world.free(world.file())


@pytest.mark.parametrize("killed", ["holder", "waiter"])
def test_killed(world: World, killed: str) -> None:
    holder, held_fd = held(world)
    waiter, waiting_fd = world.opened()
    call = waiter.flock_later(waiting_fd, EX)
    world.await_blocked(call)
    if killed == "holder":
        holder.kill()
        assert call.result() == OK
        assert not world.free(world.file())
    else:
        waiter.kill()
        assert holder.flock(held_fd, UN) == OK
        assert world.free(world.file())
