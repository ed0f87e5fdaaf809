"""``--via seccomp``: the process that answers the lock calls of COMMAND and of all that it starts.

The launcher starts the supervisor, and that starts COMMAND, so that it is an ancestor of all whose descriptors it must
duplicate (Yama allows no others: ``ptrace_scope`` in the kernel's documentation). It takes in those whose own parents
have ended, and ends when nobody is left, so whatever COMMAND leaves running stays covered. The lock calls themselves
are the matter of ``shim/supervise.c``; this is about processes.
"""

from __future__ import annotations

# The socket module would take a third of the time that flockshim needs to start.
import _socket
import contextlib
import errno
import fcntl
import os
import select
import signal
import zlib

from flockshim import holders, limits
from flockshim._native import lib
from flockshim.locking import Locker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable, Iterator, Mapping
    from typing import NoReturn

# What the supervisor tells the launcher.
STARTED, FAILED, STOPPED, ENDED, OTHERS = "started", "failed", "stopped", "ended", "others"

# Settings that make a difference to what a lock call is answered.
ANSWERS = ("MODE", "ERRNO", "FORCE", "SIMULATE", "TIMEOUT", "LEASE", "ON_LOST", "DIR")


class SupervisedChild:
    """COMMAND, as the launcher sees it through the supervisor: see `parent.Child`."""

    def __init__(self, environ: Mapping[str, str], become: Callable[[], NoReturn], say: Callable[[str], None]) -> None:
        """Start supervisor and COMMAND.

        :param environ: the settings.
        :param say: writes a line to standard error.
        :raises RefusedError: when the kernel, or who confines us, does not permit it; says what.
        """
        self._say = say
        # Should the supervisor be killed, COMMAND becomes a child of this process.
        lib.native_become_subreaper()
        _fill_standard_descriptors()
        with _refused_for_limits():
            self._channel, theirs = _pair()
            self._supervisor = os.fork()
        if self._supervisor == 0:
            try:
                self._channel.close()
                _Supervisor(theirs, environ).run(become)
            finally:
                os._exit(125)
        theirs.close()
        self._alive = True
        word, text = self._receive()
        if word != STARTED:
            os.waitpid(self._supervisor, 0)
            raise RefusedError(text or "the supervisor has ended before COMMAND was started")
        self.pid = int(text)
        self._have_changes_signalled()

    def status(self) -> int | None:
        """Return what ``waitpid(2)`` with WNOHANG and WUNTRACED would, or None where nothing has changed."""
        while self._alive:
            word, text = self._receive(_socket.MSG_DONTWAIT)
            if word == STOPPED:
                if holders.is_stopped(self.pid):
                    return int(text)
                continue  # no longer
            if word == ENDED:
                self._take_leave()
                return int(text)
            if self._alive:
                return None
            # Only once: from here on there is nobody to be asked.
            self._say("the supervisor was killed: the lock calls of COMMAND fail from now on")
        return self._wait_as_parent()

    def _wait_as_parent(self) -> int | None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                # The supervisor had waited for it, and was killed before it told.
                return signal.SIGKILL
            if pid in (0, self.pid):
                return status if pid else None

    def _receive(self, flags: int = 0) -> tuple[str, str]:
        try:
            packet = self._channel.recv(4096, flags)
        except BlockingIOError:
            return "", ""
        except ConnectionResetError:
            packet = b""
        self._alive = bool(packet)
        word, _, text = packet.decode(errors="surrogateescape").partition(" ")
        return word, text

    def _have_changes_signalled(self) -> None:
        descriptor = self._channel.fileno()
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGCHLD)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_ASYNC)
        # For what was told before that.
        os.kill(os.getpid(), signal.SIGCHLD)

    def _take_leave(self) -> None:
        """No signal is sent to COMMAND's pid any more, which may be another's from here on."""
        with contextlib.suppress(OSError):
            self._channel.send(b"seen")
            if self._receive()[0] != OTHERS:
                # So that time(1) and the shell's `times` count what COMMAND has used.
                os.waitpid(self._supervisor, 0)


