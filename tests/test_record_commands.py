"""Record locks and what is typed: --simulate, --force, --mode, --errno and --timeout, and the line of one who waits.

Each way by the library and, of static programs, by seccomp. Of --locks, --break and --clean: test_record_listing.py.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.driver import BUSY, EX, NB, OK, Driver, Fleet
from support.lockcommand import FLOCKSHIM, WAITING_LINE
from support.proc import DEADLINE, await_true
from support.programs import program, static_program
from support.records import (
    AGAIN,
    GETLK,
    OFD,
    RD,
    SETLK,
    SETLKW,
    UN,
    WR,
    Lock,
    ask,
    conflict,
    lock,
    lock_later,
)

Start = Callable[..., Driver]
"""Starts a driver as the command of `flockshim OPTIONS`."""

SETTING = [(command + ofd, kind) for ofd in (0, OFD) for command in (SETLK, SETLKW) for kind in (RD, WR, UN)]
TESTING = [(command, kind) for command in (GETLK, GETLK + OFD) for kind in (RD, WR)]


@pytest.fixture
def fleet(rendezvous: Path) -> Iterator[Fleet]:
    """Programs of a user who has set nothing but the rendezvous directory. What they say must be expected."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("FLOCKSHIM_")}
    fleet = Fleet({**base, "FLOCKSHIM_DIR": str(rendezvous)})
    yield fleet
    errors = fleet.errors()
    fleet.end()
    assert errors == ""


@pytest.fixture(params=["preload", "seccomp"])
def start(request: pytest.FixtureRequest, fleet: Fleet) -> Start:
    def start(*options: str) -> Driver:
        executable = static_program("lockdriver") if request.param == "seccomp" else program("lockdriver")
        return fleet.start(None, *FLOCKSHIM, "--via", request.param, *options, executable=executable)

    return start


def answers(driver: Driver, fd: int, calls: list[tuple[int, int]]) -> set[int]:
    """All that the calls have returned: 0, or an errno."""
    return {ask(driver, fd, command, Lock(kind, 1, 1)).result() for command, kind in calls}


def lockf(driver: Driver, fd: int, command: int) -> int:
    return driver.start("lockf", fd, command, 0).result()


def lockf_answers(driver: Driver, fd: int) -> set[int]:
    return {lockf(driver, fd, command) for command in (os.F_LOCK, os.F_TLOCK, os.F_ULOCK)}


def shown(path: Path, fleet: Fleet) -> str:
    """What the kernel itself has locked of the first bytes, as a program without flockshim sees it."""
    plain = fleet.start()
    fd = plain.open(path)
    found = "".join("." if lock(plain, fd, WR, place, 1) == OK else "W" for place in range(4))
    plain.kill()
    return found


# --simulate


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "524", "EIO"])
def test_a_simulated_errno(start: Start, fleet: Fleet, tmp_path: Path, name: str) -> None:
    """Every call fails, and none of them has locked anything."""
    number = int(name) if name.isdigit() else getattr(errno, name)
    driver = start("--mode", "fail", "--simulate", name)
    fd = driver.open(tmp_path / "file")
    assert answers(driver, fd, SETTING + TESTING) == {number}
    assert lockf_answers(driver, fd) | {lockf(driver, fd, os.F_TEST)} == {number}
    assert driver.flock(fd, EX) == number
    assert shown(tmp_path / "file", fleet) == "...."


def test_simulated_below_a_directory(start: Start, fleet: Fleet, tmp_path: Path) -> None:
    for name in ("below", "beside"):
        (tmp_path / name).mkdir()
    driver = start("--mode", "fail", "--simulate", f"ENOLCK:{tmp_path / 'below'}")
    below, beside = (driver.open(tmp_path / name / "file") for name in ("below", "beside"))
    assert lock(driver, below, WR) == errno.ENOLCK
    assert lockf(driver, below, os.F_TLOCK) == errno.ENOLCK
    assert lock(driver, beside, WR, 1, 2) == OK
    assert shown(tmp_path / "beside" / "file", fleet) == ".WW."


def test_what_is_no_record_lock_is_not_simulated(start: Start, tmp_path: Path) -> None:
    driver = start("--mode", "fail", "--simulate", "EIO")
    fd = driver.open(tmp_path / "file")
    copy = driver.ask("dup", fd)
    assert copy != fd
    assert driver.ask("lseek", copy, 3, os.SEEK_SET) == 3
    driver.close(copy)
    assert lock(driver, fd, WR) == errno.EIO


