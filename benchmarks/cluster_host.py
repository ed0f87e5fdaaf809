"""A "host": ``cluster_host.py NAME MEANS PATH PROCESSES OUT``, in new mount, pid, uts and ipc namespaces.

Lines on standard input command it, and each is answered by one when it is done:

- `alone N`: one process has taken and given back the lock N times; the answer is the nanoseconds;
- `pairs N T`: all processes have, from T on (CLOCK_MONOTONIC, nanoseconds), and each time have raised the number in
  OUT/counter and noted begin and end in OUT; the answer is how many have failed;
- `hold`: one process holds the lock, for as long as the host exists;
- `wait`: all processes begin to wait for it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from functools import partial

from cluster_means import MEANS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DIGITS = 10


def isolate(name: str) -> None:
    """Become a host that shares nothing but directories with others."""
    subprocess.run(["mount", "-t", "tmpfs", "none", "/dev/shm"], check=True)
    socket.sethostname(name)


def pairs(means: str, path: str, rounds: int, start: int, out: str) -> None:
    """Take and give back the lock, raising the counter under it."""
    take, give_back = MEANS[means](path)
    counter = os.open(f"{out}/counter", os.O_RDWR)
    host = os.uname().nodename
    log = os.open(f"{out}/{host}.{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    time.sleep(max(0, start - time.monotonic_ns()) / 1e9)
    for _ in range(rounds):
        take()
        begin = time.monotonic_ns()
        number = int(os.pread(counter, DIGITS, 0) or 0)
        os.pwrite(counter, b"%0*d" % (DIGITS, number + 1), 0)
        end = time.monotonic_ns()
        give_back()
        os.write(log, f"{begin} {end}\n".encode())


def hold(means: str, path: str, ready: int) -> None:
    """Take the lock, and keep it as long as the host exists."""
    take, _ = MEANS[means](path)
    os.write(ready, b"w")
    take()
    os.write(ready, b"h")
    time.sleep(1e6)


def begin_holding(means: str, path: str, processes: int, held: bool) -> int:
    """Have processes take the lock, and return when they hold it, or have begun to wait."""
    ours, theirs = os.pipe()
    for _ in range(processes):
        fork(partial(hold, means, path, theirs))
    seen = b""
    while seen.count(b"h" if held else b"w") < processes:
        seen += os.read(ours, 100)
    return processes


def alone(take: Callable[[], object], give_back: Callable[[], object], rounds: int) -> int:
    """Take and give back the lock so many times, and return the nanoseconds."""
    start = time.monotonic_ns()
    for _ in range(rounds):
        take()
        give_back()
    return time.monotonic_ns() - start


def fork(run: Callable[[], None]) -> int:
    """Have a child do it, and return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def main() -> None:
    name, means, path, processes, out = sys.argv[1:]
    isolate(name)
    children = int(processes)
    own = MEANS[means](path)
    print("host", flush=True)
    for line in sys.stdin:
        word, *number = line.split()
        if word == "alone":
            answer = alone(*own, int(number[0]))
        elif word == "pairs":
            rounds, start = map(int, number)
            pids = [fork(partial(pairs, means, path, rounds, start, out)) for _ in range(children)]
            answer = sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
        else:
            answer = begin_holding(means, path, 1 if word == "hold" else children, word == "hold")
        print(answer, flush=True)


if __name__ == "__main__":
    main()