class RefusedError(Exception):
    """What keeps COMMAND from being supervised."""


class _Supervisor:
    """The supervisor's process."""

    def __init__(self, launcher: socket, environ: Mapping[str, str]) -> None:
        self._launcher = launcher
        self._locker = Locker(environ)
        self._mark = mark(environ)
        self._command = 0
        self._has_ended = False
        self._listener = -1

    def run(self, become: Callable[[], NoReturn]) -> NoReturn:
        """Start COMMAND, and answer lock calls until nobody is left who makes them."""
        lib.native_become_subreaper()
        try:
            with _refused_for_limits():
                ours = self._fork(become)
                self._begin(ours)
        except RefusedError as refused:
            self._tell(FAILED, str(refused))
            if self._command:
                os.kill(self._command, signal.SIGKILL)
            os._exit(125)
        self._tell(STARTED, str(self._command))
        # Not before the launcher can wait for it.
        ours.send(b"go")
        ours.close()
        self._look_after_children()

    def _fork(self, become: Callable[[], NoReturn]) -> socket:
        ours, theirs = _pair()
        self._command = os.fork()
        if self._command == 0:
            try:
                ours.close()
                self._launcher.close()
                _confine(theirs, self._mark)
                theirs.close()
                become()
            finally:
                os._exit(125)
        theirs.close()
        return ours

    def _begin(self, command: socket) -> None:
        number = _number_from(command)
        if number < 0:
            raise RefusedError(_why_no_filter(-number))
        handle = lib.native_pidfd_open(self._command)
        if handle < 0:
            raise RefusedError(_why_no_descriptor("pidfd_open(2)", "Linux 5.3", -handle))
        self._listener = lib.native_pidfd_getfd(self._command, number)
        if self._listener < 0:
            raise RefusedError(_why_no_descriptor("pidfd_getfd(2)", "Linux 5.6", -self._listener))
        self._let_go_of_everything(command)
        limits.raise_to_hard()
        error = lib.native_supervise(self._locker.config, self._listener, self._mark)
        if error < 0:
            raise RefusedError(f"no thread can be started ({os.strerror(-error)}): raise the limit (ulimit -u)")
        command.send(b"ping")
        if _number_from(command) != self._mark:
            raise RefusedError("another filter answers lock calls itself: an outer flockshim, or a container's")

    def _let_go_of_everything(self, command: socket) -> None:
        """Who reads the other end of a pipe waits for its last writer, and a directory in use cannot be unmounted."""
        os.chdir("/")
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        kept = {0, 1, 2, self._listener, command.fileno(), self._launcher.fileno()}
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in kept:
                with contextlib.suppress(OSError):
                    os.close(int(name))

    def _tell(self, word: str, text: str = "") -> None:
        with contextlib.suppress(OSError):  # the launcher was killed
            # A launcher that is stopped reads nothing, and needs but one word of it.
            flags = _socket.MSG_NOSIGNAL | (_socket.MSG_DONTWAIT if word == STOPPED else 0)
            self._launcher.send(f"{word} {text}".encode(errors="surrogateescape"), flags)

    def _look_after_children(self) -> NoReturn:
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
            except ChildProcessError:
                os._exit(0)
            assert info
            if info.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED):
                self._child_was_stopped(info.si_pid)
            elif info.si_pid == self._command:
                self._end_of_command()
            else:
                os.waitpid(info.si_pid, 0)
                if self._has_ended:
                    self._end_if_deserted()

    def _child_was_stopped(self, pid: int) -> None:
        """It may run again by now, or have ended: nothing but the stop is taken."""
        with contextlib.suppress(ChildProcessError):
            stop = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
            if stop and pid == self._command:
                self._tell(STOPPED, str(stop.si_status << 8 | 0x7F))

    def _end_of_command(self) -> None:
        """COMMAND's pid stays its own until the launcher knows that it has ended."""
        info = os.waitid(os.P_PID, self._command, os.WEXITED | os.WNOWAIT)
        assert info
        dumped = 0x80 if info.si_code == os.CLD_DUMPED else 0
        status = info.si_status << 8 if info.si_code == os.CLD_EXITED else info.si_status | dumped
        self._tell(ENDED, str(status))
        with contextlib.suppress(OSError):
            self._launcher.recv(16)
        os.waitpid(self._command, 0)
        self._has_ended = True
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        self._end_if_deserted()
        self._tell(OTHERS)
        self._launcher.close()
        os.dup2(0, 2)

    def _end_if_deserted(self) -> None:
        """The keeper may have become a child of this process, but is not behind the filter."""
        watch = select.poll()
        watch.register(self._listener, 0)
        # Linux 5.8; before that, this process stays until it has no children.
        if any(event & select.POLLHUP for _, event in watch.poll(0)):
            os._exit(0)


