"""The lock of one target between all hosts that share its directory, as steps that the caller performs.

The state is in the name of one file, and rename(2) from the name that was read is the compare-and-swap. What is read
may be out of date (NFS keeps names and listings for a while), which costs another attempt, never a lock: a state that
once was can only be left by a rename, and of each version there is one. docs/cluster.md has the argument.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Collection
from typing import Callable

from flockshim import cluster_state
from flockshim.cluster_names import (
    FREE,
    DataName,
    Names,
    StateName,
    claim_target,
    claim_text,
    data_of,
    is_litter,
    keeper_of,
    lineage_of_claim,
)
from flockshim.cluster_ops import Create, Link, List, Look, Pause, Protocol, Read, Rename, Symlink, Unlink, Wait
from flockshim.cluster_state import Entry, State
from flockshim.cluster_vouch import Judge, Voucher

ATTEMPTS = 40
"""How often a claim or state file that must be there is looked for, before that is an error."""
LOOK_AGAIN = 4
"""After how many of them the claim is read again."""
NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSALS = (*NO_HARD_LINKS, errno.EACCES, errno.EROFS, *FULL)


class Lease:
    """This keeper's part in one target's lock. At any time one of its generators may be under way, no more.

    Every generator raises the OSError of an operation that failed. After one of `acquire` the keeper may have an entry
    all the same: run `release` until it succeeds. The same goes for a generator that is closed early, once its last
    operation has ended.
    """

    def __init__(
        self,
        target: str,
        new_ticket: Callable[[], str],
        new_lineage: Callable[[], str],
        judge: Judge,
        voucher: Voucher,
        is_used: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """`target` is a name in the directory. All that a keeper has in one directory share `judge` and `voucher`.

        `new_ticket` returns `KEEPER-SERIAL`, never the same twice; `new_lineage` LINEAGE_DIGITS random hexadecimal
        digits. `is_used` tells whether another Lease of this keeper has a ticket: of another file of the same name, one
        that has replaced the other or is on another mount. Raises OSError ENAMETOOLONG.
        """
        self._target = target
        self._names = Names(target)
        self._new_ticket = new_ticket
        self._new_lineage = new_lineage
        self._judge = judge
        self._voucher = voucher
        self._is_used = is_used
        self._lineage: str | None = None
        # The state as last known, the name it had, and the version that it has reached at least.
        self._state: State | None = None
        self._name: StateName | None = None
        self._floor = 0
        # Up to this version it is unknown whether a rename of ours was done that failed.
        self._doubt = -1
        # The tickets that we have used since `acquire` began, and when we began to make their entries.
        self._made: dict[str, float] = {}
        self._litter: set[StateName | DataName] = set()

    @property
    def state(self) -> State | None:
        """The state as last known; its queue tells whether anybody waits."""
        return self._state

    @property
    def token(self) -> int:
        """The fencing token of the lock that is held; 0 if none is."""
        entry = self._own(self._state.holders) if self._state else None
        return entry.granted if entry else 0

    @property
    def is_exclusive(self) -> bool:
        """Whether the lock that is held is exclusive."""
        entry = self._own(self._state.holders) if self._state else None
        return entry is not None and entry.exclusive

    @property
    def may_have_entry(self) -> bool:
        """Return whether `release` may have something to do."""
        return bool(self._made)

    def uses(self, ticket: str) -> bool:
        """Return whether an entry of this ticket is what this Lease holds or waits by."""
        return ticket in self._made

    def still_mine(self, now: float) -> bool:
        """Return whether holders may run on; if not, they wait until `confirm` says so. `now` is of CLOCK_BOOTTIME.

        The keeper holds, as far as it knows.
        """
        if self._state is None:
            # It is being read again.
            return bool(self._made) and not self._voucher.must_stop(min(self._made.values()), now)
        entry = self._own(self._state.holders)
        return entry is not None and not self._voucher.must_stop(self._made[entry.ticket], now)

    # What a keeper does.

    def acquire(self, exclusive: bool, blocking: bool) -> Protocol[bool]:
        """Take the lock; the keeper has none. Returns False, without having waited, if others hold it."""
        self._made = {}
        while True:
            state = yield from self._known()
            own = self._own(state.holders)
            if own is not None:
                if not self._must_confirm(own) or (yield from self.confirm()):
                    return True
                continue
            wanted = yield from self._advanced(state, exclusive, blocking)
            if wanted is not None:
                yield from self._change(wanted)
            elif not blocking:
                if (yield from self._is_current()):
                    yield from self._sweep()
                    return False
            else:
                yield Wait([entry.ticket in self._made for entry in state.queue].index(True))
                yield from self._is_current()

    def release(self) -> Protocol[None]:
        """Give back what is held, or leave the queue, or make sure that we have no entry. Who is next holds then."""
        while True:
            state = yield from self._known()
            own = self._own(state.entries())
            if own is None and state.version > self._doubt:
                self._made = {}
                yield from self._sweep()
                return
            gone = self._judge.known_dead(state.entries()) | self._stale(state) | ({own.ticket} if own else set())
            wanted = state.without(gone)
            try:
                yield from self._change(wanted)
            except OSError as error:
                if error.errno not in FULL or wanted.alone() is None:
                    raise
                # Better out of order than not at all: those who are left out ask anew.
                yield from self._change(wanted.alone() or wanted)

    def confirm(self) -> Protocol[bool]:
        """Return whether we hold, though we may have been thought dead; if so, by a new ticket that nobody judged."""
        while True:
            state = yield from self._known()
            own = self._own(state.holders)
            if own is None:
                return False
            if not self._must_confirm(own):
                return True
            yield from self._change(state.renewed(own.ticket, self._ticket()))

    def convert(self, exclusive: bool) -> Protocol[bool]:
        """Change the mode in which we hold, without letting go. Returns False, without having waited, if others hold.

        Also if we do not hold any more, as `still_mine` and `confirm` then tell.
        """
        while True:
            state = yield from self._known()
            own = self._own(state.holders)
            if own is None:
                return False
            if self._must_confirm(own):
                if not (yield from self.confirm()):
                    return False
                continue
            if own.exclusive == exclusive:
                return True
            others = [entry for entry in state.holders if entry.ticket not in self._made] if exclusive else []
            dead = self._judge.known_dead(others) | (self._stale(state) if exclusive else set())
            dead |= yield from self._judge.dead([entry for entry in others if entry.ticket not in dead])
            left = tuple(entry for entry in state.holders if entry.ticket not in dead)
            wanted = state._replace(holders=left).converted(own.ticket, exclusive)
            if wanted is not None:
                yield from self._change(wanted)
            elif (yield from self._is_current()):
                return False

    def adopt(self, keepers: Collection[str]) -> Protocol[bool]:
        """Take over what keepers of these names have, which this one succeeds. Returns whether we hold now."""
        state = yield from self.refresh()
        for entry in state.entries():
            if keeper_of(entry.ticket) in keepers:
                self._made[entry.ticket] = float("-inf")
        return (yield from self.confirm())

    def refresh(self) -> Protocol[State]:
        """Return the state, read again: whether anybody waits, say."""
        if self._state is not None:
            yield from self._is_current()
        return (yield from self._known())

    def take_away(self, ticket: str) -> Protocol[bool]:
        """Remove somebody's entry (`flockshim --break`). Returns whether it was there."""
        found = False
        while True:
            state = yield from self._known()
            if ticket not in {entry.ticket for entry in state.entries()}:
                return found
            found = True
            yield from self._change(state.without({ticket}))

    def clean(self) -> Protocol[None]:
        """Remove the entries of the dead, and every file beside the target that nobody will ever use."""
        state = yield from self.refresh()
        dead = yield from self._judge.dead(state.entries())
        if dead:
            yield from self._change(state.without(dead))
        self._state = None
        yield from self._known()
        yield from self._sweep()

    # How it goes on from a state.

    def _own(self, entries: tuple[Entry, ...]) -> Entry | None:
        for entry in entries:
            if entry.ticket in self._made:
                return entry
        return None

    def _stale(self, state: State) -> set[str]:
        """Return what an earlier `acquire` of this keeper has left behind."""
        ours = {e.ticket for e in state.entries() if keeper_of(e.ticket) == self._voucher.keeper}
        return {ticket for ticket in ours if not self.uses(ticket) and not self._is_used(ticket)}

    def _must_confirm(self, own: Entry) -> bool:
        return self._voucher.must_stop(self._made[own.ticket], self._voucher.clock())

    def _ticket(self) -> str:
        ticket = self._new_ticket()
        self._made[ticket] = self._voucher.clock()
        return ticket

    def _advanced(self, state: State, exclusive: bool, blocking: bool) -> Protocol[State | None]:
        """Return what to make of a state in which we do not hold, or None if there is nothing to do but to wait."""
        waits = self._own(state.queue) is not None
        before = [entry for entry in state.entries() if entry.ticket not in self._made]
        dead = self._judge.known_dead(before) | self._stale(state)
        ahead = state.holders + state.queue[:1]
        dead |= yield from self._judge.dead([entry for entry in ahead if entry in before and entry.ticket not in dead])
        if waits:
            return state.without(dead) if dead else None
        cleared = state.without(dead)._replace(version=state.version)
        return cleared.request(Entry(self._ticket(), exclusive), blocking)

    # The files.

    def _known(self) -> Protocol[State]:
        """Return the state as last known, looking for it if it is not."""
        attempt, newest = 0, -1
        while self._state is None:
            lineage = yield from self._claimed()
            if self._state is not None:
                break
            names = [self._names.parse(name) for name in (yield List(self._names.claim))]
            states = [
                n for n in names if isinstance(n, StateName) and n.lineage == lineage and n.version >= self._floor
            ]
            if states:
                yield from self._open(max(states))
            if self._name is not None and self._state is not None:
                known = self._name
                self._litter.update(name for name in names if name is not None and is_litter(name, known))
            elif states and max(states).version > newest:
                # Not out of date, but changed since: whoever pauses does not get in where others lock all the time.
                newest = max(states).version
            else:
                attempt += 1
                if attempt == LOOK_AGAIN:
                    yield from self._doubt_lineage(lineage)
                if attempt == ATTEMPTS:
                    text = f"no state file of the lock ({self._names.claim}.{lineage}.*): removed by somebody?"
                    raise OSError(errno.ETIMEDOUT, text, self._target)
                yield Pause(attempt - 1)
        return self._state

    def _doubt_lineage(self, lineage: str) -> Protocol[None]:
        """Somebody has removed the claim by hand, or the whole directory: that ends what was before."""
        if (yield from self._read_claim()) == lineage:
            return
        if self._made:
            raise OSError(errno.ESTALE, "the record of the lock was removed while it was in use", self._names.claim)
        self._lineage = self._name = None
        self._floor = 0
        self._doubt = -1

    def _open(self, name: StateName) -> Protocol[None]:
        data = data_of(name)
        try:
            text = "" if data is None else (yield Read(self._names.data(data)))
        except FileNotFoundError:
            return
        if data is None:
            state = cluster_state.of_token(name.version, name.token)
        else:
            try:
                state = cluster_state.of_text(name.version, text)
            except ValueError as error:
                text = f"not understood, {error}: written by another version of flockshim?"
                raise OSError(errno.EBADMSG, text, self._names.data(data)) from error
        # That we hold is true as soon as it was written; all else may have changed, as has what we knew.
        if name == self._name or self._own(state.holders) is None:
            try:
                yield Look(self._names.state(name))
            except FileNotFoundError:
                return
        self._learn(name, state)

    def _learn(self, name: StateName, state: State) -> None:
        self._name, self._state = name, state
        self._floor = max(self._floor, name.version)

    def _is_current(self) -> Protocol[bool]:
        """Return whether the state as last known can be opened; if not, forget it."""
        assert self._name is not None
        try:
            yield Look(self._names.state(self._name))
        except FileNotFoundError:
            self._state = None
        return self._state is not None

    def _change(self, wanted: State) -> Protocol[None]:
        """Try to make the known state the `wanted` one. What came of it is in the state that is known then, if any."""
        assert self._name is not None and self._lineage is not None
        old = self._name
        token = wanted.token()
        if token is None:
            token = "d" + (yield from self._write_data(wanted))
        new = StateName(self._lineage, wanted.version, token)
        self._state = None
        self._doubt = old.version
        try:
            yield Rename(self._names.state(old), self._names.state(new))
        except FileNotFoundError:
            # Somebody was faster; or it was done, and the client asked again because the answer was lost. Which of
            # them, our ticket in the state tells, or its absence from one that is no older.
            self._doubt = -1
            self._floor = max(self._floor, wanted.version)
            return
        except OSError as error:
            if error.errno in REFUSALS:
                # Surely not done.
                self._doubt = -1
            raise
        self._doubt = -1
        self._learn(new, wanted)
        replaced = data_of(old)
        if replaced is not None:
            self._litter.add(replaced)
        yield from self._sweep()

    def _write_data(self, wanted: State) -> Protocol[str]:
        assert self._lineage is not None
        while True:
            data = DataName(self._lineage, wanted.version, self._new_ticket())
            self._litter.add(data)
            try:
                yield Create(self._names.data(data), wanted.text())
            except FileExistsError:
                # Made by a request whose answer was lost, but never filled.
                continue
            return data.writer

    def _sweep(self) -> Protocol[None]:
        """Remove what nobody will ever use."""
        assert self._name is not None
        old = self._name
        litter = sorted((name for name in self._litter if is_litter(name, old)), key=repr)
        self._litter.difference_update(litter)
        for name in litter:
            file = self._names.state(name) if isinstance(name, StateName) else self._names.data(name)
            # Gone already, perhaps; else the next who lists the directory finds it.
            with contextlib.suppress(OSError):
                yield Unlink(file)

    # Birth.

    def _claimed(self) -> Protocol[str]:
        """Return the lineage that is claimed, claiming one if none is."""
        if self._lineage is None:
            self._lineage = yield from self._read_claim()
        if self._lineage is None:
            self._lineage = yield from self._claim()
        return self._lineage

    def _read_claim(self) -> Protocol[str | None]:
        try:
            text = yield Read(self._names.claim)
        except FileNotFoundError:
            return None
        lineage = lineage_of_claim(text)
        if lineage is None:
            text = "not a file of flockshim's: remove it, or use --mode host"
            raise OSError(errno.EBADMSG, text, self._names.claim)
        return lineage

    def _claim(self) -> Protocol[str]:
        """Make a state file, claim its lineage by a link to it, and return whose claim it is that is there."""
        own = yield from self._write_state()
        failure = yield from self._link(own)
        # Neither success nor failure of link is trusted: the answer can be that of a request sent twice.
        for attempt in range(ATTEMPTS):
            lineage = yield from self._read_claim()
            if lineage is not None:
                if lineage == own.lineage:
                    self._learn(own, State(own.version))
                return lineage
            if failure is not None and failure.errno != errno.EEXIST:
                # After any other error the file may be claimed all the same, and stays.
                if failure.errno in REFUSALS:
                    with contextlib.suppress(OSError):
                        yield Unlink(self._names.state(own))
                raise failure
            yield Pause(attempt)
        raise OSError(errno.ETIMEDOUT, "made, but not to be seen", self._names.claim)

    def _write_state(self) -> Protocol[StateName]:
        while True:
            own = StateName(self._new_lineage(), 0, FREE)
            self._litter.add(own)
            try:
                yield Create(self._names.state(own), claim_text(own.lineage))
            except FileExistsError:
                # Made by a request whose answer was lost, but never filled.
                continue
            return own

    def _link(self, own: StateName) -> Protocol[OSError | None]:
        try:
            yield Link(self._names.state(own), self._names.claim)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                return error
        else:
            return None
        try:
            yield Symlink(claim_target(own.lineage), self._names.claim)
        except OSError as error:
            return error
        return None