@pytest.mark.parametrize("options", [["--simulate", "ENOLCK"], ["--force"]], ids=["simulate", "force"])
def test_emulated_where_the_kernel_could(start: Start, fleet: Fleet, tmp_path: Path, options: list[str]) -> None:
    """Programs under flockshim exclude each other, and the kernel has never been asked."""
    one, other = start("--mode", "host", *options), start("--mode", "host", *options)
    fds = [driver.open(tmp_path / "file") for driver in (one, other)]
    assert lock(one, fds[0], WR, 0, 2) == OK
    assert lock(other, fds[1], RD, 1, 2) == AGAIN
    assert lock(other, fds[1], RD, 2, 2, ofd=True) == OK
    assert conflict(other, fds[1], WR, 0, 2) == Lock(WR, 0, 2, pid=one.pid)
    assert lockf(one, fds[0], os.F_TLOCK) == AGAIN
    assert shown(tmp_path / "file", fleet) == "...."
    call = lock_later(other, fds[1], WR, 0, 1)
    one.kill()
    assert call.result() == OK


@pytest.mark.nolock(flock="ENOSYS", posix="hang")
def test_force_where_the_kernels_call_hangs(start: Start, nolock_dir: Path) -> None:
    driver, other = start("--mode", "host", "--force"), start("--mode", "host", "--force")
    fd, other_fd = (each.open(nolock_dir / "file") for each in (driver, other))
    assert lock(driver, fd, WR, 0, 1) == OK
    assert lock(other, other_fd, WR, 0, 1) == AGAIN
    assert lock(other, other_fd, WR, 1, 1) == OK


# --mode and --errno


def test_mode_fail(start: Start, nolock_dir: Path) -> None:
    driver = start("--mode", "fail")
    fd = driver.open(nolock_dir / "file")
    assert answers(driver, fd, SETTING + TESTING) == {errno.ENOSYS}
    assert lockf_answers(driver, fd) == {errno.ENOSYS}


def test_mode_success_by_the_library(fleet: Fleet, nolock_dir: Path) -> None:
    """Nobody is in the way; and bad calls fail as ever."""
    options = ("--via", "preload", "--mode", "success", "--quiet")
    one, other = (fleet.start(None, *FLOCKSHIM, *options) for _ in range(2))
    for driver in one, other:
        fd = driver.open(nolock_dir / "file")
        assert answers(driver, fd, SETTING) | lockf_answers(driver, fd) == {OK}
        assert lock(driver, fd, WR) == OK
        assert [conflict(driver, fd, WR, ofd=ofd) for ofd in (False, True)] == [None, None]
        assert lockf(driver, fd, os.F_TEST) == OK
        assert lock(driver, 99, WR) == errno.EBADF
        assert lock(driver, fd, 7) == errno.EINVAL
        assert lock(driver, fd, WR, -1) == errno.EINVAL
        assert lock(driver, driver.open(nolock_dir / "file", os.O_RDONLY), WR) == errno.EBADF


def test_mode_success_by_a_filter(fleet: Fleet, nolock_dir: Path) -> None:
    """A filter cannot write what F_GETLK would answer into the program's memory: that is left to the kernel."""
    options = ("--via", "seccomp", "--mode", "success", "--quiet")
    driver = fleet.start(None, *FLOCKSHIM, *options, executable=static_program("lockdriver"))
    fd = driver.open(nolock_dir / "file")
    assert answers(driver, fd, SETTING) | lockf_answers(driver, fd) == {OK}
    assert answers(driver, fd, TESTING) == {errno.ENOSYS}
    assert driver.flock(fd, EX) == OK


@pytest.mark.nolock(flock="ENOSYS", posix="EIO")
def test_another_errno(start: Start, nolock_dir: Path) -> None:
    driver = start("--mode", "host")
    fd = driver.open(nolock_dir / "file")
    assert driver.flock(fd, EX) == OK
    assert lock(driver, fd, WR) == errno.EIO
    taking, other = (start("--mode", "host", "--errno", "ENOSYS,EIO") for _ in range(2))
    fd, other_fd = (each.open(nolock_dir / "file") for each in (taking, other))
    assert lock(taking, fd, WR) == OK
    assert lock(other, other_fd, RD) == AGAIN
    assert other.flock(other_fd, EX | NB) == BUSY


@pytest.mark.nolock(flock="ENOSYS", posix="local")
def test_record_locks_of_the_kernel_beside_emulated_flocks(start: Start, fleet: Fleet, nolock_dir: Path) -> None:
    driver = start("--mode", "host")
    fd = driver.open(nolock_dir / "file")
    assert driver.flock(fd, EX) == OK
    assert lock(driver, fd, WR, 1, 1) == OK
    assert shown(nolock_dir / "file", fleet) == ".W.."


