"""Runs COMMAND as a child, and behaves as if it were COMMAND: towards the shell, the terminal and who sends signals."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time

from flockshim import FlockshimError, holders

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn, Protocol

    Begin = Callable[[Callable[[], NoReturn]], "Child"]

    class Child(Protocol):
        """COMMAND's process."""

        pid: int

        def status(self) -> int | None:
            """Return what ``waitpid(2)`` with WNOHANG and WUNTRACED does, or None where nothing has changed."""


# siginfo's si_code of what no process has sent: sigaction(2), SI_KERNEL.
FROM_KERNEL = 0x80

WATCH_SECONDS = 0.2

STOPS = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}

FAULTS = {"SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS"}

# The terminal sends these to the whole process group, so COMMAND has them already: termios(3), tty_ioctl(4).
FROM_TERMINAL = {
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGHUP,
    signal.SIGCONT,
    signal.SIGWINCH,
}


class ForkedChild:
    """COMMAND as a child of this process."""

    def __init__(self, become: Callable[[], NoReturn]) -> None:
        """Call *become* in a child."""
        try:
            self.pid = os.fork()
        except OSError as error:
            raise FlockshimError(f"no process can be started: {error.strerror}; raise the limit (ulimit -u)") from None
        if self.pid == 0:
            become()

    def status(self) -> int | None:
        """See `Child`."""
        pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
        return status if pid else None


def run(start: Callable[[], int], begin: Begin | None = None) -> int:
    """Call *start* in a child, where it becomes COMMAND, and wait for that; return its status as ``waitpid(2)`` does.

    The child is made by *begin*, which is given a function that calls *start* and does not return.

    What *start* returns where it did not become COMMAND is the child's exit status. Meanwhile signals sent to this
    process are handed on, and it is stopped and continued with the child. Signals are blocked from then on: COMMAND
    has had its end, and so must what follows.
    """
    kept = {"SIGKILL", "SIGSTOP", *FAULTS}
    handled = {number for number in signal.valid_signals() if _name(number) not in kept}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    # Where SIGCHLD is ignored children leave no status: wait(2).
    disposition = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def become() -> NoReturn:
        status = 125
        try:
            signal.signal(signal.SIGCHLD, disposition)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            status = start()
        finally:
            os._exit(status)

    child = (begin or ForkedChild)(become)
    while True:
        info = signal.sigwaitinfo(handled)
        if info.si_signo == signal.SIGCHLD:
            ended = _look_after(child)
            if ended is not None:
                return ended
        else:
            _hand_on(info, child.pid)


def end_as(status: int) -> int:
    """End as the child did that had this status of ``waitpid(2)``: does not return if that was by a signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        # One core dump is enough.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
        return 128 + number
    return os.WEXITSTATUS(status)


def _name(number: int) -> str:
    # Real-time signals have none.
    return getattr(number, "name", "")


def _look_after(child: Child) -> int | None:
    """Return the status of a child that has ended. If it was stopped, stop too, as the shell expects of a job."""
    while True:
        status = child.status()
        if status is None:
            return None
        if not os.WIFSTOPPED(status):
            return status
        # Others stop a child for its tracer: ptrace(2).
        if os.WSTOPSIG(status) in STOPS:
            _stop_with(child.pid, os.WSTOPSIG(status))


def _stop_with(child: int, number: int) -> None:
    """Stop by this signal until we are continued, or the child alone is."""
    us = os.getpid()
    try:
        watcher = os.fork()
    except OSError:  # no process is left: to run on is better than to stay stopped
        return
    if watcher == 0:
        try:
            _watch(child, us)
        finally:
            os._exit(0)
    os.kill(us, number)
    if number != signal.SIGSTOP:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    os.kill(watcher, signal.SIGKILL)
    os.waitpid(watcher, 0)


def _watch(child: int, parent: int) -> None:
    """Continue the parent as long as the child runs, until killed. A stopped process cannot see that itself."""
    # Whoever reads the other end of a pipe waits for its last writer.
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            os.close(int(name))
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
        if not holders.is_stopped(child):
            os.kill(parent, signal.SIGCONT)


def _hand_on(info: signal.struct_siginfo, child: int) -> None:
    number = info.si_signo
    with contextlib.suppress(OSError):  # set-uid, or just gone
        if info.si_code == FROM_KERNEL and number in FROM_TERMINAL:
            _hand_on_from_terminal(number, child)
        # Not what COMMAND has sent to its whole process group. And the shell continues whole groups.
        elif info.si_pid != child and (number != signal.SIGCONT or holders.is_stopped(child)):
            os.kill(child, number)


def _hand_on_from_terminal(number: int, child: int) -> None:
    group = os.getpgid(child)
    if group != os.getpgrp():
        # timeout(1), for one, makes a process group of its own.
        os.killpg(group, number)
    elif number == signal.SIGHUP and os.getsid(0) == os.getpid():
        # A terminal that is closed tells the leader of the session alone: credentials(7).
        os.kill(child, number)
