"""flockshim.AsyncFileLock: tasks exclude one another, and the event loop goes on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
from support.driver import BUSY, EX, NB, OK, UN
from support.proc import DEADLINE, await_true
from support.threads import KnownThread, descriptors, times_open
from support.worlds import World

from flockshim import AsyncFileLock, FileLock, Timeout
from flockshim.lockfile import LockFile


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, DEADLINE))


async def waits(world: World, tasks: int) -> None:
    """Return when so many tasks wait for the lock on the file of WORLD, and no thread of others is left."""

    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "flockshim"]

    while len(threads()) != tasks or times_open(world.file()) < tasks:
        await asyncio.sleep(0)
    if world.emulated:
        world.await_blocked(*map(KnownThread, threads()))  # type: ignore[arg-type]


def test_programs_and_it_exclude_one_another(world: World) -> None:
    async def main() -> None:
        driver, fd = world.opened()
        lock = AsyncFileLock(world.file())
        async with lock as entered:
            assert entered is lock
            assert driver.flock(fd, EX | NB) == BUSY
        assert driver.flock(fd, EX | NB) == OK
        for how in ({"timeout": 0}, {"blocking": False}, {"timeout": 0.05}):
            with pytest.raises(Timeout, match=rf"held by pid {driver.pid} \(lockdriver"):
                await lock.acquire(**how)  # type: ignore[arg-type]
        assert (lock.is_locked, lock.lock_counter) == (False, 0)

    run(main())


def test_shared(world: World) -> None:
    async def main() -> None:
        async with AsyncFileLock(world.file(), shared=True), AsyncFileLock(world.file(), 0, shared=True):
            with pytest.raises(Timeout):
                FileLock(world.file()).acquire(timeout=0)

    run(main())


def test_the_event_loop_goes_on(world: World) -> None:
    async def main() -> None:
        lock = AsyncFileLock(world.file())
        with FileLock(world.file()):
            task = asyncio.create_task(lock.acquire())
            await waits(world, 1)
        await task

    run(main())


def test_it_counts_what_a_task_acquires(world: World) -> None:
    async def main() -> None:
        lock = AsyncFileLock(world.file())
        async with lock, await lock.acquire() as entered:
            assert entered is lock
            assert (lock.is_locked, lock.lock_counter) == (True, 2)
            await lock.release()
            assert lock.lock_counter == 1
            await lock.acquire()
        assert (lock.is_locked, lock.lock_counter) == (False, 0)
        assert world.free(world.file())
        await lock.release()
        await lock.acquire()
        await lock.acquire()
        await lock.release(force=True)
        assert world.free(world.file())

    run(main())


def test_tasks_exclude_one_another(world: World) -> None:
    async def main() -> None:
        lock = AsyncFileLock(world.file())

        async def other() -> None:
            assert (lock.is_locked, lock.lock_counter) == (False, 0)
            await lock.release(force=True)
            with pytest.raises(Timeout):
                await lock.acquire(timeout=0)

        async with lock:
            await asyncio.create_task(other())
            assert lock.lock_counter == 1

    run(main())


def test_50_tasks(world: World) -> None:
    async def main() -> None:
        lock = AsyncFileLock(world.file(), poll_interval=0.001)
        inside = 0

        async def work() -> None:
            nonlocal inside
            async with lock:
                inside += 1
                await asyncio.sleep(0)
                assert (inside, lock.lock_counter) == (1, 1)
                inside -= 1

        await asyncio.gather(*(work() for _ in range(50)))
        assert not lock.is_locked
        assert times_open(world.file()) == 0

    run(main())


def test_a_task_that_is_cancelled_leaves_the_queue(world: World) -> None:
    async def main() -> None:
        driver, fd = world.opened()
        driver.flock(fd, EX)
        lock = AsyncFileLock(world.file())
        has, go_on = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with lock:
                has.set()
                await go_on.wait()

        world.round_trip()
        before = descriptors()
        tasks = [asyncio.create_task(work())]
        await waits(world, 1)
        tasks.append(asyncio.create_task(work()))
        await waits(world, 2)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert times_open(world.file()) == 1
        driver.flock(fd, UN)
        await has.wait()
        assert driver.flock(fd, EX | NB) == BUSY
        go_on.set()
        await tasks[1]
        assert driver.flock(fd, EX | NB) == OK
        assert descriptors() == before

    run(main())


def test_wait_for(world: World) -> None:
    async def main() -> None:
        with FileLock(world.file()):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(AsyncFileLock(world.file()).acquire(), 0.05)
            assert times_open(world.file()) == 1
        assert world.free(world.file())

    run(main())


def test_a_task_that_is_cancelled_when_the_lock_is_had(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    take = LockFile.take

    async def main() -> None:
        lock = AsyncFileLock(world.file())
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(lock.acquire())

        def take_and_cancel(*arguments: Any) -> int:
            descriptor = take(*arguments)
            loop.call_soon_threadsafe(task.cancel)
            return descriptor

        monkeypatch.setattr(LockFile, "take", take_and_cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert times_open(world.file()) == 0
        assert world.free(world.file())

    run(main())


def test_a_release_that_is_cancelled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    give_back = LockFile.give_back
    go_on = threading.Event()

    def give_back_late(*arguments: Any) -> None:
        assert go_on.wait(DEADLINE)
        give_back(*arguments)

    async def main() -> None:
        lock = AsyncFileLock(world.file())

        async def work() -> None:
            async with lock:
                holds.set()

        holds = asyncio.Event()
        monkeypatch.setattr(LockFile, "give_back", give_back_late)
        task = asyncio.create_task(work())
        await holds.wait()
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.free(world.file())

    run(main())


def test_an_event_loop_that_is_closed_meanwhile(world: World) -> None:
    loop = asyncio.new_event_loop()
    lock = AsyncFileLock(world.file())
    with FileLock(world.file()):
        task = loop.create_task(lock.acquire())
        loop.run_until_complete(waits(world, 1))
        await_true(lambda: times_open(world.file()) == 2, "the file to be opened")
        loop.close()
    await_true(lambda: times_open(world.file()) == 0, "the lock to be given back")
    assert world.free(world.file())
    assert not task.done()
    # Else asyncio says that it has been destroyed.
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_lock_that_is_dropped_is_released(world: World) -> None:
    """At once, and also after errors, whose tracebacks could keep it."""

    async def main() -> None:
        lock = AsyncFileLock(world.file())
        with FileLock(world.file()):
            with contextlib.suppress(Timeout):
                await lock.acquire(timeout=0)
            await waits(world, 0)
            task = asyncio.create_task(lock.acquire())
            await waits(world, 1)
            task.cancel()
            await asyncio.wait([task])
            del task
        await lock.acquire()
        del lock
        assert world.free(world.file())

    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()


def test_outside_of_tasks_nothing_is_held(world: World) -> None:
    lock = AsyncFileLock(world.file())

    async def main() -> None:
        await lock.acquire()
        assert lock.is_locked

    run(main())
    assert (lock.is_locked, lock.lock_counter) == (False, 0)
    assert not world.free(world.file())


def test_no_thread_can_be_had(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        lock = AsyncFileLock(world.file())
        await lock.acquire()
        monkeypatch.setattr(threading.Thread, "start", start)
        before = descriptors()
        with pytest.raises(RuntimeError):
            await AsyncFileLock(world.file()).acquire()
        assert descriptors() == before
        await lock.release()
        assert world.free(world.file())

    run(main())


def test_a_forked_child_holds_nothing(world: World) -> None:
    async def main() -> None:
        lock = AsyncFileLock(world.file())
        await lock.acquire()
        await waits(world, 0)
        child = os.fork()
        if child == 0:
            os._exit(1 if lock.is_locked or times_open(world.file()) else 0)
        assert os.waitpid(child, 0)[1] == 0
        assert lock.is_locked
        await lock.release()

    run(main())
