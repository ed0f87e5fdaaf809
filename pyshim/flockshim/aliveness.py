"""Who is alive in this domain: every keeper has, for life, a kernel lock on a file in the rendezvous directory.

A domain is where such locks are seen: one rendezvous directory, until the host is started again. No pid is judged.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os

from flockshim._native import lib

DOMAIN_DIGITS = 12
OWN_DIGITS = 12


class Aliveness:
    """This keeper's name, and its judgement of the other keepers of its domain."""

    def __init__(self, directory: str) -> None:
        """Begin to be alive. Raises OSError."""
        self._directory = directory
        self.domain = _domain(directory)
        self.keeper = self.domain + os.urandom(OWN_DIGITS // 2).hex()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self.descriptor = os.open(self._path(self.keeper), flags, 0o600)
        error = _kernel_flock(self.descriptor, fcntl.LOCK_EX)
        if error:
            raise OSError(error, os.strerror(error), self._path(self.keeper))

    def _path(self, keeper: str) -> str:
        return f"{self._directory}/a-{keeper}"

    def is_dead(self, keeper: str) -> bool | None:
        """Return whether a keeper is dead, or None for one of another domain."""
        if not keeper.startswith(self.domain):
            return None
        if keeper == self.keeper:
            return False
        try:
            descriptor = os.open(self._path(keeper), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return True
        try:
            if _kernel_flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            os.unlink(self._path(keeper))
            return True
        finally:
            os.close(descriptor)

    def end(self) -> None:
        """The keeper leaves, and has no entry anywhere."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(self.keeper))


def _kernel_flock(descriptor: int, operation: int) -> int:
    """Return the kernel's errno, or 0. A command in a shell under the shim (`--env`) must not ask the shim."""
    return -int(lib.native_raw_flock(descriptor, operation))


def keeper_of_path(path: str, directory: str) -> str | None:
    """Return whose file in `directory` this is, or None if it is nobody's."""
    prefix = f"{directory}/a-"
    return path[len(prefix) :] if path.startswith(prefix) and "/" not in path[len(prefix) :] else None


def _domain(directory: str) -> str:
    path = f"{directory}/domain"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        pass
    else:
        # Written under a name of its own and then linked it would be whole at once; a reader of half of it waits below.
        os.write(descriptor, os.urandom(16).hex().encode())
        os.close(descriptor)
    with open("/proc/sys/kernel/random/boot_id", "rb") as boot, open(path, "rb") as own:
        return hashlib.sha256(boot.read() + own.read()).hexdigest()[:DOMAIN_DIGITS]
