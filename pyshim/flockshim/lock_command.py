"""``flockshim --lock PATH COMMAND``: holds the advisory lock on PATH while COMMAND runs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import time
from typing import NamedTuple

from flockshim import FlockshimError, holders, lockfile, parent
from flockshim.locking import Locker, TimedOutError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

BUSY = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""

INHERITED = 99
"""COMMAND's descriptor of PATH has this number or a higher one, out of the way of scripts that use their own."""

WORTH_MENTIONING = 1.0
ALARM_INTERVAL = 0.1


class Request(NamedTuple):
    """What the command line asks for."""

    path: str
    shared: bool
    no_wait: bool
    inherit: bool


class BusyError(Exception):
    """Somebody else holds the lock, and we shall not wait, or no longer."""


def run(
    request: Request,
    environ: Mapping[str, str],
    start: Callable[[], int],
    begin: parent.Begin | None,
    say: Callable[[str], None],
) -> int:
    """Take the lock, run COMMAND by calling *start*, which becomes it, and return the exit status.

    :param environ: the settings, and COMMAND's environment.
    :param begin: makes the process that becomes COMMAND, where that is more than a child; see `parent.run`.
    :param say: writes a line to standard error.
    :raises FlockshimError: when the lock cannot be had at all.
    """
    locker = Locker(environ)
    try:
        descriptor = _take(locker, request, environ, _Teller(request.path, environ, say))
    except BusyError as error:
        if "FLOCKSHIM_QUIET" not in environ:
            say(f"cannot lock {request.path!r}: {error}")
        return BUSY
    descriptor = _moved_out_of_the_way(descriptor)
    # With --inherit this is what holds the lock; else it is not lost when this process is killed and COMMAND is not.
    os.set_inheritable(descriptor, True)
    if request.inherit and begin is None:
        return start()
    status = parent.run(start, begin)
    if request.inherit:
        return parent.end_as(status)
    # Not by closing: what COMMAND has left running may have inherited the descriptor. A file system that has gone away
    # must not cost COMMAND its status.
    with contextlib.suppress(OSError, FlockshimError):
        locker.unlock(descriptor)
    return parent.end_as(status)


def _moved_out_of_the_way(descriptor: int) -> int:
    try:
        moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, INHERITED)
    except OSError:  # a lower limit of descriptors
        return descriptor
    os.close(descriptor)
    return moved


def _take(locker: Locker, request: Request, environ: Mapping[str, str], teller: _Teller) -> int:
    """Return a descriptor of PATH, locked."""
    timeout = environ.get("FLOCKSHIM_TIMEOUT")
    deadline = time.monotonic() + float(timeout) if timeout else None
    operation = fcntl.LOCK_SH if request.shared else fcntl.LOCK_EX
    while True:
        descriptor = _open(request.path)
        error = locker.by_kernel(descriptor, operation | fcntl.LOCK_NB)
        try:
            if error == errno.EWOULDBLOCK and not request.no_wait:
                error = _wait_for_kernel(locker, descriptor, operation, deadline, teller)
            emulated = locker.is_refusal(error)
            if emulated:
                flags = fcntl.LOCK_NB if request.no_wait else 0
                error = locker.by_mode(descriptor, operation | flags, error, deadline)
        except TimedOutError as timed_out:
            raise BusyError(f"timed out (--timeout), held by {timed_out}") from None
        except FlockshimError as refused:
            raise FlockshimError(f"cannot lock {request.path!r}: {refused}") from None
        if error == errno.EWOULDBLOCK:
            holder = _emulated_holder(locker, descriptor, request.path) if emulated else _kernel_holder(descriptor)
            raise BusyError(f"held by {holder}")
        if error:
            raise FlockshimError(f"cannot lock {request.path!r}: {os.strerror(error)}; see flockshim --check")
        if lockfile.names(request.path, descriptor):
            return descriptor
        # Removed or replaced while we waited: whoever comes next will lock what is there now.
        os.close(descriptor)


def _open(path: str) -> int:
    try:
        descriptor = lockfile.open_file(path)
    except OSError as error:
        raise FlockshimError(f"cannot open {path!r} for locking: {error.strerror}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise FlockshimError(f"cannot lock {path!r}: neither a file nor a directory")
    return descriptor


def _wait_for_kernel(locker: Locker, descriptor: int, operation: int, deadline: float | None, teller: _Teller) -> int:
    """Wait for the kernel's lock in the kernel's queue. Returns the errno, or 0.

    :raises TimedOutError: when the deadline has passed.
    """
    teller.waits(lambda: _kernel_holder(descriptor))
    with _alarms_from(deadline) if deadline is not None else contextlib.nullcontext():
        error = errno.EINTR
        while error == errno.EINTR:
            error = locker.by_kernel(descriptor, operation)
            if error == errno.EINTR and deadline is not None and time.monotonic() >= deadline:
                raise TimedOutError(_kernel_holder(descriptor))
    teller.has_waited()
    return error


@contextlib.contextmanager
def _alarms_from(deadline: float) -> Iterator[None]:
    """Interrupt system calls from *deadline* on. What COMMAND inherits of alarm(2) and SIGALRM stays as it was."""
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    began = time.monotonic()
    # Again and again: the first one may come just before the call.
    alarm, interval = signal.setitimer(signal.ITIMER_REAL, max(deadline - began, 1e-6), ALARM_INTERVAL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGALRM, handler)
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, max(alarm - (time.monotonic() - began), 1e-6), interval)


def _kernel_holder(descriptor: int) -> str:
    from flockshim import kernel_locks

    return kernel_locks.describe(os.fstat(descriptor))


def _emulated_holder(locker: Locker, descriptor: int, path: str) -> str:
    from flockshim import lock_list

    return lock_list.holder_of(locker, os.fstat(descriptor), path)


class _Teller:
    """Tells the user of our waiting, as the shim does for emulated locks."""

    def __init__(self, path: str, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._say = say
        self._path = holders.printable(os.path.realpath(path))
        self._since = time.monotonic()
        loud = "FLOCKSHIM_VERBOSE" in environ or os.isatty(2)
        self._silent = "FLOCKSHIM_QUIET" in environ or not loud

    def seconds(self) -> float:
        return time.monotonic() - self._since

    def waits(self, holder: Callable[[], str]) -> None:
        if not self._silent:
            self._say(f"waiting for the lock on {self._path}, held by {holder()}")

    def has_waited(self) -> None:
        if not self._silent and self.seconds() >= WORTH_MENTIONING:
            self._say(f"got the lock on {self._path} after {int(self.seconds())} s")
