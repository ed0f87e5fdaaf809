"""Threads of the test process that call something which may wait, and what the process has open."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.proc import DEADLINE


class ThisProcess:
    """Stands for a `Driver` where only the process id is asked for."""

    pid = os.getpid()


class ThreadCall:
    """A call in a thread of its own, for `World.await_blocked`."""

    driver = ThisProcess

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._thread.native_id is not None
        self.tid = self._thread.native_id

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def returned(self) -> bool:
        return not self._thread.is_alive()

    def value(self) -> Any:
        """Wait for the end: what the function has returned or raised."""
        self._thread.join(DEADLINE)
        assert self.returned(), f"no end within {DEADLINE} s"
        if self._error:
            raise self._error
        return self._result


class KnownThread:
    """A thread that somebody else has started, for `World.await_blocked`."""

    driver = ThisProcess

    def __init__(self, thread: threading.Thread) -> None:
        assert thread.native_id is not None
        self.tid = thread.native_id
        self.returned = lambda: not thread.is_alive()


def descriptors() -> dict[int, str]:
    """What this process has open, without the directory by which that is found out."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue
    return found


def times_open(path: Path) -> int:
    """How many descriptors this process has of PATH."""
    return list(descriptors().values()).count(str(path))
