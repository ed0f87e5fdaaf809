"""Programs that wait for record locks: served, told for whom they wait, or told that they would wait for ever."""

from __future__ import annotations

import contextlib
import errno
import time

from flockshim import holders
from flockshim.loop import TICK_SECONDS
from flockshim.patience import Patience
from flockshim.recordtable import circle
from flockshim.undecided import UNDECIDED_SECONDS, cannot_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from flockshim.descriptions import Description
    from flockshim.loop import Loop
    from flockshim.programs import Connection
    from flockshim.recordfile import RecordFile
    from flockshim.records import RecordService
    from flockshim.recordtable import RecordWaiter


class RecordWaits:
    """Those of a record service."""

    def __init__(self, service: RecordService, loop: Loop) -> None:
        """Serve its files."""
        self._service = service
        self.patience = Patience(loop, self._tell_waiting, self._time_out)
        self._waiting: dict[Any, list[RecordWaiter]] = {}
        # Waiters of circles that may have been broken by a signal: of whose end a supervisor tells a moment later.
        self._suspects: set[RecordWaiter] = set()

    def begin(self, file: RecordFile, connection: Connection, place: Description) -> None:
        """The last in the file's queue waits, having locked by this descriptor; unless it would wait for itself."""
        waiter = file.lock.queue[-1]
        waiter.owner.waits += 1
        waiter.place = place
        self._waiting.setdefault(waiter.owner.identity(), []).append(waiter)
        connection.waiter = waiter
        self._service.programs.hold(connection)
        self._service.processes.add(connection.pid, connection)
        if not self._is_dissolved(file, waiter):
            self._service.settle(file)
            if connection.waiter:
                self.patience.begin(connection)

    def withdraw(self, connection: Connection) -> None:
        """The program has given up waiting, or has died; `programs` has forgotten it."""
        waiter = connection.waiter
        file = self._service.files[waiter.owner.key]
        self._stop(file, waiter)
        self._service.settle(file)

    def _stop(self, file: RecordFile, waiter: RecordWaiter, is_served: bool = False) -> None:
        connection = waiter.context
        if not is_served:
            file.lock.queue.remove(waiter)
        waiter.owner.waits -= 1
        identity = waiter.owner.identity()
        self._waiting[identity].remove(waiter)
        if not self._waiting[identity]:
            del self._waiting[identity]
        connection.waiter = None
        self._suspects.discard(waiter)
        self.patience.forget(connection)
        self._service.processes.discard(connection.pid, connection)
        self._service.forget_if_unused(file, waiter.owner)

    def _end(self, file: RecordFile, waiter: RecordWaiter) -> Connection:
        """Have a program wait no longer, that is to be told why."""
        self._service.programs.forget(waiter.context)
        self._stop(file, waiter)
        connection: Connection = waiter.context
        return connection

    def refuse(self, file: RecordFile, waiter: RecordWaiter, text: str) -> None:
        """Say why no protection can be given."""
        self._end(file, waiter).refuse(text)

    # Turns

    def serve(self, file: RecordFile) -> bool:
        """Grant what can be granted. Returns whether anybody waits for another keeper."""
        waits_elsewhere = False
        for waiter in list(file.lock.queue):
            if waiter in file.lock.queue:
                waits_elsewhere |= self._serve(file, waiter)
        return waits_elsewhere

    def _serve(self, file: RecordFile, waiter: RecordWaiter) -> bool:
        service, owner, blocker = self._service, waiter.owner, waiter.blocker
        service.check_places(file, owner)
        before = file.snapshot(owner, waiter.wanted)
        file.waits = True
        # After a while, since one of those who hold may wait for it.
        file.hurries = time.monotonic() - waiter.since >= TICK_SECONDS
        try:
            served = file.serve(waiter)
        except OSError as error:
            self.refuse(file, waiter, cannot_lock(error))
            return False
        if not served:
            if waiter.blocker is not blocker:
                self._is_dissolved(file, waiter)
            return file.is_refused_elsewhere
        connection = waiter.context
        self._stop(file, waiter, is_served=True)
        if owner.is_process and waiter.place.was_closed():
            # Another thread has closed it meanwhile: fcntl_setlk in fs/locks.c looks for that, too.
            service.programs.forget(connection)
            file.restore(owner, waiter.wanted, before)
            service.forget_if_unused(file, owner)
            connection.answer(errno.EBADF)
        else:
            service.processes.add(connection.pid, owner)
            service.grants.give(connection, owner, waiter.wanted, before)
        return False

    # Circles

    def _is_dissolved(self, file: RecordFile, waiter: RecordWaiter) -> bool:
        """Return whether it would wait for itself, and so has been told."""
        circle = self._circle(waiter)
        if any(one.context.is_supervised for one in circle):
            self._suspects.add(waiter)
        elif circle:
            self._end(file, waiter).answer(errno.EDEADLK)
            return True
        return False

    def _circle(self, waiter: RecordWaiter) -> list[RecordWaiter]:
        if not waiter.owner.is_process or waiter.blocker is None:
            return []
        return circle(waiter, self._waiting)

    def look_at_suspects(self) -> None:
        """Once a second."""
        for waiter in list(self._suspects):
            self._suspects.discard(waiter)
            file = self._service.files[waiter.owner.key]
            if self._circle(waiter):
                self._end(file, waiter).answer(errno.EDEADLK)
                self._service.settle(file)

    # Words

    def _tell_waiting(self, connection: Connection) -> None:
        file = self._service.files[connection.waiter.owner.key]
        leases = self._service.leases
        if leases and leases.may_learn(file.key):
            self.patience.tell_later(connection)
        else:
            connection.tell_waiting(self._describe(file, connection.waiter))

    def _time_out(self, connection: Connection) -> None:
        waiter = connection.waiter
        file = self._service.files[waiter.owner.key]
        leases = self._service.leases
        unknown = leases and leases.is_pending(file.key) and not leases.is_refused(file.key)
        late = time.monotonic() - waiter.since - connection.timeout / 1000
        if unknown and late < UNDECIDED_SECONDS:
            self.patience.end_later(connection)
            return
        who = self._describe(file, waiter)
        self._end(file, waiter).time_out(who)
        self._service.settle(file)

    def _describe(self, file: RecordFile, waiter: RecordWaiter) -> str:
        # What is only said must not end what holds the locks.
        with contextlib.suppress(OSError, ValueError):
            for owner, _ in file.lock.conflicts(waiter.owner, waiter.wanted):
                return holders.describe(owner.pid, owner.since)
            elsewhere = self._service.leases.holder(file.key) if self._service.leases else None
            return elsewhere or (file.knock.holder if file.knock else "") or holders.UNKNOWN
        return holders.UNKNOWN
