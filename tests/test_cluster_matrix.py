"""What becomes of a holder's lock on other hosts, for every way in which a holder can be dead, or seem so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN, Call, Driver
from support.hosts import (
    Host,
    Site,
    await_waiting,
    is_stopped,
    is_zombie,
    last_vouched,
    recorded,
    require_hosts,
    undocumented,
)
from support.proc import await_end, await_true, children
from support.worlds import World

LEASE = 3.0
HEARTBEAT = LEASE / 6
FOR_LONG = 1.25 * LEASE
"""Seconds in which a lock that is thought to be a dead one's is taken away."""


@pytest.fixture
def site(nolock_dir: Path) -> Iterator[Site]:
    require_hosts()
    site = Site(nolock_dir, LEASE)
    try:
        yield site
    finally:
        site.end()


class Pair:
    """A holder on one host, and a program on another that waits for it."""

    def __init__(self, site: Site, name: str, holding: Host, waiting: Host) -> None:
        """NAME is the locked file's."""
        self.here, self.there = site.world(holding), site.world(waiting)
        self.path = self.here.file(name)
        self.holder, self.held = self.here.opened(name)
        self.other, self.wanted = self.there.opened(name)
        self.waiter: Call

    def begin(self) -> None:
        """The one holds, and the other waits."""
        assert self.holder.flock(self.held, EX) == OK
        self.waiter = self.other.flock_later(self.wanted, EX)

    def granted(self) -> bool:
        """Whether the waiter has the lock."""
        return self.waiter.returned()


def pair(site: Site) -> Pair:
    """Two hosts, where one holds and the other waits."""
    pair = Pair(site, "file", site.host("one"), site.host("other"))
    pair.begin()
    await_waiting(pair.path, 1)
    return pair


def report(what: str, since: float) -> None:
    """Print what was measured; it is not asserted."""
    print(f"{what}: {time.monotonic() - since:.2f} s (lease {LEASE} s)")


# Dead ones


def test_a_holder_is_killed(site: Site) -> None:
    it = pair(site)
    killed = time.monotonic()
    it.holder.kill()
    assert it.waiter.result() == OK
    report("holder killed", killed)


def test_a_holder_is_a_zombie(site: Site) -> None:
    """Its pid is still there, and its parent too."""
    here, there = site.world(site.host("one")), site.world(site.host("other"))
    path = here.file()
    parent = here.start()
    holder = parent.fork()
    (holder.pid,) = children(parent.pid)  # as it is called here
    assert holder.flock(holder.open(path), EX) == OK
    other, wanted = there.opened()
    waiter = other.flock_later(wanted, EX)
    await_waiting(path, 1)
    ended = time.monotonic()
    holder.start("exit", 0)
    assert waiter.result() == OK
    report("holder a zombie", ended)
    assert is_zombie(holder.pid)


def test_a_holders_host_is_gone(site: Site) -> None:
    """Not before the lease is over: the host that waits has seen nothing new for so long."""
    it = pair(site)
    await_true(lambda: last_vouched(it.path) > 0, "the holder to vouch")
    gone = time.monotonic()
    site.hosts[0].end()
    vouched = last_vouched(it.path)
    assert it.waiter.result() == OK
    assert time.time() - vouched >= LEASE
    report("holder's host gone", gone)


def test_a_refusal_does_not_wait_for_the_lease(site: Site) -> None:
    """LOCK_NB is answered while the dead host still has the lock; if it waited, it would get it."""
    here, there = site.world(site.host("one")), site.world(site.host("other"))
    path = here.file()
    holder, held = here.opened()
    assert holder.flock(held, EX) == OK
    site.hosts[0].end()
    other, wanted = there.opened()
    before = recorded(path)
    for operation in EX | NB, SH | NB:
        assert other.flock(wanted, operation) == BUSY
    assert recorded(path) == before


