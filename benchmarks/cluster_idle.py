"""What it costs the file system that a lock is held, or waited for, while nothing changes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from cluster_hosts import Site, answer, compared, site, tell
from table import Table

WAITERS = (0, 1, 10)
SETTLE_SECONDS = 8


def compare(seconds: float) -> Table:
    """Compare the ways to lock, all at the same time, each holder and its waiters on a mount of their own."""
    table = Table(
        "A lock is held, or waited for: operations a minute",
        "locks",
        "a holder",
        "a waiter of another host",
        "10 waiters of another host",
    )
    with contextlib.ExitStack() as stack:
        sites = {
            (means, waiters): stack.enter_context(_occupied(means, waiters))
            for means in compared()
            for waiters in WAITERS
        }
        time.sleep(SETTLE_SECONDS)
        before = {key: _operations(place) for key, place in sites.items()}
        time.sleep(seconds)
        rates = {key: (_operations(place) - before[key]) * 60 / seconds for key, place in sites.items()}
    for means in dict.fromkeys(means for means, _ in rates):
        holder = rates[means, 0]
        table.add(means, f"{holder:.0f}", *(f"{max(0.0, rates[means, n] - holder):.0f}" for n in WAITERS[1:]))
    table.notes.append(
        f"Reads and writes too, counted for {seconds:.0f} s; of waiters what is more than with the holder alone."
    )
    return table


@contextlib.contextmanager
def _occupied(means: str, waiters: int) -> Iterator[Site]:
    """Return a site where one holds the lock, and so many wait on another host."""
    with site(means) as place:
        holder = place.host("holder")
        tell(holder, "hold")
        answer(holder)
        if waiters:
            other = place.host("waiter", waiters)
            tell(other, "wait")
            answer(other)
        yield place


def _operations(place: Site) -> int:
    counts = place.counts()
    return counts["metadata"] + counts["content"]
