"""Whose a record lock is, and how long it lasts: natively, under the shim and supervised alike.

A lock of fcntl(2)'s older commands is the process's, one of F_OFD_SETLK the open file description's.
"""

from __future__ import annotations

import os

import pytest
from support.driver import OK, Driver, pass_descriptor
from support.proc import await_true
from support.records import AGAIN, RD, UN, WR, Stranger, await_waiting, conflict, lock, lock_later
from support.worlds import ALL, BY_KEEPER, ON_KERNEL, World

WORLDS = ALL

OWNERS = pytest.mark.parametrize("ofd", [False, True], ids=["process", "description"])
BY_KERNEL = ["native", ON_KERNEL]


# In one process


def test_descriptors_of_one_process(world: World) -> None:
    """They are one owner by the older commands, and one each by the newer ones."""
    driver, fd = world.opened()
    again = driver.open(world.file())
    assert lock(driver, fd, WR) == OK
    assert lock(driver, again, WR) == OK
    assert lock(driver, again, UN, 0, 5) == OK
    assert Stranger(world).locks() == [(WR, 5, 0)]
    assert lock(driver, again, UN) == OK
    assert lock(driver, fd, WR, ofd=True) == OK
    assert lock(driver, again, RD, ofd=True) == AGAIN
    assert lock(driver, again, UN, ofd=True) == OK
    assert conflict(driver, again, RD, ofd=True) == (WR, 0, 0, os.SEEK_SET, -1)


def test_the_two_kinds_conflict_in_one_process(world: World) -> None:
    """By one descriptor too."""
    driver, fd = world.opened()
    for first, second in (False, True), (True, False):
        assert lock(driver, fd, WR, 0, 10, ofd=first) == OK
        assert lock(driver, fd, RD, 5, 10, ofd=second) == AGAIN
        seen = conflict(driver, fd, RD, 5, 10, ofd=second)
        assert seen == (WR, 0, 10, os.SEEK_SET, -1 if first else driver.pid)
        assert lock(driver, fd, UN, 0, 10, ofd=second) == OK
        assert lock(driver, fd, RD, 5, 10, ofd=second) == AGAIN
        assert lock(driver, fd, RD, 0, 10, ofd=first) == OK
        assert lock(driver, fd, RD, 5, 10, ofd=second) == OK
        for kind in first, second:
            assert lock(driver, fd, UN, ofd=kind) == OK
    assert Stranger(world).free()


def test_threads_are_one_owner(world: World) -> None:
    driver, fd = world.opened()
    thread = driver.thread()
    assert lock(thread, fd, WR, 0, 10) == OK
    assert lock(driver, fd, WR, 5, 10) == OK
    stranger = Stranger(world)
    assert stranger.locks() == [(WR, 0, 15)]
    assert stranger.first_pid() == driver.pid
    assert lock(driver, fd, UN, 0, 5) == OK
    thread.start("endthread").result()
    await_true(lambda: not os.path.exists(f"/proc/{driver.pid}/task/{thread.tid}"), "the thread to end")
    assert stranger.locks() == [(WR, 5, 10)]
    driver.close(fd)
    assert stranger.free()


@OWNERS
def test_the_first_thread_ends(world: World, ofd: bool) -> None:
    driver, fd = world.opened()
    assert lock(driver, fd, WR, 0, 10, ofd) == OK
    driver.start("mainexit").result()
    assert lock(driver, fd, RD, 0, 5, ofd) == OK
    stranger = Stranger(world)
    assert stranger.locks() == [(RD, 0, 5), (WR, 5, 5)]
    assert stranger.first_pid() == (-1 if ofd else driver.pid)
    driver.kill()
    assert stranger.free()


# Fork, and passing


def test_a_child_has_none_of_the_process_s_locks(world: World) -> None:
    parent, fd = world.opened()
    assert lock(parent, fd, WR, 0, 10) == OK
    child = parent.fork()
    assert conflict(parent, fd, WR) is None
    assert conflict(child, fd, WR) == (WR, 0, 10, os.SEEK_SET, parent.pid)
    assert lock(child, fd, RD, 5, 1) == AGAIN
    assert lock(child, fd, UN) == OK
    stranger = Stranger(world)
    assert stranger.locks() == [(WR, 0, 10)]
    assert lock(child, fd, WR, 10, 10) == OK
    assert conflict(parent, fd, WR) == (WR, 10, 10, os.SEEK_SET, child.pid)
    child.close(fd)
    assert stranger.locks() == [(WR, 0, 10)]
    grandchild = child.fork()
    child.exit()
    grandchild.kill()
    assert stranger.locks() == [(WR, 0, 10)]