def test_a_refusal_takes_one_attempt(site: Site) -> None:
    """Every attempt has a ticket of its own; the next one's number tells how many there were."""
    here, there = site.world(site.host("one")), site.world(site.host("other"))
    path = here.file()
    holder, held = here.opened()
    assert holder.flock(held, EX) == OK
    other, wanted = there.opened()
    for _ in range(5):
        assert other.flock(wanted, EX | NB) == BUSY
    assert holder.flock(held, UN) == OK
    assert other.flock(wanted, EX) == OK
    state = recorded(path)
    assert state
    assert int(state.holders[0].ticket.rpartition("-")[2]) <= 2 * (5 + 1)


# Live ones that others think dead


def test_the_process_that_does_the_file_operations_is_killed(site: Site) -> None:
    """Neither the holder's nor the waiter's lock is lost for it, and nobody is told of an error."""
    it = pair(site)
    for host in site.hosts * 2:
        (worker,) = host.running("lease_worker.py")
        os.kill(worker, signal.SIGKILL)
        await_end(worker)
        await_true(lambda h=host: bool(h.running("lease_worker.py")), "another to be started")  # type: ignore[misc]
        await_waiting(it.path, 1)
        assert not it.granted()
    assert it.holder.flock(it.held, UN) == OK
    assert it.waiter.result() == OK
    assert site.errors() == ""


def _sibling_with_the_same_shm(site: Site) -> tuple[Host, Host]:
    first = site.host("one")
    return first, site.host("sibling", first.shm)


def _sibling_with_another_shm(site: Site) -> tuple[Host, Host]:
    return site.host("one"), site.host("sibling")


def _of_one_name(site: Site) -> tuple[Host, Host]:
    return site.host("same"), site.host("same")


def test_a_live_holder_keeps_its_lock(site: Site) -> None:
    """All of these at once, because each takes more than a lease time, in which nothing must happen."""
    frozen = site.host("frozen")
    pairs = {
        "on a host that is frozen for less than the lease": Pair(site, "e", frozen, site.host("other")),
        "in a sibling pid namespace, with the same /dev/shm": Pair(site, "a", *_sibling_with_the_same_shm(site)),
        "in a sibling pid namespace, with another /dev/shm": Pair(site, "b", *_sibling_with_another_shm(site)),
        "on a host of the same name": Pair(site, "c", *_of_one_name(site)),
        "which is stopped": Pair(site, "d", site.host("one"), site.host("other")),
    }
    for it in pairs.values():
        it.begin()
    stopped = pairs["which is stopped"]
    stopped.holder.signal(signal.SIGSTOP)
    frozen.freeze()
    time.sleep(0.5 * LEASE)
    frozen.thaw()
    time.sleep(FOR_LONG - 0.5 * LEASE)
    assert [where for where, it in pairs.items() if it.granted()] == []
    stopped.holder.signal(signal.SIGCONT)
    for it in pairs.values():
        assert it.holder.flock(it.held, UN) == OK
        assert it.waiter.result() == OK
    assert site.errors() == ""


def test_a_dead_sibling_with_the_same_shm_is_known_at_once(site: Site) -> None:
    """A host's entries whose keeper is gone are those of the dead for all that share its /dev/shm."""
    it = Pair(site, "file", *_sibling_with_the_same_shm(site))
    it.begin()
    it.there.await_blocked(it.waiter)
    gone = time.monotonic()
    site.hosts[0].end()
    assert it.waiter.result() == OK
    report("holder's pid namespace gone", gone)


def test_a_host_is_frozen_past_its_lease_and_goes_on(site: Site) -> None:
    """Its lock was taken meanwhile: the holder must not go on with it, and is told why."""
    it = pair(site)
    await_true(lambda: last_vouched(it.path) > 0, "the holder to vouch")
    frozen = time.monotonic()
    site.hosts[0].freeze()
    vouched = last_vouched(it.path)
    assert it.waiter.result() == OK
    assert time.time() - vouched >= LEASE
    report("holder's host frozen", frozen)
    holder = it.holder
    site.hosts[0].thaw()
    await_end(holder.pid)
    await_true(lambda: "lost" in site.errors(), "the program to be told")
    # The new holder is not disturbed, and the old host not lost for good.
    again, wanted = it.here.opened()
    assert again.flock(wanted, EX | NB) == BUSY
    waiter = again.flock_later(wanted, EX)
    await_waiting(it.path, 1)
    assert it.other.flock(it.wanted, UN) == OK
    assert waiter.result() == OK


