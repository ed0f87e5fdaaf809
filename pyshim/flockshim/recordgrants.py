"""Record locks that were granted, until their programs have said that they are still there.

Until then an owner has the stronger of what it had before and what it is granted: neither may be anybody else's.
"""

from __future__ import annotations

from flockshim.grants import Grants
from flockshim.recordtable import clipped, gaps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from flockshim.programs import Connection
    from flockshim.recordfile import Owner
    from flockshim.recordtable import Range


class RecordGrants(Grants):
    """Those of a record service."""

    def give(self, connection: Connection, owner: Owner, wanted: Range, before: list[Range]) -> None:
        """A range has been granted, of which the owner held `before`."""
        connection.undo = wanted, before
        self.add(connection, owner, before != [wanted])

    def heed(self, owner: Owner, wanted: Range, latest: Connection | None = None) -> None:
        """A call has changed what an owner holds there: grants before are not to be undone.

        That call was granted as `latest`, or is the last of all.
        """
        for connection in self._since:
            if connection is latest:
                break
            if connection.granted is owner and connection.undo[0].overlaps(wanted):
                connection.changed = False

    def _conclude(self, connection: Connection) -> None:
        """What the grant weakens may be weakened."""
        owner, (wanted, before) = connection.granted, connection.undo
        file = self._service.files.get(owner.key)
        if file and connection.changed and not wanted.exclusive and any(held.exclusive for held in before):
            file.set(owner, *wanted)
            self._service.settle(file)
        self.heed(owner, wanted, connection)

    def _undo(self, file: Any, connection: Connection, others: list[Connection]) -> None:
        """Give the owner what it held before; but where another grant is under way, that is what may be undone yet."""
        owner, (wanted, before) = connection.granted, connection.undo
        if not connection.changed or owner not in file.owners:
            return
        windows = [wanted]
        for other in others:
            its, its_before = other.undo
            if not its.overlaps(wanted):
                continue
            windows = [part for window in windows for part in gaps([its], window)]
            if other.changed or its_before == [its]:
                outside = [part for gap in gaps([wanted], its) for part in clipped(its_before, gap)]
                other.undo = its, sorted(clipped(before, its) + outside)
                other.changed = True
        for window in windows:
            file.restore(owner, window, before)
        self._service.forget_if_unused(file, owner)
