"""What fcntl(2) promises about record locks, call by call: natively, under the shim and supervised alike.

What may be asked for: test_record_arguments.py. Whose a lock is, how long it lasts and who waits for it:
test_record_owners.py and test_record_waits.py.
"""

from __future__ import annotations

import errno
import os

import pytest
from support.driver import BUSY, EX, NB, OK, Driver
from support.records import (
    AGAIN,
    GETLK,
    LAST,
    OFD,
    RD,
    UN,
    WR,
    Lock,
    Stranger,
    ask,
    conflict,
    got,
    lock,
)
from support.worlds import ALL, World

WORLDS = ALL

CUR, END = os.SEEK_CUR, os.SEEK_END
OWNERS = pytest.mark.parametrize("ofd", [False, True], ids=["process", "description"])


# Conflicts


@OWNERS
@pytest.mark.parametrize("other_ofd", [False, True], ids=["process", "description"])
def test_readers_and_writers(world: World, ofd: bool, other_ofd: bool) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    for held, wanted, result in (RD, RD, OK), (RD, WR, AGAIN), (WR, RD, AGAIN), (WR, WR, AGAIN):
        assert lock(holder, held_fd, held, 0, 10, ofd) == OK
        assert lock(other, other_fd, wanted, 5, 10, other_ofd) == result
        assert lock(holder, held_fd, UN, 0, 10, ofd) == OK
        assert lock(other, other_fd, wanted, 5, 10, other_ofd) == OK
        assert lock(other, other_fd, UN, 5, 10, other_ofd) == OK


@OWNERS
@pytest.mark.parametrize(
    ("held", "wanted", "result"),
    [
        ((0, 10), (10, 10), OK),
        ((0, 10), (9, 1), AGAIN),
        ((10, 10), (0, 10), OK),
        ((10, 10), (0, 11), AGAIN),
        ((10, 1), (0, 0), AGAIN),
        ((0, 0), (LAST, 1), AGAIN),
        ((10, 0), (0, 10), OK),
        ((10, 0), (1 << 40, 1), AGAIN),
        ((1 << 40, 1), (0, 0), AGAIN),
        ((LAST, 1), (0, LAST), OK),
        ((LAST, 1), (0, 0), AGAIN),
        ((LAST, 0), (LAST - 1, 1), OK),
        ((LAST, 0), (LAST, 1), AGAIN),
    ],
)
def test_ranges(world: World, ofd: bool, held: tuple[int, int], wanted: tuple[int, int], result: int) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert lock(holder, held_fd, WR, *held, ofd) == OK
    assert lock(other, other_fd, WR, *wanted, ofd) == result


@OWNERS
def test_a_refused_lock_leaves_nothing(world: World, ofd: bool) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert lock(holder, held_fd, WR, 9, 1, ofd) == OK
    assert lock(other, other_fd, RD, 2, 2, ofd) == OK
    assert lock(other, other_fd, WR, 0, 10, ofd) == AGAIN
    assert Stranger(world).bytes(12) == "..rr.....W.."


@OWNERS
def test_files_are_apart(world: World, ofd: bool) -> None:
    driver, fd = world.opened()
    assert lock(driver, fd, WR, ofd=ofd) == OK
    assert Stranger(world, world.file("another")).free()


def test_flock_is_another_lock(world: World) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert holder.flock(held_fd, EX | NB) == OK
    for ofd in False, True:
        assert lock(other, other_fd, WR, ofd=ofd) == OK
        assert holder.flock(held_fd, EX | NB) == OK
        assert other.flock(other_fd, EX | NB) == BUSY
        assert lock(other, other_fd, UN, ofd=ofd) == OK
    assert holder.flock(held_fd, EX | NB) == OK
    assert world.probe(world.file(), EX) == BUSY


# What becomes of one's own locks

