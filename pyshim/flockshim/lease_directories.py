"""The directories in which a keeper has leases: vouches where it holds or waits, and cleans up when it does not."""

from __future__ import annotations

import errno
import time

from flockshim.cluster_vouch import GAP, HEARTBEATS, Voucher
from flockshim.lease_files import Directory, clock
from flockshim.lease_worker import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from flockshim.aliveness import Aliveness
    from flockshim.cluster_ops import Protocol
    from flockshim.lease_files import Told
    from flockshim.lease_runner import Runner

GONE = (errno.ENOENT, errno.ESTALE)
# What is held, or waited for, for so long is worth a note for people.
NOTE_SECONDS = 1.0
# So many vouching files of others are looked after at a time.
MOST_WATCHED = 8


class Directories:
    """All of one keeper's."""

    def __init__(self, runner: Runner, aliveness: Aliveness, seconds: float, told: Told) -> None:
        """`seconds` is the lease time."""
        self._runner = runner
        self._aliveness = aliveness
        self._seconds = seconds
        self._told = told
        self._number = 0
        self._all: dict[int, Directory] = {}
        # Those that were last seen at a path.
        self._current: dict[str, Directory] = {}

    def at(self, path: str) -> Directory:
        """Return the one at a path, as far as is known."""
        directory = self._current.get(path)
        if directory is None:
            self._number += 1
            place = Place(self._number, path, None)
            directory = Directory(place, self._aliveness.keeper, self._seconds, self._aliveness.is_dead, self._told)
            self._all[place.number] = self._current[path] = directory
        return directory

    def mistrust(self, directory: Directory) -> None:
        """At its path there may be another one now."""
        if self._current.get(directory.place.path) is directory:
            del self._current[directory.place.path]

    def withdraw_all_of(self, keeper: str) -> None:
        """Remove the vouching files of a keeper that this one succeeds."""
        for directory in self._all.values():
            left = Voucher(keeper, self._seconds, clock, str)
            self._runner.run(directory, left.withdraw(), lambda *_: None)

    def tick(self, now: float) -> None:
        """Vouch where something is held or waited for longer than a heartbeat; stop vouching where nothing is."""
        for directory in list(self._all.values()):
            self._look_after(directory, now)

    def _look_after(self, directory: Directory, now: float) -> None:
        if directory.busy or directory.place.number not in self._all:
            return
        heartbeat = self._seconds / HEARTBEATS
        entries = [one for one in directory.leases if one.named is not False and (one.mode is not None or one.busy)]
        age = heartbeat if directory.has_file else min(heartbeat, NOTE_SECONDS)
        if any(now - lease.since >= age for lease in entries):
            self._vouch(directory)
        elif directory.judge.found_dead:
            self._run(directory, directory.judge.bury(), lambda *_: None)
        elif entries:
            return
        elif directory.has_file:
            self._withdraw(directory)
        elif directory.sweep_at is not None:
            self._sweep(directory, directory.sweep_at, now)
        elif not directory.leases:
            self.mistrust(directory)
            del self._all[directory.place.number]
            self._runner.forget(directory)

    def _run(self, directory: Directory, steps: Protocol[Any], ended: Callable[[Any, Exception | None], None]) -> None:
        directory.busy = True

        def over(result: Any, error: Exception | None) -> None:
            directory.busy = False
            ended(result, error)

        self._runner.run(directory, steps, over)

    def _vouch(self, directory: Directory) -> None:
        directory.has_file = True

        def ended(_: None, error: Exception | None) -> None:
            if not error:
                for lease in directory.leases:
                    lease.since = max(lease.since, clock())

        self._run(directory, directory.voucher.vouch(), ended)

    def _withdraw(self, directory: Directory) -> None:
        def ended(_: None, error: Exception | None) -> None:
            directory.has_file = error is not None and not is_over(error)

        self._run(directory, directory.voucher.withdraw(), ended)

    def _sweep(self, directory: Directory, due: float, now: float) -> None:
        """Remove what crashes have left, once nothing else is to be done in a directory."""
        if now < due:
            return
        if not due:
            directory.sweep_at = now + NOTE_SECONDS
            return
        directory.sweep_at = now

        def ended(more: bool | None, error: Exception | None) -> None:
            if not more and (error is None or is_over(error)):
                directory.sweep_at = None
            else:
                # With short leases sooner than the next tick: what is seen too seldom does not count.
                again = time.monotonic() + self._seconds * GAP / 2
                directory.sweep_at = clock() + self._seconds * GAP / 4
                self._runner.at(again, lambda: self._look_after(directory, clock()))

        self._run(directory, directory.judge.sweep(self._aliveness.keeper, MOST_WATCHED), ended)

    def is_idle(self) -> bool:
        """Return whether nothing is left to be removed."""
        return not any(d.has_file or d.busy or d.judge.found_dead or d.sweep_at is not None for d in self._all.values())


def is_gone(error: Exception) -> bool:
    """Return whether an operation failed because its directory, or what was recorded there, was removed."""
    return isinstance(error, OSError) and error.errno in GONE


def is_over(error: Exception) -> bool:
    """Return whether there is nothing to be given back any more, or no way to: a FUSE server that died stays away."""
    return is_gone(error) or (isinstance(error, OSError) and error.errno == errno.ENOTCONN)
