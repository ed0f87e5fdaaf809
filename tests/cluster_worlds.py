"""Three hosts, as far as locks go, whose programs lock records of one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import shim_environment
from support.hosts import recorded
from support.keepers import Keeper, end_keepers, keepers
from support.proc import await_true
from support.worlds import World


class Hosts:
    """Three hosts, as far as locks go, where nothing that happens is owed to the lease time."""

    def __init__(self, directory: Path, rendezvous: Path) -> None:
        self.rendezvous = rendezvous
        self.worlds = []
        for name in "abc":
            environment = shim_environment(rendezvous / name, FLOCKSHIM_LEASE="600")
            self.worlds.append(World("emulated", directory, {**environment, "FLOCKSHIM_MODE": "cluster"}))
        self.file = self.worlds[0].file()
        self.records = directory / "file~records"

    def mode(self) -> str:
        """Who holds between hosts: `x` for exclusively, an `s` for each reader, and `-` for each host that waits."""
        state = recorded(self.records)
        assert state is not None
        return "".join("x" if entry.exclusive else "s" for entry in state.holders) + "-" * len(state.queue)

    def await_mode(self, mode: str) -> None:
        await_true(lambda: self.mode() == mode, f"{mode!r} between the hosts, not {self.mode()!r},")

    def keeper(self, number: int) -> Keeper:
        """The keeper of a host that has one."""
        directory = self.rendezvous / "abc"[number]
        await_true(lambda: len(keepers(directory)) == 1, "the keeper to be complete")
        return keepers(directory)[0]

    def end(self) -> str:
        errors = "".join(world.end() for world in self.worlds)
        for name in "abc":
            end_keepers(self.rendezvous / name)
        return errors


@pytest.fixture
def hosts(nolock_dir: Path, rendezvous: Path) -> Iterator[Hosts]:
    hosts = Hosts(nolock_dir, rendezvous)
    yield hosts
    assert hosts.end() == ""


@pytest.fixture
def three(hosts: Hosts) -> list[World]:
    return hosts.worlds
