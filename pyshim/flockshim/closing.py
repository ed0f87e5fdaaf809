"""Closes descriptors of programs' files, without waiting for the file server where the keeper must not.

close(2) may take as long as the server likes: FUSE sends it FLUSH, NFS writes back. A keeper that has leases must vouch
meanwhile, or stop its holders.

A keeper that divides (`standby`) leaves its threads behind, in a process with which the new one shares all descriptors.
So that none is closed by both, which would close another's: what waits here is left to the new one, which closes all
that it does not know; and a thread that is about to close one is waited for. One that hangs in close(2) has given its
number back to the kernel before.
"""

from __future__ import annotations

import contextlib
import os
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MOST_WAITING = 64
CLOSE_SECONDS = 1.0
"""After which a thread that closes a descriptor is in close(2), if not behind it."""


class _Closer:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: list[int] = []
        self.begun = False
        self.is_closing = False
        # How many threads have descriptors of their own.
        self.busy = 0

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                descriptor = self.waiting.pop(0)
                self.is_closing = True
            with contextlib.suppress(OSError):
                os.close(descriptor)
            with self.changed:
                self.is_closing = False
                self.changed.notify_all()


_closer = _Closer()


def in_background() -> None:
    """From now on have all closed by a thread."""
    if not _closer.begun:
        _closer.begun = True
        threading.Thread(target=_closer.run, daemon=True).start()


def close(descriptor: int) -> None:
    """Close a descriptor, now or soon; until then its number is not used again.

    A thread that runs beside the keeper makes every call of it slower: so it is woken by `flush`, or for many.
    """
    if not _closer.begun:
        os.close(descriptor)
        return
    with _closer.changed:
        _closer.waiting.append(descriptor)
        if len(_closer.waiting) > MOST_WAITING:
            _closer.changed.notify_all()


def flush() -> None:
    """Close what waits: nothing else is to be done."""
    if _closer.waiting:
        with _closer.changed:
            _closer.changed.notify_all()


def aside(work: Callable[[], None]) -> None:
    """Have something done by a thread that opens and closes descriptors of its own, and is not waited for."""
    closer = _closer

    def run() -> None:
        try:
            work()
        finally:
            with closer.changed:
                closer.busy -= 1
                closer.changed.notify_all()

    with closer.changed:
        closer.busy += 1
    threading.Thread(target=run, daemon=True).start()


def await_others(seconds: float) -> None:
    """Wait until no thread has descriptors of its own, but not for ever: a file server may not answer."""
    with _closer.changed:
        _closer.changed.wait_for(lambda: not _closer.busy, seconds)


def _leave_to_child() -> None:
    with _closer.changed:
        _closer.waiting.clear()
        _closer.changed.wait_for(lambda: not _closer.is_closing, CLOSE_SECONDS)


def _be_child() -> None:
    global _closer
    _closer = _Closer()


os.register_at_fork(before=_leave_to_child, after_in_child=_be_child)
