"""Many processes, one counter, and kill -9 for holders, waiters and keepers."""

from __future__ import annotations

import os
import random
import select
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from support.board import Torture
from support.driver import Driver
from support.groups import ControlGroup
from support.keepers import Keeper, keepers
from support.proc import await_end, await_true
from support.programs import static_program
from support.supervision import Supervision, settings
from support.worlds import World

import flockshim

DEADLINE = 100.0


@pytest.fixture
def torture(fresh_world: World) -> Iterator[Torture]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        board = Path(directory) / "board"
        torture = Torture(fresh_world.directory / "counter", board, fresh_world.environment)
        yield torture
        torture.end()


def _kill_half_a_keeper(rendezvous: Path, chance: random.Random, keepers_there: int) -> None:
    """The next half is killed only when all keepers are whole again: one survives one at a time."""
    seen: list[Keeper] = []

    def whole() -> bool:
        seen[:] = keepers(rendezvous)
        return len(seen) == keepers_there

    await_true(whole, "the keepers to be whole")
    victim = chance.choice(chance.choice(seen))
    os.kill(victim, signal.SIGKILL)
    await_end(victim)
    await_true(whole, "the keepers to be whole again")


class Load(NamedTuple):
    """How many processes make how many increments each, and how much is killed meanwhile."""

    processes: int
    each: int
    program_kills: int
    keeper_kills: int


def _torment(torture: Torture, rendezvous: Path, load: Load, keepers_there: int) -> None:
    """Kill while the seats of TORTURE work, await their end, and check what they have done."""
    processes, each, program_kills, keeper_kills = load
    chance = random.Random(sum(load))
    kills = ["program"] * program_kills + ["keeper"] * keeper_kills
    chance.shuffle(kills)
    for number, kind in enumerate(kills):
        # Kills come at points of the work, so that a slow machine sees as many as a quick one.
        torture.await_done(number * processes * each // (len(kills) + 1) + 1, DEADLINE)
        if kind == "keeper":
            _kill_half_a_keeper(rendezvous, chance, keepers_there)
            continue
        holder = torture.seat_of_holder()
        anybody = chance.randrange(processes)
        torture.kill(anybody if holder is None or chance.random() < 0.4 else holder)
    torture.await_all(DEADLINE)
    assert len(torture.killed) > program_kills / 2
    torture.check()


FEW, MANY = Load(16, 80, 60, 20), Load(100, 20, 120, 20)
LOADS = {"16 writers": (FEW, 0), "100 readers and writers": (MANY, 2)}
if os.environ.get("FLOCKSHIM_SOAK"):
    LOADS.update({"16 readers and writers": (FEW, 2), "100 writers": (MANY, 0)})


@pytest.mark.parametrize(("load", "reads"), LOADS.values(), ids=LOADS)
def test_no_update_is_lost_and_nobody_hangs(torture: Torture, rendezvous: Path, load: Load, reads: int) -> None:
    for seat in range(load.processes):
        torture.sit(seat, load.each, reads)
    _torment(torture, rendezvous, load, 1)


@pytest.mark.parametrize("reads", [0, 2], ids=["writers", "readers and writers"])
def test_two_keepers(torture: Torture, rendezvous: Path, group: ControlGroup, reads: int) -> None:
    """Half of the processes in a control group, and so with a keeper, of their own."""
    load = Load(16, 40, 30, 12)
    for seat in range(load.processes):
        torture.sit(seat, load.each, reads, group.prefix if seat % 2 else ())
    _torment(torture, rendezvous, load, 2)


class Supervised:
    """A process that a supervised driver has started: as far as it goes a `subprocess.Popen`."""

    def __init__(self, starter: Driver, *words: object) -> None:
        self.pid = starter.ask("run", *words)
        self._handle = os.pidfd_open(self.pid)

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def wait(self, timeout: float = DEADLINE) -> int:
        """The starter leaves it a zombie, and so its status to be read."""
        assert select.select([self._handle], [], [], timeout)[0], f"process {self.pid} still runs"
        status = int(Path(f"/proc/{self.pid}/stat").read_text().split()[-1])
        return os.waitstatus_to_exitcode(status)


class SupervisedTorture(Torture):
    """All seats under one supervisor."""

    def __init__(self, path: Path, board: Path, supervision: Supervision) -> None:
        super().__init__(path, board, supervision.fleet.environment)
        self._supervision = supervision
        self._starter = supervision.start(supervision.fleet)

    def _start(self, seat: int) -> None:
        words = [static_program("torture"), self.path, self.board_path, seat, self.targets[seat], self.reads[seat]]
        self.seats[seat] = Supervised(self._starter, *words)

    def failures(self) -> str:
        return super().failures() + self._supervision.fleet.errors()


@pytest.mark.parametrize("reads", [0, 2], ids=["writers", "readers and writers"])
def test_under_one_supervisor(nolock_dir: Path, rendezvous: Path, tmp_path: Path, reads: int) -> None:
    supervision = Supervision(settings(rendezvous))
    descriptors = supervision.descriptors()
    torture = SupervisedTorture(nolock_dir / "counter", tmp_path / "board", supervision)
    load = Load(16, 40, 30, 10)
    try:
        for seat in range(load.processes):
            torture.sit(seat, load.each, reads)
        _torment(torture, rendezvous, load, 1)
        supervision.await_idle(descriptors)
    finally:
        torture.end()
        supervision.end()


def test_the_check_sees_what_happens_without_a_lock(torture: Torture) -> None:
    """With locks that only pretend, the same program is found out; else it would prove nothing."""
    torture.environment = flockshim.environ(mode="success", base=torture.environment)
    for seat in range(8):
        torture.sit(seat, 2000)
    await_true(lambda: torture.violations() > 0, "a violation to be seen", DEADLINE)
