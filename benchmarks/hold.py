"""Holds locks until the end of its input: ``hold.py DIRECTORY``.

For each line with a number on standard input: locks that many files of the directory, and prints when it had them
(CLOCK_MONOTONIC, nanoseconds). None: takes one and gives it back.
"""

from __future__ import annotations

import fcntl
import os
import resource
import sys
import time


def lock(directory: str, number: int) -> int:
    """Lock a file of the directory, and return its descriptor."""
    descriptor = os.open(f"{directory}/held{number}", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def main() -> None:
    directory = sys.argv[1]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for line in sys.stdin:
        if int(line) == 0:
            fcntl.flock(lock(directory, 0), fcntl.LOCK_UN)
        for number in range(int(line)):
            lock(directory, number)
        print(time.monotonic_ns(), flush=True)


if __name__ == "__main__":
    main()
