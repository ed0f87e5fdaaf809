"""Hands a lock through a queue of processes: ``chain.py flock|SoftFileLock FILE [POLL_SECONDS]``.

For each line with a number N on standard input: this process takes the lock, N others ask for it, and when all of
them wait, it is given back; each of them takes it and gives it back at once. What is printed is a line of
nanoseconds: from the first release to the last, and then for each hand-off from the release to the next one's
having the lock.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
import time

import filelock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_HEAD = struct.Struct("=QQ")  # when the lock was last released, hand-offs so far
_LATENCY = struct.Struct("=Q")
MOST = 1000
SETTLE_SECONDS = 0.15
SETTLE_SECONDS_EACH = 0.005


def ask(means: str, path: str, poll: float) -> Callable[[], Callable[[], None]]:
    """Return what waits for the lock of *path* and returns what gives it back."""
    if means == "flock":

        def by_flock() -> Callable[[], None]:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return lambda: fcntl.flock(descriptor, fcntl.LOCK_UN)

        return by_flock

    def by_filelock() -> Callable[[], None]:
        lock = getattr(filelock, means)(path, poll_interval=poll)
        lock.acquire()
        release: Callable[[], None] = lock.release
        return release

    return by_filelock


def take_turn(acquire: Callable[[], Callable[[], None]], memory: mmap.mmap) -> None:
    """Get the lock, note how long after the release that was, and give it back."""
    release = acquire()
    now = time.monotonic_ns()
    released, number = _HEAD.unpack_from(memory)
    _LATENCY.pack_into(memory, _HEAD.size + number * _LATENCY.size, now - released)
    _HEAD.pack_into(memory, 0, time.monotonic_ns(), number + 1)
    release()


def chain(acquire: Callable[[], Callable[[], None]], processes: int, memory: mmap.mmap) -> list[int]:
    """Return the nanoseconds of one chain: see the module."""
    release = acquire()
    children = []
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            try:
                take_turn(acquire, memory)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    time.sleep(SETTLE_SECONDS + SETTLE_SECONDS_EACH * processes)
    start = time.monotonic_ns()
    _HEAD.pack_into(memory, 0, start, 0)
    release()
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise SystemExit("a process of the chain failed")
    end, count = _HEAD.unpack_from(memory)
    latencies = [_LATENCY.unpack_from(memory, _HEAD.size + i * _LATENCY.size)[0] for i in range(count)]
    return [end - start, *latencies]


def main() -> None:
    means, path, *poll = sys.argv[1:]
    acquire = ask(means, path, float(poll[0]) if poll else 0.05)
    memory = mmap.mmap(-1, _HEAD.size + MOST * _LATENCY.size)
    for line in sys.stdin:
        print(*chain(acquire, int(line), memory), flush=True)


if __name__ == "__main__":
    main()
