"""A lease that another host has taken over, and what becomes of those who held it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import shim_environment
from support.driver import EX, NB, OK, SH, UN, Driver
from support.keepers import end_keepers, keeper_processes
from support.proc import await_end, await_true
from support.worlds import World

LEASE = "3"


class Hosts:
    """Two hosts, as far as locks are concerned: nothing in common but the directory."""

    def __init__(self, directory: Path, rendezvous: list[Path], **settings: str) -> None:
        self.rendezvous = rendezvous
        self.worlds = []
        for place in rendezvous:
            environment = shim_environment(place, FLOCKSHIM_LEASE=LEASE, **settings)
            self.worlds.append(World("emulated", directory, {**environment, "FLOCKSHIM_MODE": "cluster"}))

    def signal(self, host: int, *drivers: Driver, number: signal.Signals) -> None:
        """To the keeper of a host, and to these programs."""
        for pid in (*keeper_processes(self.rendezvous[host]), *(driver.pid for driver in drivers)):
            os.kill(pid, number)


@pytest.fixture(params=["kill", "warn"])
def hosts(
    request: pytest.FixtureRequest, nolock_dir: Path, rendezvous: Path, other_rendezvous: Path
) -> Iterator[Hosts]:
    hosts = Hosts(nolock_dir, [rendezvous, other_rendezvous], FLOCKSHIM_ON_LOST=request.param)
    hosts.only_warn = request.param == "warn"  # type: ignore[attr-defined]
    yield hosts
    for world in hosts.worlds:
        world.end()


def test_a_frozen_host(hosts: Hosts) -> None:
    """It is taken for dead by others. When it goes on, its holders must not."""
    here, there = hosts.worlds
    driver, fd = here.opened()
    other, other_fd = there.opened()
    assert driver.flock(fd, EX) == OK
    assert other.flock(other_fd, SH | NB) != OK
    call = other.flock_later(other_fd, EX)
    there.await_blocked(call)
    hosts.signal(0, driver, number=signal.SIGSTOP)
    assert call.result() == OK
    hosts.signal(0, number=signal.SIGCONT)
    if hosts.only_warn:  # type: ignore[attr-defined]
        await_true(lambda: "--on-lost warn" in here.fleet.errors(), "the warning")
        os.kill(driver.pid, signal.SIGCONT)
        assert driver.flock(fd, EX | NB) != OK
    else:
        await_end(driver.pid)
        here.fleet.reap()
        assert "was lost" in here.fleet.errors()
    assert here.probe(here.file(), SH) != OK
    assert other.flock(other_fd, UN) == OK
    assert here.free(here.file())


def test_a_host_that_is_gone(hosts: Hosts) -> None:
    here, there = hosts.worlds
    driver, fd = here.opened()
    other, other_fd = there.opened()
    assert driver.flock(fd, EX) == OK
    call = other.flock_later(other_fd, EX)
    there.await_blocked(call)
    driver.kill()
    end_keepers(hosts.rendezvous[0])
    assert call.result() == OK


def test_a_server_that_stalls_for_less_than_the_lease_time(hosts: Hosts) -> None:
    """Nobody is thought dead."""
    here, there = hosts.worlds
    driver, fd = here.opened()
    other, other_fd = there.opened()
    assert driver.flock(fd, EX) == OK
    call = other.flock_later(other_fd, EX)
    there.await_blocked(call)
    assert driver.flock(fd, UN) == OK
    assert call.result() == OK
    assert here.probe(here.file(), SH) != OK
