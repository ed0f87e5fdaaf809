"""Which names and kinds of files mean the same lock."""

from __future__ import annotations

import os
import socket

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN
from support.worlds import World


def test_hard_links_share_the_lock(world: World) -> None:
    path = world.file()
    other = world.directory / "link"
    os.link(path, other)
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    assert world.probe(other, SH) == BUSY
    driver.close(fd)
    assert world.free(other)


def test_symbolic_links_share_the_lock(world: World) -> None:
    path = world.file()
    other = world.directory / "symlink"
    other.symlink_to(path)
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    assert world.probe(other, SH) == BUSY


def test_a_renamed_file_keeps_its_lock(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    moved = path.rename(world.directory / "moved")
    assert world.probe(moved, SH) == BUSY
    assert driver.flock(fd, UN) == OK
    assert world.free(moved)


def test_a_new_file_of_the_same_name_is_another_lock(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    path.unlink()
    new = world.file()
    assert world.free(new)
    heir, new_fd = world.opened()
    assert heir.flock(new_fd, EX | NB) == OK
    # The unlinked file's lock is as good as before, by its last descriptor.
    again = driver.open(f"/proc/self/fd/{fd}")
    assert driver.flock(again, SH | NB) == BUSY
    assert driver.flock(fd, UN) == OK
    assert driver.flock(again, SH | NB) == OK


def test_a_file_replaced_by_rename(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    world.file("new").rename(path)
    assert world.free(path)


def test_an_unlinked_file_is_released_with_its_last_descriptor(world: World) -> None:
    """And the number that the file system gives to the next file is not taken for it."""
    path = world.file()
    driver, fd = world.opened()
    for _ in range(20):
        assert driver.flock(fd, EX) == OK
        path.unlink()
        driver.close(fd)
        fd = driver.open(path)
        assert world.free(path)


def test_directories(world: World) -> None:
    path = world.directory / "directory"
    path.mkdir()
    driver = world.start()
    fd = driver.open(path, os.O_RDONLY | os.O_DIRECTORY)
    assert driver.flock(fd, EX) == OK
    assert world.probe(path, SH) == BUSY
    assert driver.flock(fd, SH) == OK
    assert world.probe(path, SH) == OK
    driver.close(fd)
    assert world.free(path)
    path.rmdir()


def test_fifos(world: World) -> None:
    path = world.directory / "fifo"
    os.mkfifo(path)
    driver = world.start()
    fd, other = (driver.open(path, os.O_RDWR) for _ in range(2))
    assert driver.flock(fd, EX) == OK
    assert driver.flock(other, SH | NB) == BUSY
    driver.close(fd)
    assert driver.flock(other, SH | NB) == OK


def test_pipes_and_sockets(world: World) -> None:
    driver = world.start()
    ends = driver.ask("pipe")
    left, right = socket.socketpair()
    with left, right:
        for fd in (ends // 1000, ends % 1000, driver.adopt(left.fileno())):
            assert driver.flock(fd, EX | NB) == OK
            assert driver.flock(fd, UN) == OK


@pytest.mark.parametrize("device", ["/dev/null", "/proc/self/status"])
def test_other_file_systems_answer_as_they_do(world: World, device: str) -> None:
    driver = world.start()
    fd = driver.open(device, os.O_RDONLY)
    assert driver.flock(fd, SH | NB) == OK
    assert driver.flock(fd, UN) == OK
