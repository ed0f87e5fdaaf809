"""Mistakes that one could make in the cluster protocol. The exploration must find each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Set
from typing import Any

import pytest
from cluster_program import Surroundings

from flockshim import cluster
from flockshim.cluster import Lease
from flockshim.cluster_names import StateName, data_of, is_litter
from flockshim.cluster_ops import Create, List, Look, Rename, Unlink
from flockshim.cluster_state import Entry, State

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]


class GaveUp(Exception):
    pass


class Fixed:
    """An attribute that keeps its value, whatever is assigned."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self.value

    def __set__(self, instance: Any, value: Any) -> None:
        pass


def no_claim(patch: Patch) -> None:
    """Whoever sees no claim uses a lineage of its own, without claiming it."""

    def claim(self: Any) -> Any:
        return (yield from self._write_state()).lineage

    patch.setattr(Lease, "_claim", claim)


def trusted_link(patch: Patch) -> None:
    """The answer of link decides who has claimed."""

    def claim(self: Any) -> Any:
        own = yield from self._write_state()
        failure = yield from self._link(own)
        if failure is None:
            return own.lineage
        with contextlib.suppress(FileNotFoundError):
            yield Unlink(self._names.state(own))
        lineage = None
        while lineage is None:
            lineage = yield from self._read_claim()
        return lineage

    patch.setattr(Lease, "_claim", claim)


def create_and_unlink(patch: Patch) -> None:
    """The new state file is made, then the old one removed."""

    def change(self: Any, wanted: State) -> Any:
        old = self._name
        token = wanted.token() or "d" + (yield from self._write_data(wanted))
        new = StateName(self._lineage, wanted.version, token)
        self._state = None
        try:
            yield Create(self._names.state(new), "")
            yield Unlink(self._names.state(old))
        except OSError:
            return
        self._learn(new, wanted)

    patch.setattr(Lease, "_change", change)


def unlink_and_create(patch: Patch) -> None:
    """The old state file is removed, which is the comparison, then the new one made."""

    def change(self: Any, wanted: State) -> Any:
        old = self._name
        token = wanted.token() or "d" + (yield from self._write_data(wanted))
        new = StateName(self._lineage, wanted.version, token)
        self._state = None
        try:
            yield Unlink(self._names.state(old))
        except OSError:
            return
        yield Create(self._names.state(new), "")
        self._learn(new, wanted)

    patch.setattr(Lease, "_change", change)


def trusted_memory(patch: Patch) -> None:
    """What a listing has once said is believed, and never opened again."""

    def is_current(self: Any) -> Any:
        return True
        yield

    patch.setattr(Lease, "_is_current", is_current)


def unopened(patch: Patch) -> None:
    """What a listing says is believed without being opened."""

    def is_current(self: Any) -> Any:
        self._state = None
        return True
        yield

    original = Lease._open

    def opened(self: Any, name: StateName) -> Any:
        run = original(self, name)
        told: Any = None
        while True:
            try:
                op = run.send(told)
            except StopIteration:
                return
            told = None
            if not isinstance(op, Look):
                try:
                    told = yield op
                except OSError as error:
                    with contextlib.suppress(StopIteration):
                        run.throw(error)
                    return

    patch.setattr(Lease, "_open", opened)
    patch.setattr(Lease, "_is_current", is_current)


def lost_answer(patch: Patch) -> None:
    """ENOENT means that the rename was not done, so that a non-blocking request gives up."""
    change, acquire = Lease._change, Lease.acquire

    def changed(self: Any, wanted: State) -> Any:
        yield from change(self, wanted)
        if self._state is None:
            raise GaveUp

    def acquired(self: Any, exclusive: bool, blocking: bool) -> Any:
        patch.setattr(Lease, "_change", change if blocking else changed)
        try:
            return (yield from acquire(self, exclusive, blocking))
        except GaveUp:
            return False
        finally:
            patch.setattr(Lease, "_change", change)

    patch.setattr(Lease, "acquire", acquired)


