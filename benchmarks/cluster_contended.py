"""Processes of several hosts want one lock again and again: how it is handed on, and whether it excludes."""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path
from threading import Timer
from typing import NamedTuple

from cluster_hosts import Site, answer, compared, site, tell
from table import Table, duration, median, quantile

TURNS = 400
FORK_NANOSECONDS = 10_000_000


class Held(NamedTuple):
    """The lock was held by a process of `host` from `begin` to `end`, CLOCK_MONOTONIC, nanoseconds."""

    begin: int
    end: int
    host: str


def compare(hosts: int, processes: int, turns: int, seconds: float) -> Table:
    """Compare the ways to lock, one after the other, each for `seconds` at most."""
    word = "host" if hosts == 1 else "hosts"
    table = Table(
        f"{hosts} {word} with {processes} processes each, {turns} turns in all",
        "hands on the lock",
        "turns done",
        "a turn",
        "hand-off within a host",
        "between hosts",
        "99th percentile",
        "metadata operations a turn",
        "overlaps",
        "lost updates",
    )
    for means in compared():
        with site(means) as place:
            _row(table, place, hosts, processes, max(1, turns // (hosts * processes)), seconds)
    if any(" of " in row[1] for row in table.rows):
        table.notes.append(f"Who has not done them all was stopped after {seconds:.0f} s.")
    return table


def _row(table: Table, place: Site, hosts: int, processes: int, rounds: int, seconds: float) -> None:
    started = [place.host(f"host{number}", processes) for number in range(hosts)]
    # The lock's first use, and the start of a keeper, is not what is measured.
    for host in started:
        tell(host, "alone 1")
        answer(host)
    before = place.counts()["metadata"]
    timer = Timer(seconds, _end, [started])
    timer.start()
    start = time.monotonic_ns() + hosts * processes * FORK_NANOSECONDS
    for host in started:
        tell(host, f"pairs {rounds} {start}")
    for host in started:
        # Ended by the timer, it has done what it has noted.
        with contextlib.suppress(EOFError):
            answer(host)
    timer.cancel()
    operations = place.counts()["metadata"] - before
    wanted = hosts * processes * rounds
    turns = history(place.out)
    if not turns:
        table.add(place.means, f"0 of {wanted}", *["-"] * 7)
        return
    within, between, overlaps = hand_offs(turns)
    both = within + between
    lost = len(turns) - int((place.out / "counter").read_text() or 0)
    table.add(
        place.means,
        f"{len(turns)}" if len(turns) == wanted else f"{len(turns)} of {wanted}",
        duration((turns[-1].end - turns[0].begin) / len(turns)),
        *(duration(median(some)) if some else "-" for some in (within, between)),
        duration(quantile(both, 0.99)) if both else "-",
        f"{operations / len(turns):.2f}",
        str(overlaps),
        # Who was killed under the lock may have counted a turn that it has not noted.
        str(max(0, lost)),
    )


def _end(hosts: list[subprocess.Popen[str]]) -> None:
    for host in hosts:
        host.kill()


def history(out: Path) -> list[Held]:
    """Return what all processes have noted, by begin."""
    found = []
    for file in out.glob("*.*"):
        for line in file.read_text().splitlines():
            begin, end = line.split()
            found.append(Held(int(begin), int(end), file.name.partition(".")[0]))
    return sorted(found)


def hand_offs(turns: list[Held]) -> tuple[list[float], list[float], int]:
    """Return the nanoseconds from an end to the next begin, within a host and between hosts, and how many overlap."""
    within: list[float] = []
    between: list[float] = []
    overlaps = 0
    last = turns[0]
    for turn in turns[1:]:
        if turn.begin < last.end:
            overlaps += 1
        else:
            (within if turn.host == last.host else between).append(turn.begin - last.end)
        last = max(last, turn, key=lambda held: held.end)
    return within, between, overlaps
