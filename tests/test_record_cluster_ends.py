"""Record locks in mode cluster when programs, halves of keepers, and hosts die."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_worlds import Hosts, hosts, three
from support.driver import BUSY, EX, OK, Call
from support.driver import SH as FLOCK_SH
from support.driver import UN as FLOCK_UN
from support.hosts import Host, Site, recorded, require_hosts
from support.proc import await_end, await_true
from support.records import AGAIN, RD, SETLK, UN, WR, Lock, Stranger, ask, await_waiting, lock, lock_later
from support.worlds import World
from test_record_torture import RecordTorture

from flockshim.cluster_names import keeper_of

__all__ = ["hosts", "three"]


@pytest.mark.parametrize(("kind", "ofd"), [(RD, False), (WR, True)])
def test_a_killed_holder(hosts: Hosts, three: list[World], kind: int, ofd: bool) -> None:
    here, there, _ = three
    (one, fd), (other, other_fd) = here.opened(), there.opened()
    assert lock(one, fd, kind, 0, 1, ofd) == OK
    call = lock_later(other, other_fd, WR, 0, 1, ofd)
    hosts.await_mode("s-" if kind == RD else "x-")
    one.kill()
    assert call.result() == OK


def test_a_killed_waiter_leaves_the_queue(hosts: Hosts, three: list[World]) -> None:
    here, there, _ = three
    (one, fd), (other, other_fd) = here.opened(), there.opened()
    assert lock(one, fd, WR, 0, 1) == OK
    lock_later(other, other_fd, RD, 0, 1)
    hosts.await_mode("x-")
    other.kill()
    hosts.await_mode("x")
    assert lock(one, fd, UN) == OK
    assert hosts.mode() == ""


@pytest.mark.parametrize("half", ["worker", "standby"])
@pytest.mark.parametrize("writes", [False, True], ids=["readers", "a writer"])
def test_half_of_a_keeper_is_killed(hosts: Hosts, three: list[World], half: str, writes: bool) -> None:
    """What its programs have they keep, and other hosts are kept out; or come in, where all of them read."""
    here, there, _ = three
    (one, fd), (neighbour, neighbour_fd), (other, other_fd) = here.opened(), here.opened(), there.opened()
    assert lock(one, fd, RD, 0, 2) == OK
    assert lock(neighbour, neighbour_fd, RD, 1, 2, ofd=True) == OK
    if writes:
        assert lock(one, fd, WR, 4, 1) == OK
    victim = getattr(hosts.keeper(0), half)
    os.kill(victim, signal.SIGKILL)
    await_end(victim)
    assert lock(other, other_fd, RD, 5, 1) == (AGAIN if writes else OK)
    assert lock(other, other_fd, WR, 5, 1) == AGAIN
    # On its own host nothing is in the way; on another one somebody reads, if nobody here writes.
    assert lock(one, fd, WR, 0, 1) == (OK if writes else AGAIN)
    assert lock(one, fd, RD, 0, 1) == OK
    assert lock(other, other_fd, UN) == OK
    assert Stranger(here).bytes(6) == ("rrr.W." if writes else "rrr...")
    call = lock_later(other, other_fd, WR, 0, 1)
    await_true(lambda: hosts.mode().endswith("-"), "the other host to wait")
    assert lock(one, fd, UN) == OK
    await_waiting(there, call)
    neighbour.kill()
    assert call.result() == OK


def test_a_whole_keeper_is_killed(hosts: Hosts, three: list[World]) -> None:
    """Those of the same host know that at once."""
    here, there, _ = three
    (one, fd), (next_one, next_fd), (other, other_fd) = here.opened(), here.opened(), there.opened()
    assert lock(one, fd, WR, 0, 2) == OK
    keeper = hosts.keeper(0)
    for which in (signal.SIGSTOP, signal.SIGKILL):
        for pid in keeper:
            os.kill(pid, which)
    for pid in keeper:
        await_end(pid)
    assert lock(other, other_fd, RD, 0, 1) == AGAIN
    assert lock(next_one, next_fd, RD, 0, 1) == OK
    assert hosts.mode() == "s"
    assert lock(other, other_fd, RD, 0, 1) == OK


@pytest.mark.parametrize("half", ["worker", "standby"])
def test_a_number_that_was_used_before(three: list[World], hosts: Hosts, half: str) -> None:
    """The keeper's descriptor of a lock gets the number of one that was closed just before."""
    here, there, _ = three
    driver = here.start()
    one, other = (driver.open(here.file(name)) for name in ("one", "other"))
    assert driver.flock(one, EX) == OK
    assert driver.flock(one, FLOCK_UN) == OK
    assert driver.flock(other, EX) == OK
    victim = getattr(hosts.keeper(0), half)
    os.kill(victim, signal.SIGKILL)
    await_end(victim)
    for world in here, there:
        assert world.probe(here.file("other"), FLOCK_SH) == BUSY
        assert world.free(here.file("one"))


