"""What a keeper's standby must know to take over: which descriptor of the shared table is a held lock.

The journal is a piece of memory that both processes map. Its entry for a lock has the number of the descriptor by
which the keeper holds the description, so that nothing needs to be searched or kept in order. Record locks have one
entry for each owner, under the number of its proxy's descriptor; the kernel knows their ranges. A keeper may die
between any two instructions: the mode byte, written last and cleared first, says whether an entry counts.
"""

from __future__ import annotations

import mmap
import struct

_ENTRY = struct.Struct("=x?xxiiiQQd")
_PLACE, _PLACE_AT = struct.Struct("=iii"), 4
_NOTHING, _SHARED, _EXCLUSIVE, _OF_PROCESS, _OF_DESCRIPTION = range(5)


class Journal:
    """Entries for descriptors 0 to `capacity` - 1."""

    def __init__(self, capacity: int) -> None:
        """Map the memory; processes made by clone(2) afterwards share it."""
        self.capacity = capacity
        self._memory = mmap.mmap(-1, capacity * _ENTRY.size)

    def note(
        self, descriptor: int, exclusive: bool, key: tuple[int, ...], pid: int, number: int, since: float, leased: bool
    ) -> None:
        """Record that `descriptor` is a lock on file `key`, taken by process `pid` as its `number`, at time `since`."""
        at = descriptor * _ENTRY.size
        _ENTRY.pack_into(self._memory, at, leased, descriptor, pid, number, *key[:2], since)
        self._memory[at] = _EXCLUSIVE if exclusive else _SHARED

    def clear(self, descriptor: int) -> None:
        """Record that `descriptor` is no lock."""
        self._memory[descriptor * _ENTRY.size] = _NOTHING

    def read(self, descriptor: int) -> tuple[bool, int, int, int, int, float, bool] | None:
        """Return (exclusive, device, inode, pid, number, since, leased), or None where there is no lock."""
        at = descriptor * _ENTRY.size
        mode = self._memory[at]
        if mode not in (_SHARED, _EXCLUSIVE):
            return None
        leased, _, pid, number, device, inode, since = _ENTRY.unpack_from(self._memory, at)
        return mode == _EXCLUSIVE, device, inode, pid, number, since, leased

    def note_records(
        self,
        descriptor: int,
        is_process: bool,
        kept: int,
        key: tuple[int, ...],
        pid: int,
        number: int,
        since: float,
        leased: bool,
    ) -> None:
        """Record that `descriptor` is a proxy for the owner that has locked by `kept`."""
        at = descriptor * _ENTRY.size
        _ENTRY.pack_into(self._memory, at, leased, kept, pid, number, *key[:2], since)
        self._memory[at] = _OF_PROCESS if is_process else _OF_DESCRIPTION

    def move_records(self, descriptor: int, kept: int, pid: int, number: int) -> None:
        """Record that the owner behind a proxy is known by another descriptor now. The entry counts all the time."""
        at = descriptor * _ENTRY.size + _PLACE_AT
        self._memory[at : at + _PLACE.size] = _PLACE.pack(kept, pid, number)

    def read_records(self, descriptor: int) -> tuple[bool, int, int, int, int, int, float, bool] | None:
        """Return (is_process, kept, device, inode, pid, number, since, leased), or None where it is no such proxy."""
        at = descriptor * _ENTRY.size
        mode = self._memory[at]
        if mode not in (_OF_PROCESS, _OF_DESCRIPTION):
            return None
        leased, kept, pid, number, device, inode, since = _ENTRY.unpack_from(self._memory, at)
        return mode == _OF_PROCESS, kept, device, inode, pid, number, since, leased
