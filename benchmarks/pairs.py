"""What pairs.c does, by Python's means: ``pairs.py flock|FileLock|SoftFileLock FILE``."""

from __future__ import annotations

import fcntl
import os
import sys
import time

import filelock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def pair(means: str, path: str) -> Callable[[], None]:
    """Return what takes and gives back the lock of *path* once."""
    if means == "flock":
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

        def by_flock() -> None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            fcntl.flock(descriptor, fcntl.LOCK_UN)

        return by_flock
    lock = getattr(filelock, means)(path)

    def by_filelock() -> None:
        lock.acquire()
        lock.release()

    return by_filelock


def main() -> None:
    once = pair(*sys.argv[1:])
    for line in sys.stdin:
        start = time.monotonic_ns()
        for _ in range(int(line)):
            once()
        print(time.monotonic_ns() - start, flush=True)


if __name__ == "__main__":
    main()
