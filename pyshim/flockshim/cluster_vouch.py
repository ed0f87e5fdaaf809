"""Who is alive, by vouching files and nobody's clock but one's own; and when holders must stop.

All times are seconds of this host's CLOCK_BOOTTIME, which goes on while the machine is suspended: `clock` returns it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator
from typing import Any, Callable

from flockshim.cluster_names import keeper_of, keeper_of_vouching, vouching_name
from flockshim.cluster_ops import Create, List, Operation, Protocol, Read, Unlink, Write
from flockshim.cluster_state import Entry

DEFAULT_LEASE = 90.0
"""The lease time, in seconds, where FLOCKSHIM_LEASE does not say another."""
HEARTBEATS = 6
"""How often in a lease time a keeper vouches."""
STOP = 0.6
"""The part of a lease time after which a holder that could not vouch stops."""
GAP = 0.25
"""The part of a lease time within which observations must follow each other to count together."""
THOUGHT_DEAD = "thought dead at"
"""How an observer's text in the file of an absent keeper begins."""

Clock = Callable[[], float]


class Voucher:
    """This keeper's vouching for its entries in one directory.

    An entry is vouched for by being made, and from then on by each write of the vouching file. Between making one and
    the end of its use the file must not be removed, nor an entry be made while the removal is under way.
    """

    def __init__(self, keeper: str, lease: float, clock: Clock, nonce: Callable[[], str]) -> None:
        """`lease` is the lease time in seconds; `nonce` returns a text that it has not returned before."""
        self.keeper = keeper
        self._patience = lease * STOP
        self._nonce = nonce
        self._last = float("-inf")
        self._lapsed_before = float("-inf")
        self.clock = clock

    def vouch(self) -> Protocol[None]:
        """Write the file, to be done every lease / HEARTBEATS. Raises OSError if it could not be written."""
        begun = self.clock()
        yield Write(vouching_name(self.keeper), self._nonce())
        # From the last write's beginning to this one's end others may have seen no change.
        oldest = self.clock() - self._patience
        if self._last <= oldest:
            self._lapsed_before = oldest
        self._last = begun

    def withdraw(self) -> Protocol[None]:
        """Remove the file: the keeper has no entry in the directory any more. Raises OSError but for ENOENT."""
        with contextlib.suppress(FileNotFoundError):
            yield Unlink(vouching_name(self.keeper))

    def must_stop(self, made: float, now: float) -> bool:
        """Return whether others may soon think dead, or may have thought so, an entry that we began to make at `made`.

        Its holders must not run on before the entry has been renewed (`Lease.confirm`).
        """
        return made <= self._lapsed_before or now - max(made, self._last) >= self._patience


class _Silence:
    """An unbroken row of observations of the same bytes, or of none (None)."""

    __slots__ = ("ended", "length", "since", "text")

    def __init__(self, text: str | None, ended: float) -> None:
        self.text = text
        self.since = ended
        self.ended = ended
        self.length = 0.0


