"""A process is moved to another control group while it holds or waits: batch systems do that."""

from __future__ import annotations

from support.driver import BUSY, EX, NB, OK, SH, UN, Driver
from support.groups import ControlGroup
from support.worlds import World


def _move(driver: Driver, group: ControlGroup) -> None:
    (group.path / "cgroup.procs").write_text(str(driver.pid))


def test_it_can_unlock_afterwards(fresh_world: World, group: ControlGroup) -> None:
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    _move(driver, group)
    assert fresh_world.probe(fresh_world.file(), SH) == BUSY
    assert driver.flock(fd, UN) == OK
    assert fresh_world.free(fresh_world.file())


def test_another_program_can_unlock_afterwards(fresh_world: World, group: ControlGroup) -> None:
    """One that knows no keeper yet, and there is none in its group."""
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    _move(driver, group)
    driver.exec()
    assert driver.flock(fd, UN) == OK
    assert fresh_world.free(fresh_world.file())


def test_it_can_convert_afterwards(fresh_world: World, group: ControlGroup) -> None:
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    _move(driver, group)
    assert driver.flock(fd, SH | NB) == OK
    assert fresh_world.probe(fresh_world.file(), SH) == OK
    assert driver.flock(fd, EX | NB) == OK
    assert fresh_world.probe(fresh_world.file(), SH) == BUSY


def test_a_child_that_is_moved_shares_the_lock(fresh_world: World, group: ControlGroup) -> None:
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    child = driver.fork()
    _move(child, group)
    assert child.flock(fd, EX | NB) == OK
    driver.kill()
    assert fresh_world.probe(fresh_world.file(), SH) == BUSY
    child.kill()


def test_a_waiter_that_is_moved_gets_its_lock(fresh_world: World, group: ControlGroup) -> None:
    holder, held_fd = fresh_world.opened()
    other, other_fd = fresh_world.opened()
    assert holder.flock(held_fd, EX) == OK
    call = other.flock_later(other_fd, EX)
    fresh_world.await_blocked(call)
    _move(other, group)
    assert holder.flock(held_fd, UN) == OK
    assert call.result() == OK
    assert fresh_world.probe(fresh_world.file(), SH) == BUSY
    assert other.flock(other_fd, UN) == OK
    assert fresh_world.free(fresh_world.file())
