"""The open file descriptions that the keeper holds duplicates of, and the processes in which they are open."""

from __future__ import annotations

import os

from flockshim import closing
from flockshim._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from flockshim.host import Key


class Description:
    """An open file description, by the keeper's duplicate, and where it was last seen open."""

    is_process = False
    """Whether its locks are a process's own: those of descriptions live as long as these."""

    __slots__ = ("answers", "descriptor", "key", "number", "only_warn", "pid", "since", "taker", "waits")

    def __init__(self, descriptor: int, key: Key, pid: int, number: int) -> None:
        """`number` is the descriptor's number in process `pid`."""
        self.descriptor = descriptor
        self.key = key
        self.pid = pid
        self.number = number
        self.waits = 0
        # How many calls were told that they have the lock.
        self.answers = 0
        # While the lock is held: since when (seconds since the epoch), and the process that took it.
        self.since = 0.0
        self.taker = 0
        self.only_warn = False

    def is_where_it_was(self) -> bool:
        """Return whether it is still open where it was last seen."""
        return bool(lib.native_is_open_at(self.descriptor, self.pid, self.number))

    def was_closed(self) -> bool:
        """Return whether it surely is not open any more where it was last seen, in any thread's table."""
        return bool(lib.native_was_closed_at(self.descriptor, self.pid, self.number))


def closed(descriptions: Iterable[Description]) -> list[Description]:
    """Return those that no process but the keeper has open any more, and note where the others are.

    To prove that one is open nowhere all processes of the host must be looked at, so ask for many at once.
    """
    moved = [description for description in descriptions if not description.is_where_it_was()]
    if not moved:
        return []
    suspects = ffi.new("struct native_suspect[]", len(moved))
    for description, suspect in zip(moved, suspects):
        suspect.kept = description.descriptor
        suspect.device, suspect.inode = description.key[:2]
        suspect.known_pid = description.pid
    if lib.native_find_open(suspects, len(moved)) < 0:
        return []
    for description, suspect in zip(moved, suspects):
        if suspect.pid:
            description.pid, description.number = suspect.pid, suspect.number
    return [description for description, suspect in zip(moved, suspects) if not suspect.pid]


class Descriptions:
    """Those of one file, ordered by kcmp(2) so that hundreds can be told apart with few calls."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        """Begin with none."""
        self._items: list[Description] = []

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._items)

    def any(self) -> Description | None:
        """Return one of them."""
        return self._items[0] if self._items else None

    def find(self, descriptor: int) -> Description | None:
        """Return the one that `descriptor` is a duplicate of."""
        index, found = self._search(descriptor)
        return self._items[index] if found else None

    def add(self, description: Description) -> None:
        """Add one that `find` does not know."""
        index, _ = self._search(description.descriptor)
        self._items.insert(index, description)

    def remove(self, description: Description) -> None:
        """Forget one, and close the keeper's duplicate."""
        self._items.remove(description)
        closing.close(description.descriptor)

    def _search(self, descriptor: int) -> tuple[int, bool]:
        low, high = 0, len(self._items)
        if not high:
            return 0, False
        error = ffi.new("int *")
        while low < high:
            middle = (low + high) // 2
            order = lib.native_compare(descriptor, self._items[middle].descriptor, error)
            if error[0]:
                return self._search_one_by_one(descriptor)
            if order == 0:
                return middle, True
            if order < 0:
                high = middle
            else:
                low = middle + 1
        return low, False

    def _search_one_by_one(self, descriptor: int) -> tuple[int, bool]:
        for index, item in enumerate(self._items):
            if lib.native_same_description(descriptor, item.descriptor) == 1:
                return index, True
        return len(self._items), False


class Processes:
    """Watches processes by pidfd (Linux 5.3; before that the once-a-second look must do)."""

    def __init__(
        self, watch: Callable[[int, Callable[[], None]], None], unwatch: Callable[[int], None], most: int
    ) -> None:
        """`watch(descriptor, callback)` has it called while the descriptor is readable, until `unwatch`.

        Descriptors from `most` on are not used.
        """
        self._most = most
        self._watch = watch
        self._unwatch = unwatch
        self._interests: dict[int, set[object]] = {}
        self._pidfds: dict[int, int] = {}
        self.ended: set[object] = set()

    def add(self, pid: int, interest: object) -> None:
        """Put `interest` into `ended` when process `pid` has ended; at once where it has."""
        interests = self._interests.get(pid)
        if interests is None:
            pidfd = lib.native_pidfd_open(pid)
            if pidfd >= self._most:
                os.close(pidfd)
            if not 0 <= pidfd < self._most:
                return
            interests = self._interests[pid] = set()
            self._pidfds[pid] = pidfd
            self._watch(pidfd, lambda: self._end(pid))
        interests.add(interest)

    def discard(self, pid: int, interest: object) -> None:
        """Take `interest` back. The process is watched on: it will come again."""
        interests = self._interests.get(pid)
        if interests:
            interests.discard(interest)

    def follow(self, owners: Mapping[Any, int]) -> None:
        """Watch the processes in which these owners are now, each instead of the one in which it was."""
        for owner, pid in owners.items():
            if owner.pid != pid:
                self.discard(pid, owner)
                self.add(owner.pid, owner)

    def _end(self, pid: int) -> None:
        pidfd = self._pidfds.pop(pid)
        self._unwatch(pidfd)
        os.close(pidfd)
        self.ended |= self._interests.pop(pid)
