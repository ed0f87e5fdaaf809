"""The ways to lock that are compared between hosts: each takes and gives back one lock, on a file or beside it."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib
import os
import shutil
import subprocess
from typing import Any

import filelock

flufl_lock: Any = None
with contextlib.suppress(ImportError):
    flufl_lock = importlib.import_module("flufl.lock")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Pair = tuple[Callable[[], object], Callable[[], object]]

LIFETIME = datetime.timedelta(minutes=5)


def _flock(path: str) -> Pair:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    return lambda: fcntl.flock(descriptor, fcntl.LOCK_EX), lambda: fcntl.flock(descriptor, fcntl.LOCK_UN)


def _soft(path: str) -> Pair:
    lock = filelock.SoftFileLock(f"{path}.soft")
    return lock.acquire, lock.release


def _soft_read_write(path: str) -> Pair:
    lock = filelock.SoftReadWriteLock(f"{path}.rw")
    return lock.acquire_write, lock.release


def _flufl(path: str) -> Pair:
    lock = flufl_lock.Lock(f"{path}.flufl", lifetime=LIFETIME)
    return lock.lock, lock.unlock


def _dotlockfile(path: str) -> Pair:
    name = f"{path}.dot"
    # It knows seconds only, and gives up after so many attempts.
    take = ["dotlockfile", "-l", "-r", "1000", "-i", "1", name]
    return lambda: subprocess.run(take, check=True), lambda: subprocess.run(["dotlockfile", "-u", name], check=True)


MEANS: dict[str, Callable[[str], Pair]] = {
    "flockshim": _flock,
    "SoftFileLock": _soft,
    "SoftReadWriteLock": _soft_read_write,
    "flufl.lock": _flufl,
    "dotlockfile": _dotlockfile,
}


def missing(means: str) -> str | None:
    """Return what has to be installed for this way to lock, or None."""
    if means == "flufl.lock" and not flufl_lock:
        return "pip install flufl.lock"
    if means == "dotlockfile" and not shutil.which("dotlockfile"):
        return "apt install liblockfile-bin"
    return None