def forgotten_ticket(patch: Patch) -> None:
    """After a rename that failed, an entry made by it is not known as one's own when it comes to releasing."""
    change = Lease._change

    def changed(self: Any, wanted: State) -> Any:
        made = dict(self._made)
        yield from change(self, wanted)
        if self._state is None:
            self._made = {ticket: time for ticket, time in made.items() if ticket != max(made)}

    patch.setattr(Lease, "_change", changed)
    patch.setattr(Lease, "_stale", lambda self, state: set())


def forgotten_queue(patch: Patch) -> None:
    """A release leaves nobody in the queue."""
    patch.setattr(State, "without", lambda self, tickets: State(self.version + 1))


def no_hand_over(patch: Patch) -> None:
    """A release leaves the lock to whoever comes."""

    def without(self: State, tickets: Set[str]) -> State:
        holders, queue = (tuple(e for e in es if e.ticket not in tickets) for es in (self.holders, self.queue))
        return State(self.version + 1, holders, queue)

    patch.setattr(State, "without", without)


def last_come_first_served(patch: Patch) -> None:
    """The queue is a stack."""
    request = State.request

    def requested(self: State, entry: Entry, blocking: bool) -> Any:
        state = request(self, entry, blocking)
        if state and len(state.queue) > len(self.queue):
            return state._replace(queue=(entry, *self.queue))
        return state

    patch.setattr(State, "request", requested)


def blind_break(patch: Patch) -> None:
    """A rename that comes too late is repeated from whatever name there is now."""
    change = Lease._change

    def changed(self: Any, wanted: State) -> Any:
        yield from change(self, wanted)
        if self._state is None and wanted.token() is not None:
            for name in (yield List(self._names.claim)):
                parsed = self._names.parse(name)
                if isinstance(parsed, StateName):
                    new = StateName(self._lineage, parsed.version + 1, wanted.token())
                    yield Rename(name, self._names.state(new))
                    self._learn(new, wanted._replace(version=new.version))
                    return

    patch.setattr(Lease, "_change", changed)


def no_confirmation(patch: Patch) -> None:
    """Whoever was silent goes on if the state still names it."""

    def confirm(self: Any) -> Any:
        state = yield from self.refresh()
        return self._own(state.holders) is not None

    patch.setattr(Lease, "confirm", confirm)


def grant_taken_late(patch: Patch) -> None:
    """A waiter that was silent takes the grant that it finds without asking."""
    patch.setattr(Lease, "_must_confirm", lambda self, own: False)


def same_ticket(patch: Patch) -> None:
    """An entry that is made again or confirmed has the name of the one before."""

    def ticket(self: Any) -> str:
        name = f"{self._voucher.keeper}-0"
        self._made[name] = self._voucher.clock()
        return name

    patch.setattr(Lease, "_ticket", ticket)


def no_floor(patch: Patch) -> None:
    """A state older than one that was known is believed."""
    patch.setattr(Lease, "_floor", Fixed(0), raising=False)


def no_doubt(patch: Patch) -> None:
    """A rename that failed with EIO is taken for not done."""
    patch.setattr(Lease, "_doubt", Fixed(-1), raising=False)


def eager_cleaner(patch: Patch) -> None:
    """Data files of the next version are taken for litter."""

    def eager(name: Any, seen: StateName) -> bool:
        next_version = seen._replace(version=seen.version + 1, token="free")
        return is_litter(name, next_version) and name != data_of(seen) and name != seen

    patch.setattr(cluster, "is_litter", eager)


def eager_birth_cleaner(patch: Patch) -> None:
    """Whose link failed removes its state file before it has read the claim."""
    link = Lease._link

    def linked(self: Any, own: StateName) -> Any:
        failure = yield from link(self, own)
        if failure is not None:
            with contextlib.suppress(FileNotFoundError):
                yield Unlink(self._names.state(own))
        return failure

    patch.setattr(Lease, "_link", linked)


def same_version(patch: Patch) -> None:
    """Giving back does not raise the version."""
    without = State.without

    def back(self: State, tickets: Set[str]) -> State:
        return without(self._replace(version=self.version - 1), tickets)

    patch.setattr(State, "without", back)


