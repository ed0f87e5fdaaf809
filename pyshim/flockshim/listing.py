"""The keeper's answer to ``flockshim --locks``: every lock, who holds it and who waits for it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time

from flockshim import holders
from flockshim._native import lib
from flockshim.recordtable import RecordLock, RecordWaiter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from flockshim.descriptions import Description
    from flockshim.files import File
    from flockshim.locktable import FileLock, Waiter
    from flockshim.recordfile import Owner, RecordFile
    from flockshim.recordtable import Range


def write(files: Iterable[File | RecordFile], descriptor: int) -> None:
    """Write the list as JSON into a file.

    An object: ``keeper``, the keeper's pid; ``pid_namespace``, by which all pids are to be read; ``files``, each with
    ``device``, ``inode``, ``path``, ``locks``, ``holders`` and ``waiters``, the latter in order: see `locks_command`.
    Raises OSError.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "not a file")  # a pipe could make us wait
    now = time.time(), time.monotonic()
    text = json.dumps(
        {
            "keeper": lib.native_self(),
            "pid_namespace": holders.pid_namespace(),
            "files": [_file(file, *now) for file in files if file.lock.holders or file.lock.queue],
        }
    )
    data = text.encode()
    while data:
        data = data[os.write(descriptor, data) :]


def _file(file: File | RecordFile, now: float, monotonic: float) -> dict[str, Any]:
    queue = file.lock.queue
    return {
        "device": file.key[0],
        "inode": file.key[1],
        "path": _path([*file.lock.holders, *(waiter.owner for waiter in queue)]),
        "locks": "fcntl" if isinstance(file.lock, RecordLock) else "flock",
        "holders": [_holder(owner, mode, file.lock) for owner, mode in file.lock.holders.items()],
        "waiters": [{**_program(w.context.pid, w.exclusive, now - (monotonic - w.since)), **_wanted(w)} for w in queue],
    }


def _wanted(waiter: Waiter | RecordWaiter) -> dict[str, Any]:
    return {"ranges": [_range(waiter.wanted)]} if isinstance(waiter, RecordWaiter) else {}


def _range(held: Range) -> dict[str, Any]:
    return {
        "first": held.first,
        "last": None if held.last == lib.RECORD_END else held.last,
        "mode": "exclusive" if held.exclusive else "shared",
    }


def _path(descriptions: list[Description | Owner]) -> str:
    with contextlib.suppress(OSError):  # ENAMETOOLONG
        for description in descriptions:
            return os.readlink(f"/proc/self/fd/{description.descriptor}")
    return ""


def _holder(owner: Description | Owner, exclusive: bool, lock: FileLock | RecordLock) -> dict[str, Any]:
    program = _program(owner.pid, exclusive, owner.since)
    # The process that called flock(2) may have ended, as in a shell's (flock 9; ...) 9>file.
    program.update({"taken_by": owner.taker, "taker_ended": not holders.is_alive(owner.taker)})
    if isinstance(lock, RecordLock):
        program["owner"] = "process" if owner.is_process else "description"
        program["ranges"] = [_range(held) for held in lock.ranges[owner]]
    return program


def _program(pid: int, exclusive: bool, since: float) -> dict[str, Any]:
    return {
        "mode": "exclusive" if exclusive else "shared",
        "pid": pid,
        "command": holders.command_of(pid),
        "since": round(since, 3),
    }
