"""Record locks of two keepers of one user, in two control groups or pid namespaces: exact between them, to the byte."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import emulated_world
from support.driver import BUSY, EX, OK, Driver, pass_descriptor
from support.driver import SH as FLOCK_SH
from support.groups import ControlGroup, PidNamespace
from support.keepers import Keeper, keepers
from support.proc import await_end, await_true
from support.records import (
    AGAIN,
    GETLK,
    RD,
    SETLK,
    UN,
    WR,
    Lock,
    Stranger,
    ask,
    await_waiting,
    conflict,
    got,
    lock,
    lock_later,
)
from support.worlds import World

from flockshim.pytest_plugin import require

KINDS = pytest.mark.parametrize("ofd", [False, True], ids=["process", "description"])


class Sides(NamedTuple):
    """Two worlds that share a directory and a rendezvous, and have a keeper each."""

    left: World
    right: World
    border: ControlGroup | PidNamespace

    def both_ways(self) -> list[tuple[World, World]]:
        return [(self.left, self.right), (self.right, self.left)]


def _sides(request: pytest.FixtureRequest, rendezvous: Path, border: ControlGroup | PidNamespace) -> Iterator[Sides]:
    left = emulated_world(request, rendezvous)
    right = World("emulated", left.directory, left.environment, *border.prefix)
    yield Sides(left, right, border)
    assert right.end() == ""
    assert left.end() == ""


@pytest.fixture
def jobs(request: pytest.FixtureRequest, rendezvous: Path, group: ControlGroup) -> Iterator[Sides]:
    """Two control groups."""
    yield from _sides(request, rendezvous, group)


@pytest.fixture(params=["control groups", "pid namespaces"])
def sides(request: pytest.FixtureRequest, rendezvous: Path) -> Iterator[Sides]:
    if request.param == "control groups":
        yield from _sides(request, rendezvous, request.getfixturevalue("group"))
        return
    require(os.geteuid() == 0, "pid namespaces need root", "run the tests as root")
    border = PidNamespace()
    yield from _sides(request, rendezvous, border)
    border.remove()


# Conflicts


@KINDS
def test_ranges_to_the_byte(sides: Sides, rendezvous: Path, ofd: bool) -> None:
    for here, there in sides.both_ways():
        holder, fd = here.opened()
        stranger = Stranger(there)
        assert lock(holder, fd, WR, 1, 2, ofd) == OK
        assert lock(holder, fd, RD, 2, 2, ofd) == OK
        assert stranger.bytes(5) == ".Wrr."
        assert lock(stranger.driver, stranger.fd, WR, 4, 0) == OK
        assert lock(holder, fd, WR, 3, 2, ofd) == AGAIN
        assert lock(holder, fd, WR, 3, 1, ofd) == OK
        assert lock(stranger.driver, stranger.fd, UN, 4, 0) == OK
        assert lock(holder, fd, UN, 2, 1, ofd) == OK
        assert stranger.bytes(5) == ".W.W."
        holder.close(fd)
        await_true(stranger.free, "the closed descriptor's locks to be free")
    assert len(keepers(rendezvous)) == 2


@KINDS
def test_readers_on_both_sides(sides: Sides, ofd: bool) -> None:
    for here, there in sides.both_ways():
        (one, fd), (other, other_fd) = here.opened(), there.opened()
        assert lock(one, fd, RD, 0, 10, ofd) == OK
        assert lock(other, other_fd, RD, 5, 10, ofd) == OK
        assert lock(one, fd, WR, 0, 10, ofd) == AGAIN
        assert lock(one, fd, WR, 0, 5, ofd) == OK
        assert lock(other, other_fd, WR, 10, 5, ofd) == OK
        assert lock(other, other_fd, RD, 4, 1, ofd) == AGAIN
        for driver, descriptor in (one, fd), (other, other_fd):
            driver.close(descriptor)


def test_whose_it_is(jobs: Sides) -> None:
    for here, there in jobs.both_ways():
        (holder, fd), (other, other_fd) = here.opened(), there.opened()
        description = here.start()
        assert lock(holder, fd, WR, 7, 3) == OK
        assert lock(description, description.open(here.file()), RD, 20, 0, ofd=True) == OK
        for ofd in False, True:
            assert conflict(other, other_fd, RD, ofd=ofd) == Lock(WR, 7, 3, pid=holder.pid)
            assert conflict(other, other_fd, WR, 15, 0, ofd=ofd) == Lock(RD, 20, 0, pid=-1)
            assert conflict(other, other_fd, RD, 15, 0, ofd=ofd) is None
            assert conflict(other, other_fd, WR, 10, 10, ofd=ofd) is None
        holder.kill()
        description.kill()


def test_flock_is_another_lock(jobs: Sides) -> None:
    for here, there in jobs.both_ways():
        (holder, fd), (other, other_fd) = here.opened(), there.opened()
        assert lock(holder, fd, WR) == OK
        assert other.flock(other_fd, EX) == OK
        assert here.probe(here.file(), FLOCK_SH) == BUSY
        assert lock(other, other_fd, RD) == AGAIN
        holder.kill()
        other.kill()


# The end of a lock


@KINDS
def test_refused_and_free_as_soon_as_the_holder_is_killed(sides: Sides, ofd: bool) -> None:
    """The first try after the death has it: whoever refuses has asked the other keeper whether its holders live."""
    for here, there in sides.both_ways():
        holder, fd = here.opened()
        other, other_fd = there.opened()
        assert lock(holder, fd, WR, 0, 10, ofd) == OK
        assert lock(other, other_fd, RD, 9, 1, ofd) == AGAIN
        holder.kill()
        assert lock(other, other_fd, WR, 0, 10, ofd) == OK
        other.close(other_fd)


@KINDS
def test_free_as_soon_as_the_holder_has_closed_it(sides: Sides, ofd: bool) -> None:
    for here, there in sides.both_ways():
        holder, fd = here.opened()
        other, other_fd = there.opened()
        assert lock(holder, fd, WR, 0, 10, ofd) == OK
        holder.close(fd)
        assert conflict(other, other_fd, WR, ofd=ofd) is None
        assert lock(holder, holder.open(here.file()), WR, 0, 10, ofd) == OK
        holder.exit()
        assert lock(other, other_fd, WR, 0, 10, ofd) == OK
        other.close(other_fd)


@pytest.mark.parametrize("ended", ["unlock", "part", "downgrade", "close", "kill"])
@KINDS
def test_a_waiter_on_the_other_side_is_woken(jobs: Sides, ended: str, ofd: bool) -> None:
    (holder, fd), (other, other_fd) = jobs.left.opened(), jobs.right.opened()
    assert lock(holder, fd, WR, 0, 10, ofd) == OK
    call = lock_later(other, other_fd, RD, 9, 5, ofd)
    await_waiting(jobs.right, call)
    if ended == "unlock":
        assert lock(holder, fd, UN, ofd=ofd) == OK
    elif ended == "part":
        # What it unlocks first concerns nobody.
        assert lock(holder, fd, UN, 0, 5, ofd) == OK
        await_waiting(jobs.right, call)
        assert lock(holder, fd, UN, 9, 1, ofd) == OK
    elif ended == "downgrade":
        assert lock(holder, fd, RD, 9, 1, ofd) == OK
    elif ended == "close":
        holder.close(fd)
    else:
        holder.kill()
    assert call.result() == OK


@pytest.mark.parametrize("kind", [UN, RD], ids=["unlock", "downgrade"])
def test_a_waiter_is_told_at_once(jobs: Sides, kind: int) -> None:
    """And not found by a keeper that looks around once a second. The quickest of several, on however slow a machine."""
    (holder, fd), (other, other_fd) = jobs.left.opened(), jobs.right.opened()
    seconds = []
    for _ in range(4):
        assert lock(holder, fd, WR, 0, 1) == OK
        call = lock_later(other, other_fd, RD, 0, 1)
        await_waiting(jobs.right, call)
        begin = time.monotonic()
        assert lock(holder, fd, kind, 0, 1) == OK
        assert call.result() == OK
        seconds.append(time.monotonic() - begin)
        assert lock(other, other_fd, UN, 0, 1) == OK
    assert min(seconds) < 0.5


def test_waiters_on_both_sides_of_different_ranges(jobs: Sides) -> None:
    holder, fd = jobs.left.opened()
    assert lock(holder, fd, WR, 0, 10) == OK
    waiting = []
    for place in range(4):
        world = (jobs.left, jobs.right)[place % 2]
        driver, other_fd = world.opened()
        waiting.append((world, lock_later(driver, other_fd, WR, place, 1)))
    left = {0, 1, 2, 3}
    for place in 2, 1, 3, 0:
        for world in jobs.left, jobs.right:
            await_waiting(world, *(waiting[number][1] for number in left if waiting[number][0] is world))
        assert lock(holder, fd, UN, place, 1) == OK
        assert waiting[place][1].result() == OK
        left.remove(place)


@KINDS
def test_two_that_wait_for_each_other(jobs: Sides, ofd: bool) -> None:
    """A cycle of two keepers nobody sees; whoever is killed lets the other go on."""
    (left, left_fd), (right, right_fd) = jobs.left.opened(), jobs.right.opened()
    assert lock(left, left_fd, WR, 0, 1, ofd) == OK
    assert lock(right, right_fd, WR, 1, 1, ofd) == OK
    first = lock_later(left, left_fd, WR, 1, 1, ofd)
    await_waiting(jobs.left, first)
    second = lock_later(right, right_fd, WR, 0, 1, ofd)
    await_waiting(jobs.right, second)
    await_waiting(jobs.left, first)
    right.kill()
    assert first.result() == OK
    assert Stranger(jobs.right).bytes(3) == "WW."


# Keepers that die, and one that is stopped


def _held_by_both(jobs: Sides) -> tuple[Driver, Driver, dict[str, Keeper]]:
    """Bytes 0 to 9 of a process on the left and 10 to 19 of one on the right; the keeper of each."""
    found: dict[str, Keeper] = {}
    drivers = []
    for name, world, start in ("left", jobs.left, 0), ("right", jobs.right, 10):
        driver, fd = world.opened()
        assert lock(driver, fd, WR, start, 5) == OK
        assert lock(driver, fd, RD, start + 5, 5) == OK
        directory = world.environment["FLOCKSHIM_DIR"]
        await_true(lambda: len(keepers(directory)) == len(found) + 1, "the keeper to be complete")  # noqa: B023
        (found[name],) = set(keepers(directory)) - set(found.values())
        drivers.append(driver)
    return drivers[0], drivers[1], found


def _kill(*pids: int) -> None:
    """All of them, and none gets to replace another."""
    for which in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, which)
    for pid in pids:
        await_end(pid)


@pytest.mark.parametrize("half", ["worker", "standby"])
def test_locks_survive_the_death_of_one_half(jobs: Sides, rendezvous: Path, half: str) -> None:
    left, right, found = _held_by_both(jobs)
    _kill(getattr(found["left"], half))
    for world in jobs.left, jobs.right:
        assert Stranger(world).bytes(21) == "WWWWWrrrrrWWWWWrrrrr."
    await_true(lambda: len(keepers(rendezvous)) == 2, "both keepers to be complete")
    assert set(keepers(rendezvous)) != set(found.values())
    for world, holder, place in (jobs.right, left, 0), (jobs.left, right, 10):
        other, fd = world.opened()
        assert conflict(other, fd, WR, place, 1) == Lock(WR, place, 5, pid=holder.pid)
        holder.kill()
        assert lock(other, fd, WR, place, 10) == OK


def test_a_waiter_survives_the_death_of_either_worker(jobs: Sides) -> None:
    left, _, found = _held_by_both(jobs)
    waiting, fd = jobs.right.opened()
    call = lock_later(waiting, fd, WR, 0, 10)
    await_waiting(jobs.right, call)
    for name, world in ("left", jobs.left), ("right", jobs.right):
        _kill(found[name].worker)
        world.round_trip()
        await_waiting(jobs.right, call)
    left.kill()
    assert call.result() == OK


def test_a_keeper_killed_whole_loses_only_its_own(jobs: Sides) -> None:
    _, right, found = _held_by_both(jobs)
    waiting, fd = jobs.left.opened()
    call = lock_later(waiting, fd, WR, 10, 1)
    await_waiting(jobs.left, call)
    _kill(*found["right"])
    assert call.result() == OK
    assert Stranger(jobs.right).bytes(21) == "WWWWWrrrrrW.........."
    right.kill()
    assert Stranger(jobs.left).bytes(21) == "WWWWWrrrrrW.........."


def test_a_job_killed_whole_frees_only_its_locks(jobs: Sides) -> None:
    left, _, _ = _held_by_both(jobs)
    waiting, fd = jobs.left.opened()
    call = lock_later(waiting, fd, WR, 10, 10)
    await_waiting(jobs.left, call)
    jobs.border.kill()
    assert call.result() == OK
    stranger = Stranger(jobs.left)
    assert stranger.bytes(21) == "WWWWWrrrrrWWWWWWWWWW."
    assert stranger.first_pid() == left.pid


def test_a_stopped_keeper_holds_up_nobody_for_long(jobs: Sides) -> None:
    """What it has locked stays locked, since nobody can ask whether the holder lives."""
    left, _, found = _held_by_both(jobs)
    (refused, refused_fd), (asking, asking_fd), (other, other_fd) = (jobs.left.opened() for _ in range(3))
    os.kill(found["right"].worker, signal.SIGSTOP)
    try:
        tries = ask(refused, refused_fd, SETLK, Lock(WR, 12, 1))
        asks = ask(asking, asking_fd, GETLK, Lock(WR, 12, 1))
        assert lock(other, other_fd, WR, 30, 10) == OK
        assert lock(other, other_fd, WR, 0, 1) == AGAIN
        assert conflict(other, other_fd, WR, 5, 1) == Lock(RD, 5, 5, pid=left.pid)
        assert tries.result() == AGAIN
        assert got(asks)[:3] == Lock(WR, 10, 5)[:3]
        assert lock(other, other_fd, RD, 15, 5) == OK
    finally:
        os.kill(found["right"].worker, signal.SIGCONT)
    jobs.border.kill()
    assert lock(other, other_fd, WR, 10, 10) == OK


# A description on both sides


def test_a_description_of_both_jobs(jobs: Sides) -> None:
    """Both keepers' programs have it open, and are one owner: only the last close ends the lock."""
    left, left_fd = jobs.left.opened()
    right = jobs.right.start()
    fd = pass_descriptor(left, left_fd, right)
    assert lock(left, left_fd, WR, 0, 4, ofd=True) == OK
    assert lock(right, fd, UN, 1, 1, ofd=True) == OK
    assert lock(right, fd, RD, 2, 1, ofd=True) == OK
    assert lock(right, fd, WR, 6, 1, ofd=True) == OK
    strangers = [Stranger(world) for world in (jobs.left, jobs.right)]
    assert [stranger.bytes(8) for stranger in strangers] == ["W.rW..W."] * 2
    left.kill()
    assert [stranger.bytes(8) for stranger in strangers] == ["W.rW..W."] * 2
    right.close(fd)
    await_true(lambda: all(stranger.free() for stranger in strangers), "the closed description's locks to be free")


def test_a_description_open_in_both_namespaces(sides: Sides) -> None:
    left, left_fd = sides.left.opened()
    right = sides.right.start()
    fd = pass_descriptor(left, left_fd, right)
    assert lock(left, left_fd, WR, 0, 4, ofd=True) == OK
    left.kill()
    stranger = Stranger(sides.left)
    assert stranger.bytes(5) == "WWWW."
    right.close(fd)
    await_true(stranger.free, "the closed description's locks to be free")
