"""What a keeper's vouching file tells people: on which host it is, and for which programs it has its entries.

The protocol compares the bytes of these files and nothing else. A note is for `--locks`, `--break` and messages only:
it may be old, missing or untrue, and nobody is judged by it. It is there when a lock is held, or waited for, for longer
than a moment (`leases`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flockshim import holders
from flockshim.cluster_names import keeper_of, vouching_name
from flockshim.cluster_ops import Protocol, Read
from flockshim.cluster_state import Entry, State

MOST_FILES = 64
MOST_PROGRAMS = 8

ELSEWHERE = "a program on another host"


class Program(NamedTuple):
    """A process that holds a lock or waits for it; `since` is in seconds since the epoch, by its host's clock."""

    pid: int
    command: str
    exclusive: bool
    waits: bool
    since: float


class Note(NamedTuple):
    """What one keeper tells; `written` is in seconds since the epoch, by its host's clock."""

    host: str
    written: float
    programs: Mapping[str, Sequence[Program]]
    """By the name of the target in the directory."""

    def of(self, name: str, waits: bool) -> list[Program]:
        """Return the programs that wait for the lock on this target, or else hold it."""
        return [program for program in self.programs.get(name, ()) if program.waits is waits]


def text(nonce: str, host: str, programs: Mapping[str, Sequence[Program]]) -> str:
    """Return what to write into a vouching file. `nonce` makes it different from all that was written before."""
    few = {name: list(programs[name])[:MOST_PROGRAMS] for name in sorted(programs)[:MOST_FILES]}
    content = {"nonce": nonce, "host": host, "written": round(time.time(), 3), "programs": few}
    return json.dumps(content) + "\n"


def parse(text: str) -> Note | None:
    """Return the note in a vouching file's text, without what makes a terminal do something; None if it is none."""
    try:
        content = json.loads(text)
        programs = {
            str(name): [_program(*fields) for fields in of_name] for name, of_name in content["programs"].items()
        }
        return Note(holders.printable(str(content["host"])), float(content["written"]), programs)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None


def _program(pid: Any, command: Any, exclusive: Any, waits: Any, since: Any) -> Program:
    return Program(int(pid), holders.printable(str(command)), bool(exclusive), bool(waits), float(since))


def read(keeper: str) -> Protocol[Note | None]:
    """Return what a keeper tells, or None if it has told nothing, or that cannot be read now."""
    try:
        return parse((yield Read(vouching_name(keeper))))
    except OSError:
        return None


def holder(state: State, name: str) -> Protocol[str | None]:
    """Return who holds the lock on target `name`, for people; None as long as its keeper has told nothing."""
    for entry in state.holders:
        note = yield from read(keeper_of(entry.ticket))
        if note is not None:
            return describe(entry, note, name)
    return None


def describe(entry: Entry, note: Note | None, name: str) -> str:
    """Return who is behind an entry for target `name`."""
    if note is None:
        return ELSEWHERE
    programs = note.of(name, waits=entry.granted == 0)
    if not programs:
        return f"a program on {note.host}"
    first = min(programs, key=lambda program: program.since)
    return f"pid {first.pid} ({first.command or 'unknown'}) on {note.host} since {holders.clock(first.since)}"
