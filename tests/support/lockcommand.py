"""Starts ``flockshim --lock``, and tells who waits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Union

from flockshim.lock_list import gather
from flockshim.locking import Locker
from support.proc import DEADLINE, await_true, children
from support.worlds import World

Word = Union[str, "os.PathLike[str]"]

WAITING_LINE = re.compile(
    r"flockshim: waiting for the lock on (?P<path>.*), held by pid (?P<pid>\d+) \((?P<command>.*)\) "
    r"on (?P<host>[^ ,]+)(?P<word> since|, running since) (?P<clock>(?:\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d)\n"
)

FLOCKSHIM = [sys.executable, "-m", "flockshim"]
HOLD = ["sh", "-c", 'echo $$; read status; exit "$status"']
"""A COMMAND that says who it is, and ends with the status that it is told."""


def settings(world: World, **more: str) -> dict[str, str]:
    """The environment of a user who has set nothing but where the world's keeper is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLOCKSHIM_")}
    return {**kept, "FLOCKSHIM_DIR": world.environment["FLOCKSHIM_DIR"], **more}


def run(world: World, *words: Word, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run ``flockshim WORDS`` in the world's directory."""
    more.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(
        [*FLOCKSHIM, *words],
        **{"env": settings(world), "cwd": world.directory, **more},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )


def status(world: World, *words: Word) -> int:
    """The exit status of ``flockshim WORDS``."""
    return run(world, *words).returncode


def one_line(text: str) -> str:
    """The only line on standard error, which must be ours."""
    assert text.startswith("flockshim: ") and text.endswith("\n") and text.count("\n") == 1, text
    return text[len("flockshim: ") : -1]


def locks(world: World, *paths: Path) -> list[dict[str, Any]]:
    """The files that ``flockshim --locks --json PATHS`` shows."""
    done = run(world, "--locks", "--json", *paths)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert set(answer) == {"version", "host", "files", "silent"}
    assert (answer["version"], answer["host"], answer["silent"]) == (1, os.uname().nodename, {})
    files: list[dict[str, Any]] = answer["files"]
    return files


def locks_table(world: World, *paths: Path) -> str:
    """What ``flockshim --locks PATHS`` shows."""
    done = run(world, "--locks", *paths)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def descendants(pid: int) -> list[int]:
    """The children of PID, theirs, and so on: the youngest first."""
    found = []
    for child in children(pid):
        found += [*descendants(child), child]
    return found


class Job:
    """``flockshim WORDS`` whose COMMAND lasts until it is told to end."""

    def __init__(
        self,
        world: World,
        *words: Word,
        command: Sequence[str] = HOLD,
        prefix: Sequence[str] = (),
        **more: Any,
    ) -> None:
        self.world = world
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [*prefix, *FLOCKSHIM, *words, *command],
            **{"env": settings(world), "cwd": world.directory, "text": True, **pipes, **more},
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        """The next line that COMMAND writes."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def began(self) -> int:
        """COMMAND's pid, as soon as it runs."""
        return int(self.line())

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close_input(self) -> None:
        """Let COMMAND, and whoever else reads it, come to the end of the standard input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None

    def finish(self, number: int = 0) -> tuple[int, str]:
        """Let COMMAND exit with NUMBER; the status of the job, and what was written to standard error."""
        self.tell(str(number))
        return self.ended()

    def ended(self) -> tuple[int, str]:
        """The same of a job that ends by itself."""
        assert self.process.stderr is not None
        return self.process.wait(DEADLINE), self.process.stderr.read()

    def end(self) -> None:
        for pid in [*descendants(self.process.pid), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # What else has been left running reads from the pipe that is closed here.
        self.process.communicate(timeout=DEADLINE)


@contextmanager
def job(world: World, *words: Word, **more: Any) -> Iterator[Job]:
    """A Job of which nothing is left afterwards."""
    started = Job(world, *words, **more)
    try:
        yield started
    finally:
        started.end()


def waiters(world: World, path: Path) -> list[int]:
    """Who waits for the lock on PATH: in order, where it is emulated."""
    file = path.stat()
    emulated = [
        waiter["pid"]
        for entry in gather(Locker(world.environment))[0]
        for waiter in entry["waiters"]
        if (entry["device"], entry["inode"]) == (file.st_dev, file.st_ino)
    ]
    blocked = []
    # `1: -> FLOCK  ADVISORY  WRITE 708 08:01:1234 0 EOF`, see proc(5).
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1:3] == ["->", "FLOCK"] and words[6].rpartition(":")[2] == str(file.st_ino):
            blocked.append(int(words[5]))
    return emulated + blocked


def await_waiting(world: World, path: Path, *pids: int) -> None:
    """Return when each of PIDS is in the queue for the lock on PATH."""
    await_true(lambda: set(pids) <= set(waiters(world, path)), f"{pids} to wait")
