"""The test's side of record locks: the calls, what a stranger sees of them, and who waits for one."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from support.driver import OK, Call, Driver
from support.proc import await_true, thread_state
from support.programs import SOURCES, WARNINGS
from support.worlds import World

RD, WR, UN = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
GETLK, SETLK, SETLKW = 5, 6, 7
OFD = 31
"""What a command of open file descriptions is greater by than that of processes."""

AGAIN = errno.EAGAIN
LAST = (1 << 63) - 1
"""The last byte that can be locked."""

SYSCALLS = {"x86_64": (72, 55, 221), "aarch64": (25,)}.get(platform.machine(), ())
"""The numbers of fcntl(2); those of 32-bit programs are other calls of 64-bit ones, in which nobody waits here."""


class Lock(NamedTuple):
    """A struct flock."""

    type: int
    start: int = 0
    length: int = 0
    whence: int = os.SEEK_SET
    pid: int = 0

    def words(self) -> tuple[int, ...]:
        """As the driver takes them."""
        return self.type, self.whence, self.start, self.length, self.pid


def ask(driver: Driver, fd: int, command: int, lock: Lock, how: str = "fcntl") -> Call:
    """The call, in the thread that takes the commands, without waiting for its end."""
    return driver.start("record", how, command, fd, *lock.words())


def lock(driver: Driver, fd: int, kind: int, start: int = 0, length: int = 0, ofd: bool = False) -> int:
    """A lock that is had now or not at all: 0, or the errno."""
    return ask(driver, fd, SETLK + OFD * ofd, Lock(kind, start, length)).result()


def lock_later(driver: Driver, fd: int, kind: int, start: int = 0, length: int = 0, ofd: bool = False) -> Call:
    """A lock that is waited for, in a thread of its own."""
    return driver.later("record", "fcntl", SETLKW + OFD * ofd, fd, *Lock(kind, start, length).words())


def conflict(driver: Driver, fd: int, kind: int, start: int = 0, length: int = 0, ofd: bool = False) -> Lock | None:
    """The first lock that is in the way, by F_GETLK."""
    asked = Lock(kind, start, length)
    answer = got(ask(driver, fd, GETLK + OFD * ofd, asked))
    if answer.type != UN:
        return answer
    assert answer == asked._replace(type=UN), "more than the type has changed"
    return None


def got(call: Call) -> Lock:
    """What a call that succeeds has left in its argument."""
    assert call.result() == OK
    kind, whence, start, length, pid = map(int, call.more().split(","))
    return Lock(kind, start, length, whence, pid)


class Stranger:
    """A process of its own that looks at the locks on one file."""

    def __init__(self, world: World, path: Path | None = None) -> None:
        self.driver = world.start()
        self.fd = self.driver.open(path or world.file())

    def locks(self) -> list[tuple[int, int, int]]:
        """Type, start and length of each lock of a file that only one owner has locked, by F_GETLK."""
        found: list[tuple[int, int, int]] = []
        start = 0
        while True:
            seen = conflict(self.driver, self.fd, WR, start)
            if seen is None:
                return found
            found.append((seen.type, seen.start, seen.length))
            if seen.length == 0:
                return found
            start = seen.start + seen.length

    def bytes(self, count: int) -> str:
        """What may be had of the first COUNT bytes, by trying: nothing (W), a read lock (r), or anything (.)."""
        return "".join(self.byte(place) for place in range(count))

    def byte(self, place: int) -> str:
        """The same of one byte."""
        if lock(self.driver, self.fd, RD, place, 1) != OK:
            return "W"
        found = "." if lock(self.driver, self.fd, WR, place, 1) == OK else "r"
        assert lock(self.driver, self.fd, UN, place, 1) == OK
        return found

    def free(self) -> bool:
        """Whether there is no lock at all, by trying."""
        if lock(self.driver, self.fd, WR) != OK:
            return False
        assert lock(self.driver, self.fd, UN) == OK
        return True

    def first_pid(self) -> int | None:
        """Whose the first lock is."""
        seen = conflict(self.driver, self.fd, WR)
        return seen and seen.pid


def await_waiting(world: World, *calls: Call) -> None:
    """Return when CALLS, which are all that wait for record locks in WORLD's directory, wait.

    Why what is looked at suffices is said in World.await_blocked, which does this for flock.
    """

    def waiting() -> bool:
        for call in calls:
            if call.returned():
                raise AssertionError(f"{call.driver}: {call.value()} from a call that should wait")
        return _all_wait(world, calls)

    if calls:
        await_true(waiting, f"{[call.driver for call in calls]} to wait")


def _all_wait(world: World, calls: Sequence[Call]) -> bool:
    threads = [(call.driver.pid, call.tid) for call in calls]
    before = [thread_state(*thread) for thread in threads]
    if not all(state and state.asleep for state in before):
        return False
    in_call = [state is not None and state.syscall in SYSCALLS for state in before]
    if world.supervised:
        return all(in_call) and _queued(world) == len(calls)
    if not world.emulated:
        return all(in_call)
    if any(in_call):
        return False
    world.round_trip()
    world.round_trip()
    return [thread_state(*thread) for thread in threads] == before


def _queued(world: World) -> int:
    """How many calls wait for the record locks of WORLD's files: at a keeper, or in the kernel."""
    from flockshim.lock_list import gather  # noqa: PLC0415  (the native world is tested without the product)
    from flockshim.locking import Locker  # noqa: PLC0415

    files = {(entry.stat().st_dev, entry.stat().st_ino) for entry in os.scandir(world.directory)}
    listed = gather(Locker(world.environment))[0]
    count = sum(len(file["waiters"]) for file in listed if (file["device"], file["inode"]) in files)
    # `1: -> POSIX  ADVISORY  WRITE 708 08:01:1234 0 EOF`, see proc(5).
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "->" and words[2] in ("POSIX", "OFDLCK"):
            major, minor, inode = words[6].split(":")
            count += (os.makedev(int(major, 16), int(minor, 16)), int(inode)) in files
    return count


@functools.cache
def _directory_32() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="flockshim-32-")


@functools.cache
def driver_32() -> Path | None:
    """The driver as a static 32-bit program, where the compiler makes such and the kernel runs them."""
    target = Path(_directory_32().name) / "lockdriver"
    options = [*WARNINGS, "-O1", "-m32", "-static", "-pthread", "-D_FILE_OFFSET_BITS=64"]
    build = subprocess.run(
        ["gcc", *options, str(SOURCES / "lockdriver.c"), "-o", str(target)], capture_output=True, check=False
    )
    if build.returncode:
        return None
    try:
        runs = subprocess.run([target], check=False).returncode == 2
    except OSError:
        return None
    return target if runs else None
