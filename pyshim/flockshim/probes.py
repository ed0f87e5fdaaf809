"""What ``--check`` tries in a directory: locks between two processes, and what is done with names.

Everything that touches the file system is done by a :class:`flockshim.probe_child.Child`.
"""

import errno
import functools
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from flockshim import errnos
from flockshim.probe_child import Child, Hangs

OK = "ok"
HANGS = "hangs"
EXCLUDES_NOBODY = "excludes nobody"
SKIPPED = "skipped"

KINDS = ("flock", "fcntl", "ofd")
"""flock(2), and the record locks of processes and of open file descriptions (fcntl(2))."""
LOCK_PROBES = ("shared", "exclusive", "nonblocking", "conflict")
NAME_PROBES = ("exclusive_create", "link", "rename", "symlink")

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_REFUSED = (errno.EWOULDBLOCK, errno.EACCES)
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Place(NamedTuple):
    """What the directory is."""

    path: str
    """Absolute, without symbolic links."""
    device: int


def place(directory: str, seconds: float) -> Place:
    """Return what *directory* is.

    :param seconds: how long the file system may take.
    :raises OSError: when it is missing, no directory or may not be read.
    :raises Hangs: when the file system does not answer.
    """
    child = Child(seconds)
    try:
        return Place(*child.ask("examine", directory))
    finally:
        child.end()


class Trial:
    """Tries locks and names in temporary files in a directory; use it with ``with``, which removes them."""

    def __init__(self, directory: str, seconds: float) -> None:
        """Prepare; nothing is tried yet.

        :param directory: absolute.
        :param seconds: how long each call may take.
        """
        self._prefix = os.path.join(directory, f".flockshim-check-{os.urandom(8).hex()}.")
        self._seconds = seconds
        self._children: list[Child] = []
        self._made: list[str] = []
        self.left_behind: list[str] = []
        """The temporary files that could not be removed, known after the end of ``with``."""

    def __enter__(self) -> "Trial":
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes and remove all files, undisturbed by the signals that end a command."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        try:
            self._remove()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _remove(self) -> None:
        # First, because an NFS client renames what is removed while it is open.
        self._end_children()
        remover = self._child()
        while self._made:
            try:
                remover.ask("unlink", self._made[-1])
            except Hangs:
                break  # so would the next one
            except OSError as error:
                # What cannot be written to says EROFS of a missing file too.
                if error.errno not in (errno.ENOENT, errno.EROFS):
                    self.left_behind.append(self._made[-1])
            self._made.pop()
        self.left_behind += self._made
        self._end_children()

    def writable(self) -> None:
        """Make and remove a file.

        :raises OSError: when that is not possible.
        :raises Hangs: when the file system does not answer.
        """
        child, path = self._child(), self._path("writable")
        child.ask("close", child.ask("open", path, _NEW_FILE, 0o600))
        child.ask("unlink", path)
        self._made.remove(path)

    def names(self) -> dict[str, str]:
        """Try what is done with names; return the outcome by the names of NAME_PROBES."""
        outcomes = dict.fromkeys(NAME_PROBES, SKIPPED)
        for name in NAME_PROBES:
            outcomes[name] = self._outcome(getattr(self, f"_{name}"))
            if outcomes[name] == HANGS:
                break
        return outcomes

    def locks(self, kind: str) -> dict[str, str]:
        """Try the locks of *kind* between two processes; return the outcome by the names of LOCK_PROBES."""
        outcomes = dict.fromkeys(LOCK_PROBES, SKIPPED)
        path = self._path(kind)
        pair: list[Contender] = []

        def begin() -> None:
            for flags in (_NEW_FILE, os.O_RDWR | os.O_CLOEXEC):
                child = self._child()
                pair.append(Contender(child, child.ask("open", path, flags, 0o600), kind))

        begun = self._outcome(begin)
        if begun != OK:
            return {**outcomes, "shared": begun}
        for probe in LOCK_PROBES:
            if probe == "conflict" and not outcomes["exclusive"] == outcomes["nonblocking"] == OK:
                break
            outcomes[probe] = self._outcome(functools.partial(_LOCK_TRIALS[probe], *pair))
            if outcomes[probe] == HANGS:
                break
        return outcomes

    def _child(self) -> Child:
        child = Child(self._seconds)
        self._children.append(child)
        return child

    def _end_children(self) -> None:
        while self._children:
            self._children.pop().end()

    def _path(self, name: str) -> str:
        """Return the path of a temporary file, which is removed at the end if it is there."""
        path = self._prefix + name
        self._made.append(path)
        return path

    def _outcome(self, attempt: Callable[[], None]) -> str:
        try:
            attempt()
        except Hangs:
            return HANGS
        except ExcludesNobody:
            return EXCLUDES_NOBODY
        except OSError as error:
            return errnos_name(error.errno)
        return OK

    def _file(self, child: Child, name: str) -> str:
        path = self._path(name)
        child.ask("close", child.ask("open", path, _NEW_FILE, 0o600))
        return path

    def _exclusive_create(self) -> None:
        child = self._child()
        path = self._file(child, "create")
        _must_fail(errno.EEXIST, child, "open", path, _NEW_FILE, 0o600)

    def _link(self) -> None:
        child = self._child()
        path, name = self._file(child, "linked"), self._path("link")
        child.ask("link", path, name)
        _must_fail(errno.EEXIST, child, "link", path, name)

    def _rename(self) -> None:
        child = self._child()
        old, new = self._file(child, "old"), self._file(child, "new")
        child.ask("rename", old, new)
        _must_fail(errno.ENOENT, child, "rename", old, new)

    def _symlink(self) -> None:
        child, name = self._child(), self._path("symlink")
        child.ask("symlink", "target", name)
        _must_fail(errno.EEXIST, child, "symlink", "target", name)


