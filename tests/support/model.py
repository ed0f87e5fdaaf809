"""A reference model of flock(2): processes, open file descriptions, locks and waiting calls.

The model says which steps may follow in a history, and what they do. It is no oracle: the kernel
is, and the differential test checks the model against it too. It has two jobs.

It knows what must happen, so that a runner can await exactly that and need not guess how long a
call that hasn't returned might still take.

It admits a step only if Linux leaves no choice. When a lock goes away, Linux wakes all of its
waiters, and the scheduler decides who tries first; under flockshim the first who asked is served
first. So the model explores every order in which the woken may try, and drops the step unless all
orders, and first come first served, end alike. What remains is still sharp: every grant, refusal,
conversion, inheritance and way of losing a lock occurs with up to all readers of a file waiting at
once, or one writer. What is left out is who wins among several writers; that is the torture test's
(never two) and test_semantics.py's (in order).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from support.driver import BUSY, EX, NB, OK, SH, UN

BLOCKED = -1
"""The result of a call that has not returned."""


class Waiting(NamedTuple):
    """A call that waits: which one, on which description, for what, in which process."""

    call: int
    description: int
    mode: int
    process: int


Ending = tuple[frozenset[tuple[int, int]], frozenset[tuple[int, int]]]
"""How a race may end: who holds what, and which calls have returned what."""


@dataclass
class Description:
    """An open file description: its file, and its lock if it has one."""

    file: int
    lock: int | None = None


@dataclass
class Process:
    """Descriptors by slot, and which of them are closed by exec."""

    slots: dict[int, int] = field(default_factory=dict)
    close_on_exec: set[int] = field(default_factory=set)


class Outcome(NamedTuple):
    """What a step gives at once, and the earlier calls that return because of it."""

    result: int
    returned: dict[int, int]


class Refused(Exception):
    """The step is impossible, or Linux does not say how it ends."""


class Model:
    """The state between two steps. A step that is refused leaves it in disorder: use a copy."""

    def __init__(self) -> None:
        self.descriptions: dict[int, Description] = {}
        self.processes: dict[int, Process] = {}
        self.waiting: list[Waiting] = []
        self.numbers = 0

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def holders(self, file: int) -> dict[int, int]:
        return {
            key: each.lock for key, each in self.descriptions.items() if each.file == file and each.lock is not None
        }

    def probe(self, file: int, mode: int) -> int:
        """What a non-blocking try of a stranger gets."""
        return BUSY if _conflict(self.holders(file), -1, mode) else OK

    def referenced(self, description: int) -> bool:
        """Whether a descriptor is left, or a call at work, which holds the description too."""
        return any(description in each.slots.values() for each in self.processes.values()) or any(
            each.description == description for each in self.waiting
        )

    # --- steps ---

    def lock(self, process: int, slot: int, operation: int, call: int) -> Outcome:
        """flock(2) by PROCESS; CALL is the number under which it waits when it has to."""
        key = self.processes[process].slots[slot]
        description = self.descriptions[key]
        mode = operation & ~NB
        if any(each.description == key for each in self.waiting) and mode != UN:
            raise Refused("a retry of the waiting call would drop what this one gets")
        if mode == UN:
            description.lock = None
            return Outcome(OK, self._settle([description.file]))
        if description.lock == mode:
            return Outcome(OK, {})
        converts = description.lock is not None
        description.lock = None
        try_ = Waiting(call, key, mode, process)
        if converts:
            return self._convert(try_, bool(operation & NB))
        if not _conflict(self.holders(description.file), key, mode):
            if mode == SH and self._writer_waits(description.file) and not operation & NB:
                raise Refused("a late reader: Linux lets it pass, flockshim does not")
            description.lock = mode
            return Outcome(OK, {})
        if operation & NB:
            return Outcome(BUSY, {})
        self.waiting.append(try_)
        return Outcome(BLOCKED, {})

    def close(self, process: int, slot: int) -> Outcome:
        table = self.processes[process]
        table.close_on_exec.discard(slot)
        return Outcome(OK, self._drop([table.slots.pop(slot)]))

    def kill(self, process: int) -> Outcome:
        """Its waiting calls end first: its threads share the table, which the last one closes."""
        self.waiting = [each for each in self.waiting if each.process != process]
        return Outcome(OK, self._drop(list(self.processes.pop(process).slots.values())))

    def exec(self, process: int) -> Outcome:
        """The other threads end, and with them their calls; then comes close-on-exec."""
        dropped = [each.description for each in self.waiting if each.process == process]
        self.waiting = [each for each in self.waiting if each.process != process]
        table = self.processes[process]
        dropped += [table.slots.pop(slot) for slot in table.close_on_exec]
        table.close_on_exec.clear()
        return Outcome(OK, self._drop(dropped))

    def interrupt(self, call: int, error: int) -> Outcome:
        (ended,) = [each for each in self.waiting if each.call == call]
        self.waiting.remove(ended)
        returned = self._drop([ended.description])
        return Outcome(OK, {call: error, **returned})

    # --- what follows from them ---

    def _writer_waits(self, file: int) -> bool:
        return any(each.mode == EX for each in self._queue(file))

    def _queue(self, file: int) -> list[Waiting]:
        return [each for each in self.waiting if self.descriptions[each.description].file == file]

    def _drop(self, descriptions: Iterable[int]) -> dict[int, int]:
        """The descriptions have each lost a reference."""
        files = []
        for key in set(descriptions):
            if not self.referenced(key):
                files.append(self.descriptions.pop(key).file)
        # Waiting calls may have gone with it, so the queues of all files may have moved on.
        return self._settle({each.file for each in self.descriptions.values()} | set(files))

    def _settle(self, files: Iterable[int]) -> dict[int, int]:
        """Serve the waiting calls of FILES."""
        returned: dict[int, int] = {}
        for file in files:
            queue = self._queue(file)
            holders = self.holders(file)
            ending = self._first_come(holders, queue)
            if self._endings(holders, queue) != {ending}:
                raise Refused("the scheduler decides")
            returned.update(self._apply(file, ending))
        return returned

    def _convert(self, try_: Waiting, non_blocking: bool) -> Outcome:
        """The old lock is gone already, so its waiters race with this very call."""
        file = self.descriptions[try_.description].file
        queue, holders = self._queue(file), self.holders(file)
        give_up = {try_.call} if non_blocking else set()
        ending = self._first_come(holders, [try_, *queue], give_up)
        if self._endings(holders, [try_, *queue], give_up) != {ending}:
            raise Refused("the scheduler decides")
        self.waiting.append(try_)
        returned = self._apply(file, ending)
        return Outcome(returned.pop(try_.call, BLOCKED), returned)

    def _apply(self, file: int, ending: Ending) -> dict[int, int]:
        locks, results = dict(ending[0]), dict(ending[1])
        self.waiting = [each for each in self.waiting if each.call not in results]
        for key in [key for key, each in self.descriptions.items() if each.file == file]:
            self.descriptions[key].lock = locks.get(key)
            if not self.referenced(key):
                del self.descriptions[key]
        return results

    def _granted(self, holders: dict[int, int], queue: list[Waiting], one: Waiting) -> Ending:
        """HOLDERS after ONE has got its lock, which goes at once if only the call held on to it."""
        others = [each for each in queue if each is not one]
        in_use = any(one.description in each.slots.values() for each in self.processes.values()) or any(
            each.description == one.description for each in others
        )
        locks = {**holders, one.description: one.mode} if in_use else dict(holders)
        return frozenset(locks.items()), frozenset({(one.call, OK)})

    def _first_come(self, holders: dict[int, int], queue: list[Waiting], give_up: Iterable[int] = ()) -> Ending:
        """The end if the first in QUEUE is served first and nobody passes."""
        results: dict[int, int] = {}
        queue = list(queue)
        while queue:
            first = queue[0]
            if _conflict(holders, first.description, first.mode):
                if first.call not in give_up:
                    break
                results[first.call] = BUSY
            else:
                locks, result = self._granted(holders, queue, first)
                holders = dict(locks)
                results.update(result)
            queue.pop(0)
        return frozenset(holders.items()), frozenset(results.items())

    def _endings(self, holders: dict[int, int], queue: list[Waiting], give_up: Iterable[int] = ()) -> set[Ending]:
        """Every end that Linux allows: whoever is woken may try first."""
        endings: set[Ending] = set()
        for one in queue:
            rest = [each for each in queue if each is not one]
            if not _conflict(holders, one.description, one.mode):
                locks, result = self._granted(holders, queue, one)
            elif one.call in give_up:
                locks, result = frozenset(holders.items()), frozenset({(one.call, BUSY)})
            else:
                continue
            for end, results in self._endings(dict(locks), rest, give_up):
                endings.add((end, results | result))
        return endings or {(frozenset(holders.items()), frozenset())}


def _conflict(holders: dict[int, int], description: int, mode: int) -> bool:
    return any(key != description and EX in (mode, lock) for key, lock in holders.items())
