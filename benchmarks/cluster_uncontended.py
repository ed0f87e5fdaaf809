"""One host takes and gives back a lock that nobody else wants: operations, and time."""

from __future__ import annotations

import contextlib
import subprocess

from cluster_hosts import Site, answer, compared, site, tell
from table import Table, duration, median, spread

PAIRS = 40
FEWER = {"SoftReadWriteLock": 5}


def compare(rounds: int) -> Table:
    """Compare the ways to lock, which take turns; each has a mount of its own."""
    measured: dict[str, list[float]] = {}
    asked: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        sites = [stack.enter_context(site(means)) for means in compared()]
        hosts = {each.means: each.host("alone") for each in sites}
        for number in range(rounds + 1):
            for each in sites if number % 2 else reversed(sites):
                nanoseconds, operations = _round(each, hosts[each.means])
                if number:
                    measured.setdefault(each.means, []).append(nanoseconds)
                    asked.setdefault(each.means, []).append(operations)
    table = Table(
        "One process takes and gives back a lock (FUSE, cluster mode)",
        "acquire and release",
        "metadata operations",
        "reads and writes",
        "refused by the kernel",
        "median",
        "middle half of the rounds",
        "faster than SoftFileLock",
    )
    soft = median(measured["SoftFileLock"])
    for means, values in measured.items():
        kinds = [f"{median([one[kind] for one in asked[means]]):.1f}" for kind in ("metadata", "content", "locks")]
        table.add(means, *kinds, duration(median(values)), spread(values), f"{soft / median(values):.2f}x")
    return table


def _round(each: Site, host: subprocess.Popen[str]) -> tuple[float, dict[str, float]]:
    pairs = FEWER.get(each.means, PAIRS)
    before = each.counts()
    tell(host, f"alone {pairs}")
    nanoseconds = answer(host)
    after = each.counts()
    return nanoseconds / pairs, {kind: (after[kind] - before[kind]) / pairs for kind in after}