class ExcludesNobody(Exception):
    """What only one may have was given to two."""


def _must_fail(number: int, child: Child, name: str, *arguments: Any) -> None:
    """Make a call that is refused with *number* if the same call of another has succeeded before."""
    try:
        child.ask(name, *arguments)
    except OSError as error:
        if error.errno == number:
            return
        raise
    raise ExcludesNobody


class Contender(NamedTuple):
    """A process that has the file open."""

    child: Child
    descriptor: int
    kind: str

    def take(self, mode: str, wait: bool = False) -> None:
        """Take a lock, or give it up; raises as :meth:`Child.ask`."""
        self.child.ask("lock", self.descriptor, self.kind, mode, wait)

    def must_be_refused(self, mode: str) -> None:
        """Try for a lock that another holds."""
        try:
            self.take(mode)
        except OSError as error:
            if error.errno in _REFUSED:
                return
            raise
        raise ExcludesNobody


def _try_shared(one: Contender, other: Contender) -> None:
    one.take("shared", wait=True)
    other.take("shared")
    one.take("unlock")
    other.take("unlock")


def _try_exclusive(one: Contender, _: Contender) -> None:
    one.take("exclusive", wait=True)
    one.take("unlock")


def _try_nonblocking(_: Contender, other: Contender) -> None:
    other.take("exclusive")
    other.take("unlock")


def try_conflict(one: Contender, other: Contender) -> None:
    """Try all that must be refused while another holds a lock, and that it can be had thereafter.

    :raises ExcludesNobody: when it is not refused.
    """
    one.take("shared")
    other.must_be_refused("exclusive")
    one.take("unlock")
    one.take("exclusive")
    other.must_be_refused("shared")
    other.must_be_refused("exclusive")
    one.take("unlock")
    other.take("exclusive")
    one.must_be_refused("exclusive")
    other.take("unlock")


_LOCK_TRIALS = {
    "shared": _try_shared,
    "exclusive": _try_exclusive,
    "nonblocking": _try_nonblocking,
    "conflict": try_conflict,
}


def errnos_name(number: Optional[int]) -> str:
    """Return the name of an errno as ``--errno`` takes it, or its number if it has none."""
    if number == errnos.ENOTSUPP:
        return "ENOTSUPP"
    if number == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # the errno module says ENOTSUP, which is the same number
    return errno.errorcode.get(number or 0, str(number))
