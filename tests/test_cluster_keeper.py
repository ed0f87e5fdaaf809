"""Cluster mode as a program sees it, with the keeper of one host."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN
from support.keepers import keepers
from support.proc import await_true
from support.worlds import World

import flockshim


def cluster_files(directory: Path) -> set[str]:
    """What lies beside the files themselves."""
    return {name for name in os.listdir(directory) if "flockshim" in name}


def state_of(world: World, name: str = "file") -> str:
    """The STATE of the name of the state file."""
    (found,) = [n for n in cluster_files(world.directory) if n.startswith(f".{name}.flockshim.") and "+" not in n]
    return found.rpartition(".")[2]


def test_a_lock_is_recorded_beside_the_file(here: World) -> None:
    driver, fd = here.opened()
    assert cluster_files(here.directory) == set()
    assert driver.flock(fd, EX) == OK
    assert state_of(here).startswith("x")
    assert driver.flock(fd, UN) == OK
    assert state_of(here) == "free"
    assert driver.flock(fd, SH) == OK
    assert state_of(here).startswith("s")
    assert driver.flock(fd, EX) == OK
    assert state_of(here).startswith("x")


def test_a_dead_holder_is_released(here: World) -> None:
    driver, fd = here.opened()
    assert driver.flock(fd, EX) == OK
    driver.kill()
    other, other_fd = here.opened()
    assert other.flock(other_fd, EX | NB) == OK


def test_between_programs_of_the_host(here: World) -> None:
    driver, fd = here.opened()
    other, other_fd = here.opened()
    assert driver.flock(fd, SH) == OK
    assert other.flock(other_fd, SH | NB) == OK
    assert other.flock(other_fd, EX | NB) == BUSY
    assert driver.flock(fd, UN) == OK
    assert other.flock(other_fd, EX | NB) == OK
    call = driver.flock_later(fd, EX)
    here.await_blocked(call)
    assert other.flock(other_fd, UN) == OK
    assert call.result() == OK


def test_vouching_comes_and_goes(here: World) -> None:
    driver, fd = here.opened()
    assert driver.flock(fd, EX) == OK

    def vouching() -> list[str]:
        return [name for name in cluster_files(here.directory) if name.startswith(".flockshim.")]

    await_true(lambda: bool(vouching()), "the keeper to vouch")
    assert driver.flock(fd, UN) == OK
    await_true(lambda: not vouching(), "the vouching file to go")


def test_a_killed_keeper_keeps_the_lease(here: World, rendezvous: Path) -> None:
    driver, fd = here.opened()
    assert driver.flock(fd, EX) == OK
    before = state_of(here)
    ((_, worker),) = keepers(rendezvous)
    os.kill(worker, signal.SIGKILL)
    await_true(lambda: state_of(here) not in (before, "free"), "the next one to take over")
    assert here.probe(here.file(), SH) == BUSY
    assert driver.flock(fd, UN) == OK
    assert state_of(here) == "free"
    assert here.free(here.file())


def test_a_directory_that_takes_no_files(here: World) -> None:
    """The kernel's errno, and one line; never a lock of this host only."""
    driver, fd = here.opened("x" * 200)
    assert driver.flock(fd, EX) != OK
    errors = here.fleet.errors()
    assert "--mode host" in errors and errors.count("\n") == 1
    here.fleet.forget_errors()


@pytest.mark.parametrize(("where", "leased"), [("mount", True), ("memory", False)])
def test_auto_is_cluster_where_other_hosts_may_be(
    where: str, leased: bool, nolock_dir: Path, tmp_path_factory: pytest.TempPathFactory, rendezvous: Path
) -> None:
    directory = nolock_dir if where == "mount" else Path(f"/dev/shm/{rendezvous.name}-files")
    directory.mkdir(exist_ok=True)
    base = {**os.environ, "FLOCKSHIM_DIR": str(rendezvous)}
    environment = flockshim.environ(simulate=None if where == "mount" else "ENOSYS", base=base)
    world = World("emulated", directory, environment)
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    assert bool(cluster_files(directory)) is leased
    world.end()
