"""The keeper: the background process that holds the emulated locks of this user's programs in one control group.

Started by the shim as ``python -I -S keeper.py DIRECTORY KEY``, with the listening socket as descriptor 3.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        import _cffi_backend  # noqa: F401  (beside us in most installations, which spares importing site)
    except ImportError:
        import site

        site.main()

import fcntl
import resource
import select
import signal
import time

from flockshim import standby
from flockshim._native import ffi, lib
from flockshim.descriptions import Description, Descriptions, Processes
from flockshim.host import Host, Key, key_of_path
from flockshim.journal import Journal
from flockshim.locktable import GRANTED, REFUSED, FileLock, Waiter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LISTENER = 3
MAX_DESCRIPTORS = 65536
TICK_SECONDS = 1.0
DEFAULT_IDLE_SECONDS = 10.0
EINTR, EWOULDBLOCK = 4, 11
LOCK_EX, LOCK_NB, LOCK_UN = fcntl.LOCK_EX, fcntl.LOCK_NB, fcntl.LOCK_UN
STATUS_LOCK, KIND_ANSWER = lib.STATUS_LOCK, lib.KIND_ANSWER


class _File:
    """A file that is locked, waited for, or asked about."""

    __slots__ = ("descriptions", "key", "lock", "undecided")

    def __init__(self, key: Key, lock: FileLock) -> None:
        self.key = key
        self.lock = lock
        self.descriptions = Descriptions()
        # Non-blocking requests that another keeper's lock forbids, until that keeper has looked: see Host.
        self.undecided: list[tuple[_Connection, Description, bool, float]] = []


class _Connection:
    """A program that waits for an answer."""

    __slots__ = ("description", "descriptor", "file", "pid", "waiter")

    def __init__(self, descriptor: int, pid: int) -> None:
        self.descriptor = descriptor
        self.pid = pid
        self.file: _File | None = None
        self.waiter: Waiter | None = None


class Keeper:
    """One keeper's state and event loop."""

    def __init__(self, directory: str, key: str, journal: Journal, idle_seconds: float) -> None:
        """Take over what the journal names; it is empty in the beginning."""
        self.directory = directory
        self.socket_path = f"{directory}/k-{key}.sock"
        self.socket_identity = _identity(self.socket_path)
        self.journal = journal
        self.idle_seconds = idle_seconds
        self.files: dict[Key, _File] = {}
        self.packet = ffi.new("struct native_packet *")
        self.active = True
        self.idle_since = 0.0
        self.next_tick = time.monotonic() + TICK_SECONDS
        held = self._take_inventory()
        self.host = Host(directory)
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self.processes = Processes(self._watch, self._unwatch)
        self.connections: dict[int, _Connection] = {}
        self._watch(LISTENER, self._accept)
        if self.host.fileno() >= 0:
            self._watch(self.host.fileno(), self._neighbours)
        self._adopt(*held)

    # Taking over

    def _take_inventory(self) -> tuple[list[int], dict[Key, int]]:
        """Close every descriptor that is neither a held lock nor a proxy; waiting programs then ask again."""
        held, proxies = [], {}
        for name in os.listdir("/proc/self/fd"):
            descriptor = int(name)
            if descriptor <= LISTENER:
                continue
            try:
                path = os.readlink(f"/proc/self/fd/{descriptor}")
            except FileNotFoundError:
                continue
            key = key_of_path(path, self.directory)
            if self.journal.read(descriptor):
                held.append(descriptor)
            elif key:
                proxies[key] = descriptor
            else:
                os.close(descriptor)
        return held, proxies

    def _adopt(self, held: list[int], proxies: dict[Key, int]) -> None:
        for descriptor in held:
            entry = self.journal.read(descriptor)
            assert entry
            exclusive, device, inode, pid, number = entry
            description = Description(descriptor, (device, inode), pid, number)
            file = self._file(description.key)
            file.descriptions.add(description)
            file.lock.adopt(description, exclusive)
            self.processes.add(pid, description)
        for key, descriptor in proxies.items():
            file_or_none = self.files.get(key)
            mode = any(file_or_none.lock.holders.values()) if file_or_none else None
            self.host.adopt(key, descriptor, mode)

    # The event loop

    def _watch(self, descriptor: int, handler: Callable[[], None]) -> None:
        self.handlers[descriptor] = handler
        self.epoll.register(descriptor, select.EPOLLIN | select.EPOLLRDHUP)

    def _unwatch(self, descriptor: int) -> None:
        del self.handlers[descriptor]
        self.epoll.unregister(descriptor)

    def run(self, parent: int) -> None:
        """Serve until process `parent`, the standby, has died. Ends the process when idle for long enough."""
        orphaned, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake)
        lost_parent = os.getppid() != parent

        def lose_parent() -> None:
            nonlocal lost_parent
            lost_parent = True

        self._watch(orphaned, lose_parent)
        while not lost_parent:
            for descriptor, _ in self.epoll.poll(TICK_SECONDS):
                handler = self.handlers.get(descriptor)
                if handler:
                    handler()
            if self.processes.ended:
                self._processes_ended()
            now = time.monotonic()
            if now >= self.next_tick:
                self.next_tick = now + TICK_SECONDS
                self._tick(now)
        signal.set_wakeup_fd(-1)
        self.epoll.close()

    def _tick(self, now: float) -> None:
        for file in list(self.files.values()):
            self._check_holders(file, None)
            self._settle(file, insist=True)
        if self.host.fileno() < 0:
            self.host.recheck()
            self._heed_neighbours()
        for file in list(self.files.values()):
            self._decide(file, now)
        self.host.clean()
        if self.files or self.connections or self.active:
            self.idle_since = now
            self.active = False
        elif now - self.idle_since >= self.idle_seconds:
            self._leave()

    def _leave(self) -> None:
        """End, unless a program is just coming: whoever starts keepers holds the same lock."""
        try:
            start = os.open(f"{self.directory}/start.lock", os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(start, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(start)
            return
        except FileNotFoundError:
            os._exit(0)
        if select.select([LISTENER], [], [], 0)[0]:
            os.close(start)
            return
        self.host.clean(everything=True)
        if _identity(self.socket_path) == self.socket_identity:
            os.unlink(self.socket_path)
        os._exit(0)

    # Programs

    def _accept(self) -> None:
        packet = self.packet
        lib.native_accept(LISTENER, packet)
        descriptor = packet.connection
        if descriptor < 0:
            return
        self.active = True
        connection = _Connection(descriptor, packet.pid)
        if packet.status == STATUS_LOCK:
            self._handle(connection)
        elif packet.status == lib.STATUS_NOTHING:
            self.connections[descriptor] = connection
            self._watch(descriptor, lambda: self._receive(connection))
        else:
            self._turn_away(connection)

    def _receive(self, connection: _Connection) -> None:
        packet = self.packet
        lib.native_receive(connection.descriptor, packet)
        status = packet.status
        if status == lib.STATUS_NOTHING:
            return
        if connection.waiter is None:
            self._forget_connection(connection)
        else:
            self._withdraw(connection)
        if status == STATUS_LOCK:
            self._handle(connection)
        elif status == lib.STATUS_CANCEL:
            self._answer(connection, EINTR)
        else:
            self._turn_away(connection)

    def _turn_away(self, connection: _Connection) -> None:
        packet = self.packet
        if packet.status == lib.STATUS_VERSION:
            self._refuse(
                connection,
                f"the keeper (pid {os.getpid()}) speaks version {lib.PROTOCOL_VERSION} of the protocol and this program "
                f"{packet.request.version}: two versions of flockshim are in use; end the keeper's programs first",
            )
        elif packet.status == lib.STATUS_FULL:
            self._refuse(connection, "the keeper has no descriptor left; raise its limit (ulimit -Hn)")
        else:
            os.close(connection.descriptor)
        if packet.descriptor >= 0:
            os.close(packet.descriptor)

    def _withdraw(self, connection: _Connection) -> None:
        """The program has given up waiting, or has died."""
        file, waiter = connection.file, connection.waiter
        assert file and waiter
        file.lock.withdraw(waiter)
        self._stop_waiting(connection)
        self._release_if_unused(file, waiter.owner)
        self._settle(file)

    def _stop_waiting(self, connection: _Connection) -> None:
        self._forget_connection(connection)
        assert connection.waiter
        connection.waiter.owner.waits -= 1
        self.processes.discard(connection.pid, connection)

    def _forget_connection(self, connection: _Connection) -> None:
        del self.connections[connection.descriptor]
        self._unwatch(connection.descriptor)

    def _handle(self, connection: _Connection) -> None:
        packet = self.packet
        request = packet.request
        operation, descriptor, number = request.operation, packet.descriptor, request.descriptor
        file = self._file((request.device, request.inode))
        description = file.descriptions.find(descriptor)
        if description is None:
            description = Description(descriptor, file.key, connection.pid, number)
            file.descriptions.add(description)
        else:
            os.close(descriptor)
            if description.pid != connection.pid:
                self.processes.discard(description.pid, description)
            description.pid, description.number = connection.pid, number
        try:
            if operation & LOCK_UN:
                file.lock.release(description)
                self._release_if_unused(file, description)
                self._settle(file)
                self._answer(connection, 0)
            else:
                exclusive = bool(operation & LOCK_EX)
                self._lock(connection, file, description, exclusive, not operation & LOCK_NB)
        except OSError as error:
            self._release_if_unused(file, description)
            self._refuse(connection, _cannot_lock(error))

    def _lock(
        self,
        connection: _Connection,
        file: _File,
        description: Description,
        exclusive: bool,
        blocking: bool,
    ) -> None:
        if file.lock.conflicts(description, exclusive):
            self._check_holders(file, description)
        outcome = file.lock.request(description, exclusive, blocking, connection)
        if outcome == GRANTED:
            self.processes.add(connection.pid, description)
            if file.lock.queue:
                self._settle(file)
            self._answer(connection, 0)
        elif outcome == REFUSED:
            foreign = not file.lock.conflicts(description, exclusive)
            if foreign:
                limit = time.monotonic() + TICK_SECONDS
                file.undecided.append((connection, description, exclusive, limit))
                description.waits += 1
            else:
                self._release_if_unused(file, description)
                self._answer(connection, EWOULDBLOCK)
            self._settle(file)
        else:
            description.waits += 1
            connection.file = file
            connection.waiter = file.lock.queue[-1]
            self.connections[connection.descriptor] = connection
            self._watch(connection.descriptor, lambda: self._receive(connection))
            self.processes.add(connection.pid, connection)
            self._settle(file)

    def _answer(self, connection: _Connection, error: int) -> None:
        lib.native_answer(connection.descriptor, KIND_ANSWER, error, b"")

    def _refuse(self, connection: _Connection, text: str) -> None:
        lib.native_answer(connection.descriptor, lib.KIND_REFUSAL, 0, text.encode(errors="replace"))

    # Files

    def _file(self, key: Key) -> _File:
        file = self.files.get(key)
        if file is None:
            lock = FileLock(
                lambda exclusive, barging: self.host.permit(key, exclusive, barging),
                self._note,
                lambda description: self.journal.clear(description.descriptor),
            )
            file = self.files[key] = _File(key, lock)
        return file

    def _note(self, description: Description, exclusive: bool) -> None:
        self.journal.note(
            description.descriptor,
            exclusive,
            *description.key,
            description.pid,
            description.number,
        )

    def _release_if_unused(self, file: _File, description: Description) -> None:
        """Close the duplicate of a description that neither holds nor waits."""
        if description not in file.lock.holders and not description.waits:
            self.processes.discard(description.pid, description)
            file.descriptions.remove(description)

    def _check_holders(self, file: _File, asking: Description | None) -> None:
        """Release the locks whose description is no longer open anywhere."""
        for description in [d for d in file.lock.holders if d is not asking]:
            pid = description.pid
            if not description.is_open():
                file.lock.release(description)
                self._release_if_unused(file, description)
            elif description.pid != pid:
                self.processes.discard(pid, description)
                self.processes.add(description.pid, description)

    def _settle(self, file: _File, insist: bool = False) -> None:
        """Serve those who wait, and hold the host's lock for this file exactly as long as it is needed."""
        while True:
            try:
                self._serve(file)
                if file.lock.holders:
                    return
                if not file.lock.queue:
                    self.host.release(file.key)
                    if not len(file.descriptions):
                        self.files.pop(file.key, None)
                    return
                if not self.host.wait(file.key, file.lock.queue[0].exclusive, insist):
                    return
            except OSError as error:
                self._fail_first(file, error)

    def _serve(self, file: _File) -> None:
        for waiter in file.lock.serve():
            connection = waiter.context
            self._stop_waiting(connection)
            self.processes.add(connection.pid, waiter.owner)
            self._answer(connection, 0)

    def _fail_first(self, file: _File, error: OSError) -> None:
        """The proxy cannot be had: whoever is first in line is told so."""
        waiter = file.lock.queue[0]
        file.lock.withdraw(waiter)
        self._stop_waiting(waiter.context)
        self._release_if_unused(file, waiter.owner)
        self._refuse(waiter.context, _cannot_lock(error))

    def _processes_ended(self) -> None:
        while self.processes.ended:
            interest: Any = self.processes.ended.pop()
            if isinstance(interest, _Connection):
                if interest.descriptor in self.connections:
                    self._withdraw(interest)
                    os.close(interest.descriptor)
                continue
            file = self.files.get(interest.key)
            if file and interest in file.lock.holders:
                self._check_holders(file, None)
                self._settle(file)

    # Other keepers of this host

    def _neighbours(self) -> None:
        self.host.read()
        self._heed_neighbours()

    def _heed_neighbours(self) -> None:
        host = self.host
        while host.knocked:
            key = host.knocked.pop()
            file = self.files.get(key)
            if file:
                self._check_holders(file, None)
                self._settle(file)
            host.acknowledge(key)
        while host.freed:
            file = self.files.get(host.freed.pop())
            if file:
                self._retry_undecided(file)
                self._settle(file)
        while host.opened:
            key = host.opened.pop()
            if key not in self.files:
                host.close_idle(key)
        while host.answered:
            file = self.files.get(host.answered.pop())
            if file:
                self._decide(file, float("inf"))

    def _retry_undecided(self, file: _File) -> None:
        undecided, file.undecided = file.undecided, []
        for item in undecided:
            connection, description, exclusive, _ = item
            if file.lock.request(description, exclusive, False) == GRANTED:
                self._conclude(file, connection, description, 0)
            elif file.lock.conflicts(description, exclusive):
                self._conclude(file, connection, description, EWOULDBLOCK)
            else:
                file.undecided.append(item)

    def _decide(self, file: _File, now: float) -> None:
        """Refuse the requests whose time is up: the other keeper's holder is alive, or that keeper is stopped."""
        undecided, file.undecided = file.undecided, []
        for item in undecided:
            connection, description, _, limit = item
            if limit <= now:
                self._conclude(file, connection, description, EWOULDBLOCK)
            else:
                file.undecided.append(item)
        if undecided:
            self._settle(file)

    def _conclude(self, file: _File, connection: _Connection, description: Description, error: int) -> None:
        description.waits -= 1
        if error:
            self._release_if_unused(file, description)
        else:
            self.processes.add(connection.pid, description)
        self._answer(connection, error)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _cannot_lock(error: OSError) -> str:
    return f"no file can be made in the rendezvous directory: {error.strerror}: {error.filename}; set FLOCKSHIM_DIR"


def _raise_limits() -> int:
    """Take what the hard limits allow, so that a program's own soft limits don't end its keeper."""
    for limit in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_DATA):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (hard, hard))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def main() -> None:
    """Run as a keeper: see the module."""
    directory, key = sys.argv[1:3]
    os.umask(0o077)
    # A batch system's first signals are for the programs, which may need their locks for cleaning up.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(standby.ORPHANED, lambda *_: None)
    journal = Journal(_raise_limits())
    idle_seconds = float(os.environ.get("FLOCKSHIM_IDLE") or DEFAULT_IDLE_SECONDS)
    while True:
        parent = standby.split()
        Keeper(directory, key, journal, idle_seconds).run(parent)


if __name__ == "__main__":
    main()
