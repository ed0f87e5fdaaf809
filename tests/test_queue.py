"""Hundreds of programs that wait for one lock: each gets its turn, in the order in which they have asked."""

from __future__ import annotations

import select
import signal
from typing import NamedTuple

import pytest
from support.driver import EX, OK, SH, UN, Call, Driver
from support.lockcommand import waiters
from support.proc import DEADLINE, await_true
from support.worlds import World

WAITERS = 500


class Waiter(NamedTuple):
    """A process, its descriptor of the file, and its call that waits."""

    driver: Driver
    fd: int
    call: Call


def _queue(world: World, count: int, operation: int = EX) -> list[Waiter]:
    """COUNT processes that have asked one after another."""
    parent = world.start()
    queue = []
    for _ in range(count):
        driver = parent.fork()
        fd = driver.open(world.file())
        queue.append(Waiter(driver, fd, driver.start("flock", fd, operation)))
        world.await_blocked(queue[-1].call)
    return queue


def _who_is_next(queue: list[Waiter]) -> Waiter:
    """The first of QUEUE who gets an answer, which must be the lock."""
    sockets = {waiter.driver.control: waiter for waiter in queue}
    ready = select.select(list(sockets), [], [], DEADLINE)[0]
    assert len(ready) == 1, f"{len(ready)} at once"
    waiter = sockets[ready[0]]
    assert waiter.call.result() == OK
    return waiter


def test_in_the_order_in_which_they_have_asked(emulated: World) -> None:
    """Whoever dies in the middle leaves no gap, and whoever is stopped there keeps nobody from going on."""
    holder, held_fd = emulated.opened()
    assert holder.flock(held_fd, EX) == OK
    queue = _queue(emulated, WAITERS)
    assert waiters(emulated, emulated.file()) == [waiter.driver.pid for waiter in queue]
    killed, stopped = queue.pop(WAITERS // 2), queue.pop(WAITERS // 3)
    killed.driver.kill()
    stopped.driver.signal(signal.SIGSTOP)
    await_true(lambda: killed.driver.pid not in waiters(emulated, emulated.file()), "the dead to leave the queue")
    assert holder.flock(held_fd, UN) == OK
    while queue:
        served = _who_is_next(queue)
        assert served is queue.pop(0)
        assert served.driver.flock(served.fd, UN) == OK
    stopped.driver.signal(signal.SIGCONT)
    assert stopped.call.result() == OK
    assert stopped.driver.flock(stopped.fd, UN) == OK
    assert emulated.free(emulated.file())


@pytest.mark.parametrize(("leaving", "count"), [("exit", 10), ("kill", 10), ("close", 2)])
def test_however_the_holders_leave(emulated: World, leaving: str, count: int) -> None:
    """A descriptor that is closed is noticed once a second only."""
    holder, held_fd = emulated.opened()
    assert holder.flock(held_fd, EX) == OK
    queue = _queue(emulated, count)
    holder.kill()
    while queue:
        served = _who_is_next(queue)
        assert served is queue.pop(0)
        if leaving == "close":
            served.driver.close(served.fd)
        elif leaving == "exit":
            served.driver.exit()
        else:
            served.driver.kill()


def test_readers_and_writers(emulated: World) -> None:
    """Who reads before a writer asks, is before it; readers behind may pass it, but everybody gets a turn."""
    holder, held_fd = emulated.opened()
    assert holder.flock(held_fd, EX) == OK
    early = _queue(emulated, 3, SH)
    (writer,) = _queue(emulated, 1, EX)
    waiting = [*early, writer, *_queue(emulated, 3, SH)]
    assert holder.flock(held_fd, UN) == OK
    served = []
    while waiting:
        sockets = {waiter.driver.control: waiter for waiter in waiting}
        for ready in select.select(list(sockets), [], [], DEADLINE)[0]:
            waiter = sockets[ready]
            assert waiter.call.result() == OK
            served.append(waiter)
            waiting.remove(waiter)
            assert waiter.driver.flock(waiter.fd, UN) == OK
    assert all(waiter in served[: served.index(writer)] for waiter in early)
