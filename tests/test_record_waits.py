"""Waiting for record locks: who is served when, signals, and waiters that stop or die."""

from __future__ import annotations

import errno
import os
import signal

import pytest
from support.driver import EX, OK, Call, Driver
from support.proc import await_true, thread_state
from support.records import (
    OFD,
    RD,
    SETLKW,
    UN,
    WR,
    Lock,
    Stranger,
    ask,
    await_waiting,
    lock,
    lock_later,
)
from support.states import stop
from support.worlds import ALL, World

WORLDS = ALL

SA_RESTART = 0x10000000
OWNERS = pytest.mark.parametrize("ofd", [False, True], ids=["process", "description"])


# Who is served


@OWNERS
def test_a_free_range_is_not_waited_for(world: World, ofd: bool) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert lock(holder, held_fd, WR, 0, 10, ofd) == OK
    assert ask(other, other_fd, SETLKW + OFD * ofd, Lock(WR, 10, 10)).result() == OK
    assert ask(other, other_fd, SETLKW + OFD * ofd, Lock(UN, 0, 20)).result() == OK
    assert Stranger(world).locks() == [(WR, 0, 10)]


@OWNERS
def test_waiting_ends_when_just_that_range_is_free(world: World, ofd: bool) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert lock(holder, held_fd, WR, 0, 0, ofd) == OK
    call = lock_later(other, other_fd, WR, 10, 10, ofd)
    await_waiting(world, call)
    for start, length in (0, 10), (20, 0), (10, 5), (16, 4):
        assert lock(holder, held_fd, UN, start, length, ofd) == OK
        await_waiting(world, call)
    assert lock(holder, held_fd, UN, 15, 1, ofd) == OK
    assert call.result() == OK
    assert Stranger(world).locks() == [(WR, 10, 10)]


@OWNERS
def test_waiting_for_two_holders(world: World, ofd: bool) -> None:
    holders = [world.opened() for _ in range(3)]
    other, other_fd = world.opened()
    for place, (driver, fd) in enumerate(holders):
        assert lock(driver, fd, RD, 0, 1 + place, ofd) == OK
    call = lock_later(other, other_fd, WR, 0, 0, ofd)
    for driver, fd in holders:
        await_waiting(world, call)
        assert lock(driver, fd, UN, ofd=ofd) == OK
    assert call.result() == OK


@OWNERS
def test_waiters_of_different_ranges(world: World, ofd: bool) -> None:
    """Each is served as soon as its own range is free, in whatever order they asked."""
    holder, held_fd = world.opened()
    assert lock(holder, held_fd, WR, 0, 40, ofd) == OK
    waiters = [world.opened() for _ in range(4)]
    calls = {index: lock_later(driver, fd, WR, 10 * index, 10, ofd) for index, (driver, fd) in enumerate(waiters)}
    await_waiting(world, *calls.values())
    for index in (2, 0, 3, 1):
        assert lock(holder, held_fd, UN, 10 * index, 10, ofd) == OK
        assert calls.pop(index).result() == OK
        await_waiting(world, *calls.values())
    assert Stranger(world).bytes(40) == "W" * 40


@OWNERS
def test_waiters_of_one_range(world: World, ofd: bool) -> None:
    """One after the other, and each of them once."""
    holder, held_fd = world.opened()
    assert lock(holder, held_fd, WR, 0, 10, ofd) == OK
    opened = [world.opened() for _ in range(5)]
    calls = {lock_later(driver, fd, WR, 0, 10, ofd): (driver, fd) for driver, fd in opened}
    while calls:
        await_waiting(world, *calls)
        assert lock(holder, held_fd, UN, 0, 10, ofd) == OK
        await_true(lambda: any(call.returned() for call in calls), "one of them to be served")
        (served,) = [call for call in calls if call.returned()]
        assert served.result() == OK
        holder, held_fd = calls.pop(served)


@OWNERS
def test_readers_are_served_together(world: World, ofd: bool) -> None:
    holder, held_fd = world.opened()
    assert lock(holder, held_fd, WR, 0, 10, ofd) == OK
    readers = [world.opened() for _ in range(3)]
    calls = [lock_later(driver, fd, RD, index, 5, ofd) for index, (driver, fd) in enumerate(readers)]
    await_waiting(world, *calls)
    assert lock(holder, held_fd, RD, 0, 10, ofd) == OK
    assert [call.result() for call in calls] == [OK, OK, OK]
    assert Stranger(world).bytes(11) == "r" * 10 + "."


