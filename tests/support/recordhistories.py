"""Histories of record locks: made from arbitrary numbers by help of the model, and run in a world."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import NamedTuple

from support.driver import Call
from support.histories import FILES, FIRST_PROCESSES, MOST_PROCESSES, MOST_SLOTS, Runner, Step
from support.model import BLOCKED, Outcome, Refused
from support.proc import await_true
from support.recordmodel import PLACES, SIZE, Description, Owner, Process, RecordModel, Seen, Span
from support.records import (
    GETLK,
    OFD,
    RD,
    SETLK,
    SETLKW,
    UN,
    WR,
    Lock,
    Stranger,
    ask,
    await_waiting,
    got,
)
from support.worlds import World

KINDS = ["show", "release", "collide", "seek", "open", "close", "dup", "fork", "send", "exec", "kill", "interrupt"]
TYPES = [RD, WR, WR, RD, UN]
ACCESSES = [os.O_RDWR, os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_WRONLY]
VIEWS = 3
"""How many single bytes of each file the stranger asks about after a step, others each time."""

Raw = tuple[str, int, int, int, int, int, int]
"""A kind of step, and numbers that choose among what is there."""


class RecordStep(NamedTuple):
    """One step, and what the model expects of it: its outcome, what F_GETLK shows it, and what a stranger sees then."""

    kind: str
    process: int
    slot: int
    other: int
    lock: Lock | None
    command: int
    expected: Outcome
    seen: Seen | None
    views: tuple[Seen | None, ...]


class Observed(NamedTuple):
    """What a world shows of one step."""

    result: int
    returned: dict[int, int]
    seen: Seen | None
    views: tuple[Seen | None, ...]


PRELUDE: list[Raw] = [
    ("open", process, file, 0, 0, 0, 0) for process in range(len(FIRST_PROCESSES)) for file in (0, 0, 1)
]
"""So that there is something to lock from the first step on, and another descriptor of it."""


def history(raws: Sequence[Raw]) -> list[RecordStep]:
    """The steps that RAWS stand for, after PRELUDE, without those that the model refuses."""
    model = RecordModel(FILES)
    for key in FIRST_PROCESSES:
        model.processes[key] = Process()
    model.numbers = max(FIRST_PROCESSES)
    steps: list[RecordStep] = []
    for raw in [*PRELUDE, *raws]:
        trial = copy.deepcopy(model)
        try:
            step = _step(trial, *raw)
        except Refused:
            continue
        model = trial
        views = tuple(model.show(None, 0, span, False, file) for file, span in _views(len(steps)))
        steps.append(step._replace(views=views))
    return steps


def _views(number: int) -> list[tuple[int, Span]]:
    """What a stranger asks about after step NUMBER: all that is written or read-locked, and a few bytes."""
    spans = [Span(kind, 0, PLACES - 1) for kind in (WR, RD)]
    for index in range(VIEWS):
        place = (VIEWS * number + index) % PLACES
        spans.append(Span(WR, place, place))
    return [(file, span) for file in range(FILES) for span in spans]


def _pick(choices: Sequence[int], number: int) -> int:
    if not choices:
        raise Refused("there is none")
    return sorted(choices)[number % len(choices)]


def _new_slot(model: RecordModel, table: Process) -> int:
    if len(table.slots) >= MOST_SLOTS:
        raise Refused("enough descriptors")
    return model.number()


def _made(kind: str, process: int, slot: int = 0, other: int = 0, outcome: Outcome | None = None) -> RecordStep:
    return RecordStep(kind, process, slot, other, None, 0, outcome or Outcome(0, {}), None, ())


def _step(model: RecordModel, kind: str, a: int, b: int, c: int, d: int, e: int, f: int) -> RecordStep:
    if kind in ("interrupt", "release", "collide"):
        return _about_waiting(model, kind, a, b, f)
    process = _pick(list(model.processes), a)
    table = model.processes[process]
    if kind == "open":
        slot = _new_slot(model, table)
        number = model.number()
        file, close_on_exec, access = b % FILES, c % 2, d % len(ACCESSES)
        model.descriptions[number] = Description(file, ACCESSES[access])
        table.slots[slot] = number
        if close_on_exec:
            table.close_on_exec.add(slot)
        return _made(kind, process, slot, file + FILES * (close_on_exec + 2 * access))
    if kind == "fork":
        if len(model.processes) >= MOST_PROCESSES:
            raise Refused("enough processes")
        return _made(kind, process, 0, model.fork(process))
    if kind == "exec":
        return _made(kind, process, outcome=model.exec(process))
    if kind == "kill":
        if len(model.processes) == 1:
            raise Refused("the last process")
        return _made(kind, process, outcome=model.kill(process))
    return _on_descriptor(model, kind, process, _pick(list(table.slots), b), c, d, e, f)


def _on_descriptor(
    model: RecordModel, kind: str, process: int, slot: int, c: int, d: int, e: int, f: int
) -> RecordStep:
    table = model.processes[process]
    if kind == "close":
        return _made(kind, process, slot, 0, model.close(process, [slot]))
    if kind == "seek":
        model.description(process, slot).position = c % PLACES
        return _made(kind, process, slot, c % PLACES)
    if kind == "dup":
        new = _new_slot(model, table)
        table.slots[new] = table.slots[slot]
        return _made(kind, process, slot, new)
    if kind == "send":
        receiver = _pick(list(set(model.processes) - {process}), c)
        new = _new_slot(model, model.processes[receiver])
        model.processes[receiver].slots[new] = table.slots[slot]
        return _made(kind, process, slot, receiver * 1000 + new)
    ofd = c // 10 % 3 == 0
    wanted = _span(TYPES[c % len(TYPES)], d, e)
    if kind == "show":
        wanted = wanted._replace(kind=WR if wanted.kind == UN else wanted.kind)
        seen = model.show(process, slot, wanted, ofd)
        step = _made(kind, process, slot)
        return step._replace(lock=_words(model, process, slot, wanted, f), command=GETLK + OFD * ofd, seen=seen)
    return _lock_step(model, process, slot, wanted, ofd, bool(c // 5 % 2), f)


def _lock_step(
    model: RecordModel, process: int, slot: int, wanted: Span, ofd: bool, waits: bool, form: int
) -> RecordStep:
    call = model.number() if waits else 0
    words = _words(model, process, slot, wanted, form)
    outcome = model.lock(process, slot, wanted, ofd, call or None)
    command = (SETLKW if waits else SETLK) + OFD * ofd
    return _made("lock", process, slot, call, outcome)._replace(lock=words, command=command)


def _about_waiting(model: RecordModel, kind: str, a: int, b: int, form: int) -> RecordStep:
    if kind == "collide":
        return _collide(model, a, b, form)
    call = _pick([each.call for each in model.waiting], a)
    if kind == "release":
        return _release(model, call, a, b, form)
    return _made(kind, 0, 0, call, model.interrupt(call))


def _release(model: RecordModel, call: int, a: int, b: int, form: int) -> RecordStep:
    """One who is in the way of a waiting call gives up what that one wants."""
    (asked,) = [each for each in model.waiting if each.call == call]
    holders = model.holders(asked)
    holder = holders[b % len(holders)]
    process, slot = _hand(model, holder, asked.file, a)
    return _lock_step(model, process, slot, asked.span._replace(kind=UN), holder[0] == "description", False, form)


def _collide(model: RecordModel, a: int, b: int, form: int) -> RecordStep:
    """A process that is in the way of a waiting call wants what the waiting one has, which may close a cycle."""
    chances = [
        (holder, file, place)
        for each in model.waiting
        for holder in model.holders(each)
        for file in range(FILES)
        for place, cell in enumerate(model.tables[file].get(each.owner, [])[:-1])
        if cell is not None and holder[0] == "process"
    ]
    if not chances:
        raise Refused("there is none")
    holder, file, place = chances[b % len(chances)]
    process, slot = _hand(model, holder, file, a)
    return _lock_step(model, process, slot, Span(WR, place, place), False, True, form)


def _hand(model: RecordModel, owner: Owner, file: int, number: int) -> tuple[int, int]:
    """A process and a slot of FILE by which OWNER can ask."""
    hands = [
        (process, slot)
        for process, table in sorted(model.processes.items())
        for slot, key in sorted(table.slots.items())
        if model.descriptions[key].file == file and owner in (("process", process), ("description", key))
    ]
    if not hands:
        raise Refused("it cannot")
    return hands[number % len(hands)]


def _span(kind: int, first: int, length: int) -> Span:
    """Only a range without an end reaches the last place, which stands for all that follows."""
    first %= PLACES - 1
    length %= 6
    return Span(kind, first, min(first + length - 1, PLACES - 2) if length else PLACES - 1)


def _words(model: RecordModel, process: int, slot: int, span: Span, form: int) -> Lock:
    """The span as a program may put it."""
    whence, origin = [
        (os.SEEK_SET, 0),
        (os.SEEK_CUR, model.description(process, slot).position),
        (os.SEEK_END, SIZE),
    ][max(0, form % 5 - 2)]
    length = 0 if span.last == PLACES - 1 else span.last - span.first + 1
    if length and form % 7 == 0:
        return Lock(span.kind, span.last + 1 - origin, -length, whence)
    return Lock(span.kind, span.first - origin, length, whence)


class RecordRunner(Runner):
    """Runs histories in one world, with processes that are used again where that stays clean."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        for path in self.paths:
            path.write_bytes(bytes(SIZE))
        self._strangers = [Stranger(world, path) for path in self.paths]

    def run_all(self, steps: Sequence[RecordStep]) -> list[Observed]:
        """What the world shows of each step."""
        self.processes = dict(zip(FIRST_PROCESSES, self._fresh_processes()))
        self.slots = {key: {} for key in self.processes}
        self.calls = {}
        try:
            observed = [self._see(number, step) for number, step in enumerate(steps)]
            self._clean_up()
            for stranger in self._strangers:
                self._expect_no_locks(stranger)
        except BaseException:
            self.kept = []
            for process in self.processes.values():
                process.kill()
            raise
        return observed

    def _expect_no_locks(self, stranger: Stranger) -> None:
        if self.world.supervised:
            # It learns within a tenth of a second that a call was interrupted, whose description it keeps open.
            await_true(stranger.free, "the locks to end")
        assert stranger.free(), stranger.locks()

    def _see(self, number: int, step: RecordStep) -> Observed:
        seen = None
        if step.kind == "kill":
            result = self._kill(step.process)
        elif step.kind == "show":
            result, seen = 0, self._show(step)
        else:
            plain = Step(step.kind, step.process, step.slot, step.other, step.expected, ())
            result = self._ask(step) if step.kind == "lock" else getattr(self, f"_{step.kind}")(plain)
        if step.kind in ("close", "exec"):
            # No event tells the keeper of a close; the next request for the file, though, does.
            self._view(number)
        returned = {key: self.calls.pop(key).result() for key in step.expected.returned}
        await_waiting(self.world, *self.calls.values())
        views = self._view(number)
        await_waiting(self.world, *self.calls.values())
        return Observed(result, returned, seen, views)

    def _view(self, number: int) -> tuple[Seen | None, ...]:
        found = []
        for file, span in _views(number):
            length = 0 if span.last == PLACES - 1 else span.last - span.first + 1
            stranger = self._strangers[file]
            call = ask(stranger.driver, stranger.fd, GETLK, Lock(span.kind, span.first, length))
            found.append(self._translated(call, Lock(span.kind, span.first, length)))
        return tuple(found)

    def _translated(self, call: Call, asked: Lock) -> Seen | None:
        """With the number of the process instead of its id."""
        answer = got(call)
        if answer.type == UN:
            assert answer == asked._replace(type=UN), "more than the type has changed"
            return None
        assert answer.whence == os.SEEK_SET
        numbers = {driver.pid: key for key, driver in self.processes.items()}
        return Seen(answer.type, answer.start, answer.length, numbers.get(answer.pid, answer.pid))

    def _show(self, step: RecordStep) -> Seen | None:
        assert step.lock
        driver, fd = self.processes[step.process], self.slots[step.process][step.slot]
        return self._translated(ask(driver, fd, step.command, step.lock), step.lock)

    def _ask(self, step: RecordStep) -> int:
        assert step.lock
        driver, fd = self.processes[step.process], self.slots[step.process][step.slot]
        if step.expected.result != BLOCKED:
            return ask(driver, fd, step.command, step.lock).result()
        self.calls[step.other] = driver.later("record", "fcntl", step.command, fd, *step.lock.words())
        return BLOCKED

    def _seek(self, step: Step) -> int:
        self.processes[step.process].ask("lseek", self.slots[step.process][step.slot], step.other, os.SEEK_SET)
        return 0

    def _open(self, step: Step) -> int:
        rest, file = divmod(step.other, FILES)
        access, close_on_exec = divmod(rest, 2)
        flags = ACCESSES[access] | (os.O_CLOEXEC if close_on_exec else 0)
        self.slots[step.process][step.slot] = self.processes[step.process].open(self.paths[file], flags)
        return 0
