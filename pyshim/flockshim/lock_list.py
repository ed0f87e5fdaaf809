"""What the keepers of this host say about who holds and who waits, put together: for ``--locks`` and for messages."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from typing import TYPE_CHECKING

from flockshim import FlockshimError, holders
from flockshim._native import lib

if TYPE_CHECKING:
    from typing import Any

    from flockshim.locking import Locker

    _Files = dict[tuple[int, int, str], dict[str, Any]]

ANSWER_MILLISECONDS = 5000
MESSAGE_MILLISECONDS = 500


REASONS = {
    errno.ETIME: "is it stopped?",
    errno.EPROTO: "it is of another version",
}


def gather(locker: Locker, milliseconds: int = ANSWER_MILLISECONDS) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the locked files of all keepers, and the sockets of keepers that did not answer, each with the reason.

    A file is as in the JSON of ``flockshim --locks``: see :mod:`flockshim.locks_command`.

    :param milliseconds: how long each keeper is waited for.
    :raises FlockshimError: when it cannot be seen which keepers there are.
    """
    directory = locker.rendezvous_directory()
    files: _Files = {}
    silent = {}
    for path in _sockets(directory):
        try:
            _add(files, _ask(path, milliseconds))
        except OSError as error:
            silent[path] = REASONS.get(error.errno or 0) or str(error.strerror)
    for file in files.values():
        file["waiters"].sort(key=lambda waiter: waiter["since"])
    return sorted(files.values(), key=lambda file: str(file["path"])), silent


def holder_of(locker: Locker, file: os.stat_result, path: str | None = None) -> str:
    """Return who holds the emulated lock on a file, for people to read; as far as that is known.

    :param path: its name, by which programs on other hosts are known.
    """
    with contextlib.suppress(FlockshimError):
        for entry in gather(locker, MESSAGE_MILLISECONDS)[0]:
            if (entry["device"], entry["inode"], entry["locks"]) == (file.st_dev, file.st_ino, "flock"):
                for holder in entry["holders"]:
                    return _describe(holder)
    with contextlib.suppress(FlockshimError, OSError):
        return (path and _holder_elsewhere(locker, path)) or holders.UNKNOWN
    return holders.UNKNOWN


def _holder_elsewhere(locker: Locker, path: str) -> str | None:
    from flockshim import cluster_list

    with cluster_list.observer(locker, {}) as observer, cluster_list.Target(path, observer) as target:
        held, _ = target.holdings()
        return cluster_list.describe(held[0], target.name) if held else None


def _describe(holder: dict[str, Any]) -> str:
    text = holders.describe(holder["pid"], holder["since"], holder["command"])
    here = holder["pid_namespace"] == holders.pid_namespace()
    return text if here else f"{text}, in another pid namespace"


def _sockets(directory: str) -> list[str]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FlockshimError(f"cannot look into the rendezvous directory {directory!r}: {error.strerror}") from None
    return [f"{directory}/{name}" for name in sorted(names) if name.startswith("k-") and name.endswith(".sock")]


def _ask(socket: str, milliseconds: int) -> dict[str, Any]:
    """Return a keeper's list, an empty one where the keeper has left. Raises OSError."""
    # Not in the usual place for such files, which may be full, or hang.
    with tempfile.TemporaryFile(dir=os.path.dirname(socket)) as file:
        error = -lib.native_ask_for_list(os.fsencode(socket), file.fileno(), milliseconds)
        if error in (errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET):
            return {"files": []}
        if error:
            raise OSError(error, os.strerror(error))
        file.seek(0)
        return dict(json.load(file))


def _add(files: _Files, answer: dict[str, Any]) -> None:
    for file in answer["files"]:
        for program in (*file["holders"], *file["waiters"]):
            program["keeper"] = answer["keeper"]
            program["pid_namespace"] = answer["pid_namespace"]
        known = files.setdefault((file["device"], file["inode"], file["locks"]), file)
        if known is not file:
            known["holders"] += file["holders"]
            known["waiters"] += file["waiters"]
