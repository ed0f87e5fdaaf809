"""Descriptors that a thread closes, in a process that divides."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from support.proc import await_true

from flockshim import closing


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "_closer", closing._Closer())


@pytest.fixture
def two() -> Iterator[tuple[int, int]]:
    both = os.pipe()
    yield both
    for descriptor in both:
        if is_open(descriptor):
            os.close(descriptor)


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_at_once_and_by_a_thread(two: tuple[int, int]) -> None:
    closing.close(two[0])
    assert not is_open(two[0])
    closing.in_background()
    closing.close(two[1])
    closing.flush()
    await_true(lambda: not is_open(two[1]), "it to be closed")


def test_none_is_closed_by_both(two: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is about to be closed when the process divides; the second is left to the new one."""
    close, began, go_on = os.close, threading.Event(), threading.Event()

    def waits(descriptor: int) -> None:
        began.set()
        go_on.wait()
        close(descriptor)

    def let_go() -> None:
        await_true(lambda: not closing._closer.waiting, "the process to divide")
        go_on.set()

    monkeypatch.setattr(os, "close", waits)
    monkeypatch.setattr(closing, "CLOSE_SECONDS", 30.0)
    closing.in_background()
    for descriptor in two:
        closing.close(descriptor)
    closing.flush()
    assert began.wait(30)
    helper = threading.Thread(target=let_go)
    helper.start()
    child = os.fork()
    if child == 0:
        right = not is_open(two[0]) and is_open(two[1])
        monkeypatch.undo()
        closing.close(two[1])
        os._exit(0 if right and not is_open(two[1]) else 1)
    helper.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not is_open(two[0])
    assert is_open(two[1])


def test_one_that_hangs_is_not_waited_for_for_ever(two: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    close, began, go_on = os.close, threading.Event(), threading.Event()

    def hangs(descriptor: int) -> None:
        close(descriptor)
        began.set()
        go_on.wait()

    monkeypatch.setattr(os, "close", hangs)
    monkeypatch.setattr(closing, "CLOSE_SECONDS", 0.01)
    closing.in_background()
    closing.close(two[0])
    closing.flush()
    assert began.wait(30)
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go_on.set()


def test_many_are_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "MOST_WAITING", 2)
    closing.in_background()
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    for descriptor in many:
        closing.close(descriptor)
    await_true(lambda: not any(map(is_open, many)), "all to be closed")


def test_others_are_awaited_but_not_for_ever() -> None:
    go_on = threading.Event()

    def hangs() -> None:
        go_on.wait()

    closing.aside(hangs)
    closing.await_others(0.01)
    thread = threading.Thread(target=closing.await_others, args=(30,))
    thread.start()
    go_on.set()
    thread.join(30)
    assert not thread.is_alive()
