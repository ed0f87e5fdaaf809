"""One supervisor for many tests: a static program under ``flockshim --via seccomp`` that starts all others."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path

from flockshim.lock_list import gather
from flockshim.locking import Locker
from support.driver import Driver, Fleet
from support.proc import await_true, children
from support.programs import static_program

MANY_THREADS = 10
LAUNCHER = [sys.executable, "-m", "flockshim", "--via", "seccomp", "--"]


def settings(rendezvous: Path, **more: str) -> dict[str, str]:
    """The environment of a launcher in mode host."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("FLOCKSHIM_")}
    return {**base, "FLOCKSHIM_DIR": str(rendezvous), "FLOCKSHIM_MODE": "host", **more}


class Supervision:
    """A launcher, its supervisor, and the nursery: a driver whose only work is to start others."""

    def __init__(self, environment: Mapping[str, str], *prefix: str) -> None:
        self.fleet = Fleet(environment)
        self.nursery = self.fleet.start(None, *prefix, *LAUNCHER, executable=static_program("lockdriver"))
        self.launcher = self.fleet.processes[0].pid
        self.pid = children(self.launcher)[0]

    def start(self, fleet: Fleet) -> Driver:
        """A fresh program that writes to FLEET's standard error."""
        error = self.nursery.adopt(fleet.stderr.fileno())
        self.nursery.ask("dup2", error, 2)
        self.nursery.close(error)
        return self.nursery.spawn(fleet=fleet)

    def reap(self) -> None:
        """Leave no zombie of those that have ended."""
        with suppress(ChildProcessError):
            while self.nursery.ask("wait"):
                continue

    def descriptors(self) -> list[str]:
        """What the supervisor has open, but for what its threads keep for their next calls."""
        base = f"/proc/{self.pid}/fd"
        links = []
        for name in os.listdir(base):
            with suppress(FileNotFoundError):
                links.append(os.readlink(f"{base}/{name}"))
        kept = "eventfd", "pidfd", "/fdinfo/"
        return sorted(link for link in links if not any(word in link for word in kept))

    def threads(self) -> int:
        """How many it has."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def await_idle(self, descriptors: list[str]) -> None:
        """Return when it has only DESCRIPTORS open, and all but a handful of its threads have ended."""
        await_true(lambda: self.descriptors() == descriptors, "the supervisor to have closed all that it has opened")
        await_true(lambda: self.threads() < MANY_THREADS, "its threads to end")

    def errors(self) -> str:
        """What launcher and supervisor have written on standard error, and nobody has seen yet."""
        text = self.fleet.errors()
        self.fleet.forget_errors()
        return text

    def end(self) -> None:
        self.fleet.end()


def waiting(environment: Mapping[str, str], pids: Container[int]) -> Counter[int]:
    """How many lock calls of each of PIDS wait: at a keeper, as ENVIRONMENT names it, or in the kernel."""
    files = gather(Locker(environment))[0]
    found = Counter(waiter["pid"] for file in files for waiter in file["waiters"] if waiter["pid"] in pids)
    # `1: -> FLOCK  ADVISORY  WRITE 708 08:01:1234 0 EOF`, see proc(5).
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1:3] == ["->", "FLOCK"] and int(words[5]) in pids:
            found[int(words[5])] += 1
    return found
