"""The keeper's runner of protocol steps, whose operations a worker process does, and what its death means."""

from __future__ import annotations

import errno
import gc
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from support.proc import DEADLINE, await_end, await_true, thread_state

from flockshim.cluster_ops import Create, List, Look, Pause, Read, Unlink, Wait, Write
from flockshim.lease_files import Directory, Told
from flockshim.lease_runner import CancelledError, Run, Runner, WorkerLostError
from flockshim.lease_worker import Enter, Place
from flockshim.loop import Loop
from flockshim.pytest_plugin import Mounts

BIG = 50_000
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
        self.path = path
        self.loop = ShortLoop()
        self.runner = Runner(cast(Loop, self.loop), longest_poll=0.5)
        self.directory = self.at(1)
        self.ended: list[tuple[Any, Exception | None]] = []

    def at(self, number: int) -> Directory:
        return Directory(Place(number, str(self.path), None), "a", 90.0, lambda _: None, Told())

    def start(self, *operations: Any, waiting: Callable[[], None] = lambda: None) -> Run:
        """Begin steps that return the result of the last operation."""

        def steps() -> Any:
            result = None
            for operation in operations:
                result = yield operation
            return result

        return self.runner.run(self.directory, steps(), lambda *end: self.ended.append(end), waiting)

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
        ((_, error),) = self.ends()
        assert error is not None
        return error

    def worker(self) -> int:
        assert self.runner._process
        return self.runner._process.pid

    def signal(self, number: signal.Signals) -> int:
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


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path)
    yield running
    running.close()


def test_steps_get_their_results_and_their_failures(running: Running) -> None:
    running.start(Create("x", "text"), Look("x"), Read("x"))
    assert running.result() == "text"
    running.start(List(""))
    assert running.result() == ["x"]
    running.start(Read("nothing"), Read("x"))
    error = running.failure()
    assert isinstance(error, FileNotFoundError)
    assert error.filename == "nothing"


def test_who_waits_in_the_queue_is_told_so_and_goes_on(running: Running) -> None:
    waits: list[str] = []
    running.start(Wait(0), Pause(0), Wait(0), Create("x", ""), waiting=lambda: waits.append("waits"))
    assert waits == ["waits"]
    running.result()
    assert waits == ["waits"] * 2
    assert (running.path / "x").exists()


def test_what_is_cancelled_while_it_waits_ends_at_once(running: Running) -> None:
    run = running.start(Wait(1000), Create("x", ""))
    run.cancel()
    assert isinstance(running.failure(), CancelledError)
    running.start(Create("y", ""))
    running.result()
    assert os.listdir(running.path) == ["y"]


def test_what_is_cancelled_during_an_operation_ends_after_it(running: Running) -> None:
    run = running.start(Create("x", ""), Create("y", ""))
    run.cancel()
    assert running.ended == []
    assert isinstance(running.failure(), CancelledError)
    assert os.listdir(running.path) == ["x"]


@pytest.fixture
def server(_nolock_mounts: Mounts) -> Iterator[int]:
    """The process behind the nolock_dir, which goes on in any case."""
    pid = _nolock_mounts.get("ENOSYS", "ENOSYS").server_pid
    yield pid
    os.kill(pid, signal.SIGCONT)


def hangs_in_open(pid: int) -> bool:
    """Whether a thread of the process sleeps in openat(2)."""
    states = [thread_state(pid, int(task)) for task in os.listdir(f"/proc/{pid}/task")]
    return any(state and state.syscall == OPENAT for state in states)


def kill(running: Running) -> None:
    await_end(running.signal(signal.SIGKILL))


def test_a_worker_that_was_killed_while_idle_is_replaced_without_a_word(running: Running) -> None:
    running.start(Create("x", ""))
    running.result()
    kill(running)
    running.turn()
    running.start(Create("y", ""))
    running.result()
    assert sorted(os.listdir(running.path)) == ["x", "y"]


def test_what_is_sent_to_a_worker_that_has_just_died_is_done_by_the_next(running: Running) -> None:
    """Before the keeper has heard of its death."""
    running.start(Create("x", ""))
    running.result()
    kill(running)
    running.start(Create("y", ""), Read("x"))
    running.start(List(""))
    ended = running.ends(2)
    assert [error for _, error in ended] == [None, None]
    assert sorted(os.listdir(running.path)) == ["x", "y"]


