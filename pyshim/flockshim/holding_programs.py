"""Stops, continues and ends the programs that hold a lock, when the lease behind it is in doubt or lost."""

from __future__ import annotations

import contextlib
import os
import signal

from flockshim import closing
from flockshim._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flockshim.descriptions import Description
    from flockshim.recordfile import Owner


def find(owners: Iterable[Description | Owner]) -> list[int]:
    """Return the processes, but for the keeper's own, that have these locks: by a description that they have open."""
    owners = list(owners)
    processes = [owner.pid for owner in owners if owner.is_process]
    return processes + _that_have_open([owner.descriptor for owner in owners if not owner.is_process])


def _that_have_open(kept: list[int]) -> list[int]:
    if not kept:
        return []
    ours = {lib.native_self(), os.getppid()}
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    found = [pid for pid in pids if pid not in ours and any(lib.native_is_open_in(one, pid) for one in kept)]
    return [pid for pid in found if not _is_supervisor(pid)]


def _is_supervisor(pid: int) -> bool:
    """A supervisor has a duplicate while it answers for a program; all of its programs would be stopped with it."""
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    return "anon_inode:seccomp notify" in links


def stop(descriptions: Iterable[Description | Owner], begin: Callable[[set[int]], None] = lambda _: None) -> set[int]:
    """Stop the processes that have one of these descriptions open, and return them; `begin` is told them before."""
    kept = list(descriptions)
    stopped: set[int] = set()
    while True:
        # Whoever was not stopped yet may have made another.
        found = set(find(kept)) - stopped
        if not found:
            return stopped
        begin(found)
        send(found, signal.SIGSTOP)
        stopped |= found


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def warn(pids: Iterable[int], line: str) -> None:
    """Write a line to the standard error of each. Not waited for: it may be a file whose server does not answer."""
    closing.aside(lambda: _tell(pids, line))


def kill(pids: Iterable[int], line: str) -> None:
    """Write a line to the standard error of those, who are stopped, and end them. Not waited for."""

    def tell_and_end() -> None:
        _tell(pids, line)
        send(pids, signal.SIGKILL)

    closing.aside(tell_and_end)


def _tell(pids: Iterable[int], line: str) -> None:
    """Write to every file once."""
    told = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            path = f"/proc/{pid}/fd/2"
            status = os.stat(path)
            if (status.st_dev, status.st_ino) not in told:
                told.add((status.st_dev, status.st_ino))
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
                os.write(descriptor, f"flockshim: {line}\n".encode(errors="replace"))
                os.close(descriptor)
