"""Who holds the kernel's own flock on a file, as /proc tells: proc(5), ``/proc/PID/fdinfo`` and ``/proc/locks``."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from flockshim import holders

RECORD_KINDS = ("POSIX", "OFDLCK")


class KernelHolder(NamedTuple):
    """A lock of the kernel's."""

    exclusive: bool
    taker: int
    """The process that has called ``flock(2)``; it may have ended."""
    pids: list[int]
    """The processes that have the description open, the oldest first. Without those that may not be looked into, unless
    they have called ``flock(2)`` themselves."""


def find(file: os.stat_result) -> list[KernelHolder]:
    """Return who holds a lock on a file. None are found where they are on another host, or in another pid namespace."""
    listed = _listed(file)
    return (_open_in(os.listdir("/proc"), file) or _by_takers(listed, file.st_dev)) if listed else []


class KernelRecord(NamedTuple):
    """A record lock of the kernel's; `last` is None where it reaches to the end of the file."""

    exclusive: bool
    is_of_process: bool
    pid: int
    """The process that has it, or one of those that have the description open."""
    first: int
    last: int | None


def records(file: os.stat_result) -> list[KernelRecord]:
    """Return the record locks on a file, as far as their processes can be seen from here."""
    if not any(_listed(file, RECORD_KINDS)):
        return []
    found: list[KernelRecord] = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        for lock in _locks_of(name, file, RECORD_KINDS):
            one = KernelRecord(lock.exclusive, lock.kind == "POSIX", int(name), lock.first, lock.last)
            # A description may be open in several processes.
            if one._replace(pid=0) not in [other._replace(pid=0) for other in found if not other.is_of_process]:
                found.append(one)
    return sorted(found, key=lambda lock: lock.first)


def describe(file: os.stat_result) -> str:
    """Return who holds a lock on a file, for people to read."""
    # Mostly whoever has called flock(2) still has it; to look into all processes takes a while.
    takers = [str(lock.pid) for lock in _listed(file)]
    for holder in _open_in(takers, file) or find(file):
        return holders.describe(holder.pids[0])
    return "a program that cannot be seen from here (on another host, in another container, or gone by now)"


def _listed(file: os.stat_result, kinds: tuple[str, ...] = ("FLOCK",), blocked: bool = False) -> list[_Lock]:
    """Return the locks on files of this number, or the requests that are blocked by them.

    The device in /proc need not be that of stat(2), as on btrfs.
    """
    try:
        with open("/proc/locks", encoding="ascii", errors="replace") as lines:
            words = [line.split() for line in lines]
    except OSError:
        return []
    # Blocked ones have an arrow before what the others have too.
    found = [_Lock.of([*w[:1], *w[2:]] if blocked else w) for w in words if (w[1:2] == ["->"]) == blocked]
    return [lock for lock in found if lock and lock.kind in kinds and lock.inode == file.st_ino]


def waiting(file: os.stat_result) -> list[tuple[bool, int]]:
    """Return who waits for the kernel's lock on a file, in order: whether for an exclusive one, and the process."""
    locks = _listed(file, blocked=True)
    return [(lock.exclusive, lock.pid) for lock in locks if lock.pid > 0 and lock.device == file.st_dev]


class _Lock(NamedTuple):
    kind: str
    exclusive: bool
    pid: int
    device: int
    inode: int
    first: int
    last: int | None

    @classmethod
    def of(cls, words: list[str]) -> _Lock | None:
        """Read a line such as ``1: FLOCK  ADVISORY  WRITE 708 08:01:1234 0 EOF``."""
        if len(words) < 8 or words[1] not in ("FLOCK", *RECORD_KINDS):
            return None
        if words[5].startswith("<"):  # the file system has just gone
            return None
        major, minor, inode = words[5].split(":")
        device = os.makedev(int(major, 16), int(minor, 16))
        last = None if words[7] == "EOF" else int(words[7])
        return cls(words[1], words[3] == "WRITE", int(words[4]), device, int(inode), int(words[6]), last)


def _open_in(processes: list[str], file: os.stat_result) -> list[KernelHolder]:
    """Look for the descriptions themselves (Linux 4.1): whoever called flock(2) may have ended since.

    One description is one lock; its processes are those whose descriptor shows the same lock.
    """
    found: dict[tuple[bool, int], list[int]] = {}
    for name in filter(str.isdigit, processes):
        for lock in _locks_of(name, file):
            pids = found.setdefault((lock.exclusive, lock.pid), [])
            if int(name) not in pids:
                pids.append(int(name))
    return [KernelHolder(exclusive, taker, sorted(pids, key=holders.age)) for (exclusive, taker), pids in found.items()]


def _locks_of(process: str, file: os.stat_result, kinds: tuple[str, ...] = ("FLOCK",)) -> list[_Lock]:
    locks = []
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{process}/fdinfo"):
            with contextlib.suppress(OSError), open(f"/proc/{process}/fdinfo/{number}", "rb") as info:
                for line in info.read().decode(errors="replace").splitlines():
                    lock = _Lock.of(line.split()[1:]) if line.startswith("lock:") else None
                    if (
                        lock
                        and lock.kind in kinds
                        and lock.inode == file.st_ino
                        and _is(f"/proc/{process}/fd/{number}", file)
                    ):
                        locks.append(lock)
    return locks


def _is(path: str, file: os.stat_result) -> bool:
    return os.path.samestat(os.stat(path), file)


def _by_takers(locks: list[_Lock], device: int) -> list[KernelHolder]:
    return [
        KernelHolder(lock.exclusive, lock.pid, [lock.pid]) for lock in locks if lock.pid > 0 and lock.device == device
    ]
