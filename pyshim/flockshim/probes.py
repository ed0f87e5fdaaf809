"""Tries what a directory's file system can lock, in child processes, so that a call that hangs costs no more than one.

Everything that touches the file system is done by a :class:`Child`. A call that does not return in
time is given up and its process killed, and not waited for: it may sleep where no signal reaches it.
"""

import contextlib
import errno
import fcntl
import functools
import marshal
import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from flockshim import FlockshimError, errnos
from flockshim._native import lib

OK = "ok"
HANGS = "hangs"
EXCLUDES_NOBODY = "excludes nobody"
SKIPPED = "skipped"

KINDS = ("flock", "fcntl", "ofd")
"""flock(2), and the record locks of processes and of open file descriptions (fcntl(2))."""
LOCK_PROBES = ("shared", "exclusive", "nonblocking", "conflict")
NAME_PROBES = ("exclusive_create", "link", "rename", "symlink")

_REFUSED = (errno.EWOULDBLOCK, errno.EACCES)
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_MESSAGE_BYTES = 65536
# How long the death of a killed process is awaited, which is at once unless it can't be killed.
_DEATH_SECONDS = 0.5

_FLOCK = {"shared": fcntl.LOCK_SH, "exclusive": fcntl.LOCK_EX, "unlock": fcntl.LOCK_UN}
_RECORD = {"shared": fcntl.F_RDLCK, "exclusive": fcntl.F_WRLCK, "unlock": fcntl.F_UNLCK}


class Hangs(Exception):
    """A call has not returned in time."""


class Place(NamedTuple):
    """What the directory is."""

    path: str
    """Absolute, without symbolic links."""
    device: int


def examine(directory: str) -> tuple[str, int]:
    """Return the real path and st_dev of *directory*.

    :raises OSError: when it cannot be had, ENOTDIR when it is no directory.
    """
    path = os.path.realpath(directory)
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return path, status.st_dev


def lock(descriptor: int, kind: str, mode: str, wait: bool) -> None:
    """Ask the kernel for a lock on the whole file, past a shim that may be preloaded.

    :param kind: one of KINDS.
    :param mode: ``shared``, ``exclusive`` or ``unlock``.
    :param wait: until it is free.
    :raises OSError: as flock(2) and fcntl(2) say.
    """
    if kind == "flock":
        error = lib.native_raw_flock(descriptor, _FLOCK[mode] | (0 if wait else fcntl.LOCK_NB))
    else:
        error = lib.native_raw_record_lock(descriptor, _RECORD[mode], kind == "ofd", wait)
    if error:
        raise OSError(-error, os.strerror(-error))


_CALLS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (examine, lock, os.open, os.close, os.link, os.symlink, os.rename, os.unlink)
}


class Child:
    """A process that makes calls for this one."""

    def __init__(self, seconds: float) -> None:
        """Start it; each of its calls may take *seconds*."""
        self._seconds = seconds
        parent = os.getpid()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            _serve(theirs, parent)
        theirs.close()
        self._socket.settimeout(seconds)

    def ask(self, name: str, *arguments: object) -> Any:
        """Return what the function *name* of _CALLS returns there.

        :raises OSError: as it does there.
        :raises Hangs: when it does not return in time; the process is killed then.
        :raises FlockshimError: when the process has died.
        """
        try:
            self._socket.sendall(marshal.dumps((name, arguments)))
            answer = self._socket.recv(_MESSAGE_BYTES)
        except socket.timeout:  # TimeoutError is another one before Python 3.10
            self.end()
            raise Hangs from None
        except OSError:
            answer = b""
        if not answer:
            self.end()
            raise FlockshimError("a process that tried locks was killed: try again")
        error, result = marshal.loads(answer)
        if error:
            raise OSError(error, os.strerror(error))
        return result

    def end(self) -> None:
        """Kill it; what it has open is closed then, unless it cannot die yet."""
        self._socket.close()
        if not self._pid:
            return
        os.kill(self._pid, signal.SIGKILL)
        deadline = time.monotonic() + _DEATH_SECONDS
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
            while os.waitpid(self._pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.002)
        self._pid = 0


def _serve(requests: socket.socket, parent: int) -> None:
    """Answer calls until the parent ends. Nothing of Python's own exit may run, as it may hang too."""
    try:
        lib.native_die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            return
        # Away from the terminal's signals: Ctrl-C is the parent's to clean up after, and a call
        # must go on while Ctrl-Z stops the parent, lest its time be up at once thereafter.
        os.setsid()
        # Who reads the parent's output must not wait for a child that cannot die.
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        while True:
            message = requests.recv(_MESSAGE_BYTES)
            if not message:
                return
            requests.sendall(marshal.dumps(_answer(*marshal.loads(message))))
    finally:
        os._exit(0)


def _answer(name: str, arguments: tuple[Any, ...]) -> tuple[int, Any]:
    try:
        return 0, _CALLS[name](*arguments)
    except OSError as error:
        return error.errno or errno.EIO, None


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
        """End all processes and remove all files."""
        self._end_children()
        remover = self._child()
        for path in self._made:
            try:
                remover.ask("unlink", path)
            except FileNotFoundError:
                continue
            except Hangs:
                self.left_behind.append(path)
                remover = self._child()
            except OSError:
                self.left_behind.append(path)
        self._end_children()

    def writable(self) -> None:
        """Make and remove a file.

        :raises OSError: when that is not possible.
        :raises Hangs: when the file system does not answer.
        """
        child, path = self._child(), self._path("writable")
        child.ask("close", child.ask("open", path, _NEW_FILE, 0o600))
        child.ask("unlink", path)

    def names(self) -> dict[str, str]:
        """Try what is done with names; return the outcome by the names of NAME_PROBES."""
        return {name: self._outcome(getattr(self, f"_{name}")) for name in NAME_PROBES}

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
        except _ExcludesNobodyError:
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


class _ExcludesNobodyError(Exception):
    """What only one may have was given to two."""


def _must_fail(number: int, child: Child, *call: object) -> None:
    """Make a call that is refused with *number* if the same call of another has succeeded before."""
    try:
        child.ask(str(call[0]), *call[1:])
    except OSError as error:
        if error.errno == number:
            return
        raise
    raise _ExcludesNobodyError


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
        raise _ExcludesNobodyError


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


def _try_conflict(one: Contender, other: Contender) -> None:
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
    "conflict": _try_conflict,
}


def errnos_name(number: Optional[int]) -> str:
    """Return the name of an errno as ``--errno`` takes it, or its number if it has none."""
    if number == errnos.ENOTSUPP:
        return "ENOTSUPP"
    if number == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # the errno module says ENOTSUP, which is the same number
    return errno.errorcode.get(number or 0, str(number))
