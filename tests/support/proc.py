"""What /proc says about a process or thread, and waiting until it says something else."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

DEADLINE = 30.0
"""Seconds after which something that must happen counts as never happening."""


def await_true(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """Return as soon as CONDITION holds. For states of /proc, which no event announces."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {deadline} s")
        time.sleep(0.0005)


def await_end(pid: int, deadline: float = DEADLINE) -> None:
    """Return when process PID is gone, all of its descriptors and mappings included."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([handle], [], [], deadline)[0]:
            raise AssertionError(f"process {pid} still runs after {deadline} s")
    finally:
        os.close(handle)


def host_thread(pid: int, tid: int) -> int:
    """The id here of the thread that calls itself TID, maybe in a pid namespace of its own."""
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            status = Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        (numbers,) = [line.split() for line in status if line.startswith("NSpid:")]
        if int(numbers[-1]) == tid:
            return int(task)
    return tid  # it has ended


class ThreadState(NamedTuple):
    """One look at a thread: what it sleeps in, and how often it has ever been switched out."""

    asleep: bool
    syscall: int
    switches: int


def thread_state(pid: int, tid: int) -> ThreadState | None:
    """The state of a thread, or None when it is gone."""
    base = Path(f"/proc/{pid}/task/{tid}")
    try:
        call = (base / "syscall").read_text().split()
        fields = dict(line.split(":", 1) for line in (base / "status").read_text().splitlines() if ":" in line)
    except (FileNotFoundError, ProcessLookupError):
        return None
    number = int(call[0]) if call and call[0].lstrip("-").isdigit() else -1
    switches = int(fields["voluntary_ctxt_switches"]) + int(fields["nonvoluntary_ctxt_switches"])
    return ThreadState(number >= 0 and fields["State"].split()[0] == "S", number, switches)


class Snapshot(NamedTuple):
    """All of a process that a lock call has no business to change."""

    descriptors: dict[int, str]
    threads: int
    children: int
    signals: dict[str, str]
    directory: str


def snapshot(pid: int) -> Snapshot:
    """What a process looks like from outside."""
    base = Path(f"/proc/{pid}")
    status = (base / "status").read_text().splitlines()
    return Snapshot(
        descriptors={int(entry): os.readlink(base / "fd" / entry) for entry in os.listdir(base / "fd")},
        threads=len(os.listdir(base / "task")),
        children=len(children(pid)),
        signals=dict(line.split(":", 1) for line in status if line.startswith(("SigBlk", "SigIgn", "SigCgt"))),
        directory=os.readlink(base / "cwd"),
    )


def parent(pid: int) -> int:
    """The parent's id, or 0 when PID is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    state, ppid = stat.rpartition(")")[2].split()[:2]
    return 0 if state in "ZX" else int(ppid)


def children(pid: int) -> list[int]:
    """The processes that PID would have to wait for, zombies included."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry))
    return found
