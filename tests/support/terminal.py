"""A pseudo-terminal with an interactive shell in it, so that keys, jobs and the terminal's signals are real."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flockshim import holders
from support.proc import DEADLINE, await_end, await_true

SHELLS = {"bash": ["bash", "--norc", "--noprofile", "--noediting", "-i"], "dash": ["dash", "-i"]}
KEYS = {"Ctrl-C": b"\x03", "Ctrl-\\": b"\x1c", "Ctrl-Z": b"\x1a"}


class Terminal:
    """What a user has before him: types lines and keys, reads what is written."""

    def __init__(self, shell: str, directory: Path, environment: Mapping[str, str]) -> None:
        self.master, slave = pty.openpty()
        # What is typed does not appear among what is read, and lines end as they were written.
        settings = termios.tcgetattr(slave)
        settings[1] &= ~termios.OPOST
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        self.shell = subprocess.Popen(
            ["setsid", "--ctty", *SHELLS[shell]],
            env={**environment, "PS1": "", "PS2": "", "ENV": "", "TERM": "dumb", "HISTFILE": ""},
            cwd=directory,
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.unread = ""
        self.type("echo the shell is $((1 + 1))")
        self.expect("the shell is 2\n")

    def type(self, line: str) -> None:
        """Type a line, and Enter."""
        os.write(self.master, line.encode() + b"\n")

    def press(self, key: str) -> None:
        """Press a key that is a signal, as the terminal is set."""
        os.write(self.master, KEYS[key])

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the window."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def expect(self, pattern: str, deadline: float = DEADLINE) -> re.Match[str]:
        """Read until PATTERN has come, and forget what came up to its end."""
        end = time.monotonic() + deadline
        while not (match := re.search(pattern, self.unread)):
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"{pattern!r} has not come, but {self.unread!r}")
        self.unread = self.unread[match.end() :]
        return match

    def status(self) -> int:
        """The exit status of what the shell has run last. Call it when that is over."""
        self.type('echo "status is $?"')
        return int(self.expect(r"status is (\d+)\n")[1])

    def output(self, command: str) -> str:
        """What is written from now until the shell has run COMMAND."""
        self.type(f'{command}; echo "that was $((1 + 1))"')
        end = time.monotonic() + DEADLINE
        while "that was 2\n" not in self.unread:
            assert self._read(end - time.monotonic()), self.unread
        text, _, self.unread = self.unread.partition("that was 2\n")
        return text

    def foreground(self) -> int:
        """The process group in the foreground."""
        return os.tcgetpgrp(self.master)

    def await_job(self) -> int:
        """The process group of a job, as soon as the shell has put it into the foreground."""
        await_true(lambda: self.foreground() != self.shell.pid, "a job to be in the foreground")
        return self.foreground()

    def await_continued(self) -> None:
        """Return when no process of the job in the foreground is stopped: the shell continues it only thereafter."""
        job = self.await_job()
        await_true(lambda: not any(map(holders.is_stopped, _members(job))), "the job to be continued")

    def await_shell(self) -> None:
        """Return when the shell itself is in the foreground again."""
        await_true(lambda: self.foreground() == self.shell.pid, "the shell to be in the foreground")

    def _read(self, seconds: float) -> bool:
        if seconds <= 0 or not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # nobody has it open any more
            return False
        self.unread += data.decode(errors="replace")
        return bool(data)

    def close(self) -> None:
        """Close the window: whoever has the terminal is hung up."""
        os.close(self.master)
        self.master = -1

    def end(self) -> None:
        """Kill what still runs in the session."""
        for pid in _session(self.shell.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            await_end(pid)
        self.shell.wait()
        if self.master >= 0:
            self.close()


def _session(leader: int) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(int(entry)) == leader:
                    yield int(entry)


def _members(group: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(ProcessLookupError):
            if name.isdigit() and os.getpgid(int(name)) == group:
                found.append(int(name))
    return found
