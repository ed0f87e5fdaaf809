"""Has processes and calls come into a certain state, and waits for that."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from support.driver import EX, OK, Call, Driver
from support.proc import await_true, thread_state
from support.worlds import FLOCK_SYSCALL, World


def stop(pid: int) -> None:
    """Stop a process, and return when all of its threads have stopped."""
    os.kill(pid, signal.SIGSTOP)
    await_true(lambda: _is_stopped(pid), f"process {pid} to stop")


def _is_stopped(pid: int) -> bool:
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def await_in_flock(call: Call) -> None:
    """Return when the thread has made its call. That it waits for anybody is not said."""

    def reached() -> bool:
        state = thread_state(call.driver.pid, call.tid)
        return state is not None and state.asleep and state.syscall == FLOCK_SYSCALL

    await_true(reached, "the call to be made")


def held(world: World) -> tuple[Driver, int]:
    """A process that holds the lock, and its descriptor."""
    holder, fd = world.opened()
    assert holder.flock(fd, EX) == OK
    return holder, fd