def reader_joins_writer(patch: Patch) -> None:
    """Only the mode of who asks is looked at."""
    patch.setattr(State, "_joins", lambda self, entry, blocking: not entry.exclusive)


def data_afterwards(patch: Patch) -> None:
    """The data file is made when the state has its name."""
    change, write = Lease._change, Lease._write_data

    def nothing(self: Any, wanted: State) -> Any:
        self._later = self._new_ticket()
        return self._later
        yield

    def changed(self: Any, wanted: State) -> Any:
        self._later = ""
        yield from change(self, wanted)
        if self._later:
            yield from write(self, wanted)

    patch.setattr(Lease, "_write_data", nothing)
    patch.setattr(Lease, "_change", changed)


def data_removed_before(patch: Patch) -> None:
    """The old data file is removed before the rename that replaces its state."""
    change = Lease._change

    def changed(self: Any, wanted: State) -> Any:
        data = data_of(self._name)
        if data is not None:
            yield Unlink(self._names.data(data))
        yield from change(self, wanted)

    patch.setattr(Lease, "_change", changed)


def litter_left(patch: Patch) -> None:
    """Nobody cleans."""

    def sweep(self: Any) -> Any:
        return
        yield

    patch.setattr(Lease, "_sweep", sweep)


def quick_judge(patch: Patch) -> None:
    """Whoever holds is thought dead."""
    patch.setattr(Surroundings, "known_dead", lambda self, entries: {entry.ticket for entry in entries})


def queued_twice(patch: Patch) -> None:
    """Whoever waits does not know that it does."""

    def own(self: Any, entries: tuple[Entry, ...]) -> Any:
        return next((entry for entry in entries if entry.ticket in self._made and entry.granted), None)

    patch.setattr(Lease, "_own", own)


# Conversions


def upgrade_over_readers(patch: Patch) -> None:
    """Whoever holds may write, whoever else reads."""
    converted = State.converted

    def convert(self: State, ticket: str, exclusive: bool) -> Any:
        own = tuple(entry for entry in self.holders if entry.ticket == ticket)
        others = tuple(entry for entry in self.holders if entry.ticket != ticket)
        state = converted(self._replace(holders=own), ticket, exclusive)
        assert state is not None
        return state._replace(holders=(*state.holders, *others))

    patch.setattr(State, "converted", convert)


def upgrade_unwritten(patch: Patch) -> None:
    """Whoever holds alone, as far as it knows, need not say that it writes."""
    convert = Lease.convert

    def converted(self: Any, exclusive: bool) -> Any:
        if exclusive and self._state is not None and len(self._state.holders) == 1:
            return True
        return (yield from convert(self, exclusive))

    patch.setattr(Lease, "convert", converted)


def upgrade_by_letting_go(patch: Patch) -> None:
    """The shared lock is given back, and an exclusive one asked for."""

    def converted(self: Any, exclusive: bool) -> Any:
        yield from self.release()
        return (yield from self.acquire(exclusive, blocking=True))

    patch.setattr(Lease, "convert", converted)


def upgrade_puts_readers_out(patch: Patch) -> None:
    """Other readers are taken for dead."""
    patch.setattr(
        State,
        "converted",
        lambda self, ticket, exclusive: State(
            self.version + 1, (Entry(ticket, exclusive, self.version + 1),), self.queue
        ),
    )


def conversion_of_the_forgotten(patch: Patch) -> None:
    """Whoever was silent converts by the ticket that others may have judged."""
    convert, must_confirm = Lease.convert, Lease._must_confirm

    def converted(self: Any, exclusive: bool) -> Any:
        self._must_confirm = lambda own: False
        try:
            return (yield from convert(self, exclusive))
        finally:
            self._must_confirm = lambda own: must_confirm(self, own)

    patch.setattr(Lease, "convert", converted)


def conversion_without_the_queue(patch: Patch) -> None:
    """Those who wait are forgotten."""
    converted = State.converted

    def convert(self: State, ticket: str, exclusive: bool) -> Any:
        state = converted(self, ticket, exclusive)
        return state and state._replace(queue=())

    patch.setattr(State, "converted", convert)