class HostsTorture(RecordTorture):
    """Counters side by side in one file, and programs on several hosts that increment them."""

    def __init__(self, hosts: Hosts, board: Path) -> None:
        super().__init__(hosts.worlds[0].directory / "counters", board, hosts.worlds[0].environment)
        self.directories = [world.environment["FLOCKSHIM_DIR"] for world in hosts.worlds]

    def sit_on(self, host: int, seat: int, count: int) -> None:
        self.sit(seat, count, 1, ["env", f"FLOCKSHIM_DIR={self.directories[host]}"])


def test_counters_side_by_side(hosts: Hosts, tmp_path: Path) -> None:
    """Programs and halves of keepers are killed at points of the work."""
    torture = HostsTorture(hosts, tmp_path / "board")
    chance = random.Random(1)
    seats, each, kills = 6, 30, 12
    try:
        for seat in range(seats):
            torture.sit_on(seat // 2, seat, each)
        for number in range(kills):
            torture.await_done(number * seats * each // (kills + 1) + 1, 60)
            if number % 3:
                holder = torture.seat_of_holder()
                torture.kill(chance.randrange(seats) if holder is None else holder)
            else:
                victim = chance.choice(hosts.keeper(number % 2))
                os.kill(victim, signal.SIGKILL)
                await_end(victim)
        torture.await_all(60)
        torture.check()
    finally:
        torture.end()


# Hosts that die, and one of which nothing is heard

LEASE = 3.0


@pytest.fixture
def site(nolock_dir: Path) -> Iterator[Site]:
    require_hosts()
    site = Site(nolock_dir, LEASE)
    yield site
    site.end()


class Pair:
    """A writer on one host, and a program on another that waits."""

    def __init__(self, site: Site, holding: Host, waiting: Host, name: str) -> None:
        here, there = site.world(holding), site.world(waiting)
        self.host = holding
        self.records = here.file(name).with_name(f"{name}~records")
        self.holder, self.fd = here.opened(name)
        self.waiter, self.wanted = there.opened(name)
        assert lock(self.holder, self.fd, WR, 3, 2) == OK
        self.call: Call = lock_later(self.waiter, self.wanted, RD, 0, 1)
        await_true(lambda: len(self.entries()) == 2, "the other host to wait")
        self.before = self.entries()[0]

    def entries(self) -> list[str]:
        """The keepers that hold or wait."""
        state = recorded(self.records)
        return [keeper_of(entry.ticket) for entry in state.entries()] if state else []


def test_a_dead_host_and_a_silent_one(site: Site) -> None:
    """Both are taken over from after the lease time; when the silent one is heard again, its program is ended."""
    waiting = site.host("waiting")
    dead = Pair(site, site.host("dead"), waiting, "dead")
    silent = Pair(site, site.host("silent"), waiting, "silent")
    dead.host.end()
    silent.host.freeze()
    for it in dead, silent:
        assert it.call.result() == OK
        assert it.before not in it.entries()
        assert lock(it.waiter, it.wanted, WR, 0, 0) == OK
    silent.host.thaw()
    await_end(silent.holder.pid)
    await_true(lambda: "killed (--on-lost)" in site.errors(), "it to be said")
    assert str(silent.records.with_name("silent")) in site.errors()
    for it in dead, silent:
        assert lock(it.waiter, it.wanted, WR, 3, 2) == OK


def test_a_host_that_was_silent_for_a_while_keeps_its_locks(site: Site) -> None:
    it = Pair(site, site.host("frozen"), site.host("waiting"), "file")
    it.host.freeze()
    it.host.thaw()
    assert ask(it.holder, it.fd, SETLK, Lock(WR, 4, 2)).result() == OK
    assert not it.call.returned()
    assert lock(it.holder, it.fd, UN) == OK
    assert it.call.result() == OK
