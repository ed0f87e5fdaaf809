"""A runner of protocol steps without a keeper around it, for tests of it and of its worker."""

from __future__ import annotations

import os
import platform
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from flockshim.lease_files import Directory, Told
from flockshim.lease_runner import Run, Runner
from flockshim.lease_worker import Place
from flockshim.loop import Loop
from support.proc import DEADLINE, thread_state

OPENAT = {"x86_64": 257, "aarch64": 56}.get(platform.machine(), -1)


class ShortLoop:
    """As the keeper's, but for as long as it is asked to."""

    def __init__(self) -> None:
        self.handlers: dict[int, Callable[[], None]] = {}
        self.wake_at = float("inf")

    def watch(self, descriptor: int, handler: Callable[[], None], first: bool = False) -> None:
        self.handlers[descriptor] = handler

    def unwatch(self, descriptor: int) -> None:
        del self.handlers[descriptor]

    def wake_by(self, when: float) -> None:
        self.wake_at = min(self.wake_at, when)


class Running:
    """A runner, and what has become of what it was given."""

    def __init__(self, path: Path) -> None:
        self.number = 0
        self.loop = ShortLoop()
        self.runner = Runner(cast(Loop, self.loop), longest_poll=0.5)
        self.directory = self.at(path)
        self.ended: list[tuple[Any, Exception | None]] = []

    def at(self, path: Path, identity: list[int] | None = None) -> Directory:
        """A directory that the worker does not know yet; IDENTITY as of `Place`."""
        self.number += 1
        return Directory(Place(self.number, str(path), identity), "a", 90.0, lambda _: None, Told())

    def start(
        self, *operations: Any, directory: Directory | None = None, waiting: Callable[[], None] = lambda: None
    ) -> Run:
        """Begin steps that return the result of the last operation."""

        def steps() -> Any:
            result = None
            for operation in operations:
                result = yield operation
            return result

        return self.runner.run(directory or self.directory, steps(), lambda *end: self.ended.append(end), waiting)

    def turn(self, deadline: float = DEADLINE) -> None:
        """One round of the loop."""
        patience = max(0.0, min(deadline, self.loop.wake_at - time.monotonic()))
        for descriptor in select.select(list(self.loop.handlers), [], [], patience)[0]:
            self.loop.handlers[descriptor]()
        if time.monotonic() >= self.loop.wake_at:
            self.loop.wake_at = float("inf")
            self.runner.look(time.monotonic())

    def ends(self, count: int = 1) -> list[tuple[Any, Exception | None]]:
        """Let it run until COUNT have ended, and return how."""
        limit = time.monotonic() + DEADLINE
        while len(self.ended) < count:
            assert time.monotonic() < limit, f"only {self.ended} have ended"
            self.turn(limit - time.monotonic())
        ended, self.ended = self.ended, []
        return ended

    def result(self) -> Any:
        """The result of what was started, which must not fail."""
        ((result, error),) = self.ends()
        assert error is None
        return result

    def failure(self) -> Exception:
        """What has ended what was started."""
        ((_, error),) = self.ends()
        assert error is not None
        return error

    def do(self, operation: Any, directory: Directory | None = None) -> Any:
        """The result of one operation. Raises its OSError."""
        self.start(operation, directory=directory)
        ((result, error),) = self.ends()
        if error is not None:
            raise error
        return result

    def worker(self) -> int:
        assert self.runner._process
        return self.runner._process.pid

    def descriptors(self) -> list[str]:
        """What the worker has open but its socket and the standard streams."""
        base = f"/proc/{self.worker()}/fd"
        return [os.readlink(f"{base}/{name}") for name in os.listdir(base) if int(name) > 2]

    def signal(self, number: signal.Signals) -> int:
        """To the worker, whose id is returned."""
        pid = self.worker()
        os.kill(pid, number)
        return pid

    def close(self) -> None:
        """End the worker, as the keeper's end does."""
        worker = self.runner._worker
        if worker:
            self.signal(signal.SIGCONT)
            worker.close()
            assert self.runner._process
            self.runner._process.wait()


def threads_in_open(pid: int) -> int:
    """How many threads of a process sleep in openat(2)."""
    states = [thread_state(pid, int(task)) for task in os.listdir(f"/proc/{pid}/task")]
    return sum(1 for state in states if state and state.syscall == OPENAT)
