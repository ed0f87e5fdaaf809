"""The keeper's leases: what its programs' locks need between hosts, by the cluster protocol, without waiting for it."""

from __future__ import annotations

import contextlib
import os
import time

from flockshim import cluster_notes
from flockshim.cluster import Lease
from flockshim.cluster_names import new_lineage
from flockshim.cluster_vouch import GAP
from flockshim.lease_directories import Directories, is_gone, is_over
from flockshim.lease_files import FileLease, Told, clock
from flockshim.lease_runner import Runner, WorkerLostError
from flockshim.lease_worker import Enter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, TypeVar, Union

    from flockshim.aliveness import Aliveness
    from flockshim.cluster_ops import Operation, Protocol
    from flockshim.cluster_state import State
    from flockshim.host import Key
    from flockshim.lease_files import Directory
    from flockshim.loop import Loop

    T = TypeVar("T")
    Steps = Generator[Union[Operation, Enter], Any, T]

HAND_OVERS = 16
# How often a file is looked for that is not where its path said.
MOST_TRIES = 3
LONGEST_POLL = 1.0
SOON_SECONDS = 0.005
# By then the note of a holder that has just begun must be there.
LEARN_SECONDS = 3.0
MOST_IDLE = 256
IDLE_SECONDS = 30.0


class Leases:
    """All of one keeper's."""

    def __init__(
        self,
        loop: Loop,
        aliveness: Aliveness,
        seconds: float,
        told: Told,
        predecessors: dict[str, int],
    ) -> None:
        """`predecessors` are the keepers that this one succeeds, by the descriptors that keep them alive."""
        self.runner = Runner(loop, min(LONGEST_POLL, seconds * GAP / 2))
        self._aliveness = aliveness
        self._seconds = seconds
        self._told = told
        self._predecessors = predecessors
        # Files of whose leases it is not known yet whether they are ours.
        self._adopting: set[Key] = set()
        self._serial = 0
        self._directories = Directories(self.runner, aliveness, seconds, told)
        self._files: dict[Key, FileLease] = {}
        # Those that nobody needs at the moment, the one that was used last at the end.
        self._idle: dict[tuple[Key, str], FileLease] = {}

    def need(self, key: Key, path: str) -> None:
        """From now on locks on this file need a lease. Raises OSError where its name is too long."""
        if key in self._files:
            return
        idle = self._idle.pop((key, path), None)
        if idle:
            self._files[key] = idle
            return
        self._files[key] = self._new(key, path)

    def _renew(self, lease: FileLease) -> None:
        """Forget what was known of a record that is gone."""
        lease.lease = self._protocol(lease.directory, lease.target)
        lease.named = None

    def _protocol(self, directory: Directory, target: str) -> Lease:
        return Lease(target, self._ticket, new_lineage, directory.judge, directory.voucher, self._is_used)

    def _new(self, key: Key, path: str) -> FileLease:
        directory = self._directories.at(os.path.dirname(path))
        made = FileLease(key, path, directory, self._protocol)
        directory.leases.add(made)
        return made

    def adopt(self, key: Key, path: str, exclusive: bool) -> None:
        """Take over the lease of a file that is locked, from the predecessors."""
        self.need(key, path)
        lease = self._files[key]
        lease.mode = exclusive
        self._adopting.add(key)
        self._confirm(lease, lambda: self._succeeding(lease))

    def _adopted(self, key: Key) -> None:
        if key not in self._adopting:
            return
        self._adopting.remove(key)
        if not self._adopting:
            for keeper, descriptor in self._predecessors.items():
                self._directories.withdraw_all_of(keeper)
                os.close(descriptor)
            self._predecessors = {}

    def _confirm(self, lease: FileLease, protocol: Callable[[], Steps[bool]]) -> None:
        """Make sure that we hold; nobody goes on before. Until the server answers it is tried again."""
        lease.busy = True
        self._told.doubted(lease.key)

        def ended(held: bool | None, error: Exception | None) -> None:
            if error and self._told.is_held(lease.key):
                self.runner.at(time.monotonic() + 1.0, lambda: self._confirm(lease, protocol))
                return
            lease.busy = False
            lease.since = clock()
            self._adopted(lease.key)
            if error:
                # Nobody needs to know any more.
                self._release(lease)
                return
            if held:
                if lease.suffix:
                    # What our predecessor had may be more than its programs' locks need.
                    lease.mode = lease.lease.is_exclusive
                self._told.trusted(lease.key)
            else:
                lease.mode = None
                self._told.lost(lease.key)
            self._told.changed(lease.key)

        self.runner.run(lease.directory, self._holding(lease, protocol), ended)

    def _holding(self, lease: FileLease, protocol: Callable[[], Steps[bool]]) -> Steps[bool]:
        try:
            return (yield from protocol())
        except OSError as error:
            if not is_gone(error):
                raise
        # Whoever removes a directory in which he has locked a file (as uv does) holds what nobody else can find.
        try:
            yield from self._enter(lease)
        except OSError as error:
            if not is_gone(error):
                raise
            return False
        return not lease.named

    def _is_used(self, ticket: str) -> bool:
        return any(one.lease.uses(ticket) for one in self._files.values())

    def _ticket(self) -> str:
        self._serial += 1
        return f"{self._aliveness.keeper}-{self._serial}"

    def permit(self, key: Key, exclusive: bool, blocking: bool, held: bool, barging: bool) -> bool:
        """Return whether a lock of this mode may be held now; if not, it is asked for.

        `held`: others of this host have the lock, so that the lease must stay. `barging`: see `Host.permit`.
        """
        if key not in self._files:
            self.need(key, self._told.place(key)[1])
        lease = self._files[key]
        if lease.mode == exclusive and not lease.busy:
            if lease.named and not lease.lease.still_mine(clock()):
                self._confirm(lease, lease.lease.confirm)
                return False
            lease.hand_overs += 1
            if lease.hand_overs <= HAND_OVERS or (held and (barging or not lease.closing)):
                return True
        lease.wanted = exclusive
        if held and lease.mode is not None:
            return False
        self._advance(lease, blocking)
        return False

    def is_pending(self, key: Key) -> bool:
        """Return whether `changed` or `failed` will be called."""
        lease = self._files.get(key)
        return lease is not None and lease.busy

    def is_giving_back(self, key: Key) -> bool:
        """Return whether `changed` will be called when it is given back, or need not be."""
        lease = self._files.get(key)
        return lease is not None and lease.giving

    def is_refused(self, key: Key) -> bool:
        """Return whether others hold what was asked for last."""
        lease = self._files.get(key)
        return lease is not None and (lease.unconverted or (lease.contended and lease.mode is None))

    def holder(self, key: Key) -> str | None:
        """Return who on another host has the lock, for people; None if nobody there has it."""
        lease = self._files.get(key)
        return (lease.holder or cluster_notes.ELSEWHERE) if lease and self.is_refused(key) else None

    def may_learn(self, key: Key) -> bool:
        """Return whether `holder` is not known yet, but may be soon."""
        lease = self._files.get(key)
        if lease is None or lease.holder or clock() - lease.asked >= LEARN_SECONDS:
            return False
        return lease.busy or self.is_refused(key)

    def _ask(self, lease: FileLease) -> None:
        """Look who holds, once for each version of the state."""
        state = lease.lease.state
        if state is None or (lease.holder and lease.version == state.version):
            return
        lease.version = state.version

        def ended(holder: str | None, _: Exception | None) -> None:
            lease.holder = holder

        asking = cluster_notes.holder(state, lease.target)
        self.runner.run(lease.directory, asking, ended)

    def abandon(self, key: Key) -> None:
        """Nobody waits for the lease any more, for which was asked."""
        lease = self._files.get(key)
        if lease and lease.run:
            lease.run.cancel()

    def give_back(self, key: Key) -> bool:
        """Nobody needs the lease any more. Returns whether there is none; else `changed` is called when that is so."""
        lease = self._files.get(key)
        if lease is None:
            return True
        lease.wanted = None
        if not lease.busy and lease.mode is None:
            self._put_aside(lease)
            return True
        if not lease.busy:
            self._release(lease)
        return False

    def _put_aside(self, lease: FileLease) -> None:
        """Keep what is known of a file that nobody locks: the next lock then takes one operation."""
        del self._files[lease.key]
        if not lease.named:
            self._forget(lease)
            return
        lease.since = clock()
        self._idle[lease.key, lease.path] = lease
        while len(self._idle) > MOST_IDLE:
            self._forget(self._idle.pop(next(iter(self._idle))))

    def _forget(self, lease: FileLease) -> None:
        lease.directory.leases.discard(lease)

    def _asking(self, lease: FileLease, exclusive: bool, blocking: bool) -> Steps[bool]:
        if lease.named is None:
            yield from self._enter(lease)
        return (yield from lease.lease.acquire(exclusive, blocking)) if lease.named else True

    def _enter(self, lease: FileLease) -> Steps[None]:
        """Find out by which name the file's record goes, or that there is none. Raises OSError."""
        descriptor, _ = self._told.place(lease.key)
        found = yield Enter(os.path.basename(lease.path), lease.suffix, descriptor)
        lease.named = found is not None
        if found:
            name, identity = found
            lease.directory.place = lease.directory.place._replace(identity=identity)
            if name != lease.name:
                lease.name = name
                lease.lease = self._protocol(lease.directory, lease.target)

    def _move(self, lease: FileLease) -> FileLease:
        """Look anew where the file is: its directory was moved, removed, or made again. Raises OSError."""
        self._directories.mistrust(lease.directory)
        self._forget(lease)
        path = self._told.place(lease.key)[1]
        moved = self._files[lease.key] = self._new(lease.key, path)
        moved.tries = lease.tries + 1
        moved.wanted = lease.wanted
        return moved

    def _succeeding(self, lease: FileLease) -> Steps[bool]:
        yield from self._enter(lease)
        return (yield from lease.lease.adopt(self._predecessors)) if lease.named else True

    def _giving_back(self, lease: FileLease) -> Protocol[None]:
        if lease.lease.may_have_entry:
            yield from lease.lease.release()

    def _advance(self, lease: FileLease, blocking: bool) -> None:
        if lease.busy:
            return
        if lease.mode is not None and lease.mode == lease.wanted and lease.named and not lease.closing:
            self._see_who_waits(lease)
        elif lease.mode is not None:
            self._release(lease)
        elif lease.wanted is not None:
            self._acquire(lease, lease.wanted, blocking)

    def namesakes(self, key: Key) -> list[Key]:
        """Return the other files in use whose record is the same: those that had the name before."""
        return [one.key for one in self._namesakes(self._files[key])]

    def _namesakes(self, lease: FileLease) -> list[FileLease]:
        others = [one for one in lease.directory.leases if one.target == lease.target and one is not lease]
        return [one for one in others if one.key in self._files]

    def _acquire(self, lease: FileLease, exclusive: bool, blocking: bool) -> None:
        lease.busy = True
        lease.contended = False
        if any(one.giving for one in self._namesakes(lease)):
            self.runner.at(time.monotonic() + SOON_SECONDS, lambda: self._try_again(lease))
            return
        lease.holder = None
        lease.asked = lease.since = clock()

        def ended(granted: bool | None, error: Exception | None) -> None:
            lease.busy = False
            lease.run = None
            if error:
                lost = isinstance(error, WorkerLostError)
                self._release(lease, error if isinstance(error, OSError) and not lost else None)
                return
            lease.hand_overs = lease.tries = 0
            lease.closing = False
            if granted:
                lease.mode = exclusive
            else:
                lease.contended = True
            self._told.changed(lease.key)

        def waiting() -> None:
            if not lease.contended:
                lease.contended = True
                self._ask(lease)
                self._told.changed(lease.key)

        run = self.runner.run(lease.directory, self._asking(lease, exclusive, blocking), ended, waiting, True)
        if lease.busy:
            lease.run = run

    def _try_again(self, lease: FileLease) -> None:
        lease.busy = False
        self._told.changed(lease.key)

    def _release(self, lease: FileLease, cause: OSError | None = None) -> None:
        lease.busy = lease.giving = True
        lease.mode = None
        lease.unconverted = False

        def ended(_: None, error: Exception | None) -> None:
            if error and is_over(error):
                # uv removes whole directories in which it has locked a file: there is nothing to give back.
                self._renew(lease)
                error = None
            if error:
                # Our entry must go, whatever the server does now: others would wait for it for a lease time.
                self.runner.at(time.monotonic() + 1.0, lambda: self._release(lease))
            else:
                lease.busy = lease.giving = False
            if cause:
                self._failed(lease, cause)
            elif not error:
                self._told.changed(lease.key)

        self.runner.run(lease.directory, self._giving_back(lease), ended)

    def _failed(self, lease: FileLease, cause: OSError) -> None:
        # Something may be otherwise than it was when we looked at it.
        if not lease.busy:
            lease.named = None
        if is_gone(cause) and lease.tries < MOST_TRIES and not lease.busy:
            try:
                lease = self._move(lease)
            except OSError:
                lease.tries = 0
            else:
                self._told.changed(lease.key)
                return
        lease.tries = 0
        self._told.failed(lease.key, cause)

    # What happens without being asked for

    def tick(self) -> None:
        """Once a second: see that nobody runs on whom others may think dead."""
        now = clock()
        for place, lease in list(self._idle.items()):
            if now - lease.since >= IDLE_SECONDS:
                self._forget(self._idle.pop(place))
        for lease in list(self._files.values()):
            holds = lease.mode is not None and lease.named
            if holds and not lease.lease.still_mine(now):
                if lease.busy:
                    self._told.doubted(lease.key)
                else:
                    self._confirm(lease, lease.lease.confirm)
            elif holds and not lease.busy and not lease.closing and lease.hand_overs > HAND_OVERS:
                self._see_who_waits(lease)
            elif self.is_refused(lease.key):
                self._ask(lease)
        self._directories.tick(now)

    def _see_who_waits(self, lease: FileLease) -> None:
        """Those of this host who follow each other must not keep out for ever who waits on another."""
        lease.busy = lease.giving = True

        def ended(state: State | None, _: Exception | None) -> None:
            lease.busy = lease.giving = False
            lease.closing = state is not None and bool(state.queue)
            if not lease.closing:
                lease.hand_overs = 0
            self._told.changed(lease.key)

        self.runner.run(lease.directory, lease.lease.refresh(), ended)

    def is_idle(self) -> bool:
        """Return whether nothing is held, asked for, or left to be removed."""
        return not self._files and self._directories.is_idle()

    def close(self) -> None:
        """The keeper leaves."""
        with contextlib.suppress(OSError):
            self._aliveness.end()
