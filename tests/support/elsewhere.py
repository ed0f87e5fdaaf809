"""Keepers of other hosts, as far as they can be seen beside a target: their entries and their vouching files."""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import flockshim
from flockshim import cluster_list, cluster_notes
from flockshim.cluster import Lease
from flockshim.cluster_names import new_lineage, vouching_name
from flockshim.cluster_notes import Program
from flockshim.cluster_ops import Wait
from flockshim.cluster_state import State
from flockshim.cluster_vouch import Judge, Voucher

FLOCKSHIM = [sys.executable, "-m", "flockshim"]
MANY_SECONDS = 1000.0


def settings(rendezvous: Path, **more: str) -> dict[str, str]:
    """The environment of commands that meet in RENDEZVOUS."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("FLOCKSHIM_")}
    return flockshim.environ(mode="cluster", base={**base, "FLOCKSHIM_DIR": str(rendezvous), **more})


def files(directory: Path) -> list[str]:
    """The names in a directory."""
    return sorted(os.listdir(directory))


class Elsewhere:
    """One keeper. It judges nobody, and nothing is done for it but what the test does."""

    def __init__(self, target: Path, keeper: str | None = None) -> None:
        """KEEPER is its id; one of another domain if not given."""
        self.keeper = keeper or os.urandom(12).hex()
        self.directory = target.parent
        self.name = target.name
        serial = itertools.count(1)
        self._lease = Lease(
            self.name,
            lambda: f"{self.keeper}-{next(serial)}",
            new_lineage,
            Judge(MANY_SECONDS, time.monotonic, lambda _: None),
            Voucher(self.keeper, MANY_SECONDS, time.monotonic, str),
        )

    def lock(self, exclusive: bool = True) -> bool:
        """Hold the lock, or stand in its queue; returns whether it holds."""
        return bool(self._run(self._lease.acquire(exclusive, blocking=True)))

    def unlock(self) -> None:
        """Give the lock back."""
        self._run(self._lease.release())

    @property
    def token(self) -> int:
        """The fencing token."""
        return self._lease.token

    def state(self) -> State:
        """The state of the lock as it is now."""
        state = self._run(self._lease.refresh())
        assert isinstance(state, State)
        return state

    def vouch(self, host: str, *programs: Program) -> None:
        """Write the vouching file, on a host of this name."""
        text = cluster_notes.text(os.urandom(4).hex(), host, {self.name: programs})
        (self.directory / vouching_name(self.keeper)).write_text(text)

    def vouching_file(self) -> Path:
        """Where it vouches."""
        return self.directory / vouching_name(self.keeper)

    def _run(self, generator: Any) -> Any:
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            return cluster_list.perform(descriptor, _until_it_waits(generator))
        finally:
            os.close(descriptor)


def _until_it_waits(generator: Any) -> Any:
    """Go on until the keeper stands in the queue."""
    result, error = None, None
    while True:
        try:
            operation = generator.throw(error) if error else generator.send(result)
        except StopIteration as stop:
            return stop.value
        if isinstance(operation, Wait):
            generator.close()
            return False
        result, error = None, None
        try:
            result = yield operation
        except OSError as failure:
            error = failure


def program(pid: int, command: str, waits: bool = False, since: float = 0.0) -> Program:
    """A program that holds the lock exclusively, or waits for it."""
    return Program(pid, command, True, waits, since or time.time())
