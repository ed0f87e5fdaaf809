"""Has processes and calls come into a certain state, and waits for that."""

from __future__ import annotations

import os
import signal

from support.driver import EX, OK, Call, Driver
from support.proc import await_true, thread_state
from support.worlds import FLOCK_SYSCALL, World


def stop(pid: int) -> None:
    """Stop a process, and return when it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    await_true(lambda: _is_stopped(pid), f"process {pid} to stop")


def _is_stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


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
