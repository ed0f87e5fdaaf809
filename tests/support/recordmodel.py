"""A reference model of record locks, for the same ends as support/model.py has them for flock(2).

It says what must happen after each step, and refuses a step if Linux leaves a choice: if the order in which the
woken try again matters, if a call would pass one that has asked before it (which a keeper does not let happen), if a
cycle of waiting calls is not one beyond doubt, or if the process closes a descriptor of a file of which it has locks
that it took by another one (the documented difference). All of that has tests of its own.
"""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

from support.driver import OK
from support.model import BLOCKED, Outcome, Refused
from support.records import AGAIN, RD, UN, WR

PLACES = 12
"""Bytes of a file that are told apart; the last one stands for all behind it too."""
SIZE = 8
"""Of each file, in bytes."""

Owner = tuple[str, int]
Cells = list[Optional[int]]
Table = dict[Owner, Cells]
"""The locks of a file: type by byte of each owner, in the order in which they came."""
Ending = tuple[tuple[tuple[Owner, tuple[Optional[int], ...]], ...], frozenset[int]]


class Span(NamedTuple):
    """What is asked for: a type, and the bytes from the first to the last."""

    kind: int
    first: int
    last: int


class Waiting(NamedTuple):
    """A call that waits."""

    call: int
    owner: Owner
    process: int
    slot: int
    file: int
    span: Span


class Seen(NamedTuple):
    """What F_GETLK shows: the type, where it starts, its length, and the process, or -1."""

    kind: int
    start: int
    length: int
    process: int


@dataclass
class Description:
    file: int
    access: int
    position: int = 0


@dataclass
class Process:
    slots: dict[int, int] = field(default_factory=dict)
    close_on_exec: set[int] = field(default_factory=set)
    takers: dict[int, Cells] = field(default_factory=dict)
    """By which slot each byte of a file was locked last."""


