"""The arguments of record locks, good and bad: natively, under the shim and supervised alike."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from support.driver import OK, Driver, Fleet
from support.records import (
    GETLK,
    LAST,
    OFD,
    RD,
    SETLK,
    SETLKW,
    UN,
    WR,
    Lock,
    Stranger,
    ask,
    conflict,
    lock,
)
from support.worlds import ALL, World

WORLDS = ALL

CUR, END = os.SEEK_CUR, os.SEEK_END
OWNERS = pytest.mark.parametrize("ofd", [False, True], ids=["process", "description"])


# Where a range begins


def test_counted_from_the_position(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    stranger = Stranger(world, path)
    driver.ask("lseek", fd, 100, os.SEEK_SET)
    for start, length, expected in [
        (0, 10, (100, 10)),
        (-10, 5, (90, 5)),
        (-100, 0, (0, 0)),
        (0, -10, (90, 10)),
        (-90, -10, (0, 10)),
        (LAST - 100, 1, (LAST, 1)),
        (LAST - 100, 0, (LAST, 0)),
    ]:
        assert ask(driver, fd, SETLK, Lock(WR, start, length, CUR)).result() == OK
        place, count = expected
        if place == LAST:
            count = 0  # to the last byte is to the end
        assert stranger.locks() == [(WR, place, count)]
        driver.ask("lseek", fd, 7, CUR)  # the lock stays where it was made
        assert stranger.locks() == [(WR, place, count)]
        driver.ask("lseek", fd, -7, CUR)
        assert ask(driver, fd, SETLK, Lock(UN, start, length, CUR)).result() == OK
        assert stranger.free()


def test_counted_from_the_end(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    stranger = Stranger(world, path)
    driver.ask("ftruncate", fd, 1000)
    for start, length, expected in [
        (0, 0, (1000, 0)),
        (0, 10, (1000, 10)),
        (-10, 10, (990, 10)),
        (-10, 0, (990, 0)),
        (0, -1000, (0, 1000)),
        (-1000, 1, (0, 1)),
        (10, -5, (1005, 5)),
    ]:
        assert ask(driver, fd, SETLK, Lock(WR, start, length, END)).result() == OK
        assert stranger.locks() == [(WR, *expected)]
        stranger.driver.ask("ftruncate", stranger.fd, 2000)
        assert stranger.locks() == [(WR, *expected)], "the lock does not move with the end"
        # The same words mean another place now.
        assert ask(driver, fd, SETLK, Lock(WR, start, length, END)).result() == OK
        assert conflict(stranger.driver, stranger.fd, WR, 1000 + expected[0], 1) is not None
        stranger.driver.ask("ftruncate", stranger.fd, 1000)
        assert lock(driver, fd, UN) == OK


def test_negative_lengths(world: World) -> None:
    driver, fd = world.opened()
    stranger = Stranger(world)
    for start, length, expected in [
        (10, -5, (5, 5)),
        (10, -10, (0, 10)),
        (1, -1, (0, 1)),
        (LAST, -1, (LAST - 1, 1)),
        (LAST, -LAST, (0, LAST)),
    ]:
        assert lock(driver, fd, WR, start, length) == OK
        assert stranger.locks() == [(WR, *expected)]
        seen = conflict(stranger.driver, stranger.fd, RD, start, length)
        assert seen == Lock(WR, *expected, pid=driver.pid)
        assert lock(driver, fd, UN, start, length) == OK
        assert stranger.free()


# Bad arguments

BAD = [
    # The file has 1000 bytes, the position is 10.
    (Lock(WR, 0, 1, whence=3), errno.EINVAL),
    (Lock(WR, 0, 1, whence=4), errno.EINVAL),
    (Lock(WR, 0, 1, whence=-1), errno.EINVAL),
    (Lock(WR, 0, 1, whence=99), errno.EINVAL),
    (Lock(3, 0, 1), errno.EINVAL),
    (Lock(4, 0, 1), errno.EINVAL),
    (Lock(32, 0, 1), errno.EINVAL),
    (Lock(-1, 0, 1), errno.EINVAL),
    (Lock(WR, -1, 1), errno.EINVAL),
    (Lock(WR, -LAST - 1, 0), errno.EINVAL),
    (Lock(WR, 0, -1), errno.EINVAL),
    (Lock(WR, 5, -6), errno.EINVAL),
    (Lock(WR, LAST, -LAST - 1), errno.EINVAL),
    (Lock(WR, LAST, 2), errno.EOVERFLOW),
    (Lock(WR, LAST, LAST), errno.EOVERFLOW),
    (Lock(WR, 2, LAST), errno.EOVERFLOW),
    (Lock(WR, -11, 1, CUR), errno.EINVAL),
    (Lock(WR, LAST - 9, 1, CUR), errno.EOVERFLOW),
    (Lock(WR, LAST, 0, CUR), errno.EOVERFLOW),
    (Lock(WR, 0, -11, CUR), errno.EINVAL),
    (Lock(WR, -1001, 1, END), errno.EINVAL),
    (Lock(WR, LAST - 999, 1, END), errno.EOVERFLOW),
    (Lock(WR, 0, -1001, END), errno.EINVAL),
    (Lock(WR, 0, LAST, END), errno.EOVERFLOW),
    # The first wrong thing decides.
    (Lock(99, 0, 1, whence=99), errno.EINVAL),
    (Lock(99, LAST, 2), errno.EOVERFLOW),
    (Lock(WR, LAST, 2, whence=99), errno.EINVAL),
]
GOOD = [(LAST, 1), (LAST, 0), (1, LAST), (0, LAST), (LAST, -1), (0, 1)]


@OWNERS
def test_bad_ranges_types_and_whences(world: World, ofd: bool) -> None:
    driver, fd = world.opened()
    driver.ask("ftruncate", fd, 1000)
    driver.ask("lseek", fd, 10, os.SEEK_SET)
    assert lock(driver, fd, WR, 100, 10, ofd) == OK
    for wrong, result in BAD:
        for command in SETLK, SETLKW, GETLK:
            expected = errno.EINVAL if command == GETLK and not ofd and wrong.type == 99 else result
            assert ask(driver, fd, command + OFD * ofd, wrong).result() == expected, (command, wrong)
    assert Stranger(world).locks() == [(WR, 100, 10)]
    for start, length in GOOD:
        assert lock(driver, fd, WR, start, length, ofd) == OK
        assert lock(driver, fd, UN, start, length, ofd) == OK


def test_asking_for_no_lock(world: World, native: Driver) -> None:
    """F_GETLK with F_UNLCK is wrong; F_OFD_GETLK tells of one's own locks, since Linux 6.7."""
    driver, fd = world.opened()
    native_fd = native.open(f"/dev/shm/{os.path.basename(world.directory)}-asking")
    try:
        asked = Lock(UN, 0, 0)
        assert ask(driver, fd, GETLK, asked).result() == errno.EINVAL
        for here, here_fd in (driver, fd), (native, native_fd):
            assert lock(here, here_fd, RD, 0, 5) == OK
            assert lock(here, here_fd, RD, 5, 5, ofd=True) == OK
        calls = [ask(*each, GETLK + OFD, asked) for each in ((driver, fd), (native, native_fd))]
        results = [(call.result(), call.more()) for call in calls]
        assert results[0] == results[1]
    finally:
        os.unlink(f"/dev/shm/{os.path.basename(world.directory)}-asking")


