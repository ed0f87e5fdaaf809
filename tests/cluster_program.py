"""What a host of the model does with the protocol, and what it is told besides the answers of the server."""

from __future__ import annotations

import errno
from collections.abc import Collection, Generator
from typing import Any, NamedTuple

from flockshim import cluster_ops as ops
from flockshim.cluster import Lease
from flockshim.cluster_names import keeper_of
from flockshim.cluster_state import Entry

Script = tuple[tuple[bool, ...], ...]
"""What a host does: (exclusive, blocking) for each lock that it takes and gives back; more are modes to convert it to,
exclusive or not, one after the other."""


class Hold(NamedTuple):
    """The host's program has the lock."""

    exclusive: bool
    token: int


class Refused(NamedTuple):
    """A non-blocking request was refused, or a conversion."""


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
        # While its mode is changed the program has a shared lock, before and after.
        self.converts = False

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
    for exclusive, blocking, *conversions in script:
        try:
            got = yield from lease.acquire(exclusive, blocking)
            if not got:
                yield Refused()
                continue
            got = yield from _hold(lease, around, exclusive)
            for wanted in conversions:
                if got:
                    got, exclusive = yield from _convert(lease, around, exclusive, wanted)  # noqa: PLW2901
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        around.converts = False
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


def _hold(lease: Lease, around: Surroundings, exclusive: bool) -> Generator[Any, Any, bool]:
    """Run the program; it goes on after a lapse only if the lock is still ours, which is returned."""
    while True:
        yield Hold(exclusive, lease.token)
        if lease.still_mine(around.clock()):
            return True
        if not (yield from lease.confirm()):
            return False


def _convert(
    lease: Lease, around: Surroundings, exclusive: bool, wanted: bool
) -> Generator[Any, Any, tuple[bool, bool]]:
    """What record locks need: more of a lease when a reader writes, less of it when only readers are left.

    Returns whether the lock is still ours, and its mode.
    """
    around.converts = True
    if (yield from lease.convert(wanted)):
        exclusive = wanted
        is_ours = True
    else:
        if lease.still_mine(around.clock()):
            yield Refused()
        around.converts = False
        is_ours = lease.still_mine(around.clock()) or (yield from lease.confirm())
    around.converts = False
    return is_ours and (yield from _hold(lease, around, exclusive)), exclusive
