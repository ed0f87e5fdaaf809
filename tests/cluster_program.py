"""What a host of the model does with the protocol, and what it is told besides the answers of the server."""

from __future__ import annotations

import errno
from collections.abc import Collection, Generator
from typing import Any, NamedTuple

from flockshim import cluster_ops as ops
from flockshim.cluster import Lease
from flockshim.cluster_names import keeper_of
from flockshim.cluster_state import Entry

Script = tuple[tuple[bool, bool], ...]
"""What a host does: (exclusive, blocking) for each lock that it takes and gives back."""


class Hold(NamedTuple):
    """The host's program has the lock."""

    exclusive: bool
    token: int


class Refused(NamedTuple):
    """A non-blocking request was refused."""


class Observe(NamedTuple):
    """The host asks which of these are dead."""

    tickets: tuple[str, ...]


class Surroundings:
    """Judge and voucher of a host whose time is the number of its lapses, and which is told who is dead."""

    def __init__(self, keeper: str) -> None:
        self.keeper = keeper
        self.lapses = 0
        self.serial = 0
        self.lineages = 0
        self.dead_keepers: set[str] = set()

    def new_ticket(self) -> str:
        self.serial += 1
        return f"{self.keeper}-{self.serial}"

    def new_lineage(self) -> str:
        self.lineages += 1
        return f"{self.keeper}{self.lineages:x}"

    def clock(self) -> float:
        return self.lapses

    def must_stop(self, made: float, now: float) -> bool:
        return made < self.lapses

    def known_dead(self, entries: Collection[Entry]) -> set[str]:
        return {entry.ticket for entry in entries if keeper_of(entry.ticket) in self.dead_keepers}

    def dead(self, entries: Collection[Entry]) -> Generator[Any, Any, set[str]]:
        if not entries:
            return set()
        return set((yield Observe(tuple(entry.ticket for entry in entries))))


def program(lease: Lease, around: Surroundings, script: Script, cleans: bool) -> Generator[Any, Any, None]:
    """What a keeper does for a program: lock, hold, unlock; and after a lapse, only what is still right."""
    for exclusive, blocking in script:
        try:
            got = yield from lease.acquire(exclusive, blocking)
            if not got:
                yield Refused()
                continue
            while got:
                yield Hold(exclusive, lease.token)
                if lease.still_mine(around.clock()):
                    break
                got = yield from lease.confirm()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        while True:
            try:
                yield from lease.release()
                break
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                yield ops.Pause(0)
    if cleans:
        yield from lease.clean()
