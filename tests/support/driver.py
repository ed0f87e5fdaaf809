"""The test's side of tests/programs/lockdriver.c: a process that does what it is told."""

from __future__ import annotations

import array
import errno
import fcntl
import itertools
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from support.proc import DEADLINE, await_end, children, host_thread
from support.programs import program

ERRNO_BEFORE = 1234
PACKET_MAX = 8192

SH, EX, UN, NB = fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN, fcntl.LOCK_NB
OK = 0
BUSY = errno.EWOULDBLOCK


class Died(AssertionError):
    """The driver ended where an answer was expected."""


class Call:
    """A command that was sent and may not have been answered yet."""

    def __init__(self, driver: Driver, token: str) -> None:
        self.driver = driver
        self.token = token
        self.tid = driver.tid

    def returned(self) -> bool:
        """Whether the answer is here already."""
        self.driver.pump(0)
        return bool(self.driver.answers.get(self.token))

    def value(self, deadline: float = DEADLINE) -> tuple[int, int]:
        """Wait for the answer: the call's value and the errno after it."""
        end = time.monotonic() + deadline
        while not self.driver.answers.get(self.token):
            left = end - time.monotonic()
            if left <= 0 or not self.driver.pump(left):
                raise AssertionError(f"no answer within {deadline} s: {self.driver}")
        return self.driver.answers[self.token].pop(0)

    def result(self, deadline: float = DEADLINE) -> int:
        """Wait for a call that returns 0 or -1: 0, or the errno of its failure."""
        value, err = self.value(deadline)
        if value == 0:
            assert err == ERRNO_BEFORE, f"errno was changed to {err} by a success"
            return OK
        assert value == -1, f"neither 0 nor -1: {value}"
        return err

    def more(self) -> str:
        """What was answered besides, to a call that has returned."""
        return self.driver.more[self.token]


