"""The worlds that must not differ: a file system whose kernel locks, one under the shim, and both supervised."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from support.driver import EX, Call, Driver, Fleet
from support.proc import await_true, thread_state
from support.programs import program, static_program

if TYPE_CHECKING:
    import pytest

    from support.supervision import Supervision

FLOCK_SYSCALL = {"x86_64": 73, "aarch64": 32}.get(platform.machine(), -1)


ON_KERNEL = "supervised, kernel"
ON_FUSE = "supervised, kernel on FUSE"
ALL = ["native", "emulated", "supervised", ON_KERNEL]
BY_KEEPER = ["emulated", "supervised"]
# For what takes a keeper a second, and is the same to it whoever asks.
ONCE_BY_KEEPER = ["native", "emulated", ON_KERNEL]


class World:
    """A directory, and the environment in which programs can lock the files in it."""

    def __init__(self, name: str, directory: Path, environment: Mapping[str, str], *prefix: str) -> None:
        """PREFIX is a command that starts every program of this world, such as unshare(1)."""
        self.name = name
        self.directory = directory
        self.environment = dict(environment)
        self.emulated = name == "emulated"
        self.prefix = prefix
        self.fleet = Fleet(environment)
        self.supervised = False
        self._prober: Driver | None = None

    def start(self) -> Driver:
        """A new process of this world."""
        return self.fleet.start(None, *self.prefix)

    def command(self, name: str) -> list[str]:
        """The words that run tests/programs/NAME.c in this world."""
        return [*self.prefix, str(program(name))]

    def file(self, name: str = "file") -> Path:
        """An empty file in this world's directory."""
        path = self.directory / name
        path.touch()
        return path

    def opened(self, name: str = "file") -> tuple[Driver, int]:
        """A new process, and its descriptor of the file NAME."""
        driver = self.start()
        return driver, driver.open(self.directory / name)

    def probe(self, path: Path | str, operation: int) -> int:
        """Result of a non-blocking try from a description, and process, of its own; undone."""
        return self._prober_process().probe(path, operation)

    def free(self, path: Path | str) -> bool:
        """Whether nobody holds any lock on PATH."""
        return self.probe(path, EX) == 0

    def await_blocked(self, *calls: Call) -> None:
        """Return when each of CALLS, made in a thread that does nothing else, waits for its lock.

        Natively a thread that sleeps in flock(2) waits. Under the shim it waits when the keeper
        has its request and has not answered: it sleeps outside flock(2), and has not been switched
        in or out during two round trips of other requests to the same keeper. The keeper takes
        what is ready before it asks for more, so after two round trips it has dealt with all that
        was sent before them; and an answer makes the sleeper runnable in the very send(2).
        """
        if calls:
            await_true(lambda: self._quiescent(calls), f"{[call.driver for call in calls]} to wait")

    def await_process_blocked(self, pid: int) -> None:
        """The same of a program that is no driver, single-threaded, and must not return meanwhile."""
        await_true(lambda: self._all_wait([(pid, pid)]), f"process {pid} to wait")

    def at_rest(self, call: Call) -> object:
        """What changes as soon as the lock of a waiting call is granted, and the keeper has done what it does then."""
        return thread_state(call.driver.pid, call.tid)

    def _quiescent(self, calls: Sequence[Call]) -> bool:
        for call in calls:
            if call.returned():
                raise AssertionError(f"{call.driver}: {call.value()} from a call that should wait")
        return self._all_wait([(call.driver.pid, call.tid) for call in calls])

    def _all_wait(self, threads: Sequence[tuple[int, int]]) -> bool:
        before = [thread_state(*thread) for thread in threads]
        if not all(state and state.asleep for state in before):
            return False
        in_flock = [state is not None and state.syscall == FLOCK_SYSCALL for state in before]
        if not self.emulated:
            return all(in_flock)
        if any(in_flock):
            return False
        self.round_trip()
        self.round_trip()
        return [thread_state(*thread) for thread in threads] == before

    def waits(self, call: Call) -> bool:
        """Whether a call waits for its lock; it may have returned as well."""
        return self._all_wait([(call.driver.pid, call.tid)])

    def round_trip(self) -> None:
        """A lock call of nobody else's concern, answered by the keeper when there is one."""
        driver = self._prober_process()
        assert driver.probe(self.directory / f".prober-{driver.pid}", EX) == 0

    def _prober_process(self) -> Driver:
        if self._prober is None:
            self._prober = self.start()
            self._prober.close(self._prober.open(self.directory / f".prober-{self._prober.pid}"))
        return self._prober

    def end(self) -> str:
        """End every process; what they wrote on standard error."""
        errors = self.fleet.errors()
        self.fleet.end()
        return errors


class SupervisedWorld(World):
    """Static programs under a supervisor, which a world shares with others: where the kernel locks, or where not."""

    def __init__(self, name: str, directory: Path, supervision: Supervision, environment: Mapping[str, str]) -> None:
        from support.supervision import LAUNCHER  # noqa: PLC0415  (the native world is tested without the product)

        super().__init__(name, directory, environment, *LAUNCHER)
        self.supervised = True
        self.emulated = name not in (ON_KERNEL, ON_FUSE)
        self.supervision = supervision

    def start(self) -> Driver:
        return self.supervision.start(self.fleet)

    def command(self, name: str) -> list[str]:
        return [*self.prefix, str(static_program(name))]

    def at_rest(self, call: Call) -> object:
        return self._waiting({call.driver.pid})

    def _all_wait(self, threads: Sequence[tuple[int, int]]) -> bool:
        """A call waits when its thread sleeps in flock(2), and it is in the keeper's queue or in the kernel's.

        What is left in a queue of calls that were interrupted would count for them, so the numbers must be the same.
        """
        states = [thread_state(*thread) for thread in threads]
        if not all(state and state.asleep and state.syscall == FLOCK_SYSCALL for state in states):
            return False
        expected = Counter(pid for pid, _ in threads)
        return self._waiting(expected) == expected

    def _waiting(self, pids: Container[int]) -> Counter[int]:
        from support.supervision import waiting  # noqa: PLC0415

        return waiting(self.environment, pids)

    def end(self) -> str:
        errors = super().end()
        self.supervision.reap()
        return errors + self.supervision.errors()


def in_mode(request: pytest.FixtureRequest, host: str = "emulated") -> World:
    """The world of the parameter native, host or cluster: where the kernel locks, or the shim where it does not.

    HOST is the fixture for mode host.
    """
    if request.param == "native":
        return World("native", request.getfixturevalue("native_directory"), os.environ)
    world: World = request.getfixturevalue({"host": host, "cluster": "here"}[request.param])
    return world
