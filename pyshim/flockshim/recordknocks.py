"""What keepers of one host ask each other about record locks: see `neighbours`."""

from __future__ import annotations

from flockshim import holders
from flockshim._native import lib
from flockshim.recordfile import EVERYTHING, RECORDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from flockshim.neighbours import Knock, Neighbours
    from flockshim.programs import Connection
    from flockshim.recordfile import RecordFile
    from flockshim.records import RecordService
    from flockshim.recordtable import Range


class RecordKnocks:
    """Those of a record service."""

    def __init__(self, service: RecordService, neighbours: Neighbours) -> None:
        """Serve its files."""
        self._service = service
        self._neighbours = neighbours

    def ask(self, file: RecordFile, wanted: Range, answered: Callable[[], None]) -> Knock:
        """Have the others look whether their holders are alive."""
        return self._neighbours.knock(file.key, wanted, answered)

    def knocked(self, connection: Connection, device: int, inode: int, wanted: Range) -> None:
        """Tell another keeper whether a lock of ours forbids this one; and, if it stays, when that has changed."""
        service = self._service
        file = service.files.get((device, inode, RECORDS))
        if file:
            service.check([owner for owner, _ in file.lock.conflicts(None, wanted)])
            service.settle(file)
        found = next(file.lock.conflicts(None, wanted), None) if file else None
        if file is None or found is None:
            connection.answer(0)
            return
        holder, held = found
        text = holders.describe(holder.pid, holder.since)
        # One of another pid namespace would take it for another process; the kernel says 0 then.
        pid = holder.shown_pid if not holder.is_process or holders.is_of_our_pid_namespace(connection.pid) else 0
        if not connection.flags & lib.FLAG_STAY:
            connection.answer_found(held, pid, text)
            return
        subscribers = file.subscribers
        subscribers.append(connection)
        connection.ends = lambda: subscribers.remove(connection)
        service.programs.hold(connection)
        connection.tell_found(held, pid, text)

    def tell(self, file: RecordFile) -> None:
        """Something was unlocked."""
        for connection in file.subscribers:
            self._service.programs.forget(connection)
            connection.answer(0)
        file.subscribers.clear()

    def subscribe(self, file: RecordFile, waits_elsewhere: bool) -> None:
        """Those who wait for other keepers must learn when these have unlocked something."""
        if waits_elsewhere and file.knock is None:
            file.knock = self._neighbours.knock(
                file.key, EVERYTHING, lambda: self._answered(file), lambda: self._freed(file)
            )
        elif not file.lock.queue:
            file.unsubscribe()

    def _answered(self, file: RecordFile) -> None:
        """What was in the way may have gone before the other keeper was asked."""
        if file.knock and not file.knock.is_watching():
            self._service.settle(file)

    def _freed(self, file: RecordFile) -> None:
        file.knock = None
        if self._service.files.get(file.key) is file:
            self._service.settle(file)
