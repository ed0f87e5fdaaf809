"""What the keepers of this host say about who holds and who waits, put together: for ``--locks`` and for messages."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from typing import TYPE_CHECKING

from flockshim import holders
from flockshim._native import lib

if TYPE_CHECKING:
    from typing import Any

    from flockshim.locking import Locker

ANSWER_MILLISECONDS = 5000


def gather(locker: Locker) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the locked files of all keepers, and the sockets of keepers that do not answer.

    A file is as in the JSON of ``flockshim --locks``: see :mod:`flockshim.locks_command`.
    """
    directory = locker.rendezvous_directory()
    files: dict[tuple[int, int], dict[str, Any]] = {}
    silent = []
    for path in _sockets(directory):
        answer = _ask(path)
        if answer is None:
            silent.append(path)
        else:
            _add(files, answer)
    for file in files.values():
        file["waiters"].sort(key=lambda waiter: waiter["since"])
    return sorted(files.values(), key=lambda file: str(file["path"])), silent


def holder_of(locker: Locker, file: os.stat_result) -> str:
    """Return who holds the emulated lock on a file, for people to read; empty where nobody is known to."""
    for entry in gather(locker)[0]:
        if (entry["device"], entry["inode"]) == (file.st_dev, file.st_ino):
            for holder in entry["holders"]:
                return holders.describe(holder["pid"], holder["since"])
    return ""


def _sockets(directory: str) -> list[str]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return [f"{directory}/{name}" for name in sorted(names) if name.startswith("k-") and name.endswith(".sock")]


def _ask(socket: str) -> dict[str, Any] | None:
    """Return a keeper's list, an empty one where the keeper has left, or None where it does not answer."""
    with tempfile.TemporaryFile() as file:
        error = -lib.native_ask_for_list(os.fsencode(socket), file.fileno(), ANSWER_MILLISECONDS)
        if error in (errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET):
            return {"files": []}
        if error:
            return None
        file.seek(0)
        return dict(json.load(file))


def _add(files: dict[tuple[int, int], dict[str, Any]], answer: dict[str, Any]) -> None:
    for file in answer["files"]:
        for program in (*file["holders"], *file["waiters"]):
            program["keeper"] = answer["keeper"]
            program["pid_namespace"] = answer["pid_namespace"]
        known = files.setdefault((file["device"], file["inode"]), file)
        if known is not file:
            known["holders"] += file["holders"]
            known["waiters"] += file["waiters"]