@OWNERS
def test_others_pass_who_does_not_concern_them(world: World, ofd: bool) -> None:
    holder, held_fd = world.opened()
    waiter, waiter_fd = world.opened()
    other, other_fd = world.opened()
    assert lock(holder, held_fd, RD, 0, 10, ofd) == OK
    call = lock_later(waiter, waiter_fd, WR, 0, 20, ofd)
    await_waiting(world, call)
    # Not even within its range: only who holds is in the way of a call that does not wait.
    for kind, start, length in (WR, 20, 10), (WR, 10, 10), (RD, 0, 10):
        assert lock(other, other_fd, kind, start, length, ofd) == OK
        assert lock(other, other_fd, UN, start, length, ofd) == OK
    await_waiting(world, call)
    assert lock(holder, held_fd, UN, ofd=ofd) == OK
    assert call.result() == OK


@OWNERS
def test_a_waiting_upgrade_keeps_the_read_lock(world: World, ofd: bool) -> None:
    first, first_fd = world.opened()
    second, second_fd = world.opened()
    assert lock(first, first_fd, RD, 0, 10, ofd) == OK
    assert lock(second, second_fd, RD, 0, 5, ofd) == OK
    call = lock_later(first, first_fd, WR, 0, 10, ofd)
    await_waiting(world, call)
    stranger = Stranger(world)
    assert stranger.bytes(12) == "r" * 10 + ".."
    assert lock(second, second_fd, UN, 0, 5, ofd) == OK
    assert call.result() == OK
    assert stranger.bytes(12) == "W" * 10 + ".."


@OWNERS
def test_what_is_had_after_waiting_merges(world: World, ofd: bool) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert lock(other, other_fd, WR, 0, 5, ofd) == OK
    assert lock(other, other_fd, RD, 15, 5, ofd) == OK
    assert lock(holder, held_fd, WR, 5, 5, ofd) == OK
    call = lock_later(other, other_fd, WR, 3, 14, ofd)
    await_waiting(world, call)
    holder.kill()
    assert call.result() == OK
    assert Stranger(world).locks() == [(WR, 0, 17), (RD, 17, 3)]


def test_flock_does_not_wait_for_records(world: World) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert lock(holder, held_fd, WR) == OK
    call = lock_later(other, other_fd, WR)
    await_waiting(world, call)
    assert other.flock(other_fd, EX) == OK
    assert lock(holder, held_fd, UN) == OK
    assert call.result() == OK


def test_lockf_waits(world: World) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    holder.ask("lseek", held_fd, 10, os.SEEK_SET)
    assert holder.start("lockf", held_fd, os.F_LOCK, 10).result() == OK
    call = other.later("lockf", other_fd, os.F_LOCK, 11)
    await_waiting(world, call)
    assert holder.start("lockf", held_fd, os.F_ULOCK, 1).result() == OK
    assert call.result() == OK
    assert Stranger(world).bytes(21) == "W" * 20 + "."


# Signals


def _waiting(world: World, flags: int, ofd: bool) -> tuple[Driver, int, Driver, int, Call]:
    """A holder, and a single-threaded process that waits for it, with a handler of FLAGS."""
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, flags)
    assert lock(holder, held_fd, WR, 0, 10, ofd) == OK
    call = ask(driver, fd, SETLKW + OFD * ofd, Lock(WR, 5, 10))
    await_waiting(world, call)
    return holder, held_fd, driver, fd, call


@OWNERS
def test_a_handler_without_restart_interrupts(world: World, ofd: bool) -> None:
    holder, held_fd, driver, _, call = _waiting(world, 0, ofd)
    driver.signal(signal.SIGUSR1)
    assert call.result() == errno.EINTR
    assert driver.ask("sigcount", signal.SIGUSR1) == 1
    assert lock(holder, held_fd, UN, ofd=ofd) == OK
    assert Stranger(world).free()


@OWNERS
def test_a_handler_with_restart_goes_on_waiting(world: World, ofd: bool) -> None:
    holder, held_fd, driver, _, call = _waiting(world, SA_RESTART, ofd)
    for _ in range(3):
        before = thread_state(driver.pid, call.tid)
        assert before is not None
        driver.signal(signal.SIGUSR1)
        await_true(lambda: _switched(call, before.switches), "the handler to run")  # noqa: B023
        await_waiting(world, call)
    assert lock(holder, held_fd, UN, ofd=ofd) == OK
    assert call.result() == OK
    assert driver.ask("sigcount", signal.SIGUSR1) == 3
    assert Stranger(world).locks() == [(WR, 5, 10)]


def _switched(call: Call, switches: int) -> bool:
    now = thread_state(call.driver.pid, call.tid)
    return now is not None and now.switches > switches


