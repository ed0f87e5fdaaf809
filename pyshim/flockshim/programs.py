"""The keeper's connections to programs: each carries one lock request and one answer."""

from __future__ import annotations

import errno
import fcntl
import os
import time

from flockshim import closing
from flockshim._native import ffi, lib
from flockshim.recordtable import Range

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from flockshim.grants import Grants
    from flockshim.loop import Loop

    class Service(Protocol):
        """What serves the locks of a family."""

        @property
        def grants(self) -> Grants:
            """Those that are under way."""

        def request(
            self, connection: Connection, operation: int, descriptor: int, number: int, device: int, inode: int
        ) -> None:
            """`descriptor` is ours; `number` the program's."""

        def withdraw(self, connection: Connection) -> None:
            """Who waited has given up."""


STATUS_LOCK, KIND_ANSWER = lib.STATUS_LOCK, lib.KIND_ANSWER


class Connection:
    """A program that waits for an answer."""

    __slots__ = (
        "answers",
        "changed",
        "descriptor",
        "ends",
        "family",
        "first",
        "flags",
        "granted",
        "is_supervised",
        "last",
        "pid",
        "service",
        "timeout",
        "undo",
        "waiter",
    )

    def __init__(self, descriptor: int, pid: int) -> None:
        """`pid` is the process that connected."""
        self.descriptor = descriptor
        self.pid = pid
        self.flags = 0
        # A supervisor asks, for process `pid`.
        self.is_supervised = False
        # Milliseconds that it will wait; negative: for ever.
        self.timeout = -1
        # The description that got the lock after a wait, until the program has said that it is still there.
        self.granted: Any = None
        # Whether that has changed what the description holds, and how many calls of it had been answered.
        self.changed = False
        self.answers = 0
        self.waiter: Any = None
        # Of what family of locks the request is, who serves that, and the range of a record lock (see protocol.h).
        self.family = lib.FAMILY_FLOCK
        self.service: Service | None = None
        self.first = self.last = 0
        # Of a record lock that was granted: its range, and what the owner had there before.
        self.undo: Any = None
        # Another keeper that hears of a change: called when it hears no more.
        self.ends: Callable[[], None] | None = None

    def answer(self, error: int) -> None:
        """Give the errno with which the program's call ends, or 0."""
        lib.native_answer(self.descriptor, KIND_ANSWER, error, b"")

    def grant(self) -> None:
        """Tell a program that waited that the lock is its own."""
        lib.native_send(self.descriptor, lib.KIND_GRANT, 0, b"")

    def wants_to_know(self) -> bool:
        """Return whether `tell_waiting` may be used."""
        return bool(self.flags & lib.FLAG_TELL)

    def tell_waiting(self, holder: str) -> None:
        """Tell a program that wants to know whom it waits for."""
        lib.native_send(self.descriptor, lib.KIND_WAITING, 0, holder.encode(errors="replace"))

    def time_out(self, holder: str) -> None:
        """Tell a program that it has waited for as long as it would."""
        lib.native_answer(self.descriptor, lib.KIND_TIMEOUT, 0, holder.encode(errors="replace"))

    def tell_found(self, held: Range, pid: int, holder: str) -> None:
        """Tell another keeper of a lock that is in the way."""
        text = holder.encode(errors="replace")
        lib.native_send_found(self.descriptor, held.exclusive, pid, held.first, held.last, text)

    def answer_found(self, held: Range, pid: int, holder: str) -> None:
        """Give the lock that is in the way of the one that was asked about."""
        self.tell_found(held, pid, holder)
        os.close(self.descriptor)

    def refuse(self, text: str) -> None:
        """Say why no protection can be given."""
        lib.native_answer(self.descriptor, lib.KIND_REFUSAL, 0, text.encode(errors="replace"))

    def redirect(self, key: str) -> None:
        """Send the program to the keeper of another key."""
        lib.native_answer(self.descriptor, lib.KIND_REDIRECT, 0, key.encode())


