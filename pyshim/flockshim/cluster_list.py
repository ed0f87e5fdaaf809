"""Who holds and who waits between hosts, read beside a target by a command that has no part in it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, TypeVar

from flockshim import cluster_files, cluster_notes
from flockshim.aliveness import Aliveness
from flockshim.cluster import Lease
from flockshim.cluster_names import MAX_KEEPER, RECORDS, Names, keeper_of, new_lineage
from flockshim.cluster_ops import Operation, Pause, Protocol, Read
from flockshim.cluster_vouch import DEFAULT_LEASE, Judge, Voucher
from flockshim.lease_files import clock

if TYPE_CHECKING:
    from flockshim.cluster_notes import Note
    from flockshim.cluster_state import Entry
    from flockshim.locking import Locker

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.1

T = TypeVar("T")
Heed = Callable[[Operation], None]


class Observer:
    """A command's view of cluster mode: it has no entry anywhere, and so needs no vouching file."""

    def __init__(self, keeper: str, aliveness: Aliveness | None, seconds: float) -> None:
        """`aliveness` is None where this host has no rendezvous directory yet; `seconds` is the lease time."""
        self.keeper = keeper
        self.seconds = seconds
        self._aliveness = aliveness
        self._serial = 0

    def is_dead(self, keeper: str) -> bool | None:
        """Return whether a keeper of this host's domain is dead, or None for one of another."""
        return self._aliveness.is_dead(keeper) if self._aliveness else None

    def new_ticket(self) -> str:
        """Return what no keeper has used."""
        self._serial += 1
        return f"{self.keeper}-{self._serial}"

    def judge(self) -> Judge:
        """Return a judge of the keepers in one directory."""
        return Judge(self.seconds, clock, self.is_dead)


@contextlib.contextmanager
def observer(locker: Locker, environ: Mapping[str, str]) -> Iterator[Observer]:
    """Return an observer by the settings of *environ*.

    :raises FlockshimError: when the rendezvous directory's name is too long.
    """
    directory = locker.rendezvous_directory()
    aliveness = None
    with contextlib.suppress(OSError):
        # Of somebody else's directory nothing is believed; where there is none, no keeper of this domain can be alive.
        if os.lstat(directory).st_uid == os.geteuid():
            aliveness = Aliveness(directory)
    keeper = aliveness.keeper if aliveness else os.urandom(MAX_KEEPER // 2).hex()
    try:
        yield Observer(keeper, aliveness, float(environ.get("FLOCKSHIM_LEASE") or DEFAULT_LEASE))
    finally:
        if aliveness:
            aliveness.end()
            os.close(aliveness.descriptor)


class Holding(NamedTuple):
    """An entry, and what is known of its keeper; `alive` is None where only watching it for a lease time would tell."""

    entry: Entry
    note: Note | None
    alive: bool | None


class Target:
    """The lock files beside one target. Use as a context manager."""

    def __init__(self, path: str, observer: Observer, judge: Judge | None = None, records: bool = False) -> None:
        """`path` need not exist; `judge` is shared by the targets of one directory. `records`: of its record locks.

        Raises OSError where its directory cannot be opened, or its name is too long for cluster mode.
        """
        self.path = os.path.realpath(path)
        self.name = os.path.basename(self.path) + (RECORDS if records else "")
        self.records = records
        self.judge = judge or observer.judge()
        self._observer = observer
        self._claim = Names(self.name).claim
        voucher = Voucher(observer.keeper, observer.seconds, clock, str)
        self.lease = Lease(self.name, observer.new_ticket, new_lineage, self.judge, voucher)
        self._directory = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Target:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the directory."""
        os.close(self._directory)

    def perform(self, generator: Protocol[T], heed: Heed = lambda _: None) -> T:
        """Run a generator of the protocol to its end; see `perform`. Raises OSError."""
        return perform(self._directory, generator, heed)

    def is_claimed(self) -> bool:
        """Return whether the lock has ever been taken in cluster mode: else reading its state would make its files."""
        try:
            self.perform(_read(self._claim))
        except FileNotFoundError:
            return False
        return True

    def version(self) -> int:
        """Return the version of the state as last known."""
        return self.lease.state.version if self.lease.state else 0

    def holdings(self) -> tuple[list[Holding], list[Holding]]:
        """Return who holds, and who waits in order; both empty if nobody ever did. Raises OSError."""
        if not self.is_claimed():
            return [], []
        state = self.perform(self.lease.refresh())
        held, waiting = ([self._known(entry) for entry in entries] for entries in (state.holders, state.queue))
        return held, waiting

    def _known(self, entry: Entry) -> Holding:
        keeper = keeper_of(entry.ticket)
        dead = self._observer.is_dead(keeper)
        return Holding(entry, self.perform(cluster_notes.read(keeper)), None if dead is None else not dead)


def perform(directory: int, generator: Protocol[T], heed: Heed = lambda _: None) -> T:
    """Run a generator of the protocol in the directory of this descriptor, for as long as the file server takes.

    `heed` is told of every operation that has succeeded. Raises OSError.
    """
    result: Any = None
    error: OSError | None = None
    while True:
        try:
            operation = generator.throw(error) if error else generator.send(result)
        except StopIteration as stop:
            ended: T = stop.value
            return ended
        result = error = None
        if isinstance(operation, Pause):
            time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**operation.attempt))
            continue
        try:
            result = cluster_files.perform(directory, operation)
            heed(operation)
        except OSError as failure:
            error = failure


def perform_in(path: str, generator: Protocol[T], heed: Heed = lambda _: None) -> T:
    """Run a generator of the protocol in the directory `path`. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return perform(descriptor, generator, heed)
    finally:
        os.close(descriptor)


def describe(holding: Holding, name: str) -> str:
    """Return who is behind an entry for target *name*, for people."""
    if holding.note is None and holding.alive is not None:
        return "a program of another job" if holding.alive else "a program of this host that is gone"
    return cluster_notes.describe(holding.entry, holding.note, name)


def as_json(holding: Holding, name: str) -> dict[str, Any]:
    """Return an entry as `flockshim --locks --json` shows it: see `locks_command`."""
    entry, note, alive = holding
    waits = entry.granted == 0
    programs = note.of(name, waits) if note else []
    return {
        "mode": "exclusive" if entry.exclusive else "shared",
        "keeper": keeper_of(entry.ticket),
        "host": note.host if note else None,
        "alive": alive,
        "token": None if waits else entry.granted,
        "vouched": note.written if note else None,
        "programs": [
            {
                "mode": "exclusive" if program.exclusive else "shared",
                "pid": program.pid,
                "command": program.command,
                "since": program.since,
            }
            for program in programs
        ],
    }


def _read(name: str) -> Protocol[str]:
    text: str = yield Read(name)
    return text