@OWNERS
def test_an_interrupted_upgrade_keeps_the_read_lock(world: World, ofd: bool) -> None:
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, 0)
    assert lock(holder, held_fd, RD, 0, 10, ofd) == OK
    assert lock(driver, fd, RD, 5, 10, ofd) == OK
    call = ask(driver, fd, SETLKW + OFD * ofd, Lock(WR, 5, 10))
    await_waiting(world, call)
    driver.signal(signal.SIGUSR1)
    assert call.result() == errno.EINTR
    assert Stranger(world).bytes(16) == "r" * 15 + "."


def test_a_signal_for_another_thread(world: World) -> None:
    """Only the thread that handles it is interrupted."""
    holder, held_fd, _, _, call = _waiting(world, SA_RESTART, False)
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, 0)
    calls = [lock_later(driver, fd, WR, 0, 1), lock_later(driver, fd, WR, 1, 1)]
    await_waiting(world, call, *calls)
    driver.ask("sigthread", calls[0].tid, signal.SIGUSR1)
    assert calls[0].result() == errno.EINTR
    await_waiting(world, call, calls[1])
    assert lock(holder, held_fd, UN) == OK
    assert [call.result(), calls[1].result()] == [OK, OK]


# Waiters that come to nothing


@OWNERS
def test_a_killed_waiter(world: World, ofd: bool) -> None:
    holder, held_fd = world.opened()
    assert lock(holder, held_fd, WR, 0, 10, ofd) == OK
    doomed, doomed_fd = world.opened()
    other, other_fd = world.opened()
    dead = lock_later(doomed, doomed_fd, WR, 0, 10, ofd)
    await_waiting(world, dead)
    call = lock_later(other, other_fd, WR, 0, 10, ofd)
    await_waiting(world, dead, call)
    doomed.kill()
    assert lock(holder, held_fd, UN, ofd=ofd) == OK
    assert call.result() == OK


@OWNERS
def test_a_stopped_waiter(world: World, ofd: bool) -> None:
    """Others go on; and when it is continued, so does it."""
    holder, held_fd = world.opened()
    assert lock(holder, held_fd, WR, 0, 10, ofd) == OK
    stopped, stopped_fd = world.opened()
    other, other_fd = world.opened()
    first = lock_later(stopped, stopped_fd, WR, 0, 10, ofd)
    await_waiting(world, first)
    call = lock_later(other, other_fd, WR, 0, 10, ofd)
    await_waiting(world, first, call)
    stop(stopped.pid)
    assert lock(holder, held_fd, UN, ofd=ofd) == OK
    assert call.result() == OK
    os.kill(stopped.pid, signal.SIGCONT)
    await_waiting(world, first)
    assert lock(other, other_fd, UN, ofd=ofd) == OK
    assert first.result() == OK


@OWNERS
def test_a_descriptor_closed_while_its_call_waits(world: World, ofd: bool) -> None:
    """The process's lock would belong to nothing, so it is not had; the description's goes with the call's end."""
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    assert lock(holder, held_fd, WR, 0, 10, ofd) == OK
    call = lock_later(driver, fd, WR, 0, 10, ofd)
    await_waiting(world, call)
    driver.close(fd)
    await_waiting(world, call)
    assert lock(holder, held_fd, UN, ofd=ofd) == OK
    assert call.result() == (OK if ofd else errno.EBADF)
    assert Stranger(world).free()


def test_unlocking_by_another_thread(world: World) -> None:
    """What a thread waits for, another thread of its process may give up meanwhile: it is one owner."""
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    assert lock(driver, fd, WR, 10, 10) == OK
    assert lock(holder, held_fd, WR, 0, 10) == OK
    call = lock_later(driver, fd, WR, 0, 20)
    await_waiting(world, call)
    assert lock(driver, fd, UN, 10, 10) == OK
    assert Stranger(world).locks() == [(WR, 0, 10)]
    assert lock(holder, held_fd, UN) == OK
    assert call.result() == OK
    assert Stranger(world).locks() == [(WR, 0, 20)]


def test_cancelling_who_waits(world: World) -> None:
    """F_SETLKW is a cancellation point."""
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    assert lock(holder, held_fd, WR, 0, 10) == OK
    call = lock_later(driver, fd, WR, 0, 10)
    await_waiting(world, call)
    driver.ask("cancel")
    await_true(lambda: not os.path.exists(f"/proc/{driver.pid}/task/{call.tid}"), "the thread to end")
    assert lock(holder, held_fd, UN) == OK
    assert Stranger(world).free()
