"""The table of record locks by itself: against a map of bytes, against the kernel, and its circles of waiting."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Optional

import hypothesis.strategies as st
import pytest
from hypothesis import given
from support.driver import Driver
from support.records import GETLK, LAST, OFD, RD, SETLK, UN, WR, await_waiting, lock, lock_later
from support.worlds import World

from flockshim.locktable import GRANTED, REFUSED, WAITING
from flockshim.recordtable import Range, RecordLock, RecordWaiter, changed_by, circle, clipped, gaps

Kind = Optional[bool]
"""Whether a lock is exclusive; None: there is none."""

FIRSTS = (0, 1, 2, 3, 10, 11, LAST - 1, LAST)
"""Where each of the places begins of which the model knows. The ends of the range space have one byte each."""
PLACES = range(len(FIRSTS))
OWNERS = range(3)
KINDS = (None, False, True)


class Span(NamedTuple):
    """Places, both inclusive."""

    low: int
    high: int

    @property
    def first(self) -> int:
        return FIRSTS[self.low]

    @property
    def last(self) -> int:
        return LAST if self.high == len(FIRSTS) - 1 else FIRSTS[self.high + 1] - 1

    def places(self) -> range:
        return range(self.low, self.high + 1)

    def wanted(self, exclusive: bool) -> Range:
        return Range(self.first, self.last, exclusive)


spans = st.tuples(st.sampled_from(PLACES), st.sampled_from(PLACES)).map(lambda ends: Span(min(ends), max(ends)))
changes = st.tuples(st.sampled_from(OWNERS), spans, st.sampled_from(KINDS))


class Bytes:
    """What one owner has of each place."""

    def __init__(self) -> None:
        self.kinds: list[Kind] = [None] * len(PLACES)

    def set(self, span: Span, kind: Kind) -> None:
        for place in span.places():
            self.kinds[place] = kind

    def ranges(self) -> list[Range]:
        """The longest runs of one kind."""
        found: list[Range] = []
        before: Kind = None
        for place, kind in enumerate(self.kinds):
            here = Span(place, place)
            if kind is not None and kind == before:
                found[-1] = found[-1]._replace(last=here.last)
            elif kind is not None:
                found.append(here.wanted(kind))
            before = kind
        return found


def clash(held: Kind, wanted: bool) -> bool:
    """Whether a byte that somebody has locked so cannot be had by another."""
    return held is not None and (held or wanted)


def table() -> RecordLock:
    return RecordLock(lambda owner, wanted, parts: True)


# Against a map of bytes


@given(st.lists(st.tuples(spans, st.sampled_from(KINDS)), max_size=12))
def test_an_owners_ranges(steps: list[tuple[Span, Kind]]) -> None:
    model = Bytes()
    ranges: list[Range] = []
    for span, kind in steps:
        model.set(span, kind)
        ranges = changed_by(ranges, span.first, span.last, kind)
        assert ranges == model.ranges()


@given(st.lists(changes, max_size=20))
def test_who_is_granted_what(steps: list[tuple[int, Span, Kind]]) -> None:
    locks = table()
    models = [Bytes() for _ in OWNERS]
    for owner, span, kind in steps:
        if kind is None:
            locks.set(owner, span.first, span.last, None)
            models[owner].set(span, None)
        else:
            others = [model for number, model in enumerate(models) if number != owner]
            free = not any(clash(model.kinds[place], kind) for model in others for place in span.places())
            assert locks.request(owner, span.wanted(kind), blocking=False) == (GRANTED if free else REFUSED)
            if free:
                models[owner].set(span, kind)
        held = {number: model.ranges() for number, model in enumerate(models) if model.ranges()}
        assert locks.ranges == held
        assert locks.holders == {number: any(one.exclusive for one in some) for number, some in held.items()}
        assert locks.queue == []


@given(st.lists(changes, max_size=12), st.sampled_from(OWNERS), spans)
def test_what_is_ones_own(steps: list[tuple[int, Span, Kind]], owner: int, span: Span) -> None:
    locks = table()
    for each, changed, kind in steps:
        locks.set(each, changed.first, changed.last, kind)
    expected = [held for held in locks.ranges.get(owner, []) if not (held.last < span.first or span.last < held.first)]
    assert list(locks.own(owner, span.wanted(True))) == [(owner, held) for held in expected]


# Requests that wait


def test_a_request_waits_and_keeps_what_is_held() -> None:
    locks = table()
    for owner in ("a", "b"):
        assert locks.request(owner, Range(0, 9, False), False) == GRANTED
    assert locks.request("a", Range(0, 4, True), True, "context", 7.0) == WAITING
    (waiter,) = locks.queue
    assert (waiter.owner, waiter.context, waiter.since, waiter.exclusive) == ("a", "context", 7.0, True)
    assert (waiter.blocker, locks.ranges["a"]) == ("b", [Range(0, 9, False)])
    assert not locks.serve(waiter)
    locks.set("b", 0, 4, None)
    assert locks.serve(waiter)
    assert locks.queue == []
    assert locks.ranges == {"a": [Range(0, 4, True), Range(5, 9, False)], "b": [Range(5, 9, False)]}


def test_the_blocker_is_whoever_is_in_the_way_now() -> None:
    locks = table()
    for owner in ("a", "b"):
        assert locks.request(owner, Range(0, 0, False), False) == GRANTED
    assert locks.request("c", Range(0, 0, True), True) == WAITING
    (waiter,) = locks.queue
    assert waiter.blocker == "a"
    locks.set("a", 0, 0, None)
    assert not locks.serve(waiter)
    assert waiter.blocker == "b"


def test_what_else_must_agree() -> None:
    """It is asked about nothing that the table itself forbids, and what it forbids is not in the table."""
    asked: list[tuple[str, Range, list[Range]]] = []
    answers: list[bool] = []

    def permit(owner: str, wanted: Range, parts: list[Range]) -> bool:
        asked.append((owner, wanted, parts))
        return answers.pop()

    locks = RecordLock(permit)
    answers += [False]
    assert locks.request("a", Range(0, 3, True), False) == REFUSED
    answers += [False]
    assert locks.request("a", Range(0, 3, True), True) == WAITING
    assert (locks.ranges, locks.queue[0].blocker) == ({}, None)
    answers += [True]
    assert locks.serve(locks.queue[0])
    assert asked == [("a", Range(0, 3, True), [Range(0, 3, True)])] * 3
    assert locks.request("b", Range(3, 4, False), False) == REFUSED
    assert len(asked) == 3


# What the owner may not learn


@given(st.lists(st.tuples(spans, st.sampled_from(KINDS)), max_size=8), spans)
def test_a_grant_that_is_not_firm_takes_nothing_away(steps: list[tuple[Span, Kind]], span: Span) -> None:
    """Of an exclusive lock nothing becomes shared, and what is shared already need not be asked for again."""
    parts_asked: list[list[Range]] = []

    def permit(owner: int, wanted: Range, parts: list[Range]) -> bool:
        parts_asked.append(parts)
        return True

    locks = RecordLock(permit)
    model = Bytes()
    for changed, kind in steps:
        locks.set(0, changed.first, changed.last, kind)
        model.set(changed, kind)
    before = list(model.kinds)
    assert locks.request(0, span.wanted(False), blocking=False, firm=False) == GRANTED
    free = [place for place in span.places() if before[place] is None]
    for place in free:
        model.set(Span(place, place), False)
    assert locks.ranges.get(0, []) == model.ranges()
    (parts,) = parts_asked
    only = Bytes()
    for place in free:
        only.set(Span(place, place), False)
    assert parts == only.ranges()
    # An exclusive one is firm in any case.
    assert locks.request(0, span.wanted(True), blocking=False, firm=False) == GRANTED
    model.set(span, True)
    assert locks.ranges[0] == model.ranges()


@given(st.lists(st.tuples(spans, st.sampled_from(KINDS)), max_size=8), spans, st.booleans())
def test_what_is_inside_and_what_is_missing(steps: list[tuple[Span, Kind]], span: Span, exclusive: bool) -> None:
    model = Bytes()
    for changed, kind in steps:
        model.set(changed, kind)
    window = span.wanted(exclusive)
    inside, missing = Bytes(), Bytes()
    for place in span.places():
        inside.kinds[place] = model.kinds[place]
        missing.kinds[place] = exclusive if model.kinds[place] is None else None
    assert clipped(model.ranges(), window) == inside.ranges()
    assert gaps(model.ranges(), window) == missing.ranges()


# Against the kernel


class Contender:
    """An owner in the kernel: a description, or this process."""

    def __init__(self, path: str, is_process: bool) -> None:
        self.is_process = is_process
        self.descriptor = os.open(path, os.O_RDWR)

    def call(self, command: int, kind: int, span: Span) -> tuple[int, int, int, int]:
        """Type, start, length and pid as fcntl(2) leaves them; raises OSError."""
        length = 0 if span.last == LAST else span.last - span.first + 1
        asked = struct.pack("hhqqi4x", kind, os.SEEK_SET, span.first, length, 0)
        answer = fcntl.fcntl(self.descriptor, command + OFD * (not self.is_process), asked)
        kind, _, first, length, pid = struct.unpack("hhqqi4x", answer)
        return kind, first, length, pid

    def set(self, span: Span, kind: Kind) -> int:
        try:
            self.call(SETLK, UN if kind is None else WR if kind else RD, span)
        except OSError as error:
            assert error.errno == errno.EAGAIN
            return REFUSED
        return GRANTED

    def found(self, kind: int, span: Span) -> tuple[Range, int] | None:
        """The first lock in the way, and its process, -1 for a description's; with UN, the first of its own."""
        found, first, length, pid = self.call(GETLK, kind, span)
        last = LAST if length == 0 else first + length - 1
        return None if found == UN else (Range(first, last, found == WR), pid)


