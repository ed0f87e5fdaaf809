"""Locks files by their names: opens, waits, and sees to it that the name still means the locked file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import time
from typing import NamedTuple

from flockshim import FlockshimError, kernel_locks, launch
from flockshim.locking import Locker, TimedOutError

NOT_WRITABLE = (errno.EACCES, errno.EISDIR, errno.EPERM, errno.EROFS, errno.ETXTBSY)
DEFAULT_BITS = 0o666

# Every descriptor that this process locks or waits with.
_open_descriptors: set[int] = set()


class Timeout(TimeoutError):
    """A lock was not had in time."""

    def __init__(self, lock_file: str, holder: str | None = None) -> None:
        """Say so of *lock_file*.

        :param holder: who holds it, for people to read, where that is known.
        """
        super().__init__()
        self.lock_file = lock_file
        self.holder = holder

    def __str__(self) -> str:
        """Return one line that names the file and, where known, the holder: pid, command, since when."""
        text = f"the lock on {self.lock_file!r} was not free in time"
        return f"{text}: held by {self.holder}" if self.holder else text

    def __reduce__(self) -> tuple[type[Timeout], tuple[str, str | None]]:
        """Return what pickle needs, by which exceptions reach other processes."""
        return type(self), (self.lock_file, self.holder)


class WaitCancelledError(Exception):
    """The wait has been ended by its `Wait.cancel`."""


class Wait(NamedTuple):
    """How a lock is waited for."""

    blocking: bool
    deadline: float | None
    """Monotonic time; none: for ever."""
    poll_interval: float
    """Seconds between two tries where the kernel locks and the wait must end by itself."""
    cancel: int = -1
    """A descriptor; the wait ends when it is readable."""

    def left(self) -> float:
        """Return how many seconds there are left; infinite: for ever."""
        if not self.blocking:
            return 0.0
        return float("inf") if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def sleep(self, seconds: float) -> None:
        """Sleep; raises WaitCancelledError."""
        if self.cancel < 0:
            time.sleep(seconds)
            return
        poll = select.poll()
        poll.register(self.cancel, select.POLLIN)
        if poll.poll(seconds * 1000):
            raise WaitCancelledError


class LockFile:
    """One file and how it is to be locked."""

    def __init__(self, name: str, *, shared: bool, mode: str | None, bits: int | None) -> None:
        """Read the other settings from the environment.

        :param mode: that of ``flockshim --mode``; none: as the environment says.
        :param bits: the permissions of a file that is made; none: what the umask leaves of 0o666.
        :raises FlockshimError: for a setting that is wrong.
        """
        self._locker = Locker(launch.environment(os.environ, mode=mode, quiet=True))
        self._name = name
        self._operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._bits = bits

    def take(self, wait: Wait) -> int:
        """Return a descriptor of the file, locked; the file and its directory are made if they are missing.

        :raises Timeout: when it is not had in time.
        :raises WaitCancelledError: when the wait was cancelled.
        :raises OSError: as ``open(2)`` and ``flock(2)``.
        :raises FlockshimError: when the lock cannot be emulated; says why.
        """
        # The working directory may change while we wait.
        path = os.path.abspath(self._name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        while True:
            descriptor = open_file(path, self._bits)
            _open_descriptors.add(descriptor)
            try:
                self._lock(descriptor, wait)
                if names(path, descriptor):
                    return descriptor
            except BaseException:
                with contextlib.suppress(OSError, FlockshimError):
                    self.give_back(descriptor)
                raise
            self.give_back(descriptor)

    def give_back(self, descriptor: int) -> None:
        """Unlock and close: in this order, since a child may have the description open too.

        :raises OSError: as ``flock(2)`` and ``close(2)``; the descriptor is closed all the same.
        :raises FlockshimError: when the keeper cannot be told; it finds out by itself.
        """
        try:
            self._locker.unlock(descriptor)
        finally:
            # In this order: the number may be another file's as soon as it is closed.
            _open_descriptors.discard(descriptor)
            os.close(descriptor)

    def _lock(self, descriptor: int, wait: Wait) -> None:
        sleeps = wait.blocking and wait.deadline is None and wait.cancel < 0
        operation = self._operation if sleeps else self._operation | fcntl.LOCK_NB
        while True:
            error = self._locker.by_kernel(descriptor, operation)
            if self._locker.is_refusal(error):
                error = self._emulate(descriptor, error, wait)
            if error == 0:
                return
            if error == errno.EWOULDBLOCK:
                self._pause(descriptor, wait)
            elif error == errno.EINTR:
                # Python has run the handlers of signals meanwhile, and none of them has raised.
                wait.sleep(0)
            else:
                raise self._failure(error)

    def _emulate(self, descriptor: int, refusal: int, wait: Wait) -> int:
        locker, operation = self._locker, self._operation
        deadline = wait.deadline
        try:
            if not wait.blocking:
                error = locker.by_mode(descriptor, operation | fcntl.LOCK_NB, refusal)
                if error != errno.EWOULDBLOCK:
                    return error
                # Who waits, if only till now, is told for whom.
                deadline = time.monotonic()
            return locker.by_mode(descriptor, operation, refusal, deadline, wait.cancel)
        except TimedOutError as error:
            if wait.left() > 0:
                return errno.EINTR  # the keeper's longest time is over, not ours
            raise Timeout(self._name, str(error)) from None
        except FlockshimError as error:
            raise FlockshimError(f"cannot lock {self._name!r}: {error}") from None

    def _pause(self, descriptor: int, wait: Wait) -> None:
        left = wait.left()
        if left <= 0:
            raise Timeout(self._name, kernel_locks.describe(os.fstat(descriptor)))
        wait.sleep(min(wait.poll_interval, left))

    def _failure(self, error: int) -> OSError:
        return OSError(error, os.strerror(error), self._name)


def open_file(path: str, bits: int | None = None) -> int:
    """Return a descriptor of what is to be locked: a directory as it is, or a file, made if it is missing.

    :param bits: the permissions of a file that is made; none: what the umask leaves of 0o666.
    :raises OSError: as ``open(2)``.
    """
    # No O_TRUNC: the file may be anything. flock(2) needs no descriptor that can write, but NFS does: nfs(5).
    try:
        return os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return _create(path, bits)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        return os.open(path, os.O_RDONLY)


def _create(path: str, bits: int | None) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, DEFAULT_BITS if bits is None else bits)
    if bits is not None:
        # What was asked for the umask does not change. The file is another's if it was made just before.
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, bits)
    return descriptor


def names(path: str, descriptor: int) -> bool:
    """Return whether a path still means an open file, which somebody may have deleted while we waited."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:  # opening it again will tell
        return False


def _close_inherited() -> None:
    """Close in a forked child what would keep the parent's locks after the parent's death, and never unlock it.

    The description is the parent's as well, and an unlock would be for both: ``flock(2)``.
    """
    while _open_descriptors:
        with contextlib.suppress(OSError):
            os.close(_open_descriptors.pop())


os.register_at_fork(after_in_child=_close_inherited)
