"""Finds and ends the keepers of one rendezvous directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

from support.proc import await_end, parent


class Keeper(NamedTuple):
    """The two processes of one keeper; the standby is the worker's parent."""

    standby: int
    worker: int


def keeper_processes(rendezvous: Path | str) -> list[int]:
    """Every process that serves RENDEZVOUS."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        here = os.fsencode(str(rendezvous)) in words
        if here and any(word.endswith(b"flockshim/keeper.py") for word in words):
            found.append(int(entry))
    return found


def keepers(rendezvous: Path | str) -> list[Keeper]:
    """Every complete keeper that serves RENDEZVOUS."""
    processes = keeper_processes(rendezvous)
    return [Keeper(parent(pid), pid) for pid in processes if parent(pid) in processes]


def end_keepers(rendezvous: Path | str) -> None:
    """Kill every keeper of RENDEZVOUS, and return when they are gone."""
    while processes := keeper_processes(rendezvous):
        for pid in processes:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for pid in processes:
            await_end(pid)
