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

MOST_RANGES = 8
"""How many ranges of one program are shown to people."""


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
    A file has ``path``, ``device``, ``inode``, ``locks`` (``"flock"``, or ``"fcntl"`` for record locks, which are
    independent of those), ``kind`` (``"emulated"``, ``"kernel"`` or ``"cluster"``), ``holders`` and ``waiters``, the
    latter in the order in which they have come.
    Both have ``mode`` (``"exclusive"`` or ``"shared"``), ``pid``, ``command``, ``since`` (seconds since the epoch; null
    for the kernel's locks, of which it is not known), ``pid_namespace`` and ``keeper`` (its pid, or null); holders also
    ``taken_by``, the process that called ``flock(2)``, and ``taker_ended``, whether that is no more: the lock is then
    held by a description that others have inherited. Of record locks both have ``ranges``, each with ``first`` and
    ``last`` byte (null: to the end of the file) and ``mode``, and holders ``owner``, ``"process"`` or
    ``"description"``.
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
        files += [file for path, status in wanted.values() for file in _kernel_files(path, status)]
        with cluster_list.observer(locker, environ) as observer:
            for path, status in wanted.values():
                try:
                    files += _cluster_file(path, status, observer, "flock")
                    files += _cluster_file(path, status, observer, "fcntl")
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


def _kernel_files(path: str, status: os.stat_result) -> list[dict[str, Any]]:
    file = {"path": os.path.realpath(path), "device": status.st_dev, "inode": status.st_ino, "kind": "kernel"}
    flocks = [
        {
            **_of_kernel(lock.exclusive, lock.pids[0]),
            "taken_by": lock.taker,
            "taker_ended": not holders.is_alive(lock.taker),
        }
        for lock in kernel_locks.find(status)
    ]
    waiting = [_of_kernel(exclusive, pid) for exclusive, pid in kernel_locks.waiting(status)]
    records = [
        {
            **_of_kernel(lock.exclusive, lock.pid),
            "taken_by": lock.pid,
            "taker_ended": False,
            "owner": "process" if lock.is_of_process else "description",
            "ranges": [{"first": lock.first, "last": lock.last, "mode": _mode(lock.exclusive)}],
        }
        for lock in kernel_locks.records(status)
    ]
    found = [("flock", flocks, waiting), ("fcntl", records, [])]
    return [{**file, "locks": locks, "holders": held, "waiters": waits} for locks, held, waits in found if held]


def _mode(exclusive: bool) -> str:
    return "exclusive" if exclusive else "shared"


def _cluster_file(path: str, status: os.stat_result, observer: Observer, locks: str) -> list[dict[str, Any]]:
    with Target(path, observer, records=locks == "fcntl") as target:
        held, waiting = target.holdings()
        if not held:
            return []
        return [
            {
                "path": target.path,
                "device": status.st_dev,
                "inode": status.st_ino,
                "locks": locks,
                "kind": "cluster",
                "holders": [cluster_list.as_json(holding, target.name) for holding in held],
                "waiters": [cluster_list.as_json(holding, target.name) for holding in waiting],
            }
        ]


def _of_kernel(exclusive: bool, pid: int) -> dict[str, Any]:
    return {
        "mode": _mode(exclusive),
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
    lines = [f"{_path(file)}{note}"]
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
    return f"{program['mode']:9}  {pid:11}  {since:14}  {program['command']}{_ranges(program)}"


def _path(file: dict[str, Any]) -> str:
    return str(holders.printable(file["path"])) + ("  (record locks)" if file["locks"] == "fcntl" else "")


def _ranges(program: dict[str, Any]) -> str:
    ranges = program.get("ranges", [])
    shown = [f"{one['first']}-{'' if one['last'] is None else one['last']}" for one in ranges[:MOST_RANGES]]
    more = f" and {len(ranges) - MOST_RANGES} more" if len(ranges) > MOST_RANGES else ""
    return f"  [bytes {', '.join(shown)}{more}]" if ranges else ""


def _cluster_lines(file: dict[str, Any]) -> str:
    lines = [f"{_path(file)}  (between hosts)"]
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