CHANGES = [
    # As asked for: type, start, length. And what a stranger then sees.
    ([(WR, 0, 10), (UN, 3, 4)], [(WR, 0, 3), (WR, 7, 3)]),
    ([(WR, 0, 10), (UN, 0, 4)], [(WR, 4, 6)]),
    ([(WR, 0, 10), (UN, 4, 6)], [(WR, 0, 4)]),
    ([(WR, 0, 10), (UN, 4, 0)], [(WR, 0, 4)]),
    ([(WR, 5, 10), (UN, 0, 8)], [(WR, 8, 7)]),
    ([(WR, 5, 10), (UN, 0, 5)], [(WR, 5, 10)]),
    ([(WR, 5, 10), (UN, 15, 5)], [(WR, 5, 10)]),
    ([(WR, 0, 0), (UN, 5, 5)], [(WR, 0, 5), (WR, 10, 0)]),
    ([(WR, 0, 0), (UN, LAST, 1)], [(WR, 0, LAST)]),
    ([(WR, 0, 0), (UN, 0, 0)], []),
    ([(WR, 0, 5), (WR, 5, 5)], [(WR, 0, 10)]),
    ([(WR, 5, 5), (WR, 0, 5)], [(WR, 0, 10)]),
    ([(WR, 0, 5), (WR, 6, 5)], [(WR, 0, 5), (WR, 6, 5)]),
    ([(WR, 0, 5), (WR, 10, 5), (WR, 5, 5)], [(WR, 0, 15)]),
    ([(WR, 0, 5), (WR, 10, 5), (WR, 3, 9)], [(WR, 0, 15)]),
    ([(WR, 0, 5), (WR, 3, 0)], [(WR, 0, 0)]),
    ([(WR, 0, LAST), (WR, LAST, 1)], [(WR, 0, 0)]),
    ([(WR, 2, 5), (WR, 3, 2)], [(WR, 2, 5)]),
    ([(WR, 3, 2), (WR, 2, 5)], [(WR, 2, 5)]),
    ([(RD, 0, 5), (WR, 5, 5)], [(RD, 0, 5), (WR, 5, 5)]),
    ([(RD, 0, 10), (WR, 3, 4)], [(RD, 0, 3), (WR, 3, 4), (RD, 7, 3)]),
    ([(WR, 0, 10), (RD, 3, 4)], [(WR, 0, 3), (RD, 3, 4), (WR, 7, 3)]),
    ([(WR, 0, 10), (RD, 3, 4), (WR, 3, 4)], [(WR, 0, 10)]),
    ([(RD, 0, 0), (WR, 0, 0)], [(WR, 0, 0)]),
    ([(WR, 0, 0), (RD, 0, 0)], [(RD, 0, 0)]),
    ([(RD, 0, 5), (WR, 5, 5), (RD, 10, 5), (WR, 0, 15)], [(WR, 0, 15)]),
    ([(RD, 0, 5), (WR, 5, 5), (RD, 10, 5), (RD, 3, 9)], [(RD, 0, 15)]),
    ([(RD, 0, 5), (WR, 5, 5), (RD, 10, 5), (UN, 3, 9)], [(RD, 0, 3), (RD, 12, 3)]),
    ([(RD, 0, 5), (WR, 5, 5), (UN, 7, 1), (RD, 10, 5), (RD, 6, 6)], [(RD, 0, 5), (WR, 5, 1), (RD, 6, 9)]),
    ([(WR, 4, 2), (RD, 2, 6)], [(RD, 2, 6)]),
    ([(WR, 0, 4), (RD, 2, 6)], [(WR, 0, 2), (RD, 2, 6)]),
    ([(WR, 6, 4), (RD, 2, 6)], [(RD, 2, 6), (WR, 8, 2)]),
]


@OWNERS
def test_split_merge_and_change(world: World, ofd: bool) -> None:
    driver, fd = world.opened()
    stranger = Stranger(world)
    for asked, expected in CHANGES:
        for step in asked:
            assert lock(driver, fd, *step, ofd) == OK
        assert stranger.locks() == expected, asked
        assert stranger.bytes(18) == _bytes(expected, 18), asked
        assert stranger.byte(LAST) == _bytes(expected, 1, LAST), asked
        assert lock(driver, fd, UN, 0, 0, ofd) == OK
        assert stranger.free()


def _bytes(locks: list[tuple[int, int, int]], count: int, first: int = 0) -> str:
    def byte(place: int) -> str:
        for kind, start, length in locks:
            if start <= place and (length == 0 or place < start + length):
                return "W" if kind == WR else "r"
        return "."

    return "".join(map(byte, range(first, first + count)))


@OWNERS
def test_many_pieces(world: World, ofd: bool) -> None:
    """Every other byte of one range, and back again."""
    driver, fd = world.opened()
    stranger = Stranger(world)
    assert lock(driver, fd, WR, 0, 200, ofd) == OK
    for place in range(0, 200, 2):
        assert lock(driver, fd, UN, place, 1, ofd) == OK
    assert stranger.locks() == [(WR, place, 1) for place in range(1, 200, 2)]
    for place in range(0, 200, 2):
        assert lock(driver, fd, WR, place, 1, ofd) == OK
    assert stranger.locks() == [(WR, 0, 200)]