@contextlib.contextmanager
def _refused_for_limits() -> Iterator[None]:
    """Have what a limit of the user's forbids said as the other reasons are."""
    try:
        yield
    except OSError as error:
        limit = {errno.EAGAIN: "no process can be started", errno.EMFILE: "no descriptor is left"}
        option = {errno.EAGAIN: "ulimit -u", errno.EMFILE: "ulimit -n"}
        if error.errno not in limit:
            raise RefusedError(os.strerror(error.errno or 0)) from None
        raise RefusedError(f"{limit[error.errno]}; raise the limit ({option[error.errno]})") from None


def _pair() -> tuple[socket, socket]:
    return _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)


def _fill_standard_descriptors() -> None:
    """Nothing of ours may have their numbers, which COMMAND finds closed again: execve(2), O_CLOEXEC."""
    while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        pass
    os.close(descriptor)


def mark(environ: Mapping[str, str]) -> int:
    """Return a number that tells supervisors with other settings apart."""
    settings = [environ.get(f"FLOCKSHIM_{name}", "") for name in ANSWERS]
    return zlib.crc32("\0".join(settings).encode(errors="surrogateescape")) & 0x3FFFFFFF | 1


def is_supervised(environ: Mapping[str, str]) -> bool | None:
    """Return whether a supervisor of ours covers this process, with the settings of *environ*; None: no supervisor."""
    answer = lib.native_ping_supervisor()
    if answer == -lib.PING_ERROR_OF_SUCCESS:
        return environ["FLOCKSHIM_MODE"] == "success"
    return None if answer < 0 else bool(answer == mark(environ))


def _confine(supervisor: socket, own_mark: int) -> None:
    """Install the filter in this process, and go on when the supervisor hears it."""
    listener = lib.native_report_lock_calls()
    supervisor.send(str(listener).encode())
    supervisor.recv(16)
    os.close(listener)
    answer = lib.native_ping_supervisor()
    supervisor.send(str(answer).encode())
    if answer != own_mark or not supervisor.recv(16):
        os._exit(125)


def _number_from(command: socket) -> int:
    text = command.recv(16)
    if not text:
        raise RefusedError("COMMAND's process has ended")
    return int(text)


def _why_no_filter(error: int) -> str:
    if error == errno.EBUSY:
        return "there can be but one supervisor: an outer flockshim's with other settings is there, or a container's"
    if error in (errno.ENOSYS, errno.EINVAL):
        return "this kernel has no seccomp user notification (Linux 5.0, CONFIG_SECCOMP_FILTER)"
    return f"seccomp(2) is refused here: {os.strerror(error)}"


def _why_no_descriptor(call: str, since: str, error: int) -> str:
    if error == errno.EMFILE:
        return "no descriptor is left; raise the limit (ulimit -n)"
    if error == errno.ENOSYS:
        return f"{call} is missing ({since}), or a container hides it"
    return f"{call} is refused here: {os.strerror(error)}"


def confine_and_answer(error: int) -> None:
    """Have all lock calls of this process, and of all that it starts, answered with an errno or 0.

    :raises RefusedError: where seccomp(2) is refused.
    """
    result = lib.native_answer_lock_calls(error)
    if result < 0:
        raise RefusedError(_why_no_filter(-result))