# One that comes late


def _stopped_worker(host: Host) -> int:
    """The process of HOST's keeper that has stopped itself before an operation."""
    found: list[int] = []

    def stopped() -> bool:
        found[:] = [pid for pid in host.running("lease_worker.py") if is_stopped(pid)]
        return bool(found)

    await_true(stopped, f"the lease worker of {host.name} to stop")
    return found[0]


def _change(driver: Driver, fd: int, times: int) -> None:
    for _ in range(times):
        assert driver.flock(fd, EX) == OK
        assert driver.flock(fd, UN) == OK


@pytest.mark.parametrize("operation", ["link", "rename"])
def test_a_client_starts_slowly_and_joins_after_many_changes(site: Site, operation: str) -> None:
    """What it does then is what it meant to do when it looked: claim the birth, or take the lock as it was."""
    slow, quick = site.host("slow", slow=True), site.host("quick")
    here, there = site.world(slow), site.world(quick)
    path = here.file()
    late, wanted = here.opened()
    other, held = there.opened()
    if operation == "rename":
        _change(other, held, 1)
    gate = slow.shm / f"stop-before-{operation}"
    gate.touch()
    waiter = late.flock_later(wanted, EX)
    worker = _stopped_worker(slow)
    gate.unlink()
    _change(other, held, 50)
    assert other.flock(held, EX) == OK
    os.kill(worker, signal.SIGCONT)
    await_waiting(path, 1)
    assert not waiter.returned()
    state = recorded(path)
    assert state and state.version > 100
    assert other.flock(held, UN) == OK
    assert waiter.result() == OK
    assert other.flock(held, EX | NB) == BUSY
    assert late.flock(wanted, UN) == OK
    assert site.errors() == ""
    await_true(lambda: undocumented(path) == [], "only the documented files to be there")


@pytest.mark.parametrize("operation", ["link", "rename"])
def test_the_process_that_does_the_file_operations_is_killed_in_the_middle_of_one(site: Site, operation: str) -> None:
    """What it was doing may have been done or not; the keeper finds out, and the program need not know."""
    host = site.host("one", slow=True)
    here = site.world(host)
    path = here.file()
    driver, fd = here.opened()
    gate = host.shm / f"stop-before-{operation}"
    gate.touch()
    call = driver.flock_later(fd, EX)
    worker = _stopped_worker(host)
    gate.unlink()
    os.kill(worker, signal.SIGKILL)
    assert call.result() == OK
    there = site.world(site.host("other"))
    assert not there.free(path)
    assert driver.flock(fd, UN) == OK
    assert there.free(path)
    assert site.errors() == ""


def _readers(world: World, count: int) -> list[tuple[Driver, int]]:
    return [world.opened() for _ in range(count)]


def test_readers_of_several_hosts_share_and_a_writer_waits_for_all(site: Site) -> None:
    worlds = [site.world(site.host(f"node{number}")) for number in range(3)]
    path = worlds[0].file()
    readers = [reader for world in worlds[:2] for reader in _readers(world, 2)]
    for driver, fd in readers:
        assert driver.flock(fd, SH) == OK
    writer, wanted = worlds[2].opened()
    assert writer.flock(wanted, EX | NB) == BUSY
    waiter = writer.flock_later(wanted, EX)
    await_waiting(path, 1)
    for driver, fd in readers:
        assert not waiter.returned()
        assert driver.flock(fd, UN) == OK
    assert waiter.result() == OK
