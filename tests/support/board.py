"""The shared board of tests/programs/torture.c, and the processes that write on it."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.proc import await_true, children
from support.programs import program

SEATS = 128
VALUES = 65536
WORD = 8
HEAD = 2
DONE, READERS, WRITERS = HEAD, HEAD + SEATS, HEAD + 2 * SEATS
SIZE = (WRITERS + VALUES) * WORD


class Torture:
    """SEATS of processes that increment one counter, each replaced when it is killed."""

    def __init__(self, path: Path, board: Path, environment: Mapping[str, str]) -> None:
        self.path = path
        self.board_path = board
        self.environment = dict(environment)
        path.write_bytes(bytes(WORD))
        with open(board, "wb+") as file:
            file.truncate(SIZE)
            self.board = mmap.mmap(file.fileno(), SIZE)
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in end())
        self.seats: dict[int, subprocess.Popen[bytes]] = {}
        self.targets: dict[int, int] = {}
        self.reads: dict[int, int] = {}
        self.prefixes: dict[int, Sequence[str]] = {}
        self.killed: set[int] = set()

    def word(self, index: int) -> int:
        (value,) = struct.unpack_from("=Q", self.board, index * WORD)
        return int(value)

    def done(self) -> int:
        """Increments completed, all seats together."""
        return sum(struct.unpack_from(f"={SEATS}Q", self.board, DONE * WORD))

    def violations(self) -> int:
        """How often a process has seen another one where it should be alone."""
        return self.word(0)

    def sit(self, seat: int, target: int, reads: int = 0, prefix: Sequence[str] = ()) -> None:
        """Fill SEAT until it has made TARGET increments, with READS shared visits between two."""
        self.targets[seat], self.reads[seat], self.prefixes[seat] = target, reads, prefix
        self._start(seat)

    def _start(self, seat: int) -> None:
        numbers = [str(seat), str(self.targets[seat]), str(self.reads[seat])]
        self.seats[seat] = subprocess.Popen(
            [*self.prefixes[seat], program("torture"), self.path, self.board_path, *numbers],
            env=self.environment,
            stderr=self.stderr,
        )

    def seat_of_holder(self) -> int | None:
        """The seat of the present exclusive holder, when there is one."""
        pid = self.word(1)
        return next((seat for seat, process in self.seats.items() if process.pid == pid), None)

    def kill(self, seat: int) -> None:
        """kill -9 whoever sits there, and fill the seat again. One that has finished stays so."""
        process = self.seats[seat]
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            self.killed.add(process.pid)
            self._start(seat)

    def await_done(self, count: int, deadline: float) -> None:
        """Return when COUNT increments have been made."""
        await_true(lambda: self.done() >= count or self.failures() != "", f"{count} increments", deadline)
        assert self.failures() == ""

    def failures(self) -> str:
        """What the processes have complained about, of themselves or of each other."""
        self.stderr.seek(0)
        text = self.stderr.read().decode()
        if self.violations() and not text:
            return f"{self.violations()} violations"
        return text

    def await_all(self, deadline: float) -> None:
        """Return when every seat has reached its target."""
        for process in self.seats.values():
            assert process.wait(deadline) == 0, self.failures()

    def check(self) -> None:
        """Every increment is in the file exactly once; a killed one at most half-recorded."""
        assert self.failures() == ""
        (counter,) = struct.unpack("=Q", self.path.read_bytes())
        writers = struct.unpack_from(f"={VALUES}Q", self.board, WRITERS * WORD)
        assert writers[0] == 0
        unfinished = []
        for value, claim in enumerate(writers):
            if claim and not claim & 1:
                assert claim // 2 in self.killed, f"value {value} left by living {claim // 2}"
                unfinished.append(claim // 2)
            elif claim:
                assert value <= counter, f"value {value} was written, the counter is at {counter}"
            else:
                assert value == 0 or value > counter, f"nobody wrote value {value}"
        assert len(unfinished) == len(set(unfinished)), "two unfinished writes of one process"
        recorded = sum(claim & 1 for claim in writers)
        # A process may be killed between the completed write and its count.
        assert 0 <= recorded - self.done() <= len(self.killed)

    def end(self) -> None:
        for process in self.seats.values():
            # A prefix may be the parent, and must itself wait for what it has started.
            for pid in children(process.pid) or [process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        self.stderr.close()
        self.board.close()
