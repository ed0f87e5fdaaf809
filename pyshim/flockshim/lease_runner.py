"""Runs the cluster protocol's generators in the keeper; `lease_worker` does the operations, and none is waited for."""

from __future__ import annotations

import contextlib
import errno
import heapq
import json
import os
import random
import socket
import subprocess
import sys
import time

from flockshim import closing
from flockshim._native import lib
from flockshim.cluster_ops import Pause, Wait
from flockshim.lease_worker import STOPPED, Enter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from flockshim.lease_files import Directory
    from flockshim.loop import Loop

# vfork(2) would stop the whole keeper until the new process has closed its copies of programs' descriptors.
subprocess._USE_VFORK = False  # type: ignore[misc]

MAX_PACKET = 1 << 20
SOCKET_BYTES = 4 << 20
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 1.0
# The queue's head polls at first this often, in seconds, who is behind more seldom for each that is ahead; then after a
# part of the time for which nothing has changed for it.
FIRST_POLL, POLL_STEP, POLL_PART = 0.002, 0.01, 0.1


class WorkerLostError(OSError):
    """The worker was killed: what it was doing may have been done or not."""


class CancelledError(Exception):
    """The steps were ended by `Run.cancel`."""


class Run:
    """A generator under way."""

    def __init__(
        self,
        runner: Runner,
        directory: Directory,
        generator: Generator[Any, Any, Any],
        ended: Callable[[Any, Exception | None], None],
        waiting: Callable[[], None],
        stays: bool,
    ) -> None:
        """See `Runner.run`."""
        self._runner = runner
        self.directory = directory
        self._generator = generator
        self._ended = ended
        self._waiting = waiting
        self.stays = stays
        self._cancelled = False
        self._over = False
        self._resumes = False
        # In the queue, and since when.
        self._position = -1
        self._moved = 0.0

    def cancel(self) -> None:
        """End it, with CancelledError, as soon as no operation is under way."""
        self._cancelled = True
        if self._resumes:
            self.resume()

    def resume(self) -> None:
        """Go on after a pause."""
        if not self._over:
            self._resumes = False
            self.step(lambda: self._generator.send(None))

    def throw(self, error: OSError) -> None:
        """Go on after an operation that failed."""
        self.step(lambda: self._generator.throw(error))

    def send(self, result: Any) -> None:
        """Go on after an operation."""
        self.step(lambda: self._generator.send(result))

    def step(self, resume: Callable[[], Any]) -> None:
        """Go on to the next operation."""
        if self._cancelled and not self._over:
            self._over = True
            self._generator.close()
            self._ended(None, CancelledError())
            return
        try:
            operation = resume()
        except StopIteration as stop:
            self._over = True
            self._ended(stop.value, None)
        except OSError as error:
            self._over = True
            self._ended(None, error)
        else:
            if not isinstance(operation, (Pause, Wait)):
                self._runner.perform(self, operation)
                return
            if isinstance(operation, Wait):
                self._waiting()
            self._resumes = True
            self._runner.at(time.monotonic() + self._delay(operation) * random.uniform(0.5, 1.0), self.resume)

    def _delay(self, operation: Pause | Wait) -> float:
        if isinstance(operation, Pause):
            return min(LONGEST_PAUSE, FIRST_PAUSE * (1 << min(operation.attempt, 20)))
        now = time.monotonic()
        if operation.position != self._position:
            self._position, self._moved = operation.position, now
        first = FIRST_POLL + POLL_STEP * operation.position
        return min(self._runner.longest_poll, max(first, POLL_PART * (now - self._moved)))


