"""Judges what processes of many hosts have done with one counter under one lock, by what each wrote down itself.

The log of a process (tests/programs/hostworker.c) has lines of a word, a time and a value; the times are of one clock:

    ask        begins to wait for the lock
    exclusive  has it; or `shared`
    read       this value
    write      is about to write this value
    end        has read this value, and is about to unlock
    done       leaves; any other word is a call that has failed, with its errno
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Hold(NamedTuple):
    """One visit under the lock. Times are nanoseconds."""

    who: str
    """HOST.NUMBER"""
    exclusive: bool
    asked: int
    begin: int
    last: int
    """The latest time at which it is known to have been inside."""
    read: int | None = None
    wrote: int | None = None
    """What it meant to write; if it was killed it may not have come to it."""
    seen: int | None = None
    """What it read in the end; None: it was killed inside."""
    broken: bool = False
    """Its lock was taken from it by rights: its host was frozen, or lost both of its keeper's processes."""

    @property
    def host(self) -> str:
        return self.who.partition(".")[0]


class Log(NamedTuple):
    """What one process wrote."""

    holds: list[Hold]
    failures: list[str]
    """Lines of calls that failed."""
    done: bool


def parse(who: str, text: str) -> Log:
    """Read the log of the process WHO. A last line without end is left out."""
    holds: list[Hold] = []
    failures = []
    done = False
    asked = 0
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        word, time, value = line.split()[0], int(line.split()[1]), int(line.split()[2])
        if word == "ask":
            asked = time
        elif word in ("exclusive", "shared"):
            holds.append(Hold(who, word == "exclusive", asked, time, time))
        elif word == "read":
            holds[-1] = holds[-1]._replace(last=time, read=value)
        elif word == "write":
            holds[-1] = holds[-1]._replace(last=time, wrote=value)
        elif word == "end":
            holds[-1] = holds[-1]._replace(last=time, seen=value)
        elif word == "done":
            done = True
        else:
            failures.append(f"{who}: {line.strip()}")
    return Log(holds, failures, done)


def with_breaks(holds: Iterable[Hold], breaks: Mapping[str, Sequence[int]]) -> list[Hold]:
    """Mark the holds that were broken, BREAKS being the times at which a host has lost what it held.

    What was granted by then and begins later is broken too: the grant was on its way. From the break on such a
    hold counts as over.
    """
    result = []
    for hold in holds:
        over = hold.last if hold.seen is not None else float("inf")
        times = [time for time in breaks.get(hold.host, ()) if hold.asked <= time <= over]
        if times:
            hold = hold._replace(last=max(hold.begin, min(hold.last, times[0])), broken=True)  # noqa: PLW2901
        result.append(hold)
    return result


def overlaps(holds: Iterable[Hold]) -> list[tuple[Hold, Hold]]:
    """Pairs of holds that excluded each other and were inside at one time. Each wrong hold is in one pair at least."""
    found = []
    exclusive: Hold | None = None
    shared: Hold | None = None
    for hold in sorted(holds, key=lambda hold: hold.begin):
        if hold.broken and hold.last == hold.begin:
            continue  # it may have begun after the break
        for earlier in (exclusive, shared if hold.exclusive else None):
            if earlier is not None and hold.begin < earlier.last:
                found.append((earlier, hold))
        if hold.exclusive:
            exclusive = max(exclusive or hold, hold, key=lambda hold: hold.last)
        else:
            shared = max(shared or hold, hold, key=lambda hold: hold.last)
    return found


def wrong_values(holds: Iterable[Hold]) -> list[str]:
    """Every value read that is not what the lock's holder before had left, and every change seen from inside.

    A holder that was killed may have written or not; one that was broken may write at any time after.
    """
    found = []
    last = Hold("nobody", True, 0, 0, 0, wrote=0)
    killed: set[int] = set()
    broken: set[int] = set()
    for hold in sorted(holds, key=lambda hold: hold.begin):
        if not hold.broken:
            possible = {last.wrote} | killed | broken
            if hold.read is not None and hold.read not in possible:
                found.append(f"{hold.who} read {hold.read} at {hold.begin}, after {last.who} had left {last.wrote}")
            meant = hold.wrote if hold.exclusive else hold.read
            if hold.seen is not None and hold.seen != meant and hold.seen not in broken:
                found.append(f"{hold.who} saw {hold.seen} instead of {meant} at {hold.last}: somebody else was inside")
        if not hold.exclusive or hold.wrote is None:
            continue
        if hold.broken:
            broken.add(hold.wrote)
        elif hold.seen is None:
            killed.add(hold.wrote)
        else:
            last = hold
            killed.clear()
    return found
