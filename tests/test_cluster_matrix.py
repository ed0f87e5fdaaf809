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

from flockshim.cluster_names import keeper_of

LEASE = 3.0
HEARTBEAT = LEASE / 6
FOR_LONG = 1.25 * LEASE
"""Seconds in which a lock that is thought to be a dead one's is taken away."""
FOR_EVER = 600.0
"""A lease time that no test outlasts."""


def _site(directory: Path, lease: float) -> Iterator[Site]:
    require_hosts()
    site = Site(directory, lease)
    try:
        yield site
    finally:
        site.end()


@pytest.fixture
def site(nolock_dir: Path) -> Iterator[Site]:
    yield from _site(nolock_dir, LEASE)


@pytest.fixture
def patient_site(nolock_dir: Path) -> Iterator[Site]:
    """One where nothing that happens is owed to the lease time."""
    yield from _site(nolock_dir, FOR_EVER)


class Pair:
    """A holder on one host, and a program on another that waits for it."""

    def __init__(self, site: Site, name: str, holding: Host, waiting: Host) -> None:
        """NAME is the locked file's."""
        self.host = holding
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
    print(f"{what}: {time.monotonic() - since:.2f} s")


# Dead ones


def test_a_holder_is_killed(patient_site: Site) -> None:
    it = pair(patient_site)
    killed = time.monotonic()
    it.holder.kill()
    assert it.waiter.result() == OK
    report("holder killed", killed)


def test_a_holder_is_a_zombie(patient_site: Site) -> None:
    """Its pid is still there, and its parent too."""
    here, there = patient_site.world(patient_site.host("one")), patient_site.world(patient_site.host("other"))
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
    # Nor where another program of the host waits for it already.
    neighbour, also_wanted = there.opened()
    neighbour.flock_later(also_wanted, SH)
    await_waiting(path, 1)
    assert other.flock(wanted, SH | NB) == BUSY


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


def test_a_dead_sibling_with_the_same_shm_is_known_at_once(patient_site: Site) -> None:
    """A host's entries whose keeper is gone are those of the dead for all that share its /dev/shm."""
    it = Pair(patient_site, "file", *_sibling_with_the_same_shm(patient_site))
    it.begin()
    it.there.await_blocked(it.waiter)
    gone = time.monotonic()
    it.host.end()
    assert it.waiter.result() == OK
    report("holder's pid namespace gone", gone)


# Those of whom nothing is heard for a lease time


class Silent(Pair):
    """A pair whose holder has vouched, and does so no more."""

    def __init__(self, site: Site, what: str, slow: bool = False) -> None:
        """WHAT is told of it."""
        name = what.replace(" ", "-")
        super().__init__(site, name, site.host(name, slow=slow), site.host("other"))
        self.what = what
        self.vouched = 0.0
        self.since = 0.0
        self.taken = 0.0

    def is_known(self) -> bool:
        """Whether the one waits, and the other has vouched."""
        state = recorded(self.path)
        return state is not None and len(state.queue) == 1 and last_vouched(self.path) > 0

    def is_silent(self) -> None:
        """From now on."""
        self.vouched, self.since = last_vouched(self.path), time.monotonic()

    def is_taken(self) -> bool:
        """Whether the waiter has the lock; this must be looked at often, since it tells when that was."""
        if not self.taken and self.granted():
            self.taken = time.time()
            report(f"holder's {self.what}", self.since)
        return self.taken > 0


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)
    if number == signal.SIGSTOP:
        await_true(lambda: all(map(is_stopped, pids)), f"{pids} to stop")


def await_told(site: Site, path: Path) -> None:
    """Return when a program has been told what became of its lock."""
    await_true(lambda: f"the lock on {path} was lost" in site.errors(), "the program to be told")


def keepers_that_hold(path: Path) -> list[str]:
    state = recorded(path)
    return [keeper_of(entry.ticket) for entry in state.holders] if state else []


