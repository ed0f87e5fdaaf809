"""What waiting programs are owed while they wait: to be told for whom, and an end when their patience is over."""

from __future__ import annotations

import time

from flockshim.loop import NEVER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from flockshim.loop import Loop
    from flockshim.programs import Connection

# A wait that is over sooner is not worth a line.
TELL_SECONDS = 0.1
SOON_SECONDS = 0.02
LATER_SECONDS = 0.5


class Patience:
    """Watches the time for all connections that wait."""

    def __init__(self, loop: Loop, tell: Callable[[Connection], None], end: Callable[[Connection], None]) -> None:
        """`tell` gets those that must know whom they wait for, `end` those that waited for as long as they would."""
        self._loop = loop
        self._tell = tell
        self._end = end
        self._waiting: dict[Connection, tuple[float, float]] = {}

    def begin(self, connection: Connection) -> None:
        """A program begins to wait."""
        tell = end = NEVER
        if connection.wants_to_know():
            tell = time.monotonic() + TELL_SECONDS
        if connection.timeout >= 0:
            end = time.monotonic() + connection.timeout / 1000
        if min(tell, end) < NEVER:
            self._waiting[connection] = tell, end
            self._loop.wake_by(min(tell, end))

    def tell_later(self, connection: Connection) -> None:
        """Ask again in a while: for whom it waits is not known yet."""
        tell = time.monotonic() + LATER_SECONDS
        self._waiting[connection] = tell, self._waiting[connection][1]
        self._loop.wake_by(tell)

    def end_later(self, connection: Connection) -> None:
        """Ask again soon: it is not known yet whether anybody holds what it waits for."""
        end = time.monotonic() + SOON_SECONDS
        self._waiting[connection] = self._waiting[connection][0], end
        self._loop.wake_by(end)

    def forget(self, connection: Connection) -> None:
        """It waits no longer."""
        self._waiting.pop(connection, None)

    def look(self, now: float) -> None:
        """Do what is due."""
        for connection, (tell, end) in list(self._waiting.items()):
            if connection not in self._waiting:
                continue  # another's end has given it the lock
            if end <= now:
                self._end(connection)
            elif tell <= now:
                self._waiting[connection] = NEVER, end
                self._tell(connection)
        if self._waiting:
            self._loop.wake_by(min(map(min, self._waiting.values())))
