"""Vouching and judging in simulated time: nobody is thought dead who may still run, and the dead are found out."""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import random
from collections.abc import Generator
from typing import Any

import cluster_directory
import pytest

from flockshim import cluster_vouch
from flockshim.cluster_names import vouching_name
from flockshim.cluster_ops import Create, Read, Unlink, Write
from flockshim.cluster_state import Entry
from flockshim.cluster_vouch import GAP, HEARTBEATS, Judge, Voucher

LEASE = 90.0
NEGATIVE_CACHE = 60.0  # acdirmax, nfs(5)
END = 1500.0


class Wrong(AssertionError):
    """Somebody was thought dead who might run, or was not who was."""


class Simulation:
    """A holder and an observer, each with a clock of its own, and a server between them."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.files: dict[str, str] = {}
        self.absent_until: dict[str, float] = {}
        self.events: list[tuple[float, int, Any, Any]] = []
        self.order = itertools.count()
        self.stalls = self.windows()
        self.frozen = self.windows()
        self.write_failures = self.chance.choice((0.0, 0.2, 0.6))
        self.read_failures = self.chance.choice((0.0, 0.0, 0.2))
        self.crash = self.chance.uniform(0, 600) if self.chance.random() < 0.4 else END
        offsets = [self.chance.uniform(0, 1e6) for _ in range(2)]
        self.holder_clock, self.observer_clock = (lambda offset=offset: self.now + offset for offset in offsets)
        nonces = itertools.count()
        # What a file's time would be: that of the server's clock, which is none of theirs.
        self.voucher = Voucher("a", LEASE, self.holder_clock, lambda: f"{next(nonces)} {self.now}")
        self.judge = Judge(LEASE, self.observer_clock, lambda keeper: None)
        self.entry: Entry | None = None
        self.made = 0.0
        self.found_dead: float | None = None

    def windows(self) -> list[tuple[float, float]]:
        """Times at which something stands still."""
        if self.chance.random() < 0.5:
            return []
        begin = self.chance.uniform(0, 600)
        return [(begin, begin + self.chance.uniform(0, 2.5 * LEASE))]

    def after(self, time: float, windows: list[tuple[float, float]]) -> float:
        """Return the first moment from `time` on that is in none of these."""
        for begin, end in windows:
            if begin <= time < end:
                time = end
        return time

    def hold(self) -> Generator[Any, Any, None]:
        serial = itertools.count(1)
        while True:
            self.made = self.holder_clock()
            yield 0.0
            self.entry = Entry(f"a-{next(serial)}", True, 1)
            while not self.voucher.must_stop(self.made, self.holder_clock()):
                yield LEASE / HEARTBEATS
                try:
                    yield from self.voucher.vouch()
                except OSError:
                    continue

    def observe(self) -> Generator[Any, Any, None]:
        while True:
            yield self.chance.uniform(0, LEASE * GAP / 2)
            entry = self.entry
            if entry is not None:
                dead = yield from self.judge.dead([entry])
                if dead and entry == self.entry:
                    self.check_verdict()

    def check_verdict(self) -> None:
        if self.now >= self.crash:
            self.found_dead = self.found_dead or self.now
        elif not self.voucher.must_stop(self.made, self.holder_clock()):
            raise Wrong("thought dead, and had not stopped")
        elif not self.frozen and not self.write_failures:
            raise Wrong("thought dead because the server stalled")

    def perform(self, op: Any) -> Any:
        if self.chance.random() < (self.write_failures if isinstance(op, Write) else self.read_failures):
            return OSError(errno.EIO, os.strerror(errno.EIO))
        if isinstance(op, Read):
            cached = self.now < self.absent_until.get(op.name, 0.0)
            if op.name not in self.files or cached:
                if not cached:
                    self.absent_until[op.name] = self.now + self.chance.uniform(3, NEGATIVE_CACHE)
                return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return self.files[op.name]
        if isinstance(op, Create):
            if op.name in self.files:
                return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            self.files[op.name] = op.text
        elif isinstance(op, Write):
            self.files[op.name] = op.text
        else:
            assert isinstance(op, Unlink)
            del self.files[op.name]
        return None

    def go_on(self, run: Any, windows: list[tuple[float, float]], result: Any) -> None:
        """Resume a host and note when its operation is done, and when it hears of that."""
        op = run.throw(result) if isinstance(result, OSError) else run.send(result)
        if isinstance(op, float):
            self.plan(self.after(self.now + op, windows), run, lambda: self.go_on(run, windows, None))
            return
        done = self.after(self.now + self.chance.expovariate(5), self.stalls)

        def at_the_server() -> None:
            result = self.perform(op)
            heard = self.after(self.after(self.now + self.chance.expovariate(5), self.stalls), windows)
            self.plan(heard, run, lambda: self.go_on(run, windows, result))

        self.plan(done, None, at_the_server)

    def plan(self, time: float, run: Any, action: Any) -> None:
        heapq.heappush(self.events, (time, next(self.order), run, action))

    def run(self) -> None:
        holder, observer = self.hold(), self.observe()
        self.plan(0.0, holder, lambda: self.go_on(holder, self.frozen, None))
        self.plan(0.0, observer, lambda: self.go_on(observer, [], None))
        while self.events[0][0] < END:
            self.now, _, run, action = heapq.heappop(self.events)
            if run is not holder or self.now < self.crash:
                action()
        quiet = max([self.crash, *(end for _, end in self.stalls)])
        # Once more for the file that was thought absent, and was there.
        latest = quiet + 2.6 * LEASE if self.entry and not self.read_failures else END
        if self.crash < END and latest < END and (self.found_dead or END) > latest:
            raise Wrong(f"dead since {self.crash}, found out at {self.found_dead}")


def simulate(seeds: int) -> int:
    """Return how often a crash was found out."""
    found = 0
    for seed in range(seeds):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except Wrong as error:
            raise Wrong(f"{error} (seed {seed})") from error
        found += simulation.found_dead is not None
    return found


def test_only_who_has_stopped_is_thought_dead_and_the_dead_are_found() -> None:
    assert simulate(3000 if os.environ.get("FLOCKSHIM_SOAK") else 300) > 20


@pytest.mark.parametrize("observers", [1, 4])
def test_all_locks_of_one_that_never_vouched_are_taken_after_one_lease_time(observers: int) -> None:
    """Whoever thinks it dead makes its file, and removes it: that is no sign of life."""
    now = 0.0
    files: dict[str, str] = {}
    chance = random.Random(1)
    judges = [Judge(LEASE, lambda: now, lambda keeper: None) for _ in range(observers)]
    left = {Entry(f"a-{number}", True, 1): judges[number % observers] for number in range(4)}

    def perform(steps: Any) -> Any:
        resume, result = steps.send, None
        try:
            while True:
                operation = resume(result)
                try:
                    resume, result = steps.send, cluster_directory.perform(files, operation, True)
                except OSError as error:
                    resume, result = steps.throw, error
        except StopIteration as stop:
            return stop.value

    while left:
        for entry, judge in list(left.items()):
            now += 0.01
            if perform(judge.dead([entry])):
                del left[entry]
        now += LEASE * GAP / 2
        if chance.random() < 0.5:
            perform(chance.choice(judges).bury())
    assert LEASE <= now <= LEASE * (1 + 2 * GAP)


def failures_count(patch: pytest.MonkeyPatch) -> None:
    """An observation that fails is one of no change."""

    def observe(self: Any, key: str, keeper: str) -> Any:
        begun = self._clock()
        try:
            text = yield Read(vouching_name(keeper))
        except OSError:
            text = self._silences[key].text if key in self._silences else None
        self._note(key, text, begun)

    patch.setattr(Judge, "_observe", observe)


def stalls_count(patch: pytest.MonkeyPatch) -> None:
    """Observations count together, however far apart."""
    patch.setattr(cluster_vouch, "GAP", 25.0)


def late_stop(patch: pytest.MonkeyPatch) -> None:
    """Holders are stopped when others may have thought them dead already."""
    patch.setattr(cluster_vouch, "STOP", 1.5)


def by_times(patch: pytest.MonkeyPatch) -> None:
    """The file's time is compared with one's own clock."""

    def is_silent(self: Any, key: str, keeper: str) -> Any:
        try:
            text = yield Read(vouching_name(keeper))
        except OSError:
            return False
        return self._clock() - float(text.split()[1]) >= self._lease

    patch.setattr(Judge, "_is_silent", is_silent)


def absence_believed(patch: pytest.MonkeyPatch) -> None:
    """A vouching file that is not found is absent."""

    def is_really_absent(self: Any, silence: Any, keeper: str) -> Any:
        return True
        yield

    patch.setattr(Judge, "_is_really_absent", is_really_absent)


def any_write_counts(patch: pytest.MonkeyPatch) -> None:
    """A write that failed is taken for one that was done."""
    vouch = Voucher.vouch

    def vouched(self: Any) -> Any:
        try:
            yield from vouch(self)
        except OSError:
            self._last = self.clock()

    patch.setattr(Voucher, "vouch", vouched)


def short_memory(patch: pytest.MonkeyPatch) -> None:
    """A lapse is forgotten when the next write succeeds."""
    patch.setattr(Voucher, "must_stop", lambda self, made, now: now - max(made, self._last) >= self._patience)


@pytest.mark.parametrize(
    "mutation",
    [failures_count, stalls_count, late_stop, by_times, absence_believed, any_write_counts, short_memory],
)
def test_a_mistake_is_found(mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    with pytest.raises(Wrong) as caught:
        simulate(3000)
    print(caught.value)
