"""Histories of lock calls: made from arbitrary numbers by help of the model, and run in a world."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import os
import signal
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from support.driver import EX, NB, SH, UN, Call, Died, Driver, pass_descriptor
from support.model import BLOCKED, Description, Model, Outcome, Process, Refused
from support.proc import await_true
from support.worlds import World

FILES = 2
FIRST_PROCESSES = (1, 2)
MOST_PROCESSES = 5
MOST_SLOTS = 5

LOCKS = [SH, EX, EX, SH | NB, EX | NB, UN]
KINDS = ["lock", "open", "close", "dup", "fork", "send", "exec", "kill", "interrupt"]

Raw = tuple[str, int, int, int]
"""A kind of step, and three numbers that choose among what is there."""


class Step(NamedTuple):
    """One step: its kind, the process, and what else it needs; and what the model expects."""

    kind: str
    process: int
    slot: int
    other: int
    expected: Outcome
    probes: tuple[int, ...]


class Observed(NamedTuple):
    """What a world shows of one step: its result, calls that returned, and the locks after it."""

    result: int
    returned: dict[int, int]
    probes: tuple[int, ...]


def first_model() -> Model:
    model = Model()
    for key in FIRST_PROCESSES:
        model.processes[key] = Process()
    model.numbers = max(FIRST_PROCESSES)
    return model


PRELUDE: list[Raw] = [("open", process, file, 0) for process in range(len(FIRST_PROCESSES)) for file in range(FILES)]
"""So that there is something to lock from the first step on."""


def history(raws: Sequence[Raw]) -> list[Step]:
    """The steps that RAWS stand for, after PRELUDE, without those that the model refuses."""
    model = first_model()
    steps = []
    for raw in [*PRELUDE, *raws]:
        trial = copy.deepcopy(model)
        try:
            kind, process, slot, other, outcome = _step(trial, *raw)
        except Refused:
            continue
        model = trial
        steps.append(Step(kind, process, slot, other, outcome, _probes(model)))
    return steps


def _probes(model: Model) -> tuple[int, ...]:
    return tuple(model.probe(file, mode) for file in range(FILES) for mode in (SH, EX))


def _pick(choices: Iterable[int], number: int) -> int:
    listed = sorted(choices)
    if not listed:
        raise Refused("there is none")
    return listed[number % len(listed)]


def _step(model: Model, kind: str, a: int, b: int, c: int) -> tuple[str, int, int, int, Outcome]:
    if kind == "interrupt":
        call = _pick([each.call for each in model.waiting], a)
        return kind, 0, 0, call, model.interrupt(call, errno.EINTR)
    process = _pick(model.processes, a)
    table = model.processes[process]
    if kind == "open":
        slot = _new_slot(model, table)
        number = model.number()
        model.descriptions[number] = Description(b % FILES)
        table.slots[slot] = number
        if c % 2:
            table.close_on_exec.add(slot)
        return kind, process, slot, b % FILES + FILES * (c % 2), Outcome(0, {})
    if kind == "fork":
        if len(model.processes) >= MOST_PROCESSES:
            raise Refused("enough processes")
        child = model.number()
        model.processes[child] = copy.deepcopy(table)
        return kind, process, 0, child, Outcome(0, {})
    if kind in ("exec", "kill"):
        if kind == "kill" and len(model.processes) == 1:
            raise Refused("the last process")
        step = model.exec if kind == "exec" else model.kill
        return kind, process, 0, 0, step(process)
    return kind, process, *_on_descriptor(model, kind, process, b, c)


def _on_descriptor(model: Model, kind: str, process: int, b: int, c: int) -> tuple[int, int, Outcome]:
    table = model.processes[process]
    slot = _pick(table.slots, b)
    if kind == "close":
        return slot, 0, model.close(process, slot)
    if kind == "dup":
        new = _new_slot(model, table)
        table.slots[new] = table.slots[slot]
        return slot, new, Outcome(0, {})
    if kind == "send":
        receiver = _pick(set(model.processes) - {process}, c)
        new = _new_slot(model, model.processes[receiver])
        model.processes[receiver].slots[new] = table.slots[slot]
        return slot, receiver * 1000 + new, Outcome(0, {})
    operation = LOCKS[c % len(LOCKS)]
    call = model.number()
    return slot, operation * 1000 + call, model.lock(process, slot, operation, call)


def _new_slot(model: Model, table: Process) -> int:
    if len(table.slots) >= MOST_SLOTS:
        raise Refused("enough descriptors")
    return model.number()


class Runner:
    """Runs histories in one world, with processes that are used again where that stays clean."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.paths = [world.file(f"history-{index}") for index in range(FILES)]
        self.kept: list[Driver] = []

    def run(self, steps: Sequence[Step]) -> list[Observed]:
        """What the world shows of each step."""
        self.processes = dict(zip(FIRST_PROCESSES, self._fresh_processes()))
        self.slots: dict[int, dict[int, int]] = {key: {} for key in self.processes}
        self.calls: dict[int, Call] = {}
        try:
            observed = [self._observe(step) for step in steps]
            self._clean_up()
        except BaseException:
            self.kept = []
            for process in self.processes.values():
                process.kill()
            raise
        return observed

    def _fresh_processes(self) -> list[Driver]:
        while len(self.kept) < len(FIRST_PROCESSES):
            driver = self.world.start()
            driver.ask("sigaction", signal.SIGUSR1, 0)
            self.kept.append(driver)
        return self.kept

    def _clean_up(self) -> None:
        """Every waiting call can be interrupted, and when all is closed nothing is locked."""
        for call in list(self.calls.values()):
            call.driver.ask("sigthread", call.tid, signal.SIGUSR1)
            assert call.result() == errno.EINTR
            await_true(functools.partial(_thread_gone, call), "the thread of the call to end")
        for key in list(self.processes):
            if key not in FIRST_PROCESSES:
                self._kill(key)
        self.kept = list(self.processes.values())
        for driver in self.kept:
            driver.ask("closerange", 3, 90)
            with contextlib.suppress(ChildProcessError):
                while driver.ask("wait"):
                    continue
        for path in self.paths:
            assert self.world.free(path)

    def _observe(self, step: Step) -> Observed:
        served = [self.calls[key] for key in step.expected.returned]
        before = [self.world.at_rest(call) for call in served]
        result = getattr(self, f"_{step.kind}")(step)
        if served:
            self._require_promptness(step, served, before)
        returned = {key: self.calls.pop(key).result() for key in step.expected.returned}
        self.world.await_blocked(*self.calls.values())
        probes = tuple(self.world.probe(path, mode) for path in self.paths for mode in (SH, EX))
        self.world.await_blocked(*self.calls.values())
        return Observed(result, returned, probes)

    def _require_promptness(self, step: Step, served: list[Call], before: list[object]) -> None:
        """Who is served because of STEP has been woken when two later requests are answered."""
        if self.world.supervised and step.kind in ("interrupt", "exec"):
            return  # which the supervisor learns within a tenth of a second
        if step.kind in ("close", "exec"):
            # No event tells the keeper of a close; the next request for the file, though, does.
            for path in self.paths:
                self.world.probe(path, EX)
        self.world.round_trip()
        self.world.round_trip()
        after = [self.world.at_rest(call) for call in served]
        late = [call for call, old, new in zip(served, before, after) if old == new]
        assert not late, f"still asleep: {late}"

    def _lock(self, step: Step) -> int:
        operation, call = divmod(step.other, 1000)
        driver, fd = self.processes[step.process], self.slots[step.process][step.slot]
        if step.expected.result != BLOCKED:
            return driver.flock(fd, operation)
        self.calls[call] = driver.flock_later(fd, operation)
        return BLOCKED

    def _interrupt(self, step: Step) -> int:
        call = self.calls[step.other]
        return call.driver.ask("sigthread", call.tid, signal.SIGUSR1)

    def _open(self, step: Step) -> int:
        close_on_exec, file = divmod(step.other, FILES)
        flags = os.O_RDWR | (os.O_CLOEXEC if close_on_exec else 0)
        fd = self.processes[step.process].open(self.paths[file], flags)
        self.slots[step.process][step.slot] = fd
        return 0

    def _close(self, step: Step) -> int:
        return self.processes[step.process].ask("close", self.slots[step.process].pop(step.slot))

    def _dup(self, step: Step) -> int:
        table = self.slots[step.process]
        table[step.other] = self.processes[step.process].ask("dup", table[step.slot])
        return 0

    def _send(self, step: Step) -> int:
        receiver, new = divmod(step.other, 1000)
        sender, fd = self.processes[step.process], self.slots[step.process][step.slot]
        self.slots[receiver][new] = pass_descriptor(sender, fd, self.processes[receiver])
        return 0

    def _fork(self, step: Step) -> int:
        self.processes[step.other] = self.processes[step.process].fork()
        self.slots[step.other] = dict(self.slots[step.process])
        return 0

    def _exec(self, step: Step) -> int:
        driver = self.processes[step.process]
        self._forget_calls(driver)
        driver.exec()
        return driver.ask("sigaction", signal.SIGUSR1, 0)

    def _kill(self, step: Step | int) -> int:
        driver = self.processes.pop(step.process if isinstance(step, Step) else step)
        self._forget_calls(driver)
        driver.kill()
        with contextlib.suppress(Died):
            while driver.pump(0):
                continue
        driver.control.close()
        self.world.fleet.drivers.remove(driver)
        return 0

    def _forget_calls(self, driver: Driver) -> None:
        """The calls of a process that ends, or becomes another program, never return."""
        self.calls = {key: call for key, call in self.calls.items() if call.driver is not driver}


def _thread_gone(call: Call) -> bool:
    return not os.path.exists(f"/proc/{call.driver.pid}/task/{call.tid}")