class Driver:
    """One loop of commands: a process, or one of its threads."""

    def __init__(self, pid: int, control: socket.socket, fleet: Fleet, tid: int = 0) -> None:
        self.pid = pid
        self.tid = tid or pid
        self.elsewhere = False  # in a pid namespace of its own
        self.control = control
        self.fleet = fleet
        self.answers: dict[str, list[tuple[int, int]]] = {}
        self.more: dict[str, str] = {}
        self.tokens = itertools.count(1)
        fleet.drivers.append(self)

    def __repr__(self) -> str:
        return f"<driver {self.pid}>"

    def start(self, name: str, *args: object, passed: int | None = None) -> Call:
        """Send a command without waiting for the answer."""
        token = str(next(self.tokens))
        self.answers[token] = []
        # Signals are numbers; before Python 3.11 str() gives their names.
        words = [str(int(arg)) if isinstance(arg, int) else str(arg) for arg in args]
        packet = " ".join([token, name, *words]).encode()
        rights = [] if passed is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _fds(passed))]
        self.control.sendmsg([packet], rights)
        return Call(self, token)

    def pump(self, seconds: float) -> bool:
        """Take in what has come, waiting SECONDS for it at most; whether something came."""
        if not select.select([self.control], [], [], seconds)[0]:
            return False
        packet = self.control.recv(PACKET_MAX)
        if not packet:
            raise Died(f"{self} ended: {self.fleet.errors()!r}")
        token, value, err, *more = packet.decode().split()
        self.answers[token].append((int(value), int(err)))
        self.more[token] = more[0] if more else ""
        return True

    def ask(self, name: str, *args: object, passed: int | None = None) -> int:
        """Do a command that must succeed; its value."""
        value, err = self.start(name, *args, passed=passed).value()
        if value == -1:
            raise OSError(err, f"{name}{args}: {os.strerror(err)}")
        return value

    def open(self, path: Path | str, flags: int = os.O_RDWR | os.O_CREAT) -> int:
        return self.ask("open", path, flags)

    def close(self, fd: int) -> None:
        self.ask("close", fd)

    def flock(self, fd: int, operation: int) -> int:
        """0, or the errno. In the thread that takes the commands."""
        return self.start("flock", fd, operation).result()

    def flock_later(self, fd: int, operation: int) -> Call:
        """The same in a thread of its own, so that the driver goes on taking commands."""
        return self.later("flock", fd, operation)

    def later(self, name: str, *args: object) -> Call:
        """Any command in a thread of its own."""
        call = self.start("later", name, *args)
        tid = call.value()[0]
        call.tid = host_thread(self.pid, tid) if self.elsewhere else tid
        return call

    def probe(self, path: Path | str, operation: int) -> int:
        """Result of a non-blocking try from a description of its own, undone at once."""
        return self.start("probe", path, operation).result()

    def fork(self) -> Driver:
        """A child, by fork(2)."""
        return self._offspring("fork")

    def spawn(self, without_preload: bool = False, fleet: Fleet | None = None) -> Driver:
        """A child with a fresh program, by posix_spawn(3); one of another FLEET's, if that is given."""
        return self._offspring("spawn", int(without_preload), fleet=fleet)

    def thread(self) -> Driver:
        """Another thread of this process that takes commands."""
        before = set(os.listdir(f"/proc/{self.pid}/task"))
        thread = self._offspring("thread")
        thread.pid = self.pid
        (tid,) = set(os.listdir(f"/proc/{self.pid}/task")) - before
        thread.tid = int(tid)
        return thread

    def _offspring(self, name: str, *args: object, fleet: Fleet | None = None) -> Driver:
        ours, theirs = control_pair()
        with theirs:
            pid = self.ask(name, *args, passed=theirs.fileno())
        return Driver(pid, ours, fleet or self.fleet)

    def exec(self, without_preload: bool = False) -> None:
        """Become a fresh program with the same descriptors."""
        self.start("exec", int(without_preload)).result()

    def adopt(self, fd: int) -> int:
        """Give the process a duplicate of the test's own descriptor FD."""
        return self.ask("adopt", passed=fd)

    def signal(self, which: int) -> None:
        os.kill(self.pid, which)

    def kill(self) -> None:
        """kill -9, and wait until nothing is left of it."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], DEADLINE)
        except ProcessLookupError:
            pass
        finally:
            os.close(handle)
        self.fleet.reap()

    def exit(self, status: int = 0) -> None:
        """Leave by exit(3), and wait until nothing is left of it."""
        self.start("exit", status)
        await_end(self.pid)
        self.fleet.reap()


class Fleet:
    """The drivers of one test, ended together, and what they wrote on standard error."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.drivers: list[Driver] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in end())

    def start(
        self,
        environment: Mapping[str, str] | None = None,
        *prefix: str,
        executable: Path | None = None,
    ) -> Driver:
        """A new driver; PREFIX is a command that runs the one behind it, in place or as a child."""
        ours, theirs = control_pair()
        with theirs:
            process = subprocess.Popen(
                [*prefix, str(executable or program("lockdriver")), str(theirs.fileno())],
                env=dict(self.environment if environment is None else environment),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=self.stderr,
            )
        self.processes.append(process)
        driver = Driver(process.pid, ours, self)
        if prefix:
            driver.ask("sigcount", 1)  # whoever answers is the driver, and runs
            while offspring := children(driver.pid):
                driver.pid = driver.tid = offspring[0]
                driver.elsewhere = True
        return driver

    def errors(self) -> str:
        """All that any of the drivers has written on standard error."""
        self.stderr.seek(0)
        text = self.stderr.read().decode(errors="replace")
        self.stderr.seek(0, os.SEEK_END)
        return text

    def forget_errors(self) -> None:
        """The test has judged what was written so far."""
        self.stderr.seek(0)
        self.stderr.truncate()

    def reap(self) -> None:
        for process in self.processes:
            process.poll()

    def end(self) -> None:
        for driver in self.drivers:
            driver.kill()
            driver.control.close()
        for process in self.processes:
            process.wait()
        self.stderr.close()


def connect(sender: Driver, receiver: Driver) -> tuple[int, int]:
    """A descriptor in each of the two processes, of the two ends of one socket pair."""
    left, right = socket.socketpair()
    with left, right:
        return sender.adopt(left.fileno()), receiver.adopt(right.fileno())


def pass_descriptor(sender: Driver, fd: int, receiver: Driver) -> int:
    """Give RECEIVER a descriptor of the description that SENDER has as FD, by SCM_RIGHTS."""
    out, into = connect(sender, receiver)
    sender.ask("sendfd", out, fd)
    got = receiver.ask("recvfd", into)
    sender.close(out)
    receiver.close(into)
    return got


def control_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _fds(fd: int) -> array.array[int]:
    return array.array("i", [fd])
