"""The keeper's life: one for all, gone when idle, and its locks survive the death of a half."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from conftest import emulated_world, shim_environment
from support.driver import BUSY, EX, NB, OK, SH, UN, Fleet
from support.keepers import Keeper, end_keepers, keeper_processes, keepers
from support.proc import await_end, await_true
from support.worlds import World


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    await_end(pid)


def _kill_whole(keeper: Keeper) -> None:
    """Both halves, and neither gets to replace the other."""
    for which in (signal.SIGSTOP, signal.SIGKILL):
        for pid in keeper:
            os.kill(pid, which)
    for pid in keeper:
        await_end(pid)


def _only_keeper(rendezvous: Path) -> Keeper:
    """The keeper, as soon as it is complete."""
    await_true(lambda: len(keepers(rendezvous)) == 1, "the keeper to be complete")
    return keepers(rendezvous)[0]


def test_fifty_programs_at_once_share_one(fresh_world: World, rendezvous: Path) -> None:
    path = fresh_world.file()
    opened = [fresh_world.opened() for _ in range(50)]
    calls = [driver.start("flock", fd, SH) for driver, fd in opened]
    assert [call.result(60) for call in calls] == [OK] * 50
    await_true(lambda: len(keeper_processes(rendezvous)) == 2, "one keeper to be left")
    assert fresh_world.probe(path, EX) == BUSY
    for driver, fd in opened:
        driver.close(fd)
    assert fresh_world.free(path)


def test_an_idle_keeper_leaves_and_the_next_lock_starts_another(
    request: pytest.FixtureRequest, rendezvous: Path
) -> None:
    world = emulated_world(request, rendezvous)
    fleet = Fleet(shim_environment(rendezvous, FLOCKSHIM_IDLE="0.2"))
    try:
        driver = fleet.start()
        fd = driver.open(world.file())
        for _ in range(2):
            assert driver.flock(fd, EX) == OK
            first = _only_keeper(rendezvous)
            assert driver.flock(fd, UN) == OK
            await_end(first.worker)
            await_end(first.standby)
            assert keeper_processes(rendezvous) == []
            assert [entry for entry in os.listdir(rendezvous) if "sock" in entry] == []
        assert driver.flock(fd, EX) == OK
        assert fleet.errors() == ""
    finally:
        fleet.end()


def test_a_keeper_that_holds_a_lock_is_not_idle(
    request: pytest.FixtureRequest, rendezvous: Path, other_rendezvous: Path
) -> None:
    """A second keeper with the same idle time is the clock: it has left, the first one must not."""
    world = emulated_world(request, rendezvous)
    fleets = [Fleet(shim_environment(each, FLOCKSHIM_IDLE="0.1")) for each in (rendezvous, other_rendezvous)]
    try:
        holder, other = (fleet.start() for fleet in fleets)
        held_fd = holder.open(world.file())
        other_fd = other.open(world.file("other"))
        assert holder.flock(held_fd, EX) == OK
        keeper = _only_keeper(rendezvous)
        for _ in range(2):
            assert other.flock(other_fd, EX) == OK
            clock = _only_keeper(other_rendezvous)
            assert other.flock(other_fd, UN) == OK
            await_end(clock.worker)
        assert _only_keeper(rendezvous) == keeper
        holder.close(held_fd)
        await_end(keeper.worker)
    finally:
        for fleet in fleets:
            fleet.end()


@pytest.mark.parametrize("victims", [["worker"], ["standby"], ["worker", "standby"] * 2])
def test_locks_survive_the_death_of_one_half(fresh_world: World, rendezvous: Path, victims: list[str]) -> None:
    path = fresh_world.file()
    exclusive = fresh_world.file("exclusive")
    driver = fresh_world.start()
    shared_fd, fd = driver.open(path), driver.open(exclusive)
    assert driver.flock(shared_fd, SH) == OK
    assert driver.flock(fd, EX) == OK
    for victim in victims:
        _kill(getattr(_only_keeper(rendezvous), victim))
        assert fresh_world.probe(exclusive, SH) == BUSY
        assert fresh_world.probe(path, EX) == BUSY
        assert fresh_world.probe(path, SH) == OK
    driver.close(fd)
    assert fresh_world.free(exclusive)
    assert driver.flock(shared_fd, EX | NB) == OK
    assert driver.flock(shared_fd, UN) == OK
    assert fresh_world.free(path)


@pytest.mark.parametrize("victim", ["worker", "standby"])
def test_a_waiter_survives_the_death_of_one_half(fresh_world: World, rendezvous: Path, victim: str) -> None:
    holder, held_fd = fresh_world.opened()
    other, other_fd = fresh_world.opened()
    assert holder.flock(held_fd, EX) == OK
    call = other.flock_later(other_fd, EX)
    fresh_world.await_blocked(call)
    _kill(getattr(_only_keeper(rendezvous), victim))
    fresh_world.await_blocked(call)
    assert holder.flock(held_fd, UN) == OK
    assert call.result() == OK
    assert not fresh_world.free(fresh_world.file())


def test_the_holder_s_descriptor_is_closed_while_the_worker_is_dead(fresh_world: World, rendezvous: Path) -> None:
    """The standby has to find out by itself what happened meanwhile."""
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    keeper = _only_keeper(rendezvous)
    os.kill(keeper.standby, signal.SIGSTOP)
    _kill(keeper.worker)
    driver.close(fd)
    os.kill(keeper.standby, signal.SIGCONT)
    assert fresh_world.free(fresh_world.file())


def test_after_the_death_of_both_halves_locking_goes_on(fresh_world: World, rendezvous: Path) -> None:
    """What the locks of before are worth then is said in docs/semantics.md: nothing."""
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    end_keepers(rendezvous)
    other, other_fd = fresh_world.opened()
    assert other.flock(other_fd, EX) == OK
    assert driver.flock(fd, EX | NB) == BUSY
    assert other.flock(other_fd, UN) == OK
    assert driver.flock(fd, EX | NB) == OK
    _only_keeper(rendezvous)


def test_a_waiter_whose_keeper_is_killed_whole_asks_the_next_one(fresh_world: World, rendezvous: Path) -> None:
    holder, held_fd = fresh_world.opened()
    other, other_fd = fresh_world.opened()
    assert holder.flock(held_fd, EX) == OK
    call = other.flock_later(other_fd, EX)
    fresh_world.await_blocked(call)
    _kill_whole(_only_keeper(rendezvous))
    assert call.result() == OK
    assert not fresh_world.free(fresh_world.file())


def test_the_socket_of_a_dead_keeper_does_not_matter(fresh_world: World, rendezvous: Path) -> None:
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    stale = [entry for entry in rendezvous.iterdir() if entry.is_socket()]
    assert stale
    end_keepers(rendezvous)
    assert [entry for entry in stale if entry.exists()] == stale
    assert driver.flock(fd, EX) == OK
    assert not fresh_world.free(fresh_world.file())


def test_a_rendezvous_directory_removed_under_a_living_keeper(fresh_world: World, rendezvous: Path) -> None:
    """/dev/shm may be swept (systemd-logind's RemoveIPC): the keeper puts everything back.

    What a program gets in the moment before is said in docs/semantics.md.
    """
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    (socket_path,) = [entry for entry in rendezvous.iterdir() if entry.is_socket()]
    # The keeper may be quicker than the removal of the directory.
    shutil.rmtree(rendezvous, ignore_errors=True)
    await_true(socket_path.is_socket, "the keeper to come back")
    assert fresh_world.probe(fresh_world.file(), SH) == BUSY
    assert driver.flock(fd, UN) == OK
    assert fresh_world.free(fresh_world.file())


def test_somebody_who_connects_and_says_nothing(fresh_world: World, rendezvous: Path) -> None:
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    (path,) = [entry for entry in rendezvous.iterdir() if entry.is_socket()]
    kinds = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
    for text in (b"", b"x", b"\0" * 4096):
        for kind in kinds:
            with socket.socket(socket.AF_UNIX, kind) as stranger:
                try:
                    stranger.connect(str(path))
                    stranger.send(text)
                except OSError:
                    continue  # the wrong kind of socket, or told to go
        assert fresh_world.probe(fresh_world.file(), SH) == BUSY
    assert driver.flock(fd, UN) == OK
    assert fresh_world.free(fresh_world.file())


def test_the_keeper_outgrows_the_limits_of_the_program_that_started_it(
    fresh_world: World,
) -> None:
    """A soft limit is the program's own; the keeper holds a descriptor for every lock of all."""
    prefix = ["prlimit", "--nofile=128:4096"]
    drivers = [fresh_world.fleet.start(None, *prefix) for _ in range(5)]
    for number, driver in enumerate(drivers):
        for index in range(40):
            path = fresh_world.directory / f"file-{number}-{index}"
            assert driver.flock(driver.open(path), EX) == OK
    assert not fresh_world.free(fresh_world.directory / "file-0-0")
    assert not fresh_world.free(fresh_world.directory / "file-4-39")
