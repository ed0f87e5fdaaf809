"""``flockshim.FileLock``: for Python code the locks that programs under the shim have, called as py-filelock's are."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING

from flockshim import launch
from flockshim.lockfile import LockFile, Timeout, Wait

if TYPE_CHECKING:
    from typing import Any

    from typing_extensions import Self

__all__ = ["AcquireReturnProxy", "BaseFileLock", "FileLock", "Timeout"]


class Hold:
    """What one owner, a thread or a task, has of a lock."""

    def __init__(self) -> None:
        """Hold nothing."""
        self.counter = 0
        self.descriptor = -1
        # A forked child does not hold what its parent does.
        self.pid = os.getpid()


class BaseFileLock:
    """The settings of a lock, and all that is held by it: what `FileLock` and `flockshim.AsyncFileLock` share."""

    def __init__(
        self,
        lock_file: str | os.PathLike[str],
        timeout: float,
        mode: str | int,
        *,
        shared: bool,
        blocking: bool,
        poll_interval: float,
    ) -> None:
        """See :class:`FileLock`."""
        self._held: set[Hold] = set()
        self._lock_file = os.fspath(lock_file)
        self._mode = mode if isinstance(mode, int) else launch.READERS["mode"]("mode", mode)
        self._shared = shared
        self._locked: LockFile | None = None
        self.timeout = timeout
        self.poll_interval = poll_interval
        self.blocking = blocking

    @property
    def lock_file(self) -> str:
        """The path as it was given."""
        return self._lock_file

    @property
    def mode(self) -> str | int:
        """What was given: a mode of flockshim's, or the permissions of a new file."""
        return self._mode

    @property
    def shared(self) -> bool:
        """Whether others may hold the lock at the same time, if theirs is shared too."""
        return self._shared

    @property
    def timeout(self) -> float:
        """Seconds for which `acquire` waits unless told otherwise; negative: for ever. Settable."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = float(seconds)

    @property
    def poll_interval(self) -> float:
        """Seconds between two tries, where it must be tried again and again. Settable."""
        return self._poll_interval

    @poll_interval.setter
    def poll_interval(self, seconds: float) -> None:
        self._poll_interval = _interval(seconds)

    @property
    def is_locked(self) -> bool:
        """Whether the lock is held by who asks: this thread, task or object."""
        return self._current().counter > 0

    @property
    def lock_counter(self) -> int:
        """How many `acquire` calls of who asks have not been released yet."""
        return self._current().counter

    def __del__(self) -> None:
        """Release what is held by any owner."""
        for hold in getattr(self, "_held", ()):  # nothing, if the constructor was called in a wrong way
            if hold.pid == os.getpid() and self._locked:
                # Nobody is there to be told; the keeper and the kernel see that the descriptor is closed.
                with contextlib.suppress(Exception):
                    self._locked.give_back(hold.descriptor)

    def _current(self) -> Hold:
        raise NotImplementedError

    def _file(self) -> LockFile:
        if self._locked is None:
            # "auto" is what FLOCKSHIM_MODE says, if it is set, as for everything else that starts here.
            mode = self._mode if isinstance(self._mode, str) and self._mode != "auto" else None
            bits = self._mode if isinstance(self._mode, int) else None
            self._locked = LockFile(self._lock_file, shared=self._shared, mode=mode, bits=bits)
        return self._locked

    def _wait(self, timeout: float | None, poll_interval: float | None, blocking: bool | None) -> Wait:
        seconds = self._timeout if timeout is None else float(timeout)
        interval = self._poll_interval if poll_interval is None else _interval(poll_interval)
        if math.isnan(seconds):
            raise ValueError("timeout is not a number of seconds")
        for_ever = seconds < 0 or seconds == math.inf
        return Wait(
            blocking=(self.blocking if blocking is None else blocking) and seconds != 0,
            deadline=None if for_ever else time.monotonic() + seconds,
            poll_interval=interval,
        )

    def _begin(self, hold: Hold, descriptor: int) -> None:
        hold.descriptor = descriptor
        hold.counter = 1
        self._held.add(hold)

    def _end(self, hold: Hold, force: bool) -> bool:
        """Count a release, and return whether it is the last one."""
        hold.counter = 0 if force else hold.counter - 1
        if hold.counter:
            return False
        self._held.discard(hold)
        return True


class FileLock(BaseFileLock, contextlib.ContextDecorator):
    """An advisory lock on a file or directory: the one that ``flock(2)`` gives, on any file system.

    Called as py-filelock's ``FileLock``. It excludes ``flock(1)``, Python's ``fcntl.flock`` and all others who lock
    the same file, where the kernel cannot lock those that run under flockshim. The file is made if it is missing and
    never removed, since whoever waits for it would then hold another lock than those who come later. A directory is
    locked itself. Locks end with their process, however it ends. A forked child does not hold its parent's locks.

    Where the kernel locks, a wait for ever is in the kernel's queue; one with a timeout tries again and again, and may
    be overtaken by those in the queue. Where it doesn't, all wait in one queue.

    ::

        with FileLock("state.lock", timeout=10):
            ...
    """

    def __init__(
        self,
        lock_file: str | os.PathLike[str],
        timeout: float = -1,
        mode: str | int = "auto",
        thread_local: bool = True,
        *,
        shared: bool = False,
        blocking: bool = True,
        poll_interval: float = 0.05,
    ) -> None:
        """Lock nothing yet.

        The variables ``FLOCKSHIM_ERRNO``, ``FLOCKSHIM_SIMULATE``, … are read when the lock is first acquired.

        :param lock_file: what to lock.
        :param timeout: seconds for which `acquire` waits; negative: for ever; 0: not at all.
        :param mode: what is done where the kernel cannot lock: ``"auto"`` (as ``FLOCKSHIM_MODE`` says, else
            ``"host"``), ``"host"``, ``"success"`` or ``"fail"``. A number is, as in py-filelock, the permissions of a
            new file; else they are what the umask leaves of 0o666.
        :param thread_local: whether every thread has a lock of its own, so that threads exclude one another; what a
            thread leaves locked at its end is released with the object. Otherwise the lock is the object's: any
            thread may release it, and a second thread that acquires it only counts, while the first is inside.
        :param shared: let others in whose lock is shared too.
        :param blocking: whether `acquire` waits at all.
        :param poll_interval: seconds between two tries where the kernel locks and there is a timeout.
        :raises FlockshimError: for an unknown mode.
        :raises ValueError: for a poll_interval that is negative or not finite.
        """
        super().__init__(lock_file, timeout, mode, shared=shared, blocking=blocking, poll_interval=poll_interval)
        self._thread_local = thread_local
        self._owner: Any = threading.local() if thread_local else SimpleNamespace()

    def acquire(
        self, timeout: float | None = None, poll_interval: float | None = None, *, blocking: bool | None = None
    ) -> AcquireReturnProxy:
        """Wait for the lock, unless it is held already: then count, so that as many releases are needed.

        What is not given is as the constructor was told.

        :param timeout: seconds; negative: for ever; 0: do not wait.
        :param poll_interval: seconds.
        :param blocking: false: do not wait.
        :return: an object that releases the lock at the end of a ``with``.
        :raises Timeout: when the lock is not free in time.
        :raises OSError: as ``open(2)`` and ``flock(2)``, with ``mode="fail"`` also where the kernel cannot lock.
        :raises FlockshimError: when the lock cannot be emulated; says why.
        """
        wait = self._wait(timeout, poll_interval, blocking)
        hold = self._current()
        if not hold.mutex.acquire(timeout=_for_mutex(wait)):
            raise Timeout(self._lock_file)
        try:
            if hold.counter:
                hold.counter += 1
            else:
                self._begin(hold, self._file().take(wait))
        finally:
            hold.mutex.release()
        return AcquireReturnProxy(self)

    def release(self, force: bool = False) -> None:
        """Undo one `acquire`; with the last one the lock is free. Nothing happens when it is not held.

        :param force: undo them all.
        :raises OSError: as ``flock(2)`` and ``close(2)``; the lock counts as released all the same.
        :raises FlockshimError: when the keeper cannot be told; it finds out by itself.
        """
        hold = self._current()
        # Without the mutex, which belongs to the one who waits if nobody holds the lock.
        if not hold.counter:
            return
        with hold.mutex:
            if hold.counter and self._end(hold, force):
                self._file().give_back(hold.descriptor)

    def is_thread_local(self) -> bool:
        """Return whether every thread has a lock of its own."""
        return self._thread_local

    def __enter__(self) -> Self:
        """Acquire the lock."""
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release it once."""
        self.release()

    def _current(self) -> _GuardedHold:
        hold: _GuardedHold | None = getattr(self._owner, "hold", None)
        if hold is None or hold.pid != os.getpid():
            hold = self._owner.hold = _GuardedHold()
        return hold


class AcquireReturnProxy:
    """What `FileLock.acquire` returns: a ``with`` of it releases the lock at its end, and acquires nothing."""

    def __init__(self, lock: FileLock) -> None:
        """Release *lock* later."""
        self.lock = lock

    def __enter__(self) -> FileLock:
        """Return the lock."""
        return self.lock

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release it once."""
        self.lock.release()


class _GuardedHold(Hold):
    """One that several threads may have in common."""

    def __init__(self) -> None:
        super().__init__()
        # Re-entrant, because a signal handler may use the lock for which the main thread waits.
        self.mutex = threading.RLock()


def _for_mutex(wait: Wait) -> float:
    """Return what `threading.Lock.acquire` takes as its timeout."""
    left = wait.left()
    return -1 if left == math.inf else min(left, threading.TIMEOUT_MAX)


def _interval(seconds: float) -> float:
    seconds = float(seconds)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"poll_interval must be a finite number of seconds, not {seconds}")
    return seconds