@OWNERS
def test_a_refused_upgrade_keeps_the_read_lock(world: World, ofd: bool) -> None:
    first, first_fd = world.opened()
    second, second_fd = world.opened()
    assert lock(first, first_fd, RD, 0, 10, ofd) == OK
    assert lock(second, second_fd, RD, 4, 2, ofd) == OK
    assert lock(first, first_fd, WR, 0, 10, ofd) == AGAIN
    assert lock(second, second_fd, UN, 4, 2, ofd) == OK
    assert Stranger(world).bytes(10) == "r" * 10
    assert lock(first, first_fd, WR, 0, 10, ofd) == OK


@OWNERS
def test_a_downgrade_lets_readers_in(world: World, ofd: bool) -> None:
    first, first_fd = world.opened()
    second, second_fd = world.opened()
    assert lock(first, first_fd, WR, 0, 10, ofd) == OK
    assert lock(first, first_fd, RD, 0, 10, ofd) == OK
    assert lock(second, second_fd, RD, 0, 10, ofd) == OK
    assert lock(first, first_fd, WR, 0, 10, ofd) == AGAIN


@OWNERS
def test_unlocking_what_is_not_ones_own(world: World, ofd: bool) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert lock(holder, held_fd, WR, 0, 10, ofd) == OK
    for kind in False, True:
        assert lock(other, other_fd, UN, 0, 0, kind) == OK
    assert Stranger(world).locks() == [(WR, 0, 10)]


# F_GETLK


@OWNERS
def test_asking_shows_the_whole_lock(world: World, ofd: bool) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    pid = -1 if ofd else holder.pid
    assert lock(holder, held_fd, WR, 10, 10, ofd) == OK
    assert lock(holder, held_fd, RD, 30, 0, ofd) == OK
    assert lock(holder, held_fd, RD, 5, 5, ofd) == OK
    for asking in False, True:
        for kind, start, length, expected in [
            (WR, 0, 0, Lock(RD, 5, 5, pid=pid)),
            (RD, 0, 0, Lock(WR, 10, 10, pid=pid)),
            (RD, 12, 1, Lock(WR, 10, 10, pid=pid)),
            (WR, 19, 100, Lock(WR, 10, 10, pid=pid)),
            (WR, 20, 100, Lock(RD, 30, 0, pid=pid)),
            (WR, LAST, 1, Lock(RD, 30, 0, pid=pid)),
            (RD, 20, 0, None),
            (RD, 0, 10, None),
            (WR, 20, 10, None),
            (WR, 0, 5, None),
        ]:
            assert conflict(other, other_fd, kind, start, length, asking) == expected


@OWNERS
def test_asking_does_not_show_ones_own(world: World, ofd: bool) -> None:
    driver, fd = world.opened()
    assert lock(driver, fd, WR, 0, 0, ofd) == OK
    assert conflict(driver, fd, WR, 0, 0, ofd) is None


@OWNERS
def test_asking_by_position_and_end(world: World, ofd: bool) -> None:
    """The answer is counted from the beginning of the file; without a conflict only the type changes."""
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    other.ask("ftruncate", other_fd, 1000)
    other.ask("lseek", other_fd, 100, os.SEEK_SET)
    assert lock(holder, held_fd, WR, 105, 1, ofd) == OK
    command = GETLK + OFD * ofd
    expected = Lock(WR, 105, 1, pid=-1 if ofd else holder.pid)
    for asked in Lock(RD, 5, 1, CUR), Lock(RD, 6, -1, CUR), Lock(RD, -895, 1, END):
        assert got(ask(other, other_fd, command, asked)) == expected
    for asked in Lock(RD, 6, 1, CUR), Lock(RD, 0, -1, CUR), Lock(WR, -894, 0, END):
        assert got(ask(other, other_fd, command, asked)) == asked._replace(type=UN)