class RecordModel:
    """The state between two steps. A step that is refused leaves it in disorder: use a copy."""

    def __init__(self, files: int) -> None:
        self.tables: list[Table] = [{} for _ in range(files)]
        self.descriptions: dict[int, Description] = {}
        self.processes: dict[int, Process] = {}
        self.waiting: list[Waiting] = []
        self.numbers = 0

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def owner(self, process: int, slot: int, ofd: bool) -> Owner:
        return ("description", self.processes[process].slots[slot]) if ofd else ("process", process)

    def description(self, process: int, slot: int) -> Description:
        return self.descriptions[self.processes[process].slots[slot]]

    def holders(self, asked: Waiting) -> list[Owner]:
        """Who is in its way."""
        return list(_in_the_way(self.tables[asked.file], asked))

    # --- steps ---

    def lock(self, process: int, slot: int, span: Span, ofd: bool, call: int | None) -> Outcome:
        """F_SETLK, or F_SETLKW with a number under which it waits if it has to."""
        description = self.description(process, slot)
        if description.access == {RD: os.O_WRONLY, WR: os.O_RDONLY}.get(span.kind):
            return Outcome(errno.EBADF, {})
        asked = Waiting(call or 0, self.owner(process, slot, ofd), process, slot, description.file, span)
        table = self.tables[description.file]
        if not any(_in_the_way(table, asked)):
            if call and any(_conflict(asked, each) for each in self.waiting):
                raise Refused("it would pass one that has asked before it")
            self._take(asked)
            return Outcome(OK, self._settle([description.file]))
        if call is None:
            return Outcome(AGAIN, {})
        if self._leads_to(asked, asked.owner, any):
            # Behind a call that waits as a description, Linux doesn't see those that wait as a process.
            processes = all(each.owner[0] == "process" for each in [asked, *self.waiting])
            if processes and self._leads_to(asked, asked.owner, all):
                return Outcome(errno.EDEADLK, {})
            raise Refused("a cycle, or none: it depends")
        self.waiting.append(asked)
        return Outcome(BLOCKED, {})

    def show(self, process: int | None, slot: int, span: Span, ofd: bool, file: int | None = None) -> Seen | None:
        """F_GETLK; of a stranger if no process is given."""
        if process is None:
            owner: Owner = ("stranger", 0)
        else:
            owner, file = self.owner(process, slot, ofd), self.description(process, slot).file
        assert file is not None
        asked = Waiting(0, owner, 0, 0, file, span)
        for other in _in_the_way(self.tables[file], asked):
            cells = self.tables[file][other]
            place = next(place for place in _places(span) if _clash(cells[place], span.kind))
            first = last = place
            while first > 0 and cells[first - 1] == cells[place]:
                first -= 1
            while last < PLACES - 1 and cells[last + 1] == cells[place]:
                last += 1
            kind = cells[place]
            assert kind is not None
            length = 0 if last == PLACES - 1 else last - first + 1
            return Seen(kind, first, length, other[1] if other[0] == "process" else -1)
        return None

    def close(self, process: int, slots: Iterable[int]) -> Outcome:
        table = self.processes[process]
        dropped = []
        for slot in slots:
            if any(each.process == process and each.slot == slot for each in self.waiting):
                raise Refused("a call waits by this descriptor")
            file = self.description(process, slot).file
            if ("process", process) in self.tables[file]:
                if slot not in table.takers[file]:
                    raise Refused("the documented difference")
                self._forget(("process", process), file)
            table.close_on_exec.discard(slot)
            dropped.append(table.slots.pop(slot))
        return Outcome(OK, self._drop(dropped))

    def kill(self, process: int) -> Outcome:
        self.waiting = [each for each in self.waiting if each.process != process]
        for file in range(len(self.tables)):
            self._forget(("process", process), file)
        return Outcome(OK, self._drop(self.processes.pop(process).slots.values()))

    def exec(self, process: int) -> Outcome:
        """The other threads end, and with them their calls; then comes close-on-exec."""
        self.waiting = [each for each in self.waiting if each.process != process]
        return self.close(process, list(self.processes[process].close_on_exec))

    def fork(self, process: int) -> int:
        child = self.number()
        self.processes[child] = copy.deepcopy(self.processes[process])
        self.processes[child].takers = {}
        return child

    def interrupt(self, call: int) -> Outcome:
        self.waiting = [each for each in self.waiting if each.call != call]
        return Outcome(OK, {call: errno.EINTR, **self._settle(range(len(self.tables)))})

    # --- what follows from them ---

    def _take(self, asked: Waiting) -> None:
        _apply(self.tables[asked.file], asked)
        if asked.owner[0] == "process":
            takers = self.processes[asked.process].takers.setdefault(asked.file, [None] * PLACES)
            for place in _places(asked.span):
                takers[place] = None if asked.span.kind == UN else asked.slot

    def _forget(self, owner: Owner, file: int) -> None:
        self.tables[file].pop(owner, None)
        if owner[0] == "process":
            self.processes[owner[1]].takers.pop(file, None)

    def _drop(self, descriptions: Iterable[int]) -> dict[int, int]:
        for key in set(descriptions):
            if not any(key in each.slots.values() for each in self.processes.values()):
                self._forget(("description", key), self.descriptions.pop(key).file)
        return self._settle(range(len(self.tables)))

    def _settle(self, files: Iterable[int]) -> dict[int, int]:
        """Serve the calls that wait for FILES."""
        served: dict[int, int] = {}
        for file in files:
            queue = [each for each in self.waiting if each.file == file]
            granted = self._first_come(file, queue)
            if _endings(self.tables[file], queue) != {granted}:
                raise Refused("the scheduler decides")
            for each in [each for each in queue if each.call in granted[1]]:
                served[each.call] = OK
                self._take(each)
            self.tables[file] = {owner: list(cells) for owner, cells in granted[0]}
        self.waiting = [each for each in self.waiting if each.call not in served]
        if any(self._leads_to(each, each.owner, any) for each in self.waiting):
            raise Refused("a cycle has come about")
        return served

    def _first_come(self, file: int, queue: list[Waiting]) -> Ending:
        """The end if nobody passes one that has asked before and whom he would be in the way of."""
        table = copy.deepcopy(self.tables[file])
        left = list(queue)
        served: set[int] = set()
        while True:
            for index, each in enumerate(left):
                if not any(_in_the_way(table, each)) and not any(_conflict(each, other) for other in left[:index]):
                    break
            else:
                return _frozen(table), frozenset(served)
            _apply(table, each)
            served.add(each.call)
            left.remove(each)

    def _leads_to(self, asked: Waiting, goal: Owner, every: object, seen: frozenset[Owner] = frozenset()) -> bool:
        """Whether those who are in the way of a call wait, at last, for GOAL: any of them, or all in every way."""
        found = []
        for holder in self.holders(asked):
            waits = [each for each in self.waiting if each.owner == holder]
            if holder == goal:
                found.append(True)
            elif holder in seen or not waits:
                found.append(False)
            else:
                further = [self._leads_to(each, goal, every, seen | {holder}) for each in waits]
                found.append(all(further) if every is all else any(further))
        return all(found) if every is all else any(found)


def _places(span: Span) -> range:
    return range(span.first, span.last + 1)


def _clash(one: int | None, other: int) -> bool:
    return one is not None and WR in (one, other) and other != UN


def _in_the_way(table: Table, asked: Waiting) -> Iterator[Owner]:
    """The owners whose locks ASKED would conflict with, the earliest first."""
    for owner, cells in table.items():
        if owner != asked.owner and any(_clash(cells[place], asked.span.kind) for place in _places(asked.span)):
            yield owner


def _conflict(one: Waiting, other: Waiting) -> bool:
    return (
        one.file == other.file
        and one.owner != other.owner
        and one.span.first <= other.span.last
        and other.span.first <= one.span.last
        and _clash(one.span.kind, other.span.kind)
    )


def _apply(table: Table, asked: Waiting) -> None:
    cells = table.setdefault(asked.owner, [None] * PLACES)
    for place in _places(asked.span):
        cells[place] = None if asked.span.kind == UN else asked.span.kind
    if not any(cell is not None for cell in cells):
        del table[asked.owner]


def _frozen(table: Table) -> tuple[tuple[Owner, tuple[int | None, ...]], ...]:
    return tuple((owner, tuple(cells)) for owner, cells in table.items())


def _endings(table: Table, queue: list[Waiting]) -> set[Ending]:
    """Every end that Linux allows: whoever is woken may try first."""
    endings: set[Ending] = set()
    for each in queue:
        if any(_in_the_way(table, each)):
            continue
        trial = copy.deepcopy(table)
        _apply(trial, each)
        rest = [other for other in queue if other is not each]
        endings |= {(locks, calls | {each.call}) for locks, calls in _endings(trial, rest)}
    return endings or {(_frozen(table), frozenset())}
