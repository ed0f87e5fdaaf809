"""Record locks in mode cluster: one lease a file, shared while all ranges are read locks, and exact inside a host."""

from __future__ import annotations

import os
from typing import Any

import pytest
from cluster_worlds import Hosts, hosts, three
from support.driver import BUSY, EX, NB, OK
from support.driver import SH as FLOCK_SH
from support.driver import UN as FLOCK_UN
from support.hosts import recorded, undocumented
from support.lockcommand import WAITING_LINE, locks
from support.proc import await_true
from support.records import AGAIN, RD, UN, WR, Lock, Stranger, await_waiting, conflict, lock, lock_later
from support.worlds import World

from flockshim.cluster_names import Names

__all__ = ["hosts", "three"]

KINDS = pytest.mark.parametrize("ofd", [False, True], ids=["process", "description"])
EVERYTHING = Lock(WR, 0, 0, pid=-1)
"""What F_GETLK tells of another host: its lease is for the whole file."""


# Readers and writers


@KINDS
def test_readers_on_all_hosts(hosts: Hosts, three: list[World], ofd: bool) -> None:
    """Of the same bytes, at once. A writer waits for the last of them, whatever it wants to write."""
    opened = [world.opened() for world in three]
    for driver, fd in opened:
        assert lock(driver, fd, RD, 0, 10, ofd) == OK
    assert hosts.mode() == "sss"
    writer, writer_fd = three[2].opened()
    assert lock(writer, writer_fd, WR, 50, 1, ofd) == AGAIN
    last, last_fd = opened.pop()
    assert lock(last, last_fd, UN, 0, 10, ofd) == OK
    assert hosts.mode() == "ss"
    assert lock(writer, writer_fd, WR, 50, 1, ofd) == AGAIN
    call = lock_later(writer, writer_fd, WR, 50, 1, ofd)
    hosts.await_mode("ss-")
    for driver, fd in opened:
        await_waiting(three[2], call)
        assert lock(driver, fd, UN, 0, 10, ofd) == OK
    assert call.result() == OK
    assert hosts.mode() == "x"


def test_a_writer_excludes_other_hosts_from_the_whole_file(hosts: Hosts, three: list[World]) -> None:
    here, there, _ = three
    (writer, fd), (other, other_fd) = here.opened(), there.opened()
    assert lock(writer, fd, WR, 5, 1) == OK
    assert hosts.mode() == "x"
    for kind in RD, WR:
        for start in 5, 100:
            assert lock(other, other_fd, kind, start, 1) == AGAIN
    call = lock_later(other, other_fd, RD, 100, 1)
    hosts.await_mode("x-")
    assert lock(writer, fd, UN, 5, 1) == OK
    assert call.result() == OK
    assert hosts.mode() == "s"


def test_each_host_in_turn(hosts: Hosts, three: list[World]) -> None:
    """By the same byte: the token only grows."""
    versions = []
    opened = [world.opened() for world in three]
    for driver, fd in opened * 2:
        assert lock(driver, fd, WR, 0, 1) == OK
        state = recorded(hosts.records)
        assert state
        versions.append(state.holders[0].granted)
        assert [lock(one, one_fd, RD, 0, 1) for one, one_fd in opened if one is not driver] == [AGAIN, AGAIN]
        assert lock(driver, fd, UN, 0, 1) == OK
    assert versions == sorted(set(versions))


def test_ranges_are_exact_inside_a_host(hosts: Hosts, three: list[World]) -> None:
    here, there, _ = three
    (one, fd), (other, other_fd) = here.opened(), here.opened()
    stranger = Stranger(here)
    assert lock(one, fd, RD, 0, 4) == OK
    assert lock(other, other_fd, RD, 2, 4, ofd=True) == OK
    assert hosts.mode() == "s"
    assert lock(other, other_fd, WR, 3, 1, ofd=True) == AGAIN
    assert lock(other, other_fd, WR, 5, 1, ofd=True) == OK
    assert hosts.mode() == "x"
    assert stranger.bytes(7) == "rrrrrW."
    call = lock_later(one, fd, WR, 5, 2)
    await_waiting(here, call)
    assert lock(other, other_fd, UN, 5, 1, ofd=True) == OK
    assert call.result() == OK
    assert stranger.bytes(8) == "rrrrrWW."
    outsider, outside = there.opened()
    assert lock(outsider, outside, RD, 7, 1) == AGAIN
    for driver, descriptor in (one, fd), (other, other_fd):
        driver.close(descriptor)
    assert lock_later(outsider, outside, WR).result() == OK