class Judge:
    """This keeper's judgement of others in one directory."""

    def __init__(self, lease: float, clock: Clock, is_dead: Callable[[str], bool | None]) -> None:
        """`lease` is in seconds. `is_dead` tells whether a keeper is dead; None for one of another domain."""
        self._lease = lease
        self._clock = clock
        self._is_dead = is_dead
        self._silences: dict[str, _Silence] = {}
        # Those whose vouching files `sweep` watches.
        self._suspects: set[str] | None = None
        self.found_dead: set[str] = set()
        """Keepers that were thought dead since `bury`."""

    def known_dead(self, entries: Collection[Entry]) -> set[str]:
        """Return the tickets of those entries that are dead for certain, without an operation."""
        dead = {entry.ticket for entry in entries if self._is_dead(keeper_of(entry.ticket))}
        self.found_dead.update(map(keeper_of, dead))
        return dead

    def dead(self, entries: Collection[Entry]) -> Protocol[set[str]]:
        """Observe the keepers of another domain, unless that was done just now, and return the tickets of the dead.

        To be called every lease * GAP / 2 or more often, with the entries that stand in the way. What could not be
        observed is not dead.
        """
        dead = self.known_dead(entries)
        others = [entry.ticket for entry in entries if self._is_dead(keeper_of(entry.ticket)) is None]
        for ticket in others:
            if (yield from self._is_silent(ticket, keeper_of(ticket))):
                dead.add(ticket)
                self.found_dead.add(keeper_of(ticket))
        return dead

    def bury(self) -> Protocol[None]:
        """Remove the vouching files of those that were thought dead. Harmless if one lives: it writes its file anew."""
        while self.found_dead:
            with contextlib.suppress(OSError):
                yield Unlink(vouching_name(self.found_dead.pop()))

    def sweep(self, own: str, most: int) -> Protocol[bool]:
        """Remove the vouching files of the dead. Returns whether to call it again, as often as `dead`.

        Of other domains, `most` are watched, those that come next after the keeper `own`: many observers share them.
        Harmless even if one of them lives: it writes its file anew, and others begin to count again.
        """
        names = yield List(vouching_name(""))
        keepers = sorted(keeper for keeper in map(keeper_of_vouching, names) if keeper)
        keepers = [k for k in keepers if k > own] + [k for k in keepers if k < own]
        if self._suspects is None:
            self._suspects = set([keeper for keeper in keepers if self._is_dead(keeper) is None][:most])
        self._suspects.intersection_update(keepers)
        for keeper in keepers:
            if self._is_dead(keeper) or (keeper in self._suspects and (yield from self._is_at_an_end(keeper))):
                with contextlib.suppress(OSError):
                    yield Unlink(vouching_name(keeper))
                self._suspects.discard(keeper)
        if self._suspects:
            return True
        self._suspects = None
        return False

    def _is_at_an_end(self, keeper: str) -> Protocol[bool]:
        """Return whether a suspect is dead; if it is seen to live, it is none any more."""
        assert self._suspects is not None
        name = vouching_name(keeper)
        before = self._silences.get(name)
        if (yield from self._is_silent(name, keeper)):
            return True
        after = self._silences.get(name)
        if before and after and before.text != after.text:
            self._suspects.discard(keeper)
        return False

    def _is_silent(self, key: str, keeper: str) -> Protocol[bool]:
        silence = self._silences.get(key)
        if silence is None or self._clock() - silence.ended >= self._lease * GAP / 2:
            yield from self._observe(key, keeper)
        silence = self._silences.get(key)
        if silence is None or silence.length < self._lease:
            return False
        if silence.text is None:
            return (yield from self._is_really_absent(silence, keeper))
        return True

    def _observe(self, key: str, keeper: str) -> Generator[Operation, Any, None]:
        begun = self._clock()
        text: str | None
        try:
            text = yield Read(vouching_name(keeper))
        except FileNotFoundError:
            text = None
        except OSError:
            return
        self._note(key, text, begun)

    def _note(self, key: str, text: str | None, begun: float) -> None:
        """Note an observation that began at `begun` and has ended just now."""
        ended = self._clock()
        silence = self._silences.get(key)
        # A server that stalls hides the vouching of others: what spans a stall does not count.
        if silence is None or _own(silence.text) != _own(text) or ended - silence.ended > self._lease * GAP:
            self._silences[key] = _Silence(text, ended)
        else:
            silence.text = text
            silence.length = begun - silence.since
            silence.ended = ended

    def _is_really_absent(self, silence: _Silence, keeper: str) -> Generator[Operation, Any, bool]:
        """Ask the server by making the file: NFS clients keep the answer "no such file" for up to a minute."""
        text = f"{THOUGHT_DEAD} {self._clock()}\n"
        try:
            yield Create(vouching_name(keeper), text)
        except OSError:
            silence.text = ""
            silence.since, silence.length = self._clock(), 0.0
            return False
        silence.text = text
        return True


def _own(text: str | None) -> str | None:
    """Return what a keeper itself has written: what observers make and remove while it is absent is no news of it."""
    return None if text is None or text.startswith(THOUGHT_DEAD) else text
