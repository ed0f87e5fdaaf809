"""flockshim.FileLock in the place of py-filelock's: the same calls have the same results."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

import flockshim
from flockshim.pytest_plugin import require

Results = list[Any]


@pytest.fixture(autouse=True)
def _there_is_a_recent_one() -> None:
    version = tuple(int(number) for number in filelock.__version__.split(".")[:2])
    require(version >= (4, 2), f"py-filelock {filelock.__version__}", "install filelock 4.2 or later: Python 3.10")


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or what kind of exception callers can catch."""
    try:
        return call()
    except Exception as error:
        return next(base for base in type(error).__mro__ if base.__module__ == "builtins")


def attributes(lock: Any) -> Results:
    return [lock.is_locked, lock.lock_counter, lock.timeout, lock.blocking, lock.poll_interval, lock.lock_file]


def defaults(kind: Any, path: Path) -> Results:
    return attributes(kind(path)) + attributes(kind(str(path), 3)) + attributes(kind(path, timeout=2.5, blocking=False))


def thread_local(kind: Any, path: Path) -> Results:
    return [kind(path).is_thread_local(), kind(path, -1, 0o644, False).is_thread_local()]


def context_manager(kind: Any, path: Path) -> Results:
    lock = kind(path)
    with lock as entered:
        results = [entered is lock, *attributes(lock), path.exists()]
    return [*results, *attributes(lock)]


def nested(kind: Any, path: Path) -> Results:
    lock = kind(path)
    results = []
    with lock:
        with lock:
            results.append(lock.lock_counter)
        results += [lock.is_locked, lock.lock_counter]
    return [*results, lock.is_locked, lock.lock_counter]


def proxy(kind: Any, path: Path) -> Results:
    lock = kind(path)
    acquired = lock.acquire()
    with acquired as entered:
        results = [entered is lock, acquired.lock is lock, lock.lock_counter]
    return [*results, lock.is_locked, lock.lock_counter]


def release(kind: Any, path: Path) -> Results:
    lock = kind(path)
    results = [lock.release(), lock.lock_counter]
    for force in (False, True):
        lock.acquire()
        lock.acquire()
        results += [lock.release(force), lock.is_locked, lock.lock_counter]
    lock.acquire()
    lock.acquire()
    results += [lock.release(force=True), lock.is_locked, lock.lock_counter, lock.release()]
    return [*results, lock.lock_counter]


def exception_in_the_body(kind: Any, path: Path) -> Results:
    lock = kind(path)

    def body() -> None:
        with lock:
            raise KeyError

    return [outcome(body), lock.is_locked, lock.lock_counter]


def decorator(kind: Any, path: Path) -> Results:
    lock = kind(path)

    @lock
    def function() -> bool:
        return bool(lock.is_locked)

    return [function(), lock.is_locked]


def timeouts(kind: Any, path: Path) -> Results:
    holder, lock = kind(path), kind(path, timeout=0)
    with holder:
        results = [
            outcome(lock.acquire),
            outcome(lambda: lock.acquire(timeout=0.02)),
            outcome(lambda: lock.acquire(0.02, 0.01)),
            outcome(lambda: lock.acquire(blocking=False)),
            outcome(lambda: lock.acquire(timeout=-1, blocking=False)),
            outcome(lock.__enter__),
            *attributes(lock),
        ]
        lock.timeout = 0.02
        results += [lock.timeout, outcome(lock.acquire)]
        lock.blocking = False
        results.append(outcome(lambda: lock.acquire(timeout=-1)))
        lock.poll_interval = 0.5
    return results + attributes(lock)


def timeout_error(kind: Any, path: Path) -> Results:
    module = filelock if kind is filelock.FileLock else flockshim
    with kind(path):
        try:
            kind(str(path), timeout=0).acquire()
        except module.Timeout as error:
            return [error.lock_file, isinstance(error, TimeoutError), str(path) in str(error)]
    return []


def wrong_arguments(kind: Any, path: Path) -> Results:
    return [
        outcome(kind),
        outcome(lambda: kind(path, poll_interval=-1)),
        outcome(lambda: kind(path).acquire(poll_interval=-1)),
        outcome(lambda: kind(path).acquire(timeout=float("nan"))),
    ]


def permissions(kind: Any, path: Path) -> Results:
    results: Results = []
    before = os.umask(0o002)
    try:
        for bits in (None, 0o600, 0o666):
            lock = kind(path) if bits is None else kind(path, mode=bits)
            with lock:
                results += [oct(path.stat().st_mode), bits and lock.mode]
            path.unlink()
    finally:
        os.umask(before)
    return results


def file_stays(kind: Any, path: Path) -> Results:
    path.write_text("text")
    with kind(path):
        pass
    return [path.read_text(), path.exists()]


def directory_is_made(kind: Any, path: Path) -> Results:
    with kind(path / "a" / "b" / "lock"):
        return [(path / "a" / "b" / "lock").exists()]


def not_a_directory(kind: Any, path: Path) -> Results:
    path.touch()
    lock = kind(path / "lock")
    return [outcome(lock.acquire), lock.is_locked, lock.lock_counter]


def threads(kind: Any, path: Path) -> Results:
    results: Results = []
    for local in (True, False):
        lock = kind(path, thread_local=local)

        def other(lock: Any = lock) -> None:
            results.append(lock.is_locked)
            results.append(bool(outcome(lambda: lock.acquire(timeout=0)) is TimeoutError))
            results.append(lock.lock_counter)
            lock.release()

        with lock:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            results.append(lock.lock_counter)
    return results


def dropped(kind: Any, path: Path) -> Results:
    kind(path).acquire()
    with kind(path, 0) as lock:
        return [lock.is_locked]


@pytest.mark.parametrize(
    "calls",
    [
        defaults,
        thread_local,
        context_manager,
        nested,
        proxy,
        release,
        exception_in_the_body,
        decorator,
        timeouts,
        timeout_error,
        wrong_arguments,
        permissions,
        file_stays,
        directory_is_made,
        not_a_directory,
        threads,
        dropped,
    ],
)
def test_the_same_results(calls: Callable[[Any, Path], Results], tmp_path: Path) -> None:
    results = []
    for kind in (filelock.FileLock, flockshim.FileLock):
        path = tmp_path / "lock"
        results.append(calls(kind, path))
        if path.exists():
            path.rename(tmp_path / kind.__module__)
    assert results[0] == results[1]
    assert results[0]


async def asynchronous(kind: Any, path: Path) -> Results:
    lock = kind(path)
    results = attributes(lock)
    async with lock as entered:
        results += [entered is lock, *attributes(lock)]
        async with await lock.acquire() as acquired:
            results += [acquired is lock, lock.lock_counter]
        try:
            await kind(path).acquire(timeout=0)
        except TimeoutError as error:
            results.append(error.lock_file)  # type: ignore[attr-defined]
    results += attributes(lock)
    await lock.acquire()
    await lock.acquire()
    await lock.release(force=True)
    return [*results, *attributes(lock)]


def test_the_same_results_for_asyncio(tmp_path: Path) -> None:
    results = [
        asyncio.run(asynchronous(kind, tmp_path / "lock")) for kind in (filelock.AsyncFileLock, flockshim.AsyncFileLock)
    ]
    assert results[0] == results[1]


def test_they_exclude_one_another(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    for one, other in ((filelock.FileLock, flockshim.FileLock), (flockshim.FileLock, filelock.FileLock)):
        with one(path), pytest.raises(TimeoutError), other(path, timeout=0):
            pass