class Runner:
    """Performs operations by a worker process, and calls back in the loop."""

    def __init__(self, loop: Loop, longest_poll: float) -> None:
        """Start no worker before one is needed. `longest_poll`: in seconds, between two looks of one who waits."""
        self.longest_poll = longest_poll
        self._loop = loop
        self._worker: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # Why there is none.
        self._failure: OSError | None = None
        self._pending: dict[int, Run] = {}
        self._stopped: list[int] = []
        self._number = 0
        self._buffer = memoryview(bytearray(MAX_PACKET))
        self._timers: list[tuple[float, int, Callable[[], None]]] = []

    def run(
        self,
        directory: Directory,
        generator: Generator[Any, Any, Any],
        ended: Callable[[Any, Exception | None], None],
        waiting: Callable[[], None] = lambda: None,
        stays: bool = False,
    ) -> Run:
        """Run a generator to its end: `ended` gets its result, or the OSError or CancelledError that has ended it.

        `waiting` is called each time before it waits in the queue. If it must be that the directory `stays` where it
        is, an operation after it was moved fails with ESTALE.
        """
        run = Run(self, directory, generator, ended, waiting, stays)
        run.step(lambda: next(generator))
        return run

    def forget(self, directory: Directory) -> None:
        """Have the worker close what it has of a directory."""
        if self._worker:
            with contextlib.suppress(OSError):
                self._worker.send(json.dumps([0, directory.place, False, "forget", []]).encode())

    def entrust(self, stopped: list[int]) -> None:
        """Tell the worker which processes are stopped, and must be continued if this keeper and its standby die."""
        self._stopped = stopped
        if self._worker:
            with contextlib.suppress(OSError):
                self._worker.send(json.dumps([STOPPED, stopped]).encode())

    def end(self) -> None:
        """Let the worker end; nothing is called any more."""
        if self._worker:
            self._worker.close()
            self._worker = None

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Have something called once, at monotonic time `when` or soon after."""
        self._number += 1
        heapq.heappush(self._timers, (when, self._number, call))
        self._loop.wake_by(when)

    def look(self, now: float) -> None:
        """Call what is due: the loop's alarm."""
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        if self._timers:
            self._loop.wake_by(self._timers[0][0])

    def perform(self, run: Run, operation: Any) -> None:
        """Have the worker do an operation of a run."""
        self._number += 1
        number, descriptors = self._number, []
        arguments = list(operation)
        if isinstance(operation, Enter):
            descriptors = [arguments.pop()]
        name = type(operation).__name__
        packet = json.dumps([number, run.directory.place, run.stays, name, arguments]).encode()
        try:
            socket.send_fds(self._connected(), [packet], descriptors)
        except (BlockingIOError, ConnectionError):
            # It is stopped, or has been killed, and `_lose` comes next. A descriptor may be another file's by then.
            moved = OSError(errno.ESTALE, "not found out", run.directory.place.path)
            again = (lambda: run.throw(moved)) if descriptors else (lambda: self.perform(run, operation))
            self.at(time.monotonic() + FIRST_PAUSE, again)
        except OSError as error:
            # Without a descriptor there is no worker. Not at once: whoever asks does not expect it yet.
            failure = error
            self.at(time.monotonic(), lambda: run.throw(failure))
        else:
            self._pending[number] = run

    def _connected(self) -> socket.socket:
        if self._worker is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for end in ours, theirs:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
            closing.aside(lambda: self._start(theirs))
            ours.setblocking(False)
            self._worker = ours
            self.entrust(self._stopped)
            self._loop.watch(ours.fileno(), self._receive)
        return self._worker

    def _start(self, peer: socket.socket) -> None:
        """Start a worker, in a thread: the new process closes copies of programs' descriptors, which may take long."""
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "lease_worker.py")
        with peer:
            try:
                # Both must mean the same bytes by a name.
                locale = {name: os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if name in os.environ}
                command = [sys.executable, "-I", "-S", script, str(lib.native_self()), str(os.getppid())]
                self._process = subprocess.Popen(command, stdin=peer.fileno(), cwd="/", env=locale)
            except OSError as error:
                self._failure = error

    def _receive(self) -> None:
        assert self._worker
        try:
            # Into memory that is there already: a packet may be long, and hardly ever is.
            packet = bytes(self._buffer[: self._worker.recv_into(self._buffer)])
        except BlockingIOError:
            return
        except ConnectionError:
            # What was sent to it has not been read.
            packet = b""
        if not packet:
            self._lose()
            return
        number, result, error = json.loads(packet)
        run = self._pending.pop(number)
        if error is None:
            run.send(result)
        else:
            run.throw(OSError(error[0], error[1], error[2]))

    def _lose(self) -> None:
        assert self._worker
        self._loop.unwatch(self._worker.fileno())
        self._worker.close()
        self._worker = None
        if self._process:
            self._process.wait()
        failure, self._failure, self._process = self._failure, None, None
        pending, self._pending = self._pending, {}
        for run in pending.values():
            lost = WorkerLostError(errno.EIO, "the keeper's lease worker was killed", run.directory.place.path)
            run.throw(failure or lost)
