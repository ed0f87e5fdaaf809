"""The files that a keeper's programs lock, wait for, or ask about, and the note of every lock in the journal."""

from __future__ import annotations

import time

from flockshim.descriptions import Descriptions
from flockshim.locktable import FileLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flockshim.descriptions import Description
    from flockshim.host import Host, Key
    from flockshim.journal import Journal
    from flockshim.programs import Connection
    from flockshim.recordleases import RecordLeases


class File:
    """One file: its lock, and the descriptions that hold or want it."""

    __slots__ = ("descriptions", "key", "leased", "lock", "undecided", "unlocking")

    def __init__(self, key: Key, lock: FileLock) -> None:
        """Begin with none."""
        self.key = key
        self.lock = lock
        self.descriptions = Descriptions()
        # Non-blocking requests that another keeper's lock forbids, until that keeper has looked: see Host. Or one
        # that was granted to a program which has not said yet that it is still there.
        self.undecided: list[tuple[Connection, Description, bool, float]] = []
        # Programs whose unlocking is over when the lease has been given back.
        self.unlocking: list[Connection] = []
        # A program has asked for it in cluster mode: nobody holds it without a lease any more.
        self.leased = False

    def any(self) -> Description | None:
        """Return one of the descriptions."""
        return self.descriptions.any()


class Files(dict["Key", File]):
    """By (device, inode)."""

    def __init__(self, host: Host, journal: Journal) -> None:
        """`host` must agree before a lock is granted."""
        super().__init__()
        self._host = host
        self._journal = journal
        self.leases: RecordLeases | None = None

    def of(self, key: Key) -> File:
        """Return the file, a new one if need be."""
        file = self.get(key)
        if file is None:
            lock = FileLock(
                lambda exclusive, barging: self._permit(key, exclusive, barging),
                self._note,
                lambda description: self._journal.clear(description.descriptor),
            )
            file = self[key] = File(key, lock)
        return file

    def _permit(self, key: Key, exclusive: bool, barging: bool) -> bool:
        # This host first, so that of its keepers one asks the others.
        if not self._host.permit(key, exclusive, barging):
            return False
        file = self[key]
        if not file.leased:
            return True
        lock = file.lock
        waits = not barging or bool(lock.queue)
        return self.leases is not None and self.leases.permit(key, exclusive, waits, bool(lock.holders), barging)

    def holds(self, description: Description) -> bool:
        """Return whether a description holds a lock."""
        file = self.get(description.key)
        return file is not None and description in file.lock.holders

    def holders(self) -> list[Description]:
        """Return the descriptions that hold a lock."""
        return [holder for file in self.values() for holder in file.lock.holders]

    def needed(self) -> dict[Key, bool]:
        """Return the files that are locked, and whether exclusively."""
        return {key: any(file.lock.holders.values()) for key, file in self.items() if file.lock.holders}

    def _note(self, description: Description, exclusive: bool) -> None:
        description.taker, description.since = description.pid, time.time()
        self._journal.note(
            description.descriptor,
            exclusive,
            description.key,
            description.taker,
            description.number,
            description.since,
            self[description.key].leased,
        )