def test_flock_is_another_lock(hosts: Hosts, three: list[World]) -> None:
    here, there, _ = three
    (one, fd), (other, other_fd) = here.opened(), there.opened()
    assert one.flock(fd, EX) == OK
    assert lock(other, other_fd, WR) == OK
    assert other.flock(other_fd, FLOCK_SH | NB) == BUSY
    assert lock(one, fd, RD) == AGAIN
    for path in hosts.file, hosts.records:
        state = recorded(path)
        assert state and [entry.exclusive for entry in state.holders] == [True]
    assert one.flock(fd, FLOCK_UN) == OK
    assert other.flock(other_fd, EX | NB) == OK
    assert lock(one, fd, RD) == AGAIN
    assert lock(other, other_fd, UN) == OK
    assert lock(one, fd, WR) == OK


def test_what_stays_beside_the_file(hosts: Hosts, three: list[World]) -> None:
    """Two small files of the record locks' own."""
    for world in three:
        driver, fd = world.opened()
        for kind in RD, WR, RD, UN:
            assert lock(driver, fd, kind) == OK
    assert hosts.mode() == ""
    await_true(lambda: undocumented(hosts.records) == [], "vouching and data files to go")
    names = [name for name in os.listdir(hosts.file.parent) if "flockshim" in name]
    assert len(names) == 2
    assert all(name.startswith(Names("file~records").claim) for name in names)


# More of a lease, and less of it


@KINDS
def test_an_upgrade_while_others_read_is_refused(hosts: Hosts, three: list[World], ofd: bool) -> None:
    here, there, _ = three
    (one, fd), (other, other_fd) = here.opened(), there.opened()
    for driver, descriptor in (one, fd), (other, other_fd):
        assert lock(driver, descriptor, RD, 0, 10, ofd) == OK
    for driver, descriptor in (one, fd), (other, other_fd):
        assert lock(driver, descriptor, WR, 0, 1, ofd) == AGAIN
    assert hosts.mode() == "ss"
    assert lock(other, other_fd, UN, 0, 10, ofd) == OK
    assert lock(one, fd, WR, 0, 1, ofd) == OK
    assert hosts.mode() == "x"
    assert Stranger(here).bytes(11) == "Wrrrrrrrrr."
    assert lock(other, other_fd, RD, 5, 1, ofd) == AGAIN


def test_an_upgrade_waits_for_the_readers_elsewhere(hosts: Hosts, three: list[World]) -> None:
    """Keeping what it has: nobody writes in between."""
    here, there, third = three
    opened = [world.opened() for world in (here, there)]
    for driver, fd in opened:
        assert lock(driver, fd, RD, 0, 10) == OK
    (one, fd), (other, other_fd) = opened
    call = lock_later(one, fd, WR, 0, 1)
    await_waiting(here, call)
    writer, writer_fd = third.opened()
    assert lock(writer, writer_fd, WR, 0, 1) == AGAIN
    assert lock(other, other_fd, WR, 0, 1) == AGAIN
    assert not call.returned()
    other.close(other_fd)
    assert call.result() == OK
    assert lock(writer, writer_fd, RD, 0, 1) == AGAIN


def test_an_upgrade_passes_a_writer_that_waits_elsewhere(hosts: Hosts, three: list[World]) -> None:
    """Who else would wait for the other for ever."""
    here, there, _ = three
    (one, fd), (writer, writer_fd) = here.opened(), there.opened()
    assert lock(one, fd, RD, 0, 2) == OK
    call = lock_later(writer, writer_fd, WR, 0, 1)
    hosts.await_mode("s-")
    assert lock(one, fd, WR, 0, 1) == OK
    assert hosts.mode() == "x-"
    assert lock(one, fd, UN) == OK
    assert call.result() == OK


def test_two_upgrades_that_wait_for_each_other(hosts: Hosts, three: list[World]) -> None:
    """Nobody sees a cycle of two hosts; whichever is given up lets the other go on."""
    here, there, _ = three
    opened = [world.opened() for world in (here, there)]
    for driver, fd in opened:
        assert lock(driver, fd, RD, 0, 1) == OK
    calls = [lock_later(driver, fd, WR, 0, 1) for driver, fd in opened]
    for world, call in zip((here, there), calls):
        await_waiting(world, call)
    opened[1][0].kill()
    assert calls[0].result() == OK
    assert hosts.mode() == "x"


@pytest.mark.parametrize(("how", "ofd"), [("downgrade", False), ("unlock", True)])
def test_readers_come_in_when_only_readers_are_left(hosts: Hosts, three: list[World], how: str, ofd: bool) -> None:
    here, there, _ = three
    (one, fd), (other, other_fd) = here.opened(), there.opened()
    assert lock(one, fd, RD, 0, 5, ofd) == OK
    assert lock(one, fd, WR, 5, 5, ofd) == OK
    call = lock_later(other, other_fd, RD, 0, 10, ofd)
    hosts.await_mode("x-")
    assert lock(one, fd, RD if how == "downgrade" else UN, 5, 5, ofd) == OK
    assert call.result() == OK
    assert hosts.mode() == "ss"
    assert lock(one, fd, WR, 7, 1, ofd) == AGAIN
    assert lock(other, other_fd, UN, ofd=ofd) == OK
    assert lock(one, fd, WR, 7, 1, ofd) == OK


