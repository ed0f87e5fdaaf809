"""Who is alive in this domain: every keeper has, for life, a kernel lock on a file in the rendezvous directory.

A domain is where such locks are seen: one rendezvous directory, until the host is started again. No pid is judged.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile

from flockshim._native import lib

DOMAIN_BYTES = 16
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
            # Whoever judges it at the same moment may have done that.
            with contextlib.suppress(FileNotFoundError):
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
    if not os.path.exists(path):
        _make_domain(path)
    with open("/proc/sys/kernel/random/boot_id", "rb") as boot, open(path, "rb") as own:
        text = own.read()
        # Two machines that both read nothing would take each other's living keepers for dead.
        if len(text) != 2 * DOMAIN_BYTES:
            raise OSError(errno.EIO, "is damaged: end all programs that lock, and remove it", path)
        return hashlib.sha256(boot.read() + text).hexdigest()[:DOMAIN_DIGITS]


def _make_domain(path: str) -> None:
    """Make the file, whole from the beginning, unless somebody else is faster."""
    descriptor, draft = tempfile.mkstemp(prefix="domain-", dir=os.path.dirname(path))
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(DOMAIN_BYTES).hex().encode())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
