"""Locks descriptors from Python exactly as a program under the shim would: by the shim's own C code."""

from __future__ import annotations

import fcntl
import os
import stat
import time

from flockshim import FlockshimError, launch
from flockshim._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


# No errno: the kernel has locked, but for this host only.
ONE_HOST = 1 << 16


class TimedOutError(Exception):
    """A lock was not had in time; ``str()`` of it says who holds it."""


class Locker:
    """Does ``flock(2)`` by the settings of an environment."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Read *environ*, as :func:`flockshim.launch.environment` returns it."""
        names = [name for name in launch.VARIABLES if name in environ]
        entries = [ffi.new("char[]", os.fsencode(f"{name}={environ[name]}")) for name in names]
        self.config = ffi.new("struct config *")
        lib.config_read(self.config, ffi.new("char *[]", [*entries, ffi.NULL]))

    def by_kernel(self, descriptor: int, operation: int) -> int:
        """Return the errno of the kernel, or of what ``--simulate`` or ``--force`` puts in its place, or 0.

        ONE_HOST stands for a 0 that `by_mode` must add to.

        :param operation: that of ``flock(2)``.
        """
        error = -int(lib.lock_by_kernel(self.config, descriptor, operation))
        return ONE_HOST if error == 0 and self._reaches_one_host(descriptor) else error

    def rendezvous_directory(self) -> str:
        """Return the directory in which the keepers of this host listen.

        :raises FlockshimError: when its name is too long.
        """
        place = ffi.new("struct rendezvous *")
        if lib.rendezvous_find(self.config, place) < 0:
            raise FlockshimError("FLOCKSHIM_DIR: the name is too long for a socket's address: choose a shorter one")
        return os.fsdecode(ffi.string(place.directory))

    def unlock(self, descriptor: int) -> None:
        """Give up the lock that was had by `by_kernel` or `by_mode`, for all who share the description.

        :raises OSError: as ``flock(2)``.
        """
        error = self.by_kernel(descriptor, fcntl.LOCK_UN)
        if error and self.is_refusal(error):
            error = self.by_mode(descriptor, fcntl.LOCK_UN, error)
        if error:
            raise OSError(error, os.strerror(error))

    def is_refusal(self, error: int) -> bool:
        """Return whether *error* means that the kernel cannot lock, or not for all, so that `by_mode` must."""
        return error == ONE_HOST or bool(lib.config_triggers(self.config, error))

    def _reaches_one_host(self, descriptor: int) -> bool:
        """Network and FUSE file systems have a lock operation for files only, so flock(2) of a directory is local."""
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        return is_directory and bool(lib.is_for_all_hosts(self.config, descriptor))

    def by_mode(
        self, descriptor: int, operation: int, error: int, deadline: float | None = None, cancel: int = -1
    ) -> int:
        """Return the errno with which the emulation of ``flock(2)`` ends, or 0: ``EWOULDBLOCK``, ``EINTR``, …

        :param error: the errno with which the kernel has refused.
        :param deadline: monotonic time until which it may wait; none: for ever.
        :param cancel: a descriptor; when it is readable the wait ends with ``EINTR``.
        :raises TimedOutError: when the deadline has passed.
        :raises FlockshimError: when the lock cannot be emulated; says why.
        """
        wait = ffi.new("struct client_wait *")
        wait.timeout = -1
        if deadline is not None:
            wait.timeout = int(min(max(0.0, deadline - time.monotonic()), float(launch.MAX_TIMEOUT)) * 1000)
        wait.poll = 1
        wait.cancel = cancel
        result = lib.flock_by_mode(self.config, wait, descriptor, operation, error)
        if wait.refusal[0] != b"\0":
            text = os.fsdecode(ffi.string(wait.refusal))
            raise TimedOutError(text) if wait.timed_out else FlockshimError(text)
        return -int(result)