# --timeout


@pytest.mark.nolock(flock="ENOLCK", posix="ENOLCK")
def test_a_wait_that_is_over(start: Start, fleet: Fleet, nolock_dir: Path) -> None:
    """With the errno of the kernel, and one line on whose lock it was: that in the way, and no other."""
    path = nolock_dir / "file"
    bystander, holder = start("--mode", "host"), start("--mode", "host")
    assert lock(bystander, bystander.open(path), WR, 0, 5) == OK
    assert lock(holder, holder.open(path), WR, 5, 5) == OK
    for ofd in False, True:
        driver = start("--mode", "host", "--timeout", "0.2")
        fd = driver.open(path)
        assert lock(driver, fd, RD, 20, 1, ofd) == OK
        begin = time.monotonic()
        assert ask(driver, fd, SETLKW + OFD * ofd, Lock(WR, 6, 1)).result() == errno.ENOLCK
        assert time.monotonic() - begin >= 0.2
        text = fleet.errors()
        fleet.forget_errors()
        assert text.startswith(f"flockshim: cannot lock {path}: timed out (--timeout), held by pid {holder.pid} (")
        assert text.count("\n") == 1
        assert lock(driver, fd, WR, 6, 1, ofd) == AGAIN
        assert lock(bystander, bystander.open(path), WR, 20, 1) == AGAIN, "what it had it has still"
        driver.kill()
    assert fleet.errors() == ""


def test_a_time_limit_that_is_not_reached(start: Start, nolock_dir: Path) -> None:
    holder, driver = start("--mode", "host"), start("--mode", "host", "--timeout", "600")
    held, fd = (each.open(nolock_dir / "file") for each in (holder, driver))
    assert lock(holder, held, WR, 0, 5) == OK
    call = lock_later(driver, fd, WR, 4, 5)
    assert lock(holder, held, UN, 4, 1) == OK
    assert call.result() == OK


# The line of one who waits


def test_who_waits_says_for_whom(start: Start, fleet: Fleet, nolock_dir: Path) -> None:
    """For the one that is in the way, once; and that it is over, if it has taken a second."""
    path = nolock_dir / "file"
    bystander, holder, driver = (start("--mode", "host", "--verbose") for _ in range(3))
    assert lock(bystander, bystander.open(path), WR, 0, 5) == OK
    held = holder.open(path)
    assert lock(holder, held, WR, 5, 5) == OK
    begin = time.monotonic()
    call = lock_later(driver, driver.open(path), WR, 6, 1)
    await_true(lambda: fleet.errors().endswith("\n"), "the line")
    line = WAITING_LINE.fullmatch(fleet.errors())
    assert line, fleet.errors()
    assert (line["path"], int(line["pid"]), line["host"]) == (str(path), holder.pid, os.uname().nodename)
    # There is nothing to be awaited: that it takes a second is what makes it worth a line.
    time.sleep(max(0.0, begin + 1.1 - time.monotonic()))
    assert lock(holder, held, UN) == OK
    assert call.result(DEADLINE) == OK
    got = fleet.errors().removeprefix(line[0])
    assert re.fullmatch(rf"flockshim: got the lock on {re.escape(str(path))} after \d+ s\n", got), got
    fleet.forget_errors()


def test_nothing_is_said_quietly_or_without_waiting(start: Start, fleet: Fleet, nolock_dir: Path) -> None:
    """What the fleet has written must be nothing in the end."""
    path = nolock_dir / "file"
    holder = start("--mode", "host", "--verbose")
    held = holder.open(path)
    assert lock(holder, held, WR, 0, 5) == OK
    quiet, trying, told = start("--mode", "host", "--quiet"), start("--mode", "host", "--verbose"), start("--verbose")
    fd = trying.open(path)
    assert lock(trying, fd, WR, 4, 1) == AGAIN
    assert conflict(trying, fd, WR, 4, 1) == Lock(WR, 0, 5, pid=holder.pid)
    call = lock_later(quiet, quiet.open(path), WR, 0, 1)
    # Who asks later and has told has been told after those who were to be told before.
    later = lock_later(told, told.open(path), WR, 1, 1)
    await_true(lambda: fleet.errors().endswith("\n"), "the line")
    assert WAITING_LINE.fullmatch(fleet.errors())
    fleet.forget_errors()
    assert lock(holder, held, UN) == OK
    assert (call.result(), later.result()) == (OK, OK)