def test_an_exclusive_range_of_another_owner_keeps_readers_out(hosts: Hosts, three: list[World]) -> None:
    """The lease is the host's, so the downgrade of one of its programs is not yet one between hosts."""
    here, there, _ = three
    (one, fd), (neighbour, neighbour_fd), (other, other_fd) = here.opened(), here.opened(), there.opened()
    assert lock(one, fd, WR, 0, 1) == OK
    assert lock(neighbour, neighbour_fd, WR, 1, 1, ofd=True) == OK
    call = lock_later(other, other_fd, RD, 5, 1)
    hosts.await_mode("x-")
    assert lock(one, fd, RD, 0, 1) == OK
    assert lock(one, fd, UN, 0, 1) == OK
    await_waiting(there, call)
    assert hosts.mode() == "x-"
    neighbour.kill()
    assert call.result() == OK


def test_who_waits_says_for_whom_on_another_host(hosts: Hosts, three: list[World]) -> None:
    here, there, _ = three
    one, fd = here.opened()
    assert lock(one, fd, WR, 0, 1) == OK
    quiet, quiet_fd = there.opened()
    first = lock_later(quiet, quiet_fd, RD, 5, 1)
    # What is known by then: that somebody else has it, and who that is.
    hosts.await_mode("x-")
    await_true(lambda: any(one["programs"] for one in between(there, hosts)["holders"]), "the note of the holder")
    other = there.fleet.start({**there.environment, "FLOCKSHIM_VERBOSE": "1"})
    call = lock_later(other, other.open(hosts.file), RD, 5, 1)
    await_true(lambda: there.fleet.errors().endswith("\n"), "the line")
    line = WAITING_LINE.fullmatch(there.fleet.errors())
    assert line, there.fleet.errors()
    assert (line["path"], int(line["pid"]), line["host"]) == (str(hosts.file), one.pid, os.uname().nodename)
    (holder,), (waiter,) = between(there, hosts)["holders"], between(there, hosts)["waiters"]
    assert [(p["pid"], p["mode"]) for p in holder["programs"]] == [(one.pid, "exclusive")]
    assert (waiter["mode"], waiter["alive"], holder["alive"]) == ("shared", True, None)
    there.fleet.forget_errors()
    assert lock(one, fd, UN) == OK
    assert (first.result(), call.result()) == (OK, OK)
    there.fleet.forget_errors()


def between(world: World, hosts: Hosts) -> dict[str, Any]:
    """What ``--locks`` tells of the file's lease."""
    (file,) = (file for file in locks(world, hosts.file) if file["kind"] == "cluster")
    assert file["locks"] == "fcntl"
    return file


# F_GETLK


def test_who_asks_is_told_of_a_writer_elsewhere(hosts: Hosts, three: list[World]) -> None:
    here, there, _ = three
    (one, fd), (other, other_fd) = here.opened(), there.opened()
    assert lock(one, fd, WR, 5, 1) == OK
    for kind in RD, WR:
        assert conflict(other, other_fd, kind, 100, 1) == EVERYTHING
    assert hosts.mode() == "x"
    assert lock(one, fd, UN, 5, 1) == OK
    for kind in RD, WR:
        assert conflict(other, other_fd, kind, 0, 0) is None
    await_true(lambda: hosts.mode() == "", "the lease that was had for asking to be given back")


def test_who_asks_is_told_nothing_of_readers_elsewhere(hosts: Hosts, three: list[World]) -> None:
    """SQLite would take it for a living writer's lock. That a write lock is not to be had, taking it tells."""
    here, there, _ = three
    (one, fd), (other, other_fd) = here.opened(), there.opened()
    assert lock(one, fd, RD, 0, 10) == OK
    assert conflict(other, other_fd, WR, 0, 1) is None
    assert lock(other, other_fd, WR, 0, 1) == AGAIN
    assert lock(other, other_fd, RD, 0, 1) == OK
    assert conflict(other, other_fd, WR, 0, 1) is None
    assert hosts.mode() == "ss"


def test_who_asks_is_told_exactly_inside_the_host(hosts: Hosts, three: list[World]) -> None:
    here, there, _ = three
    (one, fd), (asking, asking_fd), (reader, reader_fd) = here.opened(), here.opened(), there.opened()
    assert lock(one, fd, RD, 3, 4) == OK
    assert lock(reader, reader_fd, RD, 0, 10) == OK
    assert conflict(asking, asking_fd, WR, 0, 0) == Lock(RD, 3, 4, pid=one.pid)
    assert conflict(asking, asking_fd, WR, 7, 0) is None
    assert conflict(asking, asking_fd, RD, 0, 0) is None
