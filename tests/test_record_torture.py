"""Many processes, counters side by side in one file, and kill -9 for lockers and keepers.

A long one: FLOCKSHIM_SOAK=1 pytest tests/test_record_torture.py --timeout=0
"""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.board import SEATS, WORD, Torture
from support.driver import Driver
from support.groups import ControlGroup
from support.proc import await_true
from support.programs import program, static_program
from support.supervision import Supervision, settings
from support.worlds import World
from test_torture import DEADLINE, Load, Supervised, _torment

SOAK = os.environ.get("FLOCKSHIM_SOAK") == "1"
CELLS, VALUES = 16, 16384
HEAD = 2 + SEATS
CELL = 1 + SEATS + VALUES + 1
SIZE = (HEAD + CELLS * CELL) * WORD
LOAD = Load(12, 2000, 400, 200) if SOAK else Load(12, 30, 16, 5)
IN_KERNEL = LOAD._replace(each=8000 if SOAK else 1500, keeper_kills=0)


class RecordTorture(Torture):
    """The processes of tests/programs/recordtorture.c, and their board."""

    def __init__(self, path: Path, board: Path, environment: dict[str, str]) -> None:
        super().__init__(path, board, environment)
        path.write_bytes(bytes(WORD * CELLS))
        self.board.close()
        with open(board, "rb+") as file:
            file.truncate(SIZE)
            self.board = mmap.mmap(file.fileno(), SIZE)

    def _words(self, seat: int) -> list[object]:
        return [self.path, self.board_path, seat, self.targets[seat], self.reads[seat]]

    def _start(self, seat: int) -> None:
        self.seats[seat] = subprocess.Popen(
            [*self.prefixes[seat], program("recordtorture"), *map(str, self._words(seat))],
            env=self.environment,
            stderr=self.stderr,
        )

    def await_done(self, count: int, deadline: float) -> None:
        """As in Torture, and says what was complained about."""
        await_true(lambda: self.done() >= count or self.failures() != "", f"{count} increments", deadline)
        assert self.failures() == ""

    def check(self) -> None:
        """Every increment is in the file exactly once; a killed one at most half-recorded."""
        assert self.failures() == ""
        values = struct.unpack(f"={CELLS}Q", self.path.read_bytes())
        unfinished: list[int] = []
        recorded = 0
        for cell, counter in enumerate(values):
            at = (HEAD + cell * CELL + 1 + SEATS) * WORD
            writers = struct.unpack_from(f"={VALUES}Q", self.board, at)
            assert writers[0] == 0
            for value, claim in enumerate(writers):
                if claim and not claim & 1:
                    assert claim // 2 in self.killed, f"value {value} of {cell} left by living {claim // 2}"
                    unfinished.append(claim // 2)
                elif claim:
                    assert value <= counter, f"value {value} of {cell} was written, the counter is at {counter}"
                else:
                    assert value == 0 or value > counter, f"nobody wrote value {value} of {cell}"
            recorded += sum(claim & 1 for claim in writers)
        assert len(unfinished) == len(set(unfinished)), "two unfinished writes of one process"
        assert 0 <= recorded - self.done() <= len(self.killed)


class SupervisedRecordTorture(RecordTorture):
    """All seats under one supervisor."""

    def __init__(self, path: Path, board: Path, supervision: Supervision) -> None:
        super().__init__(path, board, supervision.fleet.environment)
        self._supervision = supervision
        self._starter: Driver = supervision.start(supervision.fleet)

    def _start(self, seat: int) -> None:
        process = Supervised(self._starter, static_program("recordtorture"), *self._words(seat))
        self.seats[seat] = process  # type: ignore[assignment]

    def failures(self) -> str:
        return super().failures() + self._supervision.fleet.errors()


@pytest.fixture
def board() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory) / "board"


@pytest.fixture
def torture(fresh_world: World, board: Path) -> Iterator[RecordTorture]:
    torture = RecordTorture(fresh_world.directory / "counters", board, fresh_world.environment)
    yield torture
    torture.end()


def test_in_the_kernel(native_directory: Path, board: Path, rendezvous: Path) -> None:
    """The program itself: what it takes for granted is what Linux does."""
    torture = RecordTorture(native_directory / "counters", board, dict(os.environ))
    try:
        for seat in range(IN_KERNEL.processes):
            torture.sit(seat, IN_KERNEL.each, 1)
        _torment(torture, rendezvous, IN_KERNEL, 0)
    finally:
        torture.end()


def test_neighbours_do_not_disturb_each_other(torture: RecordTorture, rendezvous: Path) -> None:
    for seat in range(LOAD.processes):
        torture.sit(seat, LOAD.each, 1)
    _torment(torture, rendezvous, LOAD, 1)


def test_two_keepers(torture: RecordTorture, rendezvous: Path, group: ControlGroup) -> None:
    """Half of the processes in a control group, and so with a keeper, of their own."""
    for seat in range(LOAD.processes):
        torture.sit(seat, LOAD.each, 1, group.prefix if seat // 2 % 2 else ())
    _torment(torture, rendezvous, LOAD, 2)


def test_under_one_supervisor(nolock_dir: Path, rendezvous: Path, board: Path) -> None:
    supervision = Supervision(settings(rendezvous))
    descriptors = supervision.descriptors()
    torture = SupervisedRecordTorture(nolock_dir / "counters", board, supervision)
    try:
        for seat in range(LOAD.processes):
            torture.sit(seat, LOAD.each, 1)
        _torment(torture, rendezvous, LOAD, 1)
        supervision.await_idle(descriptors)
    finally:
        torture.end()
        supervision.end()


# Locks that are too short make programs wait for each other now and then, which nobody finds out.
@pytest.mark.parametrize("sabotage", ["none", *(["short"] if SOAK else [])])
def test_the_check_sees_what_happens_without_the_right_locks(
    native_directory: Path, board: Path, sabotage: str
) -> None:
    """Else it would prove nothing."""
    torture = RecordTorture(native_directory / "counters", board, {**os.environ, "RECORDTORTURE": sabotage})
    try:
        for seat in range(8):
            torture.sit(seat, 20000, 1)
        ended = torture.seats.values()
        await_true(
            lambda: torture.violations() > 0 or all(each.poll() is not None for each in ended), "an end", DEADLINE
        )
        assert torture.violations() > 0
    finally:
        torture.end()
