"""A lease that another host has taken over, and what becomes of those who held it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import shim_environment
from support.driver import BUSY, EX, NB, OK, SH, UN, Driver
from support.hosts import is_stopped
from support.keepers import keeper_processes
from support.proc import await_end, await_true
from support.worlds import World

from flockshim.pytest_plugin import Mounts

LEASE = 3.0


class Hosts:
    """Two hosts, as far as locks are concerned: nothing in common but the directory."""

    def __init__(self, directory: Path, rendezvous: list[Path]) -> None:
        self.rendezvous = rendezvous
        self.worlds = [self._world(directory, place) for place in rendezvous]
        self.warned = self._world(directory, rendezvous[0], FLOCKSHIM_ON_LOST="warn")
        """More programs of the first one."""

    @staticmethod
    def _world(directory: Path, rendezvous: Path, **settings: str) -> World:
        environment = shim_environment(rendezvous, FLOCKSHIM_LEASE=str(LEASE), **settings)
        return World("emulated", directory, {**environment, "FLOCKSHIM_MODE": "cluster"})

    def signal(self, host: int, *drivers: Driver, number: signal.Signals) -> None:
        """To the keeper of a host, and to these programs."""
        for pid in (*keeper_processes(self.rendezvous[host]), *(driver.pid for driver in drivers)):
            os.kill(pid, number)


@pytest.fixture
def hosts(nolock_dir: Path, rendezvous: Path, other_rendezvous: Path) -> Iterator[Hosts]:
    hosts = Hosts(nolock_dir, [rendezvous, other_rendezvous])
    yield hosts
    for world in (*hosts.worlds, hosts.warned):
        world.end()


def test_a_frozen_host(hosts: Hosts) -> None:
    """It is taken for dead by others. When it goes on, its holders must not, unless all they want is to be warned."""
    here, there = hosts.worlds
    driver, fd = here.opened("one")
    warned, warned_fd = hosts.warned.opened("two")
    assert driver.flock(fd, EX) == OK
    assert warned.flock(warned_fd, EX) == OK
    others = [there.opened(name) for name in ("one", "two")]
    for other, other_fd in others:
        assert other.flock(other_fd, SH | NB) == BUSY
    calls = [other.flock_later(other_fd, EX) for other, other_fd in others]
    there.await_blocked(*calls)
    hosts.signal(0, driver, warned, number=signal.SIGSTOP)
    assert [call.result() for call in calls] == [OK, OK]
    hosts.signal(0, number=signal.SIGCONT)
    await_end(driver.pid)
    here.fleet.reap()
    await_true(lambda: "was lost" in here.fleet.errors(), "the program to be told")
    await_true(lambda: "--on-lost warn" in hosts.warned.fleet.errors(), "the warning")
    os.kill(warned.pid, signal.SIGCONT)
    assert warned.flock(warned_fd, EX | NB) == BUSY
    for name, (other, other_fd) in zip(("one", "two"), others):
        assert here.probe(here.file(name), SH) == BUSY
        assert other.flock(other_fd, UN) == OK
        assert here.free(here.file(name))


def test_a_server_that_stalls_for_longer_than_the_lease_time(hosts: Hosts, _nolock_mounts: Mounts) -> None:
    """Nobody is thought dead. Holders wait until the server says that their lock is still theirs, and go on."""
    here, there = hosts.worlds
    driver, fd = here.opened()
    other, other_fd = there.opened()
    assert driver.flock(fd, EX) == OK
    call = other.flock_later(other_fd, EX)
    there.await_blocked(call)
    server = _nolock_mounts.get("ENOSYS", "ENOSYS").server_pid
    begun = time.monotonic()
    os.kill(server, signal.SIGSTOP)
    try:
        await_true(lambda: is_stopped(driver.pid), "the holder to be stopped")
        time.sleep(max(0.0, begun + 1.5 * LEASE - time.monotonic()))
        assert is_stopped(driver.pid)
    finally:
        os.kill(server, signal.SIGCONT)
    await_true(lambda: not is_stopped(driver.pid), "the holder to go on")
    assert not call.returned()
    assert driver.flock(fd, UN) == OK
    assert call.result() == OK
    assert here.probe(here.file(), SH) == BUSY
    assert "lost" not in here.fleet.errors()
