"""Two keepers of one user, in two control groups or pid namespaces, lock against each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import emulated_world, shim_environment
from support.board import Torture
from support.driver import BUSY, EX, NB, OK, SH, UN, pass_descriptor
from support.groups import ControlGroup, PidNamespace
from support.keepers import keepers
from support.proc import await_true
from support.worlds import World

from flockshim.pytest_plugin import require


class Sides(NamedTuple):
    """Two worlds that share a directory and a rendezvous, and have a keeper each."""

    left: World
    right: World
    path: Path
    border: ControlGroup | PidNamespace


@pytest.fixture(params=["control groups", "pid namespaces"])
def sides(request: pytest.FixtureRequest, rendezvous: Path) -> Iterator[Sides]:
    left = emulated_world(request, rendezvous)
    border: ControlGroup | PidNamespace
    if request.param == "control groups":
        border = request.getfixturevalue("group")
    else:
        require(os.geteuid() == 0, "pid namespaces need root", "run the tests as root")
        border = PidNamespace()
    right = World("emulated", left.directory, left.environment, *border.prefix)
    yield Sides(left, right, left.file(), border)
    assert right.end() == ""
    assert left.end() == ""
    if isinstance(border, PidNamespace):
        border.remove()


def test_each_side_has_a_keeper(sides: Sides, rendezvous: Path) -> None:
    for world in (sides.left, sides.right):
        driver, fd = world.opened()
        assert driver.flock(fd, SH) == OK
    assert len(keepers(rendezvous)) == 2


@pytest.mark.parametrize(("held", "wanted", "result"), [(SH, SH, OK), (SH, EX, BUSY), (EX, SH, BUSY), (EX, EX, BUSY)])
def test_shared_and_exclusive(sides: Sides, held: int, wanted: int, result: int) -> None:
    for here, there in ((sides.left, sides.right), (sides.right, sides.left)):
        holder, held_fd = here.opened()
        assert holder.flock(held_fd, held) == OK
        assert there.probe(sides.path, wanted) == result
        assert holder.flock(held_fd, UN) == OK
        assert there.probe(sides.path, EX) == OK


@pytest.mark.parametrize(
    ("held", "ended"),
    [(mode, end) for mode in (SH, EX) for end in ("unlock", "close", "kill")] + [(EX, "downgrade")],
)
def test_a_waiter_on_the_other_side_is_woken(sides: Sides, held: int, ended: str) -> None:
    for here, there in ((sides.left, sides.right), (sides.right, sides.left)):
        holder, held_fd = here.opened()
        other, other_fd = there.opened()
        assert holder.flock(held_fd, held) == OK
        call = other.flock_later(other_fd, SH if held == EX else EX)
        there.await_blocked(call)
        if ended == "unlock":
            assert holder.flock(held_fd, UN) == OK
        elif ended == "close":
            holder.close(held_fd)
        elif ended == "kill":
            holder.kill()
        else:
            assert holder.flock(held_fd, SH) == OK
        assert call.result() == OK
        assert other.flock(other_fd, UN) == OK
        if ended == "downgrade":
            assert holder.flock(held_fd, UN) == OK


def test_an_upgrade_against_the_other_side(sides: Sides) -> None:
    left, left_fd = sides.left.opened()
    right, right_fd = sides.right.opened()
    assert left.flock(left_fd, SH) == OK
    assert right.flock(right_fd, SH) == OK
    assert right.flock(right_fd, EX | NB) == BUSY
    assert left.flock(left_fd, EX | NB) == OK
    assert sides.right.probe(sides.path, SH) == BUSY


def test_a_lock_that_is_closed_on_one_side_can_be_tried_on_the_other(sides: Sides) -> None:
    """The knock of one keeper makes the other look whether its holders are still there.

    Its answer may come after the try, so tries go on; natively the first one succeeds.
    """
    for here, there in ((sides.left, sides.right), (sides.right, sides.left)):
        holder, held_fd = here.opened()
        assert holder.flock(held_fd, EX) == OK
        assert there.probe(sides.path, SH) == BUSY
        holder.close(held_fd)
        await_true(lambda: there.free(sides.path), "the closed lock to be free")  # noqa: B023


def test_killing_one_side_whole_frees_only_its_locks(sides: Sides) -> None:
    mine = sides.left.file("mine")
    left, right = sides.left.start(), sides.right.start()
    assert left.flock(left.open(mine), EX) == OK
    assert right.flock(right.open(sides.path), EX) == OK
    waiting = sides.left.start()
    call = waiting.flock_later(waiting.open(sides.path), EX)
    sides.left.await_blocked(call)
    sides.border.kill()
    assert call.result() == OK
    assert sides.left.probe(mine, SH) == BUSY


def test_a_description_that_has_moved_to_the_other_side(sides: Sides) -> None:
    """Both keepers' programs have it open: only the last close ends the lock."""
    left, left_fd = sides.left.opened()
    right = sides.right.start()
    fd = pass_descriptor(left, left_fd, right)
    assert left.flock(left_fd, EX) == OK
    left.kill()
    assert sides.left.probe(sides.path, SH) == BUSY
    right.close(fd)
    await_true(lambda: sides.left.free(sides.path), "the last descriptor's lock to be free")


def test_neither_side_starves(sides: Sides, rendezvous: Path, tmp_path: Path) -> None:
    """One process gets its turns though four on the other side never stop asking."""
    for hogs, guest in ((sides.left, sides.right), (sides.right, sides.left)):
        torture = Torture(sides.path, tmp_path / "board", shim_environment(rendezvous))
        try:
            for seat in range(1, 5):
                torture.sit(seat, 1 << 60, prefix=hogs.prefix)
            torture.await_done(20, 60)
            torture.sit(0, 15, prefix=guest.prefix)
            assert torture.seats[0].wait(60) == 0
            assert torture.failures() == ""
        finally:
            torture.end()
