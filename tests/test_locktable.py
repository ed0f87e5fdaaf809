"""The lock table by itself: against a model that is too small to be wrong, and rule by rule."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from flockshim.locktable import GRANTED, REFUSED, WAITING, FileLock, Waiter

SHARED, EXCLUSIVE = False, True
Asked = tuple[int, str, bool, float]
"""A request that waits: its number, owner, mode and time."""


class Model:
    """flock(2) of one file as a list of what is so, with blocking requests served in order."""

    def __init__(self) -> None:
        self.held: dict[str, bool] = {}
        self.waiting: list[Asked] = []
        self.permitted = {SHARED: True, EXCLUSIVE: True}

    def fits(self, owner: str, mode: bool) -> bool:
        others = [held for other, held in self.held.items() if other != owner]
        return self.permitted[mode] and (not others or (mode == SHARED and EXCLUSIVE not in others))

    def request(self, number: int, owner: str, mode: bool, blocking: bool, now: float) -> int:
        if self.held.get(owner) == mode:
            return GRANTED
        converts = self.held.pop(owner, None) is not None
        must_queue = blocking and not converts and bool(self.waiting)
        if not must_queue and self.fits(owner, mode):
            self.held[owner] = mode
            return GRANTED
        if blocking:
            self.waiting.append((number, owner, mode, now))
        return WAITING if blocking else REFUSED

    def serve(self, overdue: float | None) -> list[int]:
        served = []
        while self.waiting:
            number, owner, mode, _ = self.waiting[0]
            if self.held.get(owner) != mode:
                self.held.pop(owner, None)
                if not self.fits(owner, mode):
                    break
                self.held[owner] = mode
            served.append(number)
            del self.waiting[0]
        for asked in list(self.waiting):
            number, owner, mode, _ = asked
            if self.held.get(owner) == mode:
                self.waiting.remove(asked)
                served.append(number)
        for asked in list(self.waiting):
            number, owner, mode, since = asked
            late = overdue is not None and since <= overdue
            if late and mode == SHARED and self.held and self.fits(owner, SHARED):
                self.held[owner] = SHARED
                self.waiting.remove(asked)
                served.append(number)
        return served


class Machine(RuleBasedStateMachine):
    """The same requests to the lock table and to the model."""

    waiters = Bundle("waiters")
    owners = st.sampled_from("ABCD")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.number = 0
        self.told: dict[str, bool] = {}
        self.asked: list[bool] = []
        self.lock = FileLock(self.permit, self.grant, self.drop)

    def permit(self, exclusive: bool, barging: bool) -> bool:
        self.asked.append(exclusive)
        return self.model.permitted[exclusive]

    def grant(self, owner: str, exclusive: bool) -> None:
        assert self.asked[-1] == exclusive, "granted without asking"
        self.told[owner] = exclusive

    def drop(self, owner: str) -> None:
        del self.told[owner]

    @rule(owner=owners, mode=st.booleans())
    def try_(self, owner: str, mode: bool) -> None:
        expected = self.model.request(0, owner, mode, blocking=False, now=0)
        assert self.lock.request(owner, mode, False) == expected

    @rule(target=waiters, owner=owners, mode=st.booleans())
    def ask(self, owner: str, mode: bool) -> int:
        self.number += 1
        expected = self.model.request(self.number, owner, mode, blocking=True, now=float(self.number))
        assert self.lock.request(owner, mode, True, self.number, float(self.number)) == expected
        return self.number

    @rule(owner=owners)
    def release(self, owner: str) -> None:
        assert self.lock.release(owner) == (self.model.held.pop(owner, None) is not None)

    @rule(number=consumes(waiters))
    def withdraw(self, number: int) -> None:
        for waiter in [each for each in self.lock.queue if each.context == number]:
            self.lock.withdraw(waiter)
        self.model.waiting = [each for each in self.model.waiting if each[0] != number]

    @rule(ago=st.none() | st.integers(0, 8))
    def serve(self, ago: int | None) -> None:
        overdue = None if ago is None else float(self.number - ago)
        assert [waiter.context for waiter in self.lock.serve(overdue)] == self.model.serve(overdue)

    @rule(mode=st.booleans(), permitted=st.booleans())
    def permission_changes(self, mode: bool, permitted: bool) -> None:
        self.model.permitted[mode] = permitted

    @precondition(lambda self: not self.lock.holders)
    @rule(owner=owners, mode=st.booleans())
    def adopt(self, owner: str, mode: bool) -> None:
        self.lock.adopt(owner, mode)
        self.told[owner] = self.model.held[owner] = mode

    @invariant()
    def both_agree(self) -> None:
        assert self.lock.holders == self.model.held == self.told
        assert [waiter.context for waiter in self.lock.queue] == [each[0] for each in self.model.waiting]

    @invariant()
    def an_exclusive_lock_is_alone(self) -> None:
        assert EXCLUSIVE not in self.lock.holders.values() or len(self.lock.holders) == 1


TestMachine = Machine.TestCase
TestMachine.settings = hypothesis.settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.fixture
def lock() -> FileLock:
    return FileLock(lambda exclusive, barging: True, lambda owner, exclusive: None, lambda owner: None)


def _contexts(waiters: list[Waiter]) -> list[object]:
    return [waiter.context for waiter in waiters]


@pytest.mark.parametrize(
    ("held", "wanted", "result"),
    [
        (SHARED, SHARED, GRANTED),
        (SHARED, EXCLUSIVE, REFUSED),
        (EXCLUSIVE, SHARED, REFUSED),
        (EXCLUSIVE, EXCLUSIVE, REFUSED),
    ],
)
def test_who_excludes_whom(lock: FileLock, held: bool, wanted: bool, result: int) -> None:
    assert lock.request("A", held, False) == GRANTED
    assert lock.request("B", wanted, False) == result


def test_a_refused_upgrade_has_lost_the_shared_lock(lock: FileLock) -> None:
    lock.request("A", SHARED, False)
    lock.request("B", SHARED, False)
    assert lock.request("A", EXCLUSIVE, False) == REFUSED
    assert lock.holders == {"B": SHARED}


def test_a_waiting_writer_keeps_later_readers_back_but_not_tries(lock: FileLock) -> None:
    lock.request("A", SHARED, False)
    assert lock.request("B", EXCLUSIVE, True, "writer") == WAITING
    assert lock.request("C", SHARED, True, "reader") == WAITING
    assert lock.request("D", SHARED, False) == GRANTED
    lock.release("A")
    assert lock.serve() == []
    lock.release("D")
    assert _contexts(lock.serve()) == ["writer"]
    lock.release("B")
    assert _contexts(lock.serve()) == ["reader"]


def test_a_run_of_readers_is_served_together(lock: FileLock) -> None:
    lock.request("A", EXCLUSIVE, False)
    for owner, mode in (("B", SHARED), ("C", SHARED), ("D", EXCLUSIVE), ("E", SHARED)):
        assert lock.request(owner, mode, True, owner) == WAITING
    lock.release("A")
    assert _contexts(lock.serve()) == ["B", "C"]


def test_an_overdue_reader_joins_the_readers_but_never_a_writer(lock: FileLock) -> None:
    lock.request("A", SHARED, False)
    lock.request("B", EXCLUSIVE, True, "writer", 1.0)
    lock.request("C", SHARED, True, "early", 2.0)
    lock.request("D", SHARED, True, "late", 3.0)
    assert _contexts(lock.serve(2.5)) == ["early"]
    lock.release("A")
    lock.release("C")
    assert _contexts(lock.serve(2.5)) == ["writer"]
    assert lock.serve(9.0) == []


def test_an_overdue_reader_joins_nobody_where_another_keeper_holds() -> None:
    """There the writer is the next, and only it may get in line."""
    lock = FileLock(lambda exclusive, barging: not exclusive, lambda owner, exclusive: None, lambda owner: None)
    assert lock.request("A", EXCLUSIVE, True, "writer", 1.0) == WAITING
    assert lock.request("B", SHARED, True, "reader", 2.0) == WAITING
    assert lock.serve(9.0) == []


def test_a_conversion_passes_those_who_wait(lock: FileLock) -> None:
    lock.request("A", SHARED, False)
    lock.request("B", EXCLUSIVE, True, "writer")
    assert lock.request("A", EXCLUSIVE, True) == GRANTED


def test_two_requests_of_one_owner_are_both_answered(lock: FileLock) -> None:
    lock.request("A", EXCLUSIVE, False)
    assert lock.request("B", EXCLUSIVE, True, 1) == WAITING
    assert lock.request("B", EXCLUSIVE, True, 2) == WAITING
    lock.release("A")
    assert _contexts(lock.serve()) == [1, 2]


def test_a_request_behind_another_owners_is_answered_with_one_of_its_own(lock: FileLock) -> None:
    lock.request("A", EXCLUSIVE, False)
    assert lock.request("B", EXCLUSIVE, True, "first") == WAITING
    assert lock.request("C", EXCLUSIVE, True, "other") == WAITING
    assert lock.request("B", EXCLUSIVE, True, "second") == WAITING
    lock.release("A")
    served = lock.serve()
    assert [(waiter.context, waiter.changed) for waiter in served] == [("first", True), ("second", False)]


@pytest.mark.parametrize(
    ("held", "blocking", "waits", "barging"),
    [(False, True, False, False), (False, False, True, True), (True, True, True, True), (False, False, False, True)],
)
def test_what_permission_is_asked_for(held: bool, blocking: bool, waits: bool, barging: bool) -> None:
    """Other keepers let pass what Linux lets pass: conversions and tries."""
    asked: list[tuple[bool, bool]] = []
    permits = [True]

    def permit(exclusive: bool, barging: bool) -> bool:
        asked.append((exclusive, barging))
        return permits[0]

    lock = FileLock(permit, lambda owner, exclusive: None, lambda owner: None)
    if held:
        lock.request("A", SHARED, False)
    permits[0] = False
    if waits:
        lock.request("W", SHARED, True)
    asked.clear()
    assert lock.request("A", EXCLUSIVE, blocking) == (WAITING if blocking else REFUSED)
    assert asked == [(EXCLUSIVE, barging)]
    assert "A" not in lock.holders