@contextmanager
def contenders() -> Iterator[list[Contender]]:
    """This process, and descriptions."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        found = [Contender(file.name, number == 0) for number in (*OWNERS, len(OWNERS))]
        try:
            yield found
        finally:
            for one in found:
                os.close(one.descriptor)


def knows_own(contender: Contender) -> bool:
    """Whether the kernel tells a description what it holds itself (Linux 6.6)."""
    try:
        contender.found(UN, Span(0, 0))
    except OSError as error:
        assert error.errno == errno.EINVAL
        return False
    return True


@given(st.lists(changes, max_size=10), spans)
def test_the_kernel_does_the_same(steps: list[tuple[int, Span, Kind]], looked_at: Span) -> None:
    """What is granted, and which lock F_GETLK shows first: to each owner, and to one that holds nothing."""
    locks = table()
    everything = Span(0, len(PLACES) - 1)
    with contenders() as kernel:
        tells_own = knows_own(kernel[1])
        for owner, span, kind in steps:
            result = kernel[owner].set(span, kind)
            if kind is None:
                locks.set(owner, span.first, span.last, None)
            else:
                assert locks.request(owner, span.wanted(kind), False) == result
            for asking, contender in enumerate(kernel):
                for area in looked_at, everything:
                    for exclusive in False, True:
                        shown = next(locks.conflicts(asking, area.wanted(exclusive)), None)
                        expected = shown and (shown[1], os.getpid() if shown[0] == 0 else -1)
                        assert contender.found(WR if exclusive else RD, area) == expected
                    if tells_own and not contender.is_process:
                        own = next(locks.own(asking, area.wanted(False)), None)
                        assert contender.found(UN, area) == (own and (own[1], -1))


# Circles


class Owner:
    """One that may be waited for."""

    def __init__(self, name: str, is_process: bool = True) -> None:
        self.name = name
        self.is_process = is_process

    def identity(self) -> str:
        return self.name


def waiting(owner: Owner, blocker: Owner | None) -> RecordWaiter:
    waiter = RecordWaiter(owner, Range(0, 0, True), None, 0.0)
    waiter.blocker = blocker
    return waiter


def circle_of(ours: RecordWaiter, others: list[RecordWaiter]) -> list[RecordWaiter]:
    """The circle, if these are all that wait."""
    by_identity: dict[str, list[RecordWaiter]] = {}
    for one in [ours, *others]:
        by_identity.setdefault(one.owner.identity(), []).append(one)
    return circle(ours, by_identity)


def chain(length: int) -> list[RecordWaiter]:
    """Each waits for the next one, and the last one for the first."""
    owners = [Owner(str(number)) for number in range(length)]
    return [waiting(owner, owners[(number + 1) % length]) for number, owner in enumerate(owners)]


@pytest.mark.parametrize("length", [2, 3, 11, 12])
def test_a_circle(length: int) -> None:
    ours, *others = chain(length)
    assert circle_of(ours, others[::-1]) == others


def test_a_circle_that_is_too_long_to_be_seen() -> None:
    """As in the kernel, see below."""
    ours, *others = chain(13)
    assert circle_of(ours, others) == []


def test_a_chain_that_ends() -> None:
    ours, *others = chain(4)
    assert circle_of(ours, others[:-1]) == []
    others[-1].blocker = None
    assert circle_of(ours, others) == []


def test_a_circle_of_others() -> None:
    """Who joins it waits for ever, without being one of it."""
    ours = waiting(Owner("joins"), chain(3)[0].owner)
    assert circle_of(ours, chain(3)) == []


def test_a_description_in_between() -> None:
    """It has no process of which one could know that it waits."""
    ours, *others = chain(3)
    others[0].blocker = Owner("2", is_process=False)
    assert circle_of(ours, others) == []


def test_the_same_process_in_several_files() -> None:
    """Each file has an owner of its own for it."""
    first, second = Owner("p"), Owner("p")
    other, elsewhere = Owner("q"), Owner("q")
    ours, theirs = waiting(first, other), waiting(elsewhere, second)
    assert circle_of(ours, [theirs]) == [theirs]


def test_a_process_with_several_threads_that_wait() -> None:
    """One of them is enough."""
    a, b = Owner("a"), Owner("b")
    ours, free, back = waiting(a, b), waiting(b, Owner("c", is_process=False)), waiting(b, a)
    assert circle_of(ours, [free, back]) == [back]


@pytest.mark.parametrize(("length", "result"), [(12, errno.EDEADLK), (13, None)])
def test_how_long_a_circle_is_seen(world: World, length: int, result: int | None) -> None:
    drivers = [world.opened() for _ in range(length)]
    for place, (driver, fd) in enumerate(drivers):
        assert lock(driver, fd, WR, place, 1) == 0
    calls = []
    for place, (driver, fd) in enumerate(drivers[:-1]):
        calls.append(lock_later(driver, fd, WR, place + 1, 1))
        await_waiting(world, *calls)
    last, fd = drivers[-1]
    call = lock_later(last, fd, WR, 0, 1)
    if result is None:
        await_waiting(world, *calls, call)
        _unlock(last, fd, length - 1)
        assert calls[-1].result() == 0
    else:
        assert call.result() == result
        await_waiting(world, *calls)


def _unlock(driver: Driver, fd: int, place: int) -> None:
    assert lock(driver, fd, UN, place, 1) == 0