@pytest.mark.parametrize("begun", [False, True])
def test_of_what_a_killed_worker_was_to_do_nobody_knows_whether_it_was_done(
    running: Running, begun: bool, nolock_dir: Path, server: int
) -> None:
    """The steps learn it, and the next ones have a new worker."""
    running.path = nolock_dir
    running.directory = running.at(2)
    running.start(List(""))
    running.result()
    if begun:
        os.kill(server, signal.SIGSTOP)
        running.start(Create("x", ""))
        await_true(lambda: hangs_in_open(running.worker()), "the worker to begin")
    else:
        running.signal(signal.SIGSTOP)
        running.start(Create("x", ""))
    pid = running.signal(signal.SIGKILL)
    os.kill(server, signal.SIGCONT)
    await_end(pid)
    error = running.failure()
    assert isinstance(error, WorkerLostError)
    assert error.filename == str(nolock_dir)
    running.start(Create("y", ""), List("y"))
    assert running.result() == ["y"]
    assert running.worker() != pid


def test_steps_may_go_on_after_the_worker_s_death(running: Running) -> None:
    """As a release does, which is tried until it succeeds."""

    def steps() -> Any:
        try:
            yield Create("x", "")
        except WorkerLostError:
            yield Create("y", "")
        return "went on"

    running.start(List(""))
    running.result()
    running.signal(signal.SIGSTOP)
    running.runner.run(running.directory, steps(), lambda *end: running.ended.append(end))
    kill(running)
    assert running.result() == "went on"
    assert os.listdir(running.path) == ["y"]


def test_a_worker_that_is_stopped_does_all_when_it_goes_on(running: Running) -> None:
    """More than a socket holds: what cannot be sent is sent later, and the keeper does not wait."""
    running.start(List(""))
    running.result()
    running.signal(signal.SIGSTOP)
    names = [f"file-{number:03}" for number in range(200)]
    for name in names:
        running.start(Write(name, "x" * BIG))
    for _ in range(20):
        running.turn(0)
    assert running.ended == []
    assert len(running.runner._pending) < len(names), "all of it was sent: nothing is tested"
    running.signal(signal.SIGCONT)
    assert {error for _, error in running.ends(len(names))} == {None}
    assert sorted(os.listdir(running.path)) == names
    assert {(running.path / name).stat().st_size for name in names} == {BIG}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_without_a_worker_the_steps_end_with_an_error_and_later_ones_try_again(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever has begun them is told after that, not meanwhile."""
    gc.collect()
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(running.path / "nothing"))
        for _ in range(3):
            running.start(Create("x", ""))
            assert running.ended == []
            error = running.failure()
            assert isinstance(error, OSError)
            assert error.errno == errno.ENOENT
    assert descriptors() == before
    running.start(Create("y", ""))
    running.result()
    assert os.listdir(running.path) == ["y"]


def test_steps_may_go_on_without_a_worker(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is thrown into them, as that of any operation."""

    def steps() -> Any:
        try:
            yield Create("x", "")
        except OSError:
            monkeypatch.undo()
        return (yield List(""))

    monkeypatch.setattr(sys, "executable", str(running.path / "nothing"))
    running.runner.run(running.directory, steps(), lambda *end: running.ended.append(end))
    assert running.result() == []


def test_no_descriptor_is_left_behind(running: Running) -> None:
    file = running.path / "file"
    file.touch()
    with file.open() as open_file:
        running.start(Enter("file", open_file.fileno()))
        running.result()
        gc.collect()
        before, there = descriptors(), len(os.listdir(f"/proc/{running.worker()}/fd"))
        for _ in range(50):
            running.start(Enter("file", open_file.fileno()), Enter("other", open_file.fileno()))
            error = running.failure()
            assert isinstance(error, OSError)
            assert error.errno == errno.ESTALE
        kept = descriptors(), len(os.listdir(f"/proc/{running.worker()}/fd"))
        assert kept == (before, there)
        kill(running)
        running.start(Unlink("file"))
        running.result()
        assert descriptors() == before
