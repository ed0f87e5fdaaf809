"""``flockshim --clean``: removes what crashes have left of cluster mode below DIR, by the protocol."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from flockshim import FlockshimError, cluster_list
from flockshim.cluster_list import Observer, Target
from flockshim.cluster_names import keeper_of_vouching, vouching_name
from flockshim.cluster_ops import List, Rename, Unlink
from flockshim.cluster_vouch import GAP
from flockshim.locking import Locker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flockshim.cluster_ops import Operation, Protocol

INCOMPLETE = 1
CLAIM = ".flockshim"
# Of the lease time: a little more than the whole of it must be watched before somebody can be called dead.
WATCH = 1.1


class Counts:
    """What was done."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.removed = 0
        self.changed = 0
        self.failed = 0

    def heed(self, operation: Operation) -> None:
        """Count an operation that has succeeded."""
        self.removed += isinstance(operation, Unlink)
        self.changed += isinstance(operation, Rename)


class Directory:
    """One directory with lock files, and what is observed of the keepers that use it."""

    def __init__(self, path: str, names: list[str], observer: Observer) -> None:
        """`names` are those of its files."""
        self.targets = [name[1 : -len(CLAIM)] for name in names if _is_claim(name)]
        # Entries and vouching files of keepers on other hosts, of whom it is not known whether they are dead.
        self.doubtful = 0
        self._path = path
        self._observer = observer
        self._judge = observer.judge()

    def clean(self, counts: Counts, say: Callable[[str], None]) -> None:
        """Remove what is known by now to be of no use, and observe the rest."""
        self.doubtful = 0
        failed = []
        for name in self.targets:
            try:
                self._clean_target(name, counts)
            except OSError as error:
                failed.append((name, error))
        try:
            cluster_list.perform_in(self._path, self._judge.bury(), counts.heed)
            cluster_list.perform_in(self._path, self._judge.sweep(self._observer.keeper, sys.maxsize), counts.heed)
            keepers = map(keeper_of_vouching, cluster_list.perform_in(self._path, _list(vouching_name(""))))
            self.doubtful += sum(keeper is not None and self._observer.is_dead(keeper) is None for keeper in keepers)
        except OSError as error:
            failed.append(("", error))
        counts.failed += len(failed)
        for name, failure in failed:
            say(f"--clean: the lock files of {os.path.join(self._path, name)!r}: {failure.strerror}")

    def _clean_target(self, name: str, counts: Counts) -> None:
        with Target(os.path.join(self._path, name), self._observer, self._judge) as target:
            target.perform(target.lease.clean(), counts.heed)
            self.doubtful += sum(holding.alive is None for row in target.holdings() for holding in row)


def run(
    path: str,
    wait: bool,
    environ: Mapping[str, str],
    write: Callable[[str], None],
    say: Callable[[str], None],
) -> int:
    """Clean the directory *path* and all below it. Returns 0, or 1 where some of it could not be cleaned.

    Entries and vouching files of other hosts can only be called dead after they have been watched for a lease time
    (``FLOCKSHIM_LEASE``, seconds, which must be that of those hosts).

    :param wait: watch them for so long.
    :param write: writes to standard output, *say* a line to standard error.
    :raises FlockshimError: for a directory that does not exist.
    """
    if not os.path.isdir(path):
        raise FlockshimError(f"--clean: {path!r} is not an existing directory")
    counts = Counts()
    with cluster_list.observer(Locker(environ), environ) as observer:
        directories = _find(path, observer, counts, say)
        end = time.monotonic() + WATCH * observer.seconds
        _clean_all(directories, counts, say)
        while wait and any(directory.doubtful for directory in directories) and time.monotonic() < end:
            time.sleep(observer.seconds * GAP / 2)
            _clean_all(directories, counts, say)
        write(_report(directories, counts, None if wait else WATCH * observer.seconds))
    return INCOMPLETE if counts.failed else 0


def _find(path: str, observer: Observer, counts: Counts, say: Callable[[str], None]) -> list[Directory]:
    def unreadable(error: OSError) -> None:
        counts.failed += 1
        say(f"--clean: {error.filename!r}: {error.strerror}")

    return [
        Directory(parent, names, observer)
        for parent, _, names in os.walk(path, onerror=unreadable)
        if any(_is_claim(name) or keeper_of_vouching(name) for name in names)
    ]


def _clean_all(directories: list[Directory], counts: Counts, say: Callable[[str], None]) -> None:
    counts.failed = 0
    for directory in directories:
        directory.clean(counts, say)


def _report(directories: list[Directory], counts: Counts, seconds: float | None) -> str:
    claims = sum(len(directory.targets) for directory in directories)
    doubtful = sum(directory.doubtful for directory in directories)
    lines = [
        f"removed {counts.removed} files, and the dead from {counts.changed} locks",
        f"left {claims} locks with two files each, which nothing can remove safely (docs/cluster.md)",
    ]
    if doubtful:
        told = "seem alive" if seconds is None else f"may be alive: --wait watches them for {seconds:.0f} s"
        lines.append(f"left {doubtful} entries and vouching files of other hosts, which {told}")
    return "".join(f"{line}\n" for line in lines)


def _is_claim(name: str) -> bool:
    return name.startswith(".") and name.endswith(CLAIM) and len(name) > len(".") + len(CLAIM)


def _list(prefix: str) -> Protocol[list[str]]:
    names: list[str] = yield List(prefix)
    return names
