"""``flockshim --locks``: who holds and who waits."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from flockshim import FlockshimError, holders, kernel_locks, lock_list
from flockshim.locking import Locker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def run(
    paths: list[str],
    as_json: bool,
    environ: Mapping[str, str],
    write: Callable[[str], None],
    say: Callable[[str], None],
) -> int:
    """Print the emulated locks of this user on this host, or those on *paths* and the kernel's locks on these too.

    The JSON is an object: ``version`` 1; ``host``; ``files``; ``silent``, the sockets of keepers that did not
    answer, each with the reason.
    A file has ``path``, ``device``, ``inode``, ``kind`` (``"emulated"`` or ``"kernel"``), ``holders`` and ``waiters``,
    the latter in the order in which they have come. Both have ``mode`` (``"exclusive"`` or ``"shared"``), ``pid``,
    ``command``, ``since`` (seconds since the epoch; null for the kernel's locks, of which it is not known),
    ``pid_namespace`` and ``keeper`` (its pid, or null); holders also ``taken_by``, the process that called
    ``flock(2)``, and ``taker_ended``, whether that is no more: the lock is then held by a description that others have
    inherited.

    Returns 1 where a keeper did not answer, so that locks may be missing, else 0.

    :param write: writes to standard output, *say* a line to standard error.
    :raises FlockshimError: for a path that does not exist.
    """
    files, silent = lock_list.gather(Locker(environ))
    for file in files:
        file["kind"] = "emulated"
    if paths:
        wanted = {(status.st_dev, status.st_ino): (path, status) for path in paths for status in [_stat(path)]}
        files = [file for file in files if (file["device"], file["inode"]) in wanted]
        files += [file for path, status in wanted.values() for file in _kernel_file(path, status)]
    host = os.uname().nodename
    if as_json:
        text = json.dumps({"version": 1, "host": host, "files": files, "silent": silent}, indent=2) + "\n"
    else:
        text = "".join(_lines(file) for file in files) or "no locks\n"
    write(text)
    for socket, reason in silent.items():
        say(f"the keeper at {socket!r} does not answer: {reason}")
    return 1 if silent else 0


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise FlockshimError(f"--locks: {path!r}: {error.strerror}") from None


def _kernel_file(path: str, status: os.stat_result) -> list[dict[str, Any]]:
    found = kernel_locks.find(status)
    if not found:
        return []
    return [
        {
            "path": os.path.realpath(path),
            "device": status.st_dev,
            "inode": status.st_ino,
            "kind": "kernel",
            "holders": [
                {
                    **_of_kernel(lock.exclusive, lock.pids[0]),
                    "taken_by": lock.taker,
                    "taker_ended": not holders.is_alive(lock.taker),
                }
                for lock in found
            ],
            "waiters": [_of_kernel(exclusive, pid) for exclusive, pid in kernel_locks.waiting(status)],
        }
    ]


def _of_kernel(exclusive: bool, pid: int) -> dict[str, Any]:
    return {
        "mode": "exclusive" if exclusive else "shared",
        "pid": pid,
        "command": holders.command_of(pid),
        "since": None,
        "keeper": None,
        "pid_namespace": holders.pid_namespace(),
    }


def _lines(file: dict[str, Any]) -> str:
    note = "" if file["kind"] == "emulated" else "  (locked by the kernel, which does not tell since when)"
    lines = [f"{holders.printable(file['path'])}{note}"]
    for holder in file["holders"]:
        lines.append("  held by   " + _program(holder))
        if holder["taker_ended"] and holder["taken_by"] != holder["pid"]:
            lines[-1] += f"  [taken by pid {holder['taken_by']}, which has ended]"
    for number, waiter in enumerate(file["waiters"], 1):
        lines.append(f"  waits {number:3} " + _program(waiter))
    return "\n".join(lines) + "\n"


def _program(program: dict[str, Any]) -> str:
    since = f"since {holders.clock(program['since'])}" if program["since"] else ""
    here = program["pid_namespace"] == holders.pid_namespace()
    pid = f"pid {program['pid']}" + ("" if here else " of another pid namespace")
    return f"{program['mode']:9}  {pid:11}  {since:14}  {program['command']}"