@OWNERS
def test_the_open_mode(world: World, ofd: bool) -> None:
    """A read lock needs a descriptor for reading, a write lock one for writing; asking needs neither."""
    path = world.file()
    driver = world.start()
    for flags, kind, result in [
        (os.O_RDONLY, RD, OK),
        (os.O_RDONLY, WR, errno.EBADF),
        (os.O_WRONLY, RD, errno.EBADF),
        (os.O_WRONLY, WR, OK),
        (os.O_RDWR, RD, OK),
        (os.O_RDWR, WR, OK),
    ]:
        fd = driver.open(path, flags)
        for command in SETLK, SETLKW:
            assert ask(driver, fd, command + OFD * ofd, Lock(kind)).result() == result
            assert ask(driver, fd, command + OFD * ofd, Lock(UN)).result() == OK
        assert conflict(driver, fd, kind, ofd=ofd) is None
        # What is wrong with the range is looked at first.
        assert ask(driver, fd, SETLK + OFD * ofd, Lock(kind, -1)).result() == errno.EINVAL
        driver.close(fd)


@OWNERS
def test_bad_descriptors(world: World, ofd: bool) -> None:
    driver = world.start()
    path_only = driver.open(world.file(), os.O_PATH)
    for fd in (50, -1, 1 << 30, path_only):
        for command in GETLK, SETLK, SETLKW:
            for wanted in Lock(RD), Lock(WR), Lock(UN), Lock(99, -1, whence=99, pid=1):
                assert ask(driver, fd, command + OFD * ofd, wanted).result() == errno.EBADF
            assert driver.start("fcntl", "fcntl", fd, command + OFD * ofd, 0).result() == errno.EBADF


@OWNERS
def test_bad_addresses(world: World, ofd: bool) -> None:
    driver, fd = world.opened()
    for command in GETLK, SETLK, SETLKW:
        for address in (0, 1, 4096, -4096, -1):
            call = driver.start("fcntl", "fcntl", fd, command + OFD * ofd, address)
            assert call.result() == errno.EFAULT
    assert Stranger(world).free()


def test_the_pid_of_a_request(world: World) -> None:
    """It must be 0 with commands of descriptions, and does not matter otherwise."""
    driver, fd = world.opened()
    read_only = driver.open(world.file(), os.O_RDONLY)
    for pid in (1, -1, driver.pid):
        for command in GETLK, SETLK, SETLKW:
            assert ask(driver, fd, command + OFD, Lock(WR, pid=pid)).result() == errno.EINVAL
            assert ask(driver, fd, command, Lock(WR, pid=pid)).result() == OK
        for command in SETLK, SETLKW:
            assert ask(driver, fd, command + OFD, Lock(UN, pid=pid)).result() == errno.EINVAL
        assert ask(driver, read_only, SETLK + OFD, Lock(WR, pid=pid)).result() == errno.EBADF
        assert Stranger(world).first_pid() == driver.pid
        assert lock(driver, fd, UN) == OK


@pytest.fixture
def native() -> Iterator[Driver]:
    """A process that has nothing to do with flockshim."""
    fleet = Fleet({key: value for key, value in os.environ.items() if key != "LD_PRELOAD"})
    yield fleet.start()
    fleet.end()
