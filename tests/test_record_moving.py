"""A process with record locks is moved to another control group while it holds or waits: batch systems do that."""

from __future__ import annotations

import pytest
from support.driver import OK, Driver
from support.groups import ControlGroup
from support.records import AGAIN, RD, UN, WR, Stranger, await_waiting, lock, lock_later
from support.worlds import World

KINDS = pytest.mark.parametrize("ofd", [False, True], ids=["process", "description"])


def _move(driver: Driver, group: ControlGroup) -> None:
    (group.path / "cgroup.procs").write_text(str(driver.pid))


@KINDS
def test_a_moved_process_keeps_and_changes_its_locks(fresh_world: World, group: ControlGroup, ofd: bool) -> None:
    driver, fd = fresh_world.opened()
    stranger = Stranger(fresh_world)
    assert lock(driver, fd, WR, 0, 4, ofd) == OK
    _move(driver, group)
    assert stranger.bytes(5) == "WWWW."
    assert lock(driver, fd, RD, 2, 1, ofd) == OK
    assert lock(driver, fd, UN, 0, 1, ofd) == OK
    assert lock(driver, fd, WR, 6, 1, ofd) == OK
    assert stranger.bytes(8) == ".WrW..W."
    assert stranger.first_pid() == (-1 if ofd else driver.pid)
    driver.exec()
    assert lock(driver, fd, UN, ofd=ofd) == OK
    assert stranger.free()


@KINDS
def test_a_moved_process_locks_another_file(fresh_world: World, group: ControlGroup, ofd: bool) -> None:
    """With whichever keeper."""
    driver, fd = fresh_world.opened()
    other = driver.open(fresh_world.file("other"))
    assert lock(driver, fd, WR, 0, 1, ofd) == OK
    _move(driver, group)
    assert lock(driver, other, WR, 0, 1, ofd) == OK
    strangers = [Stranger(fresh_world), Stranger(fresh_world, fresh_world.file("other"))]
    assert [stranger.bytes(2) for stranger in strangers] == ["W.", "W."]
    driver.kill()
    assert all(stranger.free() for stranger in strangers)


def test_a_waiter_that_is_moved_gets_its_lock(fresh_world: World, group: ControlGroup) -> None:
    (holder, held_fd), (other, fd) = fresh_world.opened(), fresh_world.opened()
    assert lock(holder, held_fd, WR, 0, 2) == OK
    call = lock_later(other, fd, WR, 1, 2)
    await_waiting(fresh_world, call)
    _move(other, group)
    assert lock(holder, held_fd, UN) == OK
    assert call.result() == OK
    stranger = Stranger(fresh_world)
    assert stranger.bytes(4) == ".WW."
    assert lock(other, fd, UN) == OK
    assert stranger.free()


def test_a_childs_locks_are_not_its_parents(fresh_world: World, group: ControlGroup) -> None:
    """In another job too they are of another process, though the description is one."""
    driver, fd = fresh_world.opened()
    assert lock(driver, fd, WR, 0, 2) == OK
    child = driver.fork()
    _move(child, group)
    assert lock(child, fd, WR, 1, 1) == AGAIN
    assert lock(child, fd, WR, 2, 1) == OK
    stranger = Stranger(fresh_world)
    assert stranger.first_pid() == driver.pid
    child.kill()
    assert stranger.bytes(4) == "WW.."
