"""``flockshim --break``: takes the lock on PATH away from holders on other hosts that a person knows to be dead."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from flockshim import FlockshimError, cluster_list, cluster_notes, holders
from flockshim.cluster_list import Holding, Target
from flockshim.cluster_names import keeper_of
from flockshim.locking import Locker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

REFUSED = 1


def run(
    path: str,
    yes: bool,
    environ: Mapping[str, str],
    write: Callable[[str], None],
    say: Callable[[str], None],
) -> int:
    """Show who holds the lock on *path* between hosts, ask, and take it away by the protocol (docs/cluster.md).

    Returns 0 if nobody of them holds it any more, 1 if somebody kept it.

    :param yes: don't ask.
    :param write: writes to standard output, *say* a line to standard error.
    :raises FlockshimError: when the lock's files cannot be read or changed, and when there is nobody to ask.
    """
    with cluster_list.observer(Locker(environ), environ) as observer:
        try:
            with Target(path, observer) as flock, Target(path, observer, records=True) as records:
                held = [target for target in (flock, records) if target.holdings()[0]]
                if not held:
                    write(f"nobody holds the lock on {holders.printable(flock.path)} between hosts\n")
                return max([_break(target, yes, write, say) for target in held], default=0)
        except OSError as error:
            raise FlockshimError(
                f"--break: the lock files beside {path!r}: {error.filename or ''}: {error.strerror}"
            ) from None


def _break(target: Target, yes: bool, write: Callable[[str], None], say: Callable[[str], None]) -> int:
    held, _ = target.holdings()
    write("".join(_line(holding, target) for holding in held))
    alive = [holding for holding in held if holding.alive]
    for holding in alive:
        say(f"{cluster_list.describe(holding, target.name)}: alive, so the lock stays: end it instead")
    doubtful = [holding for holding in held if not holding.alive]
    if not doubtful:
        return REFUSED
    if any(holding.alive is None for holding in doubtful) and not yes and not _ask(say):
        return REFUSED
    kept = [holding for holding in doubtful if not _take_away(holding, target, write, say)]
    return REFUSED if alive or kept else 0


def _line(holding: Holding, target: Target) -> str:
    who = cluster_list.describe(holding, target.name)
    vouched = f", vouched for at {holders.clock(holding.note.written)}" if holding.note else ", never vouched for"
    mode = "exclusive" if holding.entry.exclusive else "shared"
    what = " (record locks)" if target.records else ""
    return f"{holders.printable(target.path)}{what}: held by {who}: {mode}, token {holding.entry.granted}{vouched}\n"


def _ask(say: Callable[[str], None]) -> bool:
    if not os.isatty(0) or not os.isatty(2):
        raise FlockshimError(
            "--break asks on the terminal, and there is none: add --yes if you know that the holder is dead"
        )
    say("if the holder still runs, it and the next one will both believe that they have the lock")
    os.write(2, b"Take the lock away? [y/N] ")
    return os.read(0, 100).strip().lower() in (b"y", b"yes")


def _take_away(holding: Holding, target: Target, write: Callable[[str], None], say: Callable[[str], None]) -> bool:
    """Return whether the holder is gone."""
    who = cluster_list.describe(holding, target.name)
    # While somebody thought about it the holder may have given a sign of life.
    note = target.perform(cluster_notes.read(keeper_of(holding.entry.ticket)))
    if holding.alive is None and note is not None and note != holding.note:
        say(f"{who}: alive, it has vouched for its lock just now, so the lock stays: end it instead")
        return False
    target.perform(target.lease.refresh())
    if target.perform(target.lease.take_away(holding.entry.ticket)):
        write(f"taken away from {who}; the version is {target.version()} now\n")
        target.judge.found_dead.add(keeper_of(holding.entry.ticket))
        target.perform(target.judge.bury())
    else:
        write(f"{who} does not hold it any more\n")
    return True
