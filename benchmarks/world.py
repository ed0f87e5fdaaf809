"""Where the benchmarks run: a mount whose locks fail, a directory in memory, and programs in both."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from flockshim import FlockshimError, environ, nolockfs

HERE = Path(__file__).parent
IDLE_SECONDS = 1000


class World:
    """The directories, and the environments of programs; alive inside ``with``."""

    def __init__(self) -> None:
        """Nothing is made yet."""
        self._stack = contextlib.ExitStack()
        self.memory: Path
        """A directory in memory, where the kernel can lock."""
        self.mount: Path | None
        """A directory where it cannot, or None where FUSE is not to be had (`why` says why)."""
        self.why = ""
        self.rendezvous: Path
        self.programs: Path

    def __enter__(self) -> World:
        """Make the directories, mount, and compile. Raises CalledProcessError where there is no compiler."""
        allow_many_descriptors()
        scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fb-", dir="/dev/shm")))
        self.memory = scratch / "memory"
        self.rendezvous = scratch / "r"
        self.programs = scratch / "programs"
        backing = scratch / "backing"
        for directory in (self.memory, self.programs, backing):
            directory.mkdir()
        self._stack.callback(lambda: self.end_keepers(self.rendezvous))
        try:
            self.mount = self._stack.enter_context(nolockfs.mount(backing=backing))
        except FlockshimError as error:
            self.mount, self.why = None, str(error)
        compiler = os.environ.get("CC", "cc").split()
        command = [*compiler, "-std=gnu11", "-O2", "-o", str(self.programs / "pairs"), str(HERE / "pairs.c")]
        subprocess.run(command, check=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the keepers, unmount and remove everything."""
        self._stack.close()

    def native(self) -> dict[str, str]:
        """Return an environment without the shim."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLOCKSHIM_", "LD_PRELOAD"))}
        # FileLock warns when it falls back to SoftFileLock.
        return {**kept, "PYTHONWARNINGS": "ignore"}

    def shim(
        self, mode: str | None = None, simulate: str | None = None, rendezvous: Path | None = None
    ) -> dict[str, str]:
        """Return an environment with the shim."""
        own = {"FLOCKSHIM_DIR": str(rendezvous or self.rendezvous), "FLOCKSHIM_IDLE": str(IDLE_SECONDS)}
        return environ(mode=mode, simulate=simulate, quiet=True, base={**self.native(), **own})

    def pairs(self) -> str:
        """Return the path of the program of pairs.c."""
        return str(self.programs / "pairs")

    def end_keepers(self, rendezvous: Path) -> None:
        """End the keepers of a rendezvous directory, and remove it."""
        # Stopped first: a worker and its standby make one another again.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in keepers(rendezvous):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        shutil.rmtree(rendezvous, ignore_errors=True)


@dataclass
class Contender:
    """One of those that are compared: a program that answers a number with a line of nanoseconds."""

    name: str
    command: list[str]
    env: dict[str, str]

    def start(self) -> Worker:
        """Start it."""
        return Worker(self)


class Worker:
    """A contender's process."""

    def __init__(self, contender: Contender) -> None:
        """Start it."""
        self.name = contender.name
        self.process = subprocess.Popen(
            contender.command, env=contender.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, number: int) -> list[int]:
        """Have it do *number* of what it does, and return what it measured, in nanoseconds."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if not answer:
            raise SystemExit(f"{self.name}: ended with {self.process.wait()}")
        return [int(word) for word in answer]

    def stop(self) -> None:
        """End it, having it finish."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def python(script: str, *words: str) -> list[str]:
    """Return the command that runs one of the benchmarks' own scripts."""
    return [sys.executable, str(HERE / script), *words]


def keepers(rendezvous: Path) -> list[int]:
    """Return the pids of the keepers (worker and standby) of a rendezvous directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if bytes(rendezvous) in words:
            found.append(int(process.name))
    return found


def allow_many_descriptors() -> None:
    """Take what the hard limit allows: a thousand locks are a thousand open files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
