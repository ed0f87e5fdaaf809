"""Closes descriptors of programs' files, without waiting for the file server where the keeper must not.

close(2) may take as long as the server likes: FUSE sends it FLUSH, NFS writes back. A keeper that has leases must vouch
meanwhile, or stop its holders.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading

_queue: queue.SimpleQueue[int] | None = None


def in_background() -> None:
    """From now on have all closed by a thread."""
    global _queue
    if _queue is None:
        _queue = queue.SimpleQueue()
        threading.Thread(target=_close_all, args=(_queue,), daemon=True).start()


def close(descriptor: int) -> None:
    """Close a descriptor, now or soon; until then its number is not used again."""
    if _queue is None:
        os.close(descriptor)
    else:
        _queue.put(descriptor)


def _close_all(waiting: queue.SimpleQueue[int]) -> None:
    while True:
        with contextlib.suppress(OSError):
            os.close(waiting.get())


def _forget_thread() -> None:
    """A process made by fork(2) has no thread but one."""
    global _queue
    _queue = None


os.register_at_fork(after_in_child=_forget_thread)
