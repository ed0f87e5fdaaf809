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
        connection.undo = [wanted], before
        self.add(connection, owner, before != [wanted])

    def heed(self, owner: Owner, wanted: Range, latest: Connection | None = None) -> None:
        """A call has changed what an owner holds there, which grants before have no more to do with.

        That call was granted as `latest`, or is the last of all.
        """
        for connection in self._since:
            if connection is latest:
                break
            if connection.granted is owner:
                windows, before = connection.undo
                connection.undo = _without(windows, wanted), before
                connection.changed &= bool(connection.undo[0])

    def _conclude(self, connection: Connection) -> None:
        """What the grant weakens may be weakened."""
        owner, (windows, before) = connection.granted, connection.undo
        file = self._service.files.get(owner.key)
        for window in windows:
            if file and not window.exclusive and any(held.exclusive for held in clipped(before, window)):
                file.set(owner, *window)
            self.heed(owner, window, connection)
        if file and file.is_changed:
            self._service.settle(file)

    def _undo(self, file: Any, connection: Connection, others: list[Connection]) -> None:
        """Give the owner what it held before; but where another grant is under way, that is what may be undone yet."""
        owner, (windows, before) = connection.granted, connection.undo
        if not connection.changed or owner not in file.owners:
            return
        for other in others:
            its, its_before = other.undo
            shared = [part for window in windows for one in its for part in clipped([window], one)]
            for part in shared:
                windows = _without(windows, part)
                its_before = sorted([*clipped(before, part), *_outside(its_before, part)])
                other.changed = True
            other.undo = its, its_before
        for window in windows:
            file.restore(owner, window, before)
        self._service.forget_if_unused(file, owner)


def _without(windows: list[Range], hole: Range) -> list[Range]:
    return [part for window in windows for part in gaps([hole], window)]


def _outside(ranges: list[Range], hole: Range) -> list[Range]:
    """Return what these ranges have outside of a hole."""
    return [part for held in ranges for part in gaps([hole], held)]