@pytest.mark.parametrize("ended", ["exit", "kill"])
def test_a_child_does_not_keep_the_process_s_locks(world: World, ended: str) -> None:
    parent, fd = world.opened()
    assert lock(parent, fd, WR) == OK
    child = parent.fork()
    getattr(parent, ended)()
    stranger = Stranger(world)
    assert stranger.free()
    assert lock(child, fd, WR) == OK
    assert stranger.first_pid() == child.pid


@pytest.mark.parametrize("ended", ["exit", "kill"])
def test_a_child_shares_the_description_s_locks(world: World, ended: str) -> None:
    parent, fd = world.opened()
    assert lock(parent, fd, WR, 0, 10, ofd=True) == OK
    child = parent.fork()
    stranger = Stranger(world)
    assert conflict(child, fd, WR, ofd=True) is None
    assert lock(child, fd, UN, 0, 5, ofd=True) == OK
    assert lock(child, fd, WR, 20, 5, ofd=True) == OK
    assert lock(parent, fd, RD, 20, 5, ofd=True) == OK
    assert stranger.locks() == [(WR, 5, 5), (RD, 20, 5)]
    getattr(parent, ended)()
    assert stranger.locks() == [(WR, 5, 5), (RD, 20, 5)]
    child.close(fd)
    assert stranger.free()


def test_a_child_that_opens_anew(world: World) -> None:
    parent, fd = world.opened()
    child = parent.fork()
    again = child.open(world.file())
    assert lock(parent, fd, WR, 0, 1, ofd=True) == OK
    assert lock(child, again, WR, 0, 1, ofd=True) == AGAIN
    assert lock(child, fd, WR, 0, 1, ofd=True) == OK
    assert lock(child, fd, WR, 0, 1) == AGAIN


def test_a_passed_descriptor(world: World) -> None:
    sender, fd = world.opened()
    receiver = world.start()
    assert lock(sender, fd, WR, 0, 10) == OK
    assert lock(sender, fd, WR, 20, 10, ofd=True) == OK
    there = pass_descriptor(sender, fd, receiver)
    assert lock(receiver, there, RD, 0, 10) == AGAIN
    assert lock(receiver, there, RD, 20, 10, ofd=True) == OK
    sender.kill()
    assert Stranger(world).locks() == [(RD, 20, 10)]
    assert lock(receiver, there, WR, 0, 10) == OK
    receiver.close(there)
    assert Stranger(world).free()


# Exec


@OWNERS
def test_exec_keeps_locks(world: World, ofd: bool) -> None:
    driver, fd = world.opened()
    assert lock(driver, fd, WR, 0, 10, ofd) == OK
    driver.exec()
    stranger = Stranger(world)
    assert stranger.locks() == [(WR, 0, 10)]
    assert stranger.first_pid() == (-1 if ofd else driver.pid)
    assert lock(driver, fd, UN, 0, 5, ofd) == OK
    assert lock(driver, fd, RD, 20, 5, ofd) == OK
    assert stranger.locks() == [(WR, 5, 5), (RD, 20, 5)]
    driver.kill()
    assert stranger.free()


@OWNERS
def test_exec_ends_the_locks_of_what_it_closes(world: World, ofd: bool) -> None:
    driver = world.start()
    fd = driver.open(world.file(), os.O_RDWR | os.O_CLOEXEC)
    assert lock(driver, fd, WR, 0, 10, ofd) == OK
    driver.exec()
    assert Stranger(world).free()


# The end


@OWNERS
@pytest.mark.parametrize("ended", ["exit", "kill"])
def test_the_end_of_the_holder(world: World, ofd: bool, ended: str) -> None:
    driver, fd = world.opened()
    other, other_fd = world.opened()
    assert lock(driver, fd, WR, 0, 10, ofd) == OK
    call = lock_later(other, other_fd, WR, 0, 5, ofd)
    await_waiting(world, call)
    getattr(driver, ended)()
    assert call.result() == OK
    assert Stranger(world).locks() == [(WR, 0, 5)]


CLOSING = {
    "close": lambda driver, fd: driver.close(fd),
    "close_range": lambda driver, fd: driver.ask("closerange", fd, fd),
    "fclose": lambda driver, fd: driver.ask("fclose", fd),
    "dup2": lambda driver, fd: driver.ask("dup2", driver.open("/dev/null", os.O_RDWR), fd),
}


