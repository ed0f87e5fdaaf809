"""Many processes, one counter, and kill -9 for holders, waiters and keepers."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.board import Torture
from support.keepers import Keeper, keepers
from support.proc import await_end, await_true
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


def _kill_half_a_keeper(rendezvous: Path, chance: random.Random) -> None:
    """The next half is killed only when the keeper is whole again: it survives one at a time."""
    seen: list[Keeper] = []

    def whole() -> bool:
        seen[:] = keepers(rendezvous)
        return len(seen) == 1

    await_true(whole, "the keeper to be whole")
    victim = chance.choice(seen[0])
    os.kill(victim, signal.SIGKILL)
    await_end(victim)
    await_true(whole, "the keeper to be whole again")


class Load(NamedTuple):
    """How many processes make how many increments each, and how much is killed meanwhile."""

    processes: int
    each: int
    program_kills: int
    keeper_kills: int


@pytest.mark.parametrize("load", [Load(16, 50, 40, 12), Load(100, 6, 40, 8)], ids=["16", "100"])
@pytest.mark.parametrize("reads", [0, 2], ids=["writers", "readers and writers"])
def test_no_update_is_lost_and_nobody_hangs(torture: Torture, rendezvous: Path, load: Load, reads: int) -> None:
    processes, each, program_kills, keeper_kills = load
    chance = random.Random(processes + reads)
    for seat in range(processes):
        torture.sit(seat, each, reads)
    kills = ["program"] * program_kills + ["keeper"] * keeper_kills
    chance.shuffle(kills)
    for number, kind in enumerate(kills):
        # Kills come at points of the work, so that a slow machine sees as many as a quick one.
        torture.await_done(number * processes * each // (len(kills) + 1) + 1, DEADLINE)
        if kind == "keeper":
            _kill_half_a_keeper(rendezvous, chance)
            continue
        holder = torture.seat_of_holder()
        waiter = chance.randrange(processes)
        torture.kill(waiter if holder is None or chance.random() < 0.4 else holder)
    torture.await_all(DEADLINE)
    assert torture.killed
    torture.check()


def test_the_check_sees_what_happens_without_a_lock(torture: Torture) -> None:
    """With locks that only pretend, the same program is found out; else it would prove nothing."""
    torture.environment = flockshim.environ(mode="success", base=torture.environment)
    for seat in range(8):
        torture.sit(seat, 2000)
    await_true(lambda: torture.failures() != "", "a violation to be seen", DEADLINE)
