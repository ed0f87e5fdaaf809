"""Non-blocking requests that cannot be answered yet, because it is not sure that whoever is in the way is alive."""

from __future__ import annotations

import errno
import time

from flockshim.locktable import GRANTED
from flockshim.loop import TICK_SECONDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flockshim.descriptions import Description
    from flockshim.files import File
    from flockshim.lockservice import LockService
    from flockshim.programs import Connection

GRANT_SECONDS = 2.0
"""How long a program that was granted a lock after a wait may need to say that it is there."""
UNDECIDED_SECONDS = GRANT_SECONDS + 2 * TICK_SECONDS


class Undecided:
    """Those of a lock service."""

    def __init__(self, service: LockService) -> None:
        """Serve its files."""
        self._service = service

    def add(self, file: File, connection: Connection, description: Description, exclusive: bool) -> None:
        """Answer later, but not too late."""
        description.waits += 1
        limit = time.monotonic() + UNDECIDED_SECONDS
        file.undecided.append((connection, description, exclusive, limit))

    def retry(self, file: File) -> None:
        """Answer those that can be answered now."""
        undecided, file.undecided = file.undecided, []
        for item in undecided:
            connection, description, exclusive, _ = item
            if file.lock.request(description, exclusive, False) == GRANTED:
                self._conclude(file, connection, description, 0)
            elif self._service.is_refused(file, description, exclusive):
                self._conclude(file, connection, description, errno.EWOULDBLOCK)
            else:
                file.undecided.append(item)

    def decide(self, file: File, now: float) -> None:
        """Refuse those whose time is up: the other keeper's holder is alive, or that keeper is stopped."""
        undecided, file.undecided = file.undecided, []
        for item in undecided:
            connection, description, _, limit = item
            if limit <= now:
                self._conclude(file, connection, description, errno.EWOULDBLOCK)
            else:
                file.undecided.append(item)
        if undecided:
            self._service.settle(file)

    def refused_by_hosts(self, file: File) -> None:
        """Refuse all: another host holds."""
        self.decide(file, float("inf"))

    def refuse(self, file: File, text: str) -> None:
        """Say of all why no protection can be given."""
        undecided, file.undecided = file.undecided, []
        for connection, description, _, _ in undecided:
            description.waits -= 1
            self._service.forget_if_unused(file, description)
            connection.refuse(text)

    def _conclude(self, file: File, connection: Connection, description: Description, error: int) -> None:
        description.waits -= 1
        if error:
            self._service.forget_if_unused(file, description)
            connection.answer(error)
        else:
            self._service.processes.add(connection.pid, description)
            self._service.answer_granted(connection, description, True)


def cannot_lock(error: OSError) -> str:
    """Return the line that says why a proxy cannot be had, and what to do."""
    if error.errno == errno.EMFILE:
        return "the keeper has no descriptor left; raise its limit (ulimit -Hn)"
    return f"no file can be made in the rendezvous directory: {error.strerror}: {error.filename}; set FLOCKSHIM_DIR"