@OWNERS
@pytest.mark.parametrize("way", CLOSING)
def test_closing_the_descriptor(world: World, ofd: bool, way: str) -> None:
    driver, fd = world.opened()
    assert lock(driver, fd, WR, 0, 10, ofd) == OK
    CLOSING[way](driver, fd)
    assert Stranger(world).free()


@OWNERS
def test_closing_wakes_who_waits(world: World, ofd: bool) -> None:
    driver, fd = world.opened()
    other, other_fd = world.opened()
    assert lock(driver, fd, WR, 0, 10, ofd) == OK
    call = lock_later(other, other_fd, RD, 9, 1, ofd)
    await_waiting(world, call)
    driver.close(fd)
    assert call.result() == OK


def test_closing_and_opening_the_same_number(world: World) -> None:
    driver, fd = world.opened()
    for _ in range(5):
        assert lock(driver, fd, WR, 0, 10) == OK
        driver.close(fd)
        assert driver.open(world.file()) == fd
        assert Stranger(world).free()
    assert lock(driver, fd, WR, 20, 10) == OK
    assert Stranger(world).locks() == [(WR, 20, 10)]


def test_a_duplicate_does_not_keep_the_process_s_locks(world: World) -> None:
    driver, fd = world.opened()
    again = driver.ask("dup", fd)
    assert lock(driver, fd, WR, 0, 10) == OK
    driver.close(fd)
    assert Stranger(world).free()
    assert lock(driver, again, WR, 0, 10) == OK


def test_a_duplicate_keeps_the_description_s_locks(world: World) -> None:
    driver, fd = world.opened()
    again = driver.ask("dup", fd)
    stranger = Stranger(world)
    assert lock(driver, fd, WR, 0, 10, ofd=True) == OK
    assert lock(driver, again, RD, 5, 10, ofd=True) == OK
    assert stranger.locks() == [(WR, 0, 5), (RD, 5, 10)]
    driver.close(fd)
    assert stranger.locks() == [(WR, 0, 5), (RD, 5, 10)]
    driver.close(again)
    assert stranger.free()


def test_closing_ends_all_locks_of_the_process(world: World) -> None:
    """Those that it took by other descriptors too, once it closes one by which it took any."""
    driver, fd = world.opened()
    another = driver.open(world.file())
    stranger = Stranger(world)
    elsewhere = driver.open(world.file("another"))
    assert lock(driver, fd, WR, 0, 10) == OK
    assert lock(driver, another, WR, 20, 10) == OK
    assert lock(driver, elsewhere, WR, 0, 10) == OK
    assert lock(driver, fd, WR, 40, 10, ofd=True) == OK
    driver.close(another)
    assert stranger.locks() == [(WR, 40, 10)]
    assert Stranger(world, world.file("another")).locks() == [(WR, 0, 10)]
    assert lock(driver, fd, WR, 0, 10) == OK
    driver.close(fd)
    assert stranger.free()


def test_closing_an_unlocked_descriptor_of_another_process(world: World) -> None:
    driver, fd = world.opened()
    assert lock(driver, fd, WR, 0, 10) == OK
    other, other_fd = world.opened()
    other.close(other_fd)
    assert Stranger(world).locks() == [(WR, 0, 10)]


def _closing_another(driver: Driver, fd: int, way: str, world: World) -> None:
    other = driver.ask("dup", fd) if way == "duplicate" else driver.open(world.file())
    driver.close(other)


@pytest.mark.parametrize("way", ["duplicate", "opened anew"])
@pytest.mark.parametrize("world", BY_KERNEL, indirect=True)
def test_closing_another_descriptor_in_the_kernel(world: World, way: str) -> None:
    driver, fd = world.opened()
    assert lock(driver, fd, WR, 0, 10) == OK
    _closing_another(driver, fd, way, world)
    assert Stranger(world).free()


@pytest.mark.parametrize("way", ["duplicate", "opened anew"])
@pytest.mark.parametrize("world", BY_KEEPER, indirect=True)
def test_closing_another_descriptor_at_the_keeper(world: World, way: str) -> None:
    """The documented difference: the locks stay, and end with the descriptor by which they were taken."""
    driver, fd = world.opened()
    assert lock(driver, fd, WR, 0, 10) == OK
    _closing_another(driver, fd, way, world)
    stranger = Stranger(world)
    assert stranger.locks() == [(WR, 0, 10)]
    driver.close(fd)
    assert stranger.free()
