"""Who holds which bytes of one file, and who waits: bookkeeping only, no input or output.

The rules are those of record locks as Linux has them (``fs/locks.c``, ``posix_lock_inode``): an owner's new lock takes
the place of what it held there; touching ranges of one kind become one; owners are looked at in the order in which they
came to hold something.
"""

from __future__ import annotations

from typing import NamedTuple

from flockshim.locktable import GRANTED, REFUSED, WAITING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any

MAX_STEPS = 11


class Range(NamedTuple):
    """Bytes `first` to `last`, both inclusive, and how they are locked."""

    first: int
    last: int
    exclusive: bool

    def overlaps(self, other: Range) -> bool:
        """Return whether the two have a byte in common."""
        return self.first <= other.last and other.first <= self.last

    def conflicts(self, other: Range) -> bool:
        """Return whether the two cannot be locked by different owners."""
        return (self.exclusive or other.exclusive) and self.overlaps(other)


class RecordWaiter:
    """A blocking request that could not be granted at once."""

    __slots__ = ("blocker", "context", "owner", "place", "since", "wanted")

    def __init__(self, owner: Any, wanted: Range, context: Any, since: float) -> None:
        """Note the owner, the range asked for, the caller's own `context` for the answer, and the time."""
        self.owner = owner
        self.wanted = wanted
        self.context = context
        self.since = since
        # The caller's own, too.
        self.place: Any = None
        # Whose lock is in the way, as far as it is in this table.
        self.blocker: Any = None

    @property
    def exclusive(self) -> bool:
        """Whether the lock asked for is exclusive."""
        return self.wanted.exclusive


def clipped(ranges: Iterable[Range], window: Range) -> list[Range]:
    """Return what lies inside the window."""
    return [
        Range(max(held.first, window.first), min(held.last, window.last), held.exclusive)
        for held in ranges
        if held.overlaps(window)
    ]


def gaps(ranges: Iterable[Range], window: Range) -> list[Range]:
    """Return the parts of the window, of its kind, that none of these ranges, which are in order, covers."""
    result, first = [], window.first
    for held in clipped(ranges, window):
        if held.first > first:
            result.append(window._replace(first=first, last=held.first - 1))
        first = held.last + 1
    return [*result, window._replace(first=first)] if first <= window.last else result


def changed_by(ranges: list[Range], first: int, last: int, exclusive: bool | None) -> list[Range]:
    """Return an owner's ranges, in order, once `first` to `last` are locked, or unlocked where `exclusive` is None."""
    result = []
    for held in ranges:
        if held.exclusive == exclusive and held.first - 1 <= last and first <= held.last + 1:
            first, last = min(first, held.first), max(last, held.last)
            continue
        if held.first > last or held.last < first:
            result.append(held)
            continue
        if held.first < first:
            result.append(held._replace(last=first - 1))
        if held.last > last:
            result.append(held._replace(first=last + 1))
    if exclusive is not None:
        result.append(Range(first, last, exclusive))
    return sorted(result)


class RecordLock:
    """The record locks of one file.

    `permit(owner, range, parts)` is asked before anything is granted, and stands for whatever else must agree; once it
    has returned true, the owner has the lock on those parts of the range.
    """

    __slots__ = ("_permit", "queue", "ranges")

    def __init__(self, permit: Callable[[Any, Range, list[Range]], bool]) -> None:
        """Begin with nobody holding and nobody waiting."""
        self._permit = permit
        self.ranges: dict[Any, list[Range]] = {}
        self.queue: list[RecordWaiter] = []

    @property
    def holders(self) -> dict[Any, bool]:
        """Those who hold something, and whether any of it is exclusive."""
        return {owner: any(held.exclusive for held in ranges) for owner, ranges in self.ranges.items()}

    def conflicts(self, owner: Any, wanted: Range) -> Iterator[tuple[Any, Range]]:
        """Yield the locks of others that forbid this one, the first of each owner, in order."""
        if len(self.ranges) == (owner in self.ranges):
            return
        for holder, ranges in self.ranges.items():
            if holder is not owner:
                for held in ranges:
                    if held.conflicts(wanted):
                        yield holder, held
                        break

    def own(self, owner: Any, wanted: Range) -> Iterator[tuple[Any, Range]]:
        """Yield what the owner itself holds of these bytes."""
        return ((owner, held) for held in self.ranges.get(owner, ()) if held.overlaps(wanted))

    def request(
        self,
        owner: Any,
        wanted: Range,
        blocking: bool,
        context: Any = None,
        now: float = 0.0,
        firm: bool = True,
    ) -> int:
        """Ask for a range. Returns GRANTED, REFUSED (`blocking` is false) or WAITING. What is held stays held.

        Unless `firm`, an exclusive lock does not become a shared one by that: the owner may not learn that it has.
        """
        if self._try(owner, wanted, firm):
            return GRANTED
        if not blocking:
            return REFUSED
        self.queue.append(RecordWaiter(owner, wanted, context, now))
        self.queue[-1].blocker = self._blocker(owner, wanted)
        return WAITING

    def serve(self, waiter: RecordWaiter) -> bool:
        """Grant a request that waits, if that is possible now, but not firmly, and return whether it was."""
        if not self._try(waiter.owner, waiter.wanted, False):
            waiter.blocker = self._blocker(waiter.owner, waiter.wanted)
            return False
        self.queue.remove(waiter)
        return True

    def set(self, owner: Any, first: int, last: int, exclusive: bool | None) -> None:
        """Note what the owner has now; nothing where `exclusive` is None."""
        ranges = changed_by(self.ranges.get(owner, []), first, last, exclusive)
        if ranges:
            self.ranges[owner] = ranges
        else:
            self.ranges.pop(owner, None)

    def _blocker(self, owner: Any, wanted: Range) -> Any:
        return next((holder for holder, _ in self.conflicts(owner, wanted)), None)

    def _try(self, owner: Any, wanted: Range, firm: bool) -> bool:
        parts = [wanted] if firm or wanted.exclusive else gaps(self.ranges.get(owner, ()), wanted)
        if self._blocker(owner, wanted) is not None or not self._permit(owner, wanted, parts):
            return False
        for part in parts:
            self.set(owner, *part)
        return True


def circle(waiter: RecordWaiter, waiting: Mapping[Any, list[RecordWaiter]]) -> list[RecordWaiter]:
    """Return those for whom this one waits, in the end itself; or nothing if it does not.

    `waiting` are those of all files, by the `identity` of their owners: which of them are the same process. As
    ``posix_locks_deadlock`` in ``fs/locks.c``, this follows processes' locks only, and gives up after ten steps.
    """
    found: list[RecordWaiter] = []
    blocker = waiter.blocker
    while len(found) < MAX_STEPS:
        blocked = waiting.get(blocker.identity(), ())
        nearest = next((one for one in blocked if one.blocker is not None and one.blocker.is_process), None)
        if nearest is None:
            return []
        found.append(nearest)
        blocker = nearest.blocker
        if blocker.identity() == waiter.owner.identity():
            return found
    return []
