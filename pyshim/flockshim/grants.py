"""Locks that were granted after a wait, until their programs have said that they are still there."""

from __future__ import annotations

import time

from flockshim._native import lib
from flockshim.undecided import GRANT_SECONDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from flockshim.descriptions import Description
    from flockshim.lockservice import LockService
    from flockshim.programs import Connection
    from flockshim.recordfile import Owner
    from flockshim.records import RecordService


class Grants:
    """Those of a service."""

    def __init__(self, service: LockService | RecordService) -> None:
        """Serve its files."""
        self._service: Any = service
        self._since: dict[Connection, float] = {}

    def add(self, connection: Connection, description: Description | Owner, changed: bool) -> None:
        """A request has been granted; `changed`: the description did not hold just that already."""
        connection.granted = description
        connection.changed = changed
        connection.answers = description.answers
        self._since[connection] = time.monotonic()
        connection.grant()

    def unsure(self) -> set[Description | None]:
        """Return the descriptions that may not hold after all."""
        return {connection.granted for connection in self._since if connection.changed}

    def taken(self, connection: Connection) -> None:
        """A grant has reached its program."""
        if connection.granted:
            connection.granted.answers += 1
            self._conclude(connection)
        self._end(connection)

    def confirm(self, description: Description) -> None:
        """Who asks again for what it was granted has lost its connection, not its interest."""
        for connection in self._of(description):
            self.taken(connection)

    def take_back(self, connection: Connection) -> None:
        """A grant has not reached its program: the call has been left by longjmp, exec or death.

        Nobody else may lose by that who locks the same description: another thread, or the same program once more.
        """
        owner = connection.granted
        file: Any = self._service.files.get(owner.key) if owner else None
        if file:
            others = [other for other in self._of(owner) if other is not connection]
            self._undo(file, connection, others)
        self._end(connection)
        if file:
            self._service.settle(file)

    def _conclude(self, connection: Connection) -> None:
        """A grant has reached its program."""

    def _undo(self, file: Any, connection: Connection, others: list[Connection]) -> None:
        """Take the lock away, unless `others` of the description had it since."""
        description = connection.granted
        nobody_had_it = connection.changed and connection.answers == description.answers
        if nobody_had_it and others:
            others[0].changed, others[0].answers = True, connection.answers
        elif nobody_had_it:
            self._service.release(file, description)

    def look(self, now: float) -> None:
        """The program may be stopped: others go on, and it asks again when it is continued.

        A supervisor that is stopped may have told its program already.
        """
        programs = self._service.programs
        for connection, since in list(self._since.items()):
            if now - since >= GRANT_SECONDS and not connection.is_supervised:
                programs.forget(connection)
                if programs.is_taken(connection):
                    self.taken(connection)
                else:
                    self.take_back(connection)
                lib.native_close(connection.descriptor)

    def _of(self, description: Description) -> list[Connection]:
        return [connection for connection in self._since if connection.granted is description]

    def _end(self, connection: Connection) -> None:
        description = connection.granted
        connection.granted = None
        del self._since[connection]
        file: Any = self._service.files.get(description.key) if description else None
        if file and file.undecided:
            self._service.undecided.retry(file)
