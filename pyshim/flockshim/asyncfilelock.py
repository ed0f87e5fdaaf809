"""``flockshim.AsyncFileLock``: the same locks for asyncio."""

from __future__ import annotations

import asyncio
import os
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Callable, Generic, TypeVar
from weakref import WeakKeyDictionary

from flockshim.filelock import BaseFileLock, Hold

if TYPE_CHECKING:
    from typing import Any

    from typing_extensions import Self

    from flockshim.lockfile import LockFile, Wait

__all__ = ["AsyncAcquireReturnProxy", "AsyncFileLock"]

Result = TypeVar("Result")


class AsyncFileLock(BaseFileLock):
    """The asyncio counterpart of :class:`flockshim.FileLock`, called as py-filelock's ``AsyncFileLock``.

    Every task has a lock of its own, so tasks exclude one another. The event loop goes on meanwhile: every wait is
    in a thread of its own, and ends when its task is cancelled, without the lock. Where the kernel locks, waits try
    again and again, and may be overtaken by those in the kernel's queue.

    ::

        async with AsyncFileLock("state.lock", timeout=10):
            ...
    """

    def __init__(
        self,
        lock_file: str | os.PathLike[str],
        timeout: float = -1,
        mode: str | int = "auto",
        *,
        shared: bool = False,
        blocking: bool = True,
        poll_interval: float = 0.05,
    ) -> None:
        """Lock nothing yet. The arguments are those of :class:`flockshim.FileLock`."""
        super().__init__(lock_file, timeout, mode, shared=shared, blocking=blocking, poll_interval=poll_interval)
        self._tasks: WeakKeyDictionary[asyncio.Task[Any], Hold] = WeakKeyDictionary()

    async def acquire(
        self, timeout: float | None = None, poll_interval: float | None = None, *, blocking: bool | None = None
    ) -> AsyncAcquireReturnProxy:
        """Wait for the lock, unless the task holds it already: then count, so that as many releases are needed.

        The arguments are those of :meth:`flockshim.FileLock.acquire`, and so are the errors.

        :return: an object that releases the lock at the end of an ``async with``.
        """
        wait = self._wait(timeout, poll_interval, blocking)
        hold = self._current()
        if hold.counter:
            hold.counter += 1
        else:
            self._begin(hold, await _take(self._file(), wait))
        return AsyncAcquireReturnProxy(self)

    async def release(self, force: bool = False) -> None:
        """Undo one `acquire` of the task; with the last one the lock is free. Nothing happens when it is not held.

        The arguments are those of :meth:`flockshim.FileLock.release`, and so are the errors.
        """
        hold = self._current()
        if hold.counter and self._end(hold, force):
            await _give_back(self._file(), hold.descriptor)

    async def __aenter__(self) -> Self:
        """Acquire the lock."""
        await self.acquire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release it once."""
        await self.release()

    def _current(self) -> Hold:
        try:
            task = asyncio.current_task()
        except RuntimeError:
            task = None
        # Outside of all tasks nothing is held. A forked child is there: no event loop is running in it.
        return Hold() if task is None else self._tasks.setdefault(task, Hold())


class AsyncAcquireReturnProxy:
    """What `AsyncFileLock.acquire` returns: releases the lock at the end of an ``async with``."""

    def __init__(self, lock: AsyncFileLock) -> None:
        """Release *lock* later."""
        self.lock = lock

    async def __aenter__(self) -> AsyncFileLock:
        """Return the lock."""
        return self.lock

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release it once."""
        await self.lock.release()


class _Cancellation:
    """A descriptor that can be made readable, until the thread that watches it has ended."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._ends: tuple[int, ...] = os.pipe()

    def fileno(self) -> int:
        return self._ends[0]

    def set(self) -> None:
        # By a byte, since a forked child may have the other end too, and closing it would say nothing.
        with self._mutex:
            if self._ends:
                os.write(self._ends[1], b"\0")

    def close(self) -> None:
        with self._mutex:
            for end in self._ends:
                os.close(end)
            self._ends = ()


async def _take(file: LockFile, wait: Wait) -> int:
    """Return a descriptor of the file, locked. When the task is cancelled nothing stays locked, nor in a queue."""
    cancellation = _Cancellation()

    def take() -> int:
        try:
            return file.take(wait._replace(cancel=cancellation.fileno()))
        finally:
            cancellation.close()

    try:
        taking = _ThreadCall(take, file.give_back)
    except RuntimeError:  # no more threads
        cancellation.close()
        raise
    try:
        await asyncio.wait([taking.ended])
    except asyncio.CancelledError:
        cancellation.set()
        await taking.end()
        for descriptor in taking.results:
            await _give_back(file, descriptor)
        raise
    return taking.result()


async def _give_back(file: LockFile, descriptor: int) -> None:
    try:
        giving_back = _ThreadCall(lambda: file.give_back(descriptor), lambda _: None)
    except RuntimeError:  # no more threads: the event loop waits for once
        file.give_back(descriptor)
        return
    cancelled = await giving_back.end()
    giving_back.result()
    if cancelled:
        raise asyncio.CancelledError


class _ThreadCall(Generic[Result]):
    """A call in a thread of its own: the default executor's few could all be waiting.

    Results and errors are not kept by the future, because errors would then keep themselves alive, and the lock with
    them: the traceback leads to the thread's frame, and that to the future.
    """

    def __init__(self, work: Callable[[], Result], unwanted: Callable[[Result], None]) -> None:
        """Begin. *unwanted* gets the result if the event loop has gone meanwhile."""
        self._loop = asyncio.get_running_loop()
        self._work = work
        self._unwanted = unwanted
        self._errors: list[BaseException] = []
        self.results: list[Result] = []
        self.ended: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._run, name="flockshim", daemon=True).start()

    async def end(self) -> bool:
        """Await the end, come what may, and return whether the task was cancelled meanwhile."""
        cancelled = False
        while not self.ended.done():
            try:
                await asyncio.wait([self.ended])
            except asyncio.CancelledError:
                cancelled = True
        return cancelled

    def result(self) -> Result:
        """Return or raise what the call has, once."""
        if self._errors:
            raise self._errors.pop()
        return self.results.pop()

    def _run(self) -> None:
        try:
            self.results.append(self._work())
        except BaseException as error:
            self._errors.append(error)
        try:
            self._loop.call_soon_threadsafe(self.ended.set_result, None)
        except RuntimeError:  # the loop is closed
            for result in self.results:
                self._unwanted(result)