def test_a_host_of_which_nothing_is_heard_loses_its_lock(site: Site) -> None:
    """All of these at once, because each takes a lease time, and not less.

    What goes on later must not go on with the lock, and is told why.
    """
    gone, frozen = Silent(site, "host gone"), Silent(site, "host frozen")
    keeper_frozen = Silent(site, "keeper frozen")
    giving_back = Silent(site, "host frozen while it gives back", slow=True)
    silent = [gone, frozen, keeper_frozen, giving_back]
    for it in silent:
        it.begin()
    await_true(lambda: all(it.is_known() for it in silent), "the holders to vouch")
    neighbour, also_wanted = frozen.here.opened(frozen.path.name)
    behind = neighbour.flock_later(also_wanted, EX)
    frozen.here.await_blocked(behind)
    gate = giving_back.host.shm / "stop-before-rename"
    gate.touch()
    late = giving_back.holder.flock_later(giving_back.held, UN)
    _stopped_worker(giving_back.host)
    gate.unlink()
    gone.host.end()
    frozen.host.freeze()
    giving_back.host.freeze()
    keeper = keeper_frozen.host.running("flockshim/keeper.py")
    _signal(keeper, signal.SIGSTOP)
    for it in silent:
        it.is_silent()
    await_true(lambda: all([it.is_taken() for it in silent]), "all the locks to be taken")
    assert [it.what for it in silent if it.taken - it.vouched < LEASE] == []
    assert site.errors() == ""

    holding = [keepers_that_hold(it.path) for it in (gone, keeper_frozen, giving_back)]
    frozen.host.thaw()
    giving_back.host.thaw()
    _signal(keeper, signal.SIGCONT)
    assert late.result() == OK
    for it in frozen, keeper_frozen:
        await_end(it.holder.pid)
        await_told(site, it.path)
    assert [keepers_that_hold(it.path) for it in (gone, keeper_frozen, giving_back)] == holding

    # The old hosts are not lost for good.
    await_waiting(frozen.path, 1)
    assert not behind.returned()
    assert frozen.other.flock(frozen.wanted, UN) == OK
    assert behind.result() == OK
    for it in keeper_frozen, giving_back:
        again, wanted = it.here.opened(it.path.name)
        assert again.flock(wanted, EX | NB) == BUSY


def test_a_holder_that_cannot_be_vouched_for_is_stopped(site: Site) -> None:
    """Its host lives, but cannot write. It may go on when that is over, if nobody has taken its lock."""
    host = site.host("cut-off")
    here, there = site.world(host), site.world(site.host("other"))
    path = here.file()
    holder, held = here.opened()
    kept, also_held = here.opened("kept")
    assert holder.flock(held, EX) == OK
    assert kept.flock(also_held, EX) == OK
    (worker,) = host.running("lease_worker.py")
    _signal([worker], signal.SIGSTOP)
    await_true(lambda: is_stopped(holder.pid) and is_stopped(kept.pid), "the holders to be stopped")
    other, wanted = there.opened()
    assert other.flock(wanted, EX) == OK
    assert is_stopped(holder.pid)
    os.kill(worker, signal.SIGCONT)
    await_end(holder.pid)
    assert not there.free(path.with_name("kept"))
    assert kept.flock(also_held, UN) == OK
    await_told(site, path)
    assert len(site.errors().splitlines()) == 1


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
def test_a_client_starts_slowly_and_joins_after_many_changes(patient_site: Site, operation: str) -> None:
    """What it does then is what it meant to do when it looked: claim the birth, or take the lock as it was."""
    slow, quick = patient_site.host("slow", slow=True), patient_site.host("quick")
    here, there = patient_site.world(slow), patient_site.world(quick)
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
    assert patient_site.errors() == ""
    await_true(lambda: undocumented(path) == [], "only the documented files to be there")


@pytest.mark.parametrize("operation", ["link", "rename"])
def test_the_process_that_does_the_file_operations_is_killed_in_the_middle_of_one(
    patient_site: Site, operation: str
) -> None:
    """What it was doing may have been done or not; the keeper finds out, and the program need not know."""
    host = patient_site.host("one", slow=True)
    here = patient_site.world(host)
    path = here.file()
    driver, fd = here.opened()
    gate = host.shm / f"stop-before-{operation}"
    gate.touch()
    call = driver.flock_later(fd, EX)
    worker = _stopped_worker(host)
    gate.unlink()
    os.kill(worker, signal.SIGKILL)
    assert call.result() == OK
    there = patient_site.world(patient_site.host("other"))
    assert not there.free(path)
    assert driver.flock(fd, UN) == OK
    assert there.free(path)
    assert patient_site.errors() == ""


def _readers(world: World, count: int) -> list[tuple[Driver, int]]:
    return [world.opened() for _ in range(count)]


def test_readers_of_several_hosts_share_and_a_writer_waits_for_all(patient_site: Site) -> None:
    worlds = [patient_site.world(patient_site.host(f"node{number}")) for number in range(3)]
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


def test_programs_that_follow_each_other_on_one_host_do_not_keep_out_another_host(patient_site: Site) -> None:
    it = pair(patient_site)
    holder, following = (it.holder, it.held), it.here.opened()
    for _ in range(100):
        behind = following[0].flock_later(following[1], EX)
        it.here.await_blocked(behind)
        assert holder[0].flock(holder[1], UN) == OK
        await_true(lambda call=behind: call.returned() or it.granted(), "somebody to hold")  # type: ignore[misc]
        if it.granted():
            break
        holder, following = following, holder
    assert it.granted()