class Programs:
    """Accepts connections, and watches those that have to wait."""

    def __init__(
        self,
        listener: int,
        loop: Loop,
        flock: Service,
        records: Service,
        knocked: Callable[[Connection, int, int, Range], None],
        write_list: Callable[[int], None],
        most: int,
    ) -> None:
        """`flock` and `records` serve requests; `knocked` gets what other keepers ask: device, inode and range.

        `write_list` gets a descriptor to write the list of all locks to. From descriptor `most` on only requests to
        unlock are taken.
        """
        self._most = most
        self._listener = listener
        self._loop = loop
        self._flock = flock
        self._records = records
        self._knocked = knocked
        self._write_list = write_list
        self._packet = ffi.new("struct native_packet *")
        self._body = self._packet.request
        self._open: set[int] = set()
        self.active = True
        loop.watch(listener, self._accept)

    def __len__(self) -> int:
        """Return how many are connected."""
        return len(self._open)

    def listen_again(self) -> None:
        """The listening descriptor is another socket now: the epoll(7) set lost the old one when it was closed."""
        self._loop.watch(self._listener, self._accept)

    def hold(self, connection: Connection) -> None:
        """Watch a connection whose answer must wait, or whose request has not come yet."""
        self._open.add(connection.descriptor)
        self._loop.watch(connection.descriptor, lambda: self._receive(connection))

    def forget(self, connection: Connection) -> None:
        """Stop watching a connection that `hold` was called for."""
        self._open.remove(connection.descriptor)
        self._loop.unwatch(connection.descriptor)

    def processes_ended(self, connections: list[Connection]) -> None:
        """Withdraw what processes have asked for that have ended."""
        for connection in connections:
            waits = connection.waiter is not None or connection.granted is not None
            if waits and connection.service and connection.descriptor in self._open:
                self.forget(connection)
                connection.service.withdraw(connection)
                lib.native_close(connection.descriptor)

    def is_taken(self, connection: Connection) -> bool:
        """Hear no more of a connection with a grant, and return whether the program has had it."""
        lib.native_stop_receiving(connection.descriptor)
        while True:
            lib.native_receive(connection.descriptor, self._packet)
            if self._packet.status != lib.STATUS_CANCEL:
                return bool(self._packet.status == lib.STATUS_TAKEN)

    def _accept(self) -> None:
        packet = self._packet
        lib.native_accept(self._listener, packet)
        descriptor = packet.connection
        if descriptor < 0:
            if descriptor in (-errno.EMFILE, -errno.ENFILE):
                # The whole system may be out of them; whoever knocks is still there afterwards.
                time.sleep(0.01)
            return
        self.active = True
        connection = Connection(descriptor, packet.pid)
        if packet.status == STATUS_LOCK:
            self._pass_on(connection)
        elif packet.status == lib.STATUS_LIST:
            self._list(connection)
        elif packet.status == lib.STATUS_KNOCK:
            self._knock(connection)
        elif packet.status == lib.STATUS_NOTHING and descriptor < self._most:
            self.hold(connection)
        else:
            self._turn_away(connection, packet.status)

    def _receive(self, connection: Connection) -> None:
        packet = self._packet
        lib.native_receive(connection.descriptor, packet)
        status = packet.status
        if status == lib.STATUS_NOTHING:
            return
        if status == lib.STATUS_CANCEL and connection.granted and not connection.is_supervised:
            return
        self.forget(connection)
        service = connection.service or self._flock
        if connection.granted and connection.is_supervised and status == lib.STATUS_ENDED:
            # The supervisor was killed, and may have told its program before.
            service.grants.taken(connection)
        elif connection.granted and status == lib.STATUS_TAKEN:
            service.grants.taken(connection)
        elif connection.waiter or connection.granted:
            service.withdraw(connection)
        elif connection.ends:
            connection.ends()
        if status == STATUS_LOCK:
            self._pass_on(connection)
        elif status == lib.STATUS_LIST:
            self._list(connection)
        elif status == lib.STATUS_KNOCK:
            self._knock(connection)
        elif status == lib.STATUS_CANCEL:
            connection.answer(errno.EINTR)
        else:
            self._turn_away(connection, packet.status)

    def _pass_on(self, connection: Connection) -> None:
        body = self._body
        # The lowest free number is always taken: dup(2).
        if self._packet.descriptor >= self._most and not body.operation & fcntl.LOCK_UN:
            self._turn_away(connection, lib.STATUS_FULL)
            return
        connection.flags = body.flags
        connection.timeout = body.timeout
        if body.pid:
            connection.pid = body.pid
            connection.is_supervised = True
        connection.family = body.family
        connection.first, connection.last = body.first, body.last
        connection.service = self._flock if body.family == lib.FAMILY_FLOCK else self._records
        connection.service.request(
            connection,
            body.operation,
            self._packet.descriptor,
            body.descriptor,
            body.device,
            body.inode,
        )

    def _knock(self, connection: Connection) -> None:
        body = self._body
        connection.flags = body.flags
        wanted = Range(body.first, body.last, bool(body.operation & fcntl.LOCK_EX))
        self._knocked(connection, body.device, body.inode, wanted)

    def _list(self, connection: Connection) -> None:
        try:
            self._write_list(self._packet.descriptor)
            connection.answer(0)
        except OSError as error:
            connection.answer(error.errno or errno.EIO)
        finally:
            closing.close(self._packet.descriptor)

    def _turn_away(self, connection: Connection, status: int) -> None:
        packet = self._packet
        if status == lib.STATUS_VERSION:
            connection.refuse(
                f"the keeper (pid {lib.native_self()}) speaks protocol {lib.PROTOCOL_VERSION}, this program "
                f"{self._body.version}: two versions of flockshim are in use; end the keeper's programs first"
            )
        elif status == lib.STATUS_FULL:
            connection.refuse("the keeper has no descriptor left; raise its limit (ulimit -Hn)")
        else:
            os.close(connection.descriptor)
        if packet.descriptor >= 0:
            closing.close(packet.descriptor)
