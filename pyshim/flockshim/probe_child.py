"""Makes system calls in a child process, so that a call that hangs costs no more than that.

A call that does not return in time is given up, its process killed and not waited for: it may sleep
where no signal reaches it.
"""

import contextlib
import errno
import fcntl
import marshal
import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from typing import Any

from flockshim import FlockshimError
from flockshim._native import lib

_MESSAGE_BYTES = 65536
# How long the death of a killed process is awaited, which is at once unless it can't be killed.
_DEATH_SECONDS = 0.5

_FLOCK = {"shared": fcntl.LOCK_SH, "exclusive": fcntl.LOCK_EX, "unlock": fcntl.LOCK_UN}
_RECORD = {"shared": fcntl.F_RDLCK, "exclusive": fcntl.F_WRLCK, "unlock": fcntl.F_UNLCK}


class Hangs(Exception):
    """A call has not returned in time."""


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

    def ask(self, name: str, *arguments: Any) -> Any:
        """Return what the function *name* of _CALLS returns there.

        :raises OSError: as it does there.
        :raises Hangs: when it does not return in time; there is nothing more to ask then.
        :raises FlockshimError: when the process has died.
        """
        try:
            self._socket.sendall(marshal.dumps((name, arguments)))
            answer = self._socket.recv(_MESSAGE_BYTES)
        except socket.timeout:  # TimeoutError is another one before Python 3.10
            raise Hangs from None
        except OSError:
            answer = b""
        if not answer:
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
