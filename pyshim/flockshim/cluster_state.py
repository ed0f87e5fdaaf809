"""What a state file says: who holds and who waits, and what becomes of it. Nothing here touches a file."""

from __future__ import annotations

import json
from collections.abc import Set
from typing import NamedTuple

from flockshim.cluster_names import FREE


class Entry(NamedTuple):
    """A keeper that holds or waits. `granted` is the version by which it got the lock, its fencing token; 0 before."""

    ticket: str
    exclusive: bool
    granted: int = 0


class State(NamedTuple):
    """One version of a lock's state. If anybody waits, then somebody holds."""

    version: int
    holders: tuple[Entry, ...] = ()
    queue: tuple[Entry, ...] = ()

    def entries(self) -> tuple[Entry, ...]:
        """Return those who hold, and those who wait in order."""
        return self.holders + self.queue

    def request(self, entry: Entry, blocking: bool) -> State | None:
        """Return the next state, in which the entry holds or, if `blocking`, holds or waits; None if it cannot hold.

        Who waits is passed only by non-blocking readers who join readers, as in flock(2).
        """
        version = self.version + 1
        if not self.holders or self._joins(entry, blocking):
            return State(version, (*self.holders, entry._replace(granted=version)), self.queue)
        return State(version, self.holders, (*self.queue, entry)) if blocking else None

    def _joins(self, entry: Entry, blocking: bool) -> bool:
        compatible = not entry.exclusive and not self.holders[0].exclusive
        return compatible and not (blocking and self.queue)

    def without(self, tickets: Set[str]) -> State:
        """Return the next state, without these entries; if that frees the lock, those whose turn it is hold it."""
        holders = [entry for entry in self.holders if entry.ticket not in tickets]
        queue = [entry for entry in self.queue if entry.ticket not in tickets]
        return _served(self.version + 1, holders, queue)

    def converted(self, ticket: str, exclusive: bool) -> State | None:
        """Return the next state, in which the holder `ticket` holds in this mode; None while others hold, too."""
        if exclusive and len(self.holders) > 1:
            return None
        version = self.version + 1
        holders = [
            entry._replace(exclusive=exclusive, granted=version) if entry.ticket == ticket else entry
            for entry in self.holders
        ]
        return _served(version, holders, list(self.queue))

    def alone(self) -> State | None:
        """Return this state with the first holder and nobody else, if nobody held before; that takes no data file."""
        if not self.holders or any(entry.granted != self.version for entry in self.holders):
            return None
        return State(self.version, self.holders[:1])

    def renewed(self, ticket: str, new: str) -> State:
        """Return the next state, in which the holder `ticket` is called `new`."""
        version = self.version + 1
        holders = [
            entry._replace(ticket=new, granted=version) if entry.ticket == ticket else entry for entry in self.holders
        ]
        return State(version, tuple(holders), self.queue)

    def token(self) -> str | None:
        """Return the STATE of the name that says all of this, or None where it takes a data file."""
        if not self.holders:
            return FREE
        holder = self.holders[0]
        if len(self.entries()) > 1 or holder.granted != self.version:
            return None
        return ("x" if holder.exclusive else "s") + holder.ticket

    def text(self) -> str:
        """Return the text of the data file."""
        return json.dumps({"holders": self.holders, "queue": self.queue}) + "\n"


def _served(version: int, holders: list[Entry], queue: list[Entry]) -> State:
    """Return the state in which those of the queue hold whose turn it is."""
    while queue and (not holders or not (queue[0].exclusive or holders[0].exclusive)):
        holders.append(queue.pop(0)._replace(granted=version))
    return State(version, tuple(holders), tuple(queue))


def of_token(version: int, token: str) -> State:
    """Return the state that a name says by itself: STATE is not that of a data file."""
    if token == FREE:
        return State(version)
    return State(version, (Entry(token[1:], token[0] == "x", version),))


def of_text(version: int, text: str) -> State:
    """Return the state that a data file says. Raises ValueError if it is not one."""
    try:
        content = json.loads(text)
        holders, queue = ([Entry(str(t), bool(x), int(g)) for t, x, g in content[key]] for key in ("holders", "queue"))
    except (TypeError, KeyError) as error:
        raise ValueError(str(error)) from error
    return State(version, tuple(holders), tuple(queue))
