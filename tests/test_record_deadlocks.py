"""Circles of processes that wait for each other's record locks: EDEADLK."""

from __future__ import annotations

import errno
import signal

import pytest
from support.driver import OK
from support.records import AGAIN, RD, SETLKW, UN, WR, Lock, Stranger, ask, await_waiting, lock, lock_later
from support.worlds import ALL, World

WORLDS = ALL


def test_a_cycle_of_two(world: World) -> None:
    first, first_fd = world.opened()
    second, second_fd = world.opened()
    assert lock(first, first_fd, WR, 0, 1) == OK
    assert lock(second, second_fd, WR, 1, 1) == OK
    call = lock_later(first, first_fd, WR, 1, 1)
    await_waiting(world, call)
    for kind in RD, WR:
        assert ask(second, second_fd, SETLKW, Lock(kind, 0, 1)).result() == errno.EDEADLK
        assert lock(second, second_fd, kind, 0, 1) == AGAIN
    await_waiting(world, call)
    # What it had it still has.
    assert Stranger(world).bytes(3) == "WW."
    assert lock(second, second_fd, UN, 1, 1) == OK
    assert call.result() == OK


def test_a_cycle_of_two_upgrades(world: World) -> None:
    first, first_fd = world.opened()
    second, second_fd = world.opened()
    for driver, fd in (first, first_fd), (second, second_fd):
        assert lock(driver, fd, RD, 0, 10) == OK
    call = lock_later(first, first_fd, WR, 0, 10)
    await_waiting(world, call)
    assert ask(second, second_fd, SETLKW, Lock(WR, 0, 10)).result() == errno.EDEADLK
    assert Stranger(world).bytes(10) == "r" * 10
    assert lock(second, second_fd, UN) == OK
    assert call.result() == OK


def test_a_cycle_of_three(world: World) -> None:
    opened = [world.opened() for _ in range(3)]
    for place, (driver, fd) in enumerate(opened):
        assert lock(driver, fd, WR, place, 1) == OK
    calls = []
    for place in 0, 1:
        calls.append(lock_later(*opened[place], WR, place + 1, 1))
        await_waiting(world, *calls)
    third, third_fd = opened[2]
    assert ask(third, third_fd, SETLKW, Lock(WR, 0, 1)).result() == errno.EDEADLK
    assert lock(third, third_fd, UN) == OK
    assert calls[1].result() == OK
    await_waiting(world, calls[0])
    assert lock(*opened[1], UN, 1, 1) == OK
    assert calls[0].result() == OK


def test_a_cycle_over_two_files(world: World) -> None:
    first, first_fd = world.opened()
    second, second_fd = world.opened()
    first_other, second_other = (driver.open(world.file("another")) for driver in (first, second))
    assert lock(first, first_fd, WR) == OK
    assert lock(second, second_other, WR) == OK
    call = lock_later(first, first_other, WR)
    await_waiting(world, call)
    assert ask(second, second_fd, SETLKW, Lock(WR)).result() == errno.EDEADLK
    second.kill()
    assert call.result() == OK


def test_a_chain_is_no_cycle(world: World) -> None:
    opened = [world.opened() for _ in range(3)]
    for place, (driver, fd) in enumerate(opened):
        assert lock(driver, fd, WR, place, 1) == OK
    calls = []
    for place in 1, 0:
        calls.append(lock_later(*opened[place], WR, place + 1, 1))
        await_waiting(world, *calls)
    assert lock(*opened[2], UN) == OK
    assert calls[0].result() == OK
    await_waiting(world, calls[1])
    opened[1][0].kill()
    assert calls[1].result() == OK


def test_a_cycle_that_ended(world: World) -> None:
    """Who has been interrupted waits for nobody any longer."""
    first, first_fd = world.opened()
    second, second_fd = world.opened()
    first.ask("sigaction", signal.SIGUSR1, 0)
    assert lock(first, first_fd, WR, 0, 1) == OK
    assert lock(second, second_fd, WR, 1, 1) == OK
    call = lock_later(first, first_fd, WR, 1, 1)
    await_waiting(world, call)
    first.ask("sigthread", call.tid, signal.SIGUSR1)
    assert call.result() == errno.EINTR
    waiting = lock_later(second, second_fd, WR, 0, 1)
    await_waiting(world, waiting)
    assert lock(first, first_fd, UN, 0, 1) == OK
    assert waiting.result() == OK


@pytest.mark.parametrize("kinds", [(True, True), (False, True)], ids=["both", "the second"])
def test_descriptions_find_no_cycle(world: World, kinds: tuple[bool, bool]) -> None:
    """If the first waits as a description and the second as a process, Linux does find it, whatever fcntl(2) says."""
    first, first_fd = world.opened()
    second, second_fd = world.opened()
    first.ask("sigaction", signal.SIGUSR1, 0)
    assert lock(first, first_fd, WR, 0, 1, kinds[0]) == OK
    assert lock(second, second_fd, WR, 1, 1, kinds[1]) == OK
    calls = [lock_later(first, first_fd, WR, 1, 1, kinds[0])]
    await_waiting(world, *calls)
    calls.append(lock_later(second, second_fd, WR, 0, 1, kinds[1]))
    await_waiting(world, *calls)
    first.ask("sigthread", calls[0].tid, signal.SIGUSR1)
    assert calls[0].result() == errno.EINTR
    assert lock(first, first_fd, UN, 0, 1, kinds[0]) == OK
    assert calls[1].result() == OK
