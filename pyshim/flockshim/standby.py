"""A killed keeper must not give its locks away: two processes, one descriptor table.

clone(2) with CLONE_FILES makes the keeper a child that shares its parent's descriptors, among them the kernel's locks
on the proxies, the descriptions of those who hold, and the listening socket. While one of the two lives, the kernel
drops nothing. The parent does nothing but wait: when the child is killed it makes another, which finds in the journal
what each descriptor means. When the parent is killed, the child learns it by PR_SET_PDEATHSIG and splits again.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from flockshim._native import ffi, lib

# None of those that batch systems send.
ORPHANED = signal.SIGRTMAX - 1
PAUSE_SECONDS = 0.05
# A child that cannot even begin, again and again: half an installation, say. Programs are then told.
MAX_FAILURES = 5


def split(first: bool) -> int:
    """Return the parent's pid in a child, again in another one whenever that dies; the caller never returns.

    A child that exits with status 0 has nothing left to do, and its parent follows. The child gets ORPHANED when its
    parent dies, and must look itself (``os.getppid``) whether that happened before it was ready for the signal.

    Raises OSError where there cannot be a second process, but only the `first` time: later, what is held must be kept.
    """
    failures = 0
    while failures < MAX_FAILURES:
        parent = lib.native_self()
        started = time.monotonic()
        child = _clone()
        if child == 0:
            lib.native_die_with_parent(ORPHANED)
            return int(parent)
        if child < 0 and first:
            raise OSError(-child, os.strerror(-child))
        first = False
        if child > 0:
            _, status = os.waitpid(child, 0)
            if status == 0:
                os._exit(0)
            failed = os.WIFEXITED(status) and time.monotonic() - started < 1
            failures = failures + 1 if failed else 0
        # There may be no process left for us just now.
        time.sleep(PAUSE_SECONDS)
    os._exit(1)


def _clone() -> int:
    """Make the second process. It has none of this one's threads, so that none may be in the middle of something."""
    if threading.active_count() == 1:
        return int(lib.native_clone_sharing_descriptors())
    # As os.fork() does, and with the interpreter's lock held, which calls by cffi give up.
    import ctypes

    python, address = ctypes.pythonapi, ffi.addressof(lib, "native_clone_sharing_descriptors")
    clone = ctypes.PYFUNCTYPE(ctypes.c_int)(int(ffi.cast("uintptr_t", address)))
    python.PyOS_BeforeFork()
    child = clone()
    if child:
        python.PyOS_AfterFork_Parent()
    else:
        python.PyOS_AfterFork_Child()
    return int(child)