def test_asking_shows_the_earliest_owner_s_first(world: World) -> None:
    """Owners in the order in which they came to have locks on the file; each one's locks from the beginning on."""
    asking, asking_fd = world.opened()
    opened = [world.opened() for _ in range(3)]
    for index, (driver, fd) in enumerate(opened):
        assert lock(driver, fd, RD, 20 - 5 * index, 10) == OK
    (first, first_fd), (second, second_fd), (third, _) = opened
    assert conflict(asking, asking_fd, WR) == Lock(RD, 20, 10, pid=first.pid)
    assert conflict(asking, asking_fd, WR, 0, 20) == Lock(RD, 15, 10, pid=second.pid)
    assert lock(first, first_fd, RD, 0, 5) == OK
    assert conflict(asking, asking_fd, WR) == Lock(RD, 0, 5, pid=first.pid)
    # Who has given all back comes last.
    assert lock(first, first_fd, UN) == OK
    assert lock(first, first_fd, RD, 0, 5) == OK
    assert conflict(asking, asking_fd, WR) == Lock(RD, 15, 10, pid=second.pid)
    # A change of kind does not.
    assert lock(second, second_fd, UN, 15, 5) == OK
    assert conflict(asking, asking_fd, WR) == Lock(RD, 20, 5, pid=second.pid)
    second.kill()
    assert conflict(asking, asking_fd, WR) == Lock(RD, 10, 10, pid=third.pid)


def test_asking_takes_nothing(world: World) -> None:
    driver, fd = world.opened()
    for ofd in False, True:
        for kind in RD, WR:
            assert conflict(driver, fd, kind, ofd=ofd) is None
    assert Stranger(world).free()


# lockf(3)


def test_lockf(world: World) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    stranger = Stranger(world)
    ulock, lock_, tlock, test = os.F_ULOCK, os.F_LOCK, os.F_TLOCK, os.F_TEST

    def lockf(driver: Driver, fd: int, command: int, length: int = 0) -> int:
        return driver.start("lockf", fd, command, length).result()

    for taking in lock_, tlock:
        holder.ask("lseek", held_fd, 10, os.SEEK_SET)
        assert lockf(holder, held_fd, taking, 10) == OK
        assert lockf(holder, held_fd, taking, -5) == OK
        assert stranger.locks() == [(WR, 5, 15)]
        assert lockf(other, other_fd, tlock, 5) == OK
        assert lockf(other, other_fd, tlock, 6) == AGAIN
        assert lockf(other, other_fd, test, 5) == OK
        assert lockf(other, other_fd, test, 6) == errno.EACCES
        assert lockf(holder, held_fd, test) == OK
        assert lockf(other, other_fd, ulock) == OK
        holder.ask("lseek", held_fd, 0, os.SEEK_SET)
        assert lockf(holder, held_fd, ulock, 10) == OK
        assert stranger.locks() == [(WR, 10, 10)]
        assert lockf(holder, held_fd, ulock) == OK
        assert stranger.free()
    assert lock(holder, held_fd, RD) == OK
    assert lockf(other, other_fd, test) == OK, "it asks whether one may read"
    assert lock(holder, held_fd, UN) == OK
    assert lock(holder, held_fd, WR, ofd=True) == OK
    for driver, fd in (holder, held_fd), (other, other_fd):
        assert lockf(driver, fd, test) == errno.EACCES
        assert lockf(driver, fd, tlock) == AGAIN
    for command in (4, -1, 99):
        assert lockf(other, other_fd, command) == errno.EINVAL
    read_only = other.open(world.file(), os.O_RDONLY)
    for command, result in (lock_, errno.EBADF), (tlock, errno.EBADF), (ulock, OK):
        assert lockf(other, read_only, command) == result
    for command in ulock, lock_, tlock, test:
        assert lockf(other, 50, command) == errno.EBADF
    assert lockf(other, other_fd, lock_, -1) == errno.EINVAL


# Other descriptors: the kernel's business everywhere


def test_directories_and_pipes(world: World) -> None:
    driver = world.start()
    directory = driver.open(world.directory, os.O_RDONLY | os.O_DIRECTORY)
    reading, writing = divmod(driver.ask("pipe"), 1000)
    child = driver.fork()
    for ofd in False, True:
        assert lock(driver, directory, RD, 0, 1, ofd) == OK
        assert lock(driver, directory, WR, 0, 1, ofd) == errno.EBADF
        assert lock(driver, directory, UN, 0, 1, ofd) == OK
        assert lock(driver, writing, WR, 0, 1, ofd) == OK
        assert lock(driver, reading, WR, 0, 1, ofd) == errno.EBADF
        assert lock(driver, writing, UN, 0, 1, ofd) == OK
    assert lock(driver, writing, WR, 0, 1) == OK
    assert conflict(child, writing, WR) == Lock(WR, 0, 1, pid=driver.pid)
    assert lock(child, reading, RD, 0, 1) == AGAIN
