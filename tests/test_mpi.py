"""MPI-IO: ROMIO, which is in MPICH and its relatives, locks ranges of the files that processes share."""

from __future__ import annotations

import shutil
import subprocess
from array import array
from collections import Counter
from pathlib import Path

import pytest
from support import lockcommand
from support.proc import DEADLINE
from support.programs import program
from support.worlds import World, in_mode

from flockshim.pytest_plugin import require

RANKS, TURNS = 2, 200


@pytest.fixture(params=["native", "host", "cluster"])
def world(request: pytest.FixtureRequest) -> World:
    """Where the kernel locks, and under the shim in both modes where it does not."""
    return in_mode(request)


@pytest.fixture(scope="session")
def ranks() -> list[str]:
    """The command that runs the program of all ranks."""
    require(shutil.which("mpicc.mpich"), "no MPICH", "apt install mpich libmpich-dev")
    return ["mpirun.mpich", "-n", str(RANKS), str(program("lockfmpi", "mpicc.mpich"))]


def run(command: list[str], directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, "log", "blocks", str(TURNS)],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )


def test_without_flockshim(emulated: World, ranks: list[str]) -> None:
    environment = lockcommand.settings(emulated)
    assert run(ranks, emulated.directory, environment).returncode != 0
    alone = run(ranks[-1:], emulated.directory, environment)  # mpirun may lose what a rank says that aborts
    assert alone.returncode != 0
    assert "File locking failed in ADIOI_" in alone.stderr
    assert "Function not implemented" in alone.stderr


def test_shared_pointers_and_atomic_mode(world: World, ranks: list[str]) -> None:
    done = run(ranks, world.directory, world.environment)
    assert (done.returncode, done.stderr) == (0, "")
    log = array("i", (world.directory / "log").read_bytes())
    assert Counter(log) == dict.fromkeys(range(RANKS), TURNS)
