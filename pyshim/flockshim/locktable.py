"""Who holds and who waits for the advisory lock of one file: bookkeeping only, no input or output.

The rules are those of ``flock(2)`` as Linux has them (``fs/locks.c``, ``flock_lock_inode``): the owner is an open file
description; a request for another mode first loses the mode held, and then competes only with those who hold.
One thing is stronger than in Linux: new blocking requests are served in order, so that readers who come and go
cannot starve a writer.
"""

from __future__ import annotations

from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

GRANTED = 0
REFUSED = 1
WAITING = 2


class Waiter:
    """A blocking request that could not be granted at once."""

    __slots__ = ("changed", "context", "exclusive", "owner", "since")

    def __init__(self, owner: Any, exclusive: bool, context: Any, since: float) -> None:
        """Note the description, the mode asked for, the caller's own `context` for the answer, and the time."""
        self.owner = owner
        self.exclusive = exclusive
        self.context = context
        self.since = since
        # Once granted: whether the owner did not hold just that already.
        self.changed = True


class FileLock:
    """The lock of one file.

    `permit(exclusive, barging)` is asked before anything is granted; it stands for whatever else must agree
    (other keepers of the host), and must return whether a lock of that mode may be held now. `barging` is true of
    requests that Linux lets pass those who wait. `grant(owner, exclusive)` is told each mode that an owner holds
    from now on, before anybody is told that it was granted; `drop(owner)` each loss.
    """

    __slots__ = ("_drop", "_grant", "_permit", "holders", "queue")

    def __init__(
        self,
        permit: Callable[[bool, bool], bool],
        grant: Callable[[Any, bool], None],
        drop: Callable[[Any], None],
    ) -> None:
        """Begin with nobody holding and nobody waiting."""
        self._permit = permit
        self._grant = grant
        self._drop = drop
        self.holders: dict[Any, bool] = {}
        self.queue: deque[Waiter] = deque()

    def conflicts(self, owner: Any, exclusive: bool) -> bool:
        """Return whether somebody else's lock forbids this mode to `owner`."""
        others = len(self.holders) - (owner in self.holders)
        if not others:
            return False
        return exclusive or any(mode for holder, mode in self.holders.items() if holder != owner)

    def request(self, owner: Any, exclusive: bool, blocking: bool, context: Any = None, now: float = 0.0) -> int:
        """Ask for a mode. Returns GRANTED, REFUSED (`blocking` is false) or WAITING.

        A refused or waiting conversion has lost the mode it had; call `serve` afterwards, since others may go on.
        """
        held = self.holders.get(owner)
        if held is not None:
            if held == exclusive:
                return GRANTED
            self._lose(owner)
        barging = held is not None or not blocking
        if (barging or not self.queue) and self._try(owner, exclusive, barging):
            return GRANTED
        if not blocking:
            return REFUSED
        self.queue.append(Waiter(owner, exclusive, context, now))
        return WAITING

    def release(self, owner: Any) -> bool:
        """Take `owner`'s lock away. Returns whether it had one; call `serve` afterwards."""
        if owner not in self.holders:
            return False
        self._lose(owner)
        return True

    def withdraw(self, waiter: Waiter) -> None:
        """Forget a request that waits; call `serve` afterwards."""
        self.queue.remove(waiter)

    def serve(self, overdue: float | None = None) -> list[Waiter]:
        """Grant to those whose turn has come, in order, and return their requests.

        Readers who wait since `overdue` or longer then join other readers although a writer waits before them, as they
        could at once in Linux: a reader may be waiting for its child, which wants to read too.
        """
        served = []
        while self.queue:
            waiter = self.queue[0]
            held = self.holders.get(waiter.owner)
            if held is not None and held != waiter.exclusive:
                self._lose(waiter.owner)
            if held != waiter.exclusive and not self._try(waiter.owner, waiter.exclusive, False):
                break
            waiter.changed = held != waiter.exclusive
            self.queue.popleft()
            served.append(waiter)
        # Two calls may wait on one description: what one has got the other has, too.
        for waiter in [w for w in self.queue if self.holders.get(w.owner) == w.exclusive]:
            waiter.changed = False
            self.queue.remove(waiter)
            served.append(waiter)
        if overdue is not None and self.holders:
            for waiter in [w for w in self.queue if not w.exclusive and w.since <= overdue]:
                if self._try(waiter.owner, False, True):
                    self.queue.remove(waiter)
                    served.append(waiter)
        return served

    def adopt(self, owner: Any, exclusive: bool) -> None:
        """Note a lock that is held already, by the account of a keeper that has died."""
        self.holders[owner] = exclusive

    def _try(self, owner: Any, exclusive: bool, barging: bool) -> bool:
        if self.conflicts(owner, exclusive) or not self._permit(exclusive, barging):
            return False
        self.holders[owner] = exclusive
        self._grant(owner, exclusive)
        return True

    def _lose(self, owner: Any) -> None:
        del self.holders[owner]
        self._drop(owner)
