"""``flockshim --locks``: who holds and who waits."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from flockshim import FlockshimError, cluster_list, holders, kernel_locks, lock_list
from flockshim.cluster_list import Observer, Target
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
    """Print the emulated locks of this user on this host; or those on *paths*, the kernel's, and those of other hosts.

    The JSON is an object: ``version`` 1; ``host``; ``files``; ``silent``, the sockets of keepers that did not
    answer, each with the reason.
    A file has ``path``, ``device``, ``inode``, ``kind`` (``"emulated"``, ``"kernel"`` or ``"cluster"``), ``holders``
    and ``waiters``, the latter in the order in which they have come.
    Both have ``mode`` (``"exclusive"`` or ``"shared"``), ``pid``, ``command``, ``since`` (seconds since the epoch; null
    for the kernel's locks, of which it is not known), ``pid_namespace`` and ``keeper`` (its pid, or null); holders also
    ``taken_by``, the process that called ``flock(2)``, and ``taker_ended``, whether that is no more: the lock is then
    held by a description that others have inherited.
    Those of kind ``"cluster"`` are the keepers that hold or wait between hosts, this one included: each has ``mode``,
    ``keeper`` (its id), ``host`` (null if it has not told), ``alive`` (null for one on another host), ``token``
    (the fencing token; null for one that waits), ``vouched`` (when it last said that it is alive, in seconds since the
    epoch by its own clock; null if it has not yet) and ``programs`` (``mode``, ``pid``, ``command``, ``since``).

    Returns 1 where a keeper did not answer or the lock files could not be read, so that locks may be missing, else 0.

    :param write: writes to standard output, *say* a line to standard error.
    :raises FlockshimError: for a path that does not exist.
    """
    locker = Locker(environ)
    files, silent = lock_list.gather(locker)
    unreadable = []
    for file in files:
        file["kind"] = "emulated"
    if paths:
        wanted = {(status.st_dev, status.st_ino): (path, status) for path in paths for status in [_stat(path)]}
        files = [file for file in files if (file["device"], file["inode"]) in wanted]
        files += [file for path, status in wanted.values() for file in _kernel_file(path, status)]
        with cluster_list.observer(locker, environ) as observer:
            for path, status in wanted.values():
                try:
                    files += _cluster_file(path, status, observer)
                except OSError as error:
                    unreadable.append(f"the lock files beside {path!r} cannot be read: {error.strerror}")
    host = os.uname().nodename
    if as_json:
        text = json.dumps({"version": 1, "host": host, "files": files, "silent": silent}, indent=2) + "\n"
    else:
        text = "".join(_lines(file) for file in files) or "no locks\n"
    write(text)
    for socket, reason in silent.items():
        say(f"the keeper at {socket!r} does not answer: {reason}")
    for line in unreadable:
        say(line)
    return 1 if silent or unreadable else 0


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


def _cluster_file(path: str, status: os.stat_result, observer: Observer) -> list[dict[str, Any]]:
    with Target(path, observer) as target:
        held, waiting = target.holdings()
        if not held:
            return []
        return [
            {
                "path": target.path,
                "device": status.st_dev,
                "inode": status.st_ino,
                "kind": "cluster",
                "holders": [cluster_list.as_json(holding, target.name) for holding in held],
                "waiters": [cluster_list.as_json(holding, target.name) for holding in waiting],
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
    if file["kind"] == "cluster":
        return _cluster_lines(file)
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


def _cluster_lines(file: dict[str, Any]) -> str:
    lines = [f"{holders.printable(file['path'])}  (between hosts)"]
    for holder in file["holders"]:
        lines += [
            f"  held by   {program}  (token {holder['token']}{_vouched(holder)})" for program in _programs(holder)
        ]
    for number, waiter in enumerate(file["waiters"], 1):
        lines += [f"  waits {number:3} {program}" for program in _programs(waiter)]
    return "\n".join(lines) + "\n"


def _programs(keeper: dict[str, Any]) -> list[str]:
    host = keeper["host"] or (
        "this host" if keeper["alive"] is not None else "another host, which has not told its name"
    )
    if not keeper["programs"]:
        return [f"{keeper['mode']:9}  a program on {host}"]
    return [
        f"{program['mode']:9}  pid {program['pid']:<7}  since {holders.clock(program['since'])}"
        f"  {program['command']} on {host}"
        for program in keeper["programs"]
    ]


def _vouched(keeper: dict[str, Any]) -> str:
    return f", vouched for at {holders.clock(keeper['vouched'])}" if keeper["vouched"] else ""
