"""The keeper's leases: what its programs' locks need between hosts, by the cluster protocol, without waiting for it."""

from __future__ import annotations

import contextlib
import errno
import os
import time

from flockshim import cluster_notes
from flockshim.cluster import Lease
from flockshim.cluster_names import LINEAGE_DIGITS
from flockshim.cluster_vouch import GAP, HEARTBEATS, Voucher
from flockshim.lease_files import Directory, FileLease, Told, clock
from flockshim.lease_runner import Runner, WorkerLostError
from flockshim.lease_worker import Enter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, TypeVar, Union

    from flockshim.aliveness import Aliveness
    from flockshim.cluster_ops import Operation, Protocol
    from flockshim.host import Key
    from flockshim.loop import Loop

    T = TypeVar("T")
    Steps = Generator[Union[Operation, Enter], Any, T]

HAND_OVERS = 16
GONE = (errno.ENOENT, errno.ESTALE)
LONGEST_POLL = 1.0
# What is held, or waited for, for so long is worth a note for people.
NOTE_SECONDS = 1.0
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
        self._adopting = 0
        self._serial = 0
        self._directories: dict[str, Directory] = {}
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
        parent, name = os.path.split(path)
        directory = self._directories.get(parent)
        if directory is None:
            directory = Directory(parent, self._aliveness.keeper, self._seconds, self._aliveness.is_dead, self._told)
        lease = Lease(
            name, self._ticket, lambda: os.urandom(LINEAGE_DIGITS // 2).hex(), directory.judge, directory.voucher
        )
        self._directories[parent] = directory
        self._files[key] = FileLease(key, path, directory, lease)
        directory.leases.add(self._files[key])

    def knows(self, key: Key) -> bool:
        """Return whether locks on this file need a lease."""
        return key in self._files

    def adopt(self, key: Key, path: str, exclusive: bool) -> None:
        """Take over the lease of a file that is locked, from the predecessors."""
        self.need(key, path)
        lease = self._files[key]
        if lease.mode is None:
            lease.mode = exclusive
            self._adopting += 1
            self._confirm(lease, lambda: self._succeeding(lease))
        lease.mode = lease.mode or exclusive

    def _adopted(self) -> None:
        self._adopting -= 1
        if not self._adopting:
            for keeper, descriptor in self._predecessors.items():
                for directory in self._directories.values():
                    left = Voucher(keeper, self._seconds, clock, str)
                    self.runner.run(directory.path, left.withdraw(), lambda *_: None)
                os.close(descriptor)
            self._predecessors = {}

    def _confirm(self, lease: FileLease, protocol: Callable[[], Steps[bool]]) -> None:
        """Make sure that we hold; nobody goes on before. Until the server answers it is tried again."""
        lease.busy = True
        self._told.doubted(lease.key)

        def ended(held: bool | None, error: Exception | None) -> None:
            if error:
                self.runner.at(time.monotonic() + 1.0, lambda: self._confirm(lease, protocol))
                return
            lease.busy = False
            lease.since = clock()
            if self._adopting:
                self._adopted()
            if held:
                self._told.trusted(lease.key)
            else:
                lease.mode = None
                self._told.lost(lease.key)
            self._told.changed(lease.key)

        self.runner.run(lease.directory.path, protocol(), ended)

    def _ticket(self) -> str:
        self._serial += 1
        return f"{self._aliveness.keeper}-{self._serial}"

    def permit(self, key: Key, exclusive: bool, blocking: bool) -> bool:
        """Return whether a lock of this mode may be held now; if not, it is asked for."""
        lease = self._files.get(key)
        if lease is None:
            return True
        if lease.mode == exclusive and not lease.busy:
            lease.hand_overs += 1
            if lease.hand_overs <= HAND_OVERS:
                return True
        lease.wanted = exclusive
        self._advance(lease, blocking)
        return False

    def is_pending(self, key: Key) -> bool:
        """Return whether `changed` or `failed` will be called."""
        lease = self._files.get(key)
        return lease is not None and lease.busy

    def is_refused(self, key: Key) -> bool:
        """Return whether others hold what was asked for last."""
        lease = self._files.get(key)
        return lease is not None and lease.contended and lease.mode is None

    def holder(self, key: Key) -> str | None:
        """Return who on another host has the lock, for people; None if nobody there has it."""
        lease = self._files.get(key)
        return (lease.holder or cluster_notes.ELSEWHERE) if lease and self.is_refused(key) else None

    def may_learn(self, key: Key) -> bool:
        """Return whether `holder` is not known yet, but may be soon."""
        lease = self._files.get(key)
        return lease is not None and self.is_refused(key) and not lease.holder and clock() - lease.asked < LEARN_SECONDS

    def _ask(self, lease: FileLease) -> None:
        """Look who holds, once for each version of the state."""
        state = lease.lease.state
        if state is None or (lease.holder and lease.version == state.version):
            return
        lease.version = state.version

        def ended(holder: str | None, _: Exception | None) -> None:
            lease.holder = holder

        asking = cluster_notes.holder(state, os.path.basename(lease.path))
        self.runner.run(lease.directory.path, asking, ended)

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
            lease.named = yield Enter(os.path.basename(lease.path), *lease.key)
        return (yield from lease.lease.acquire(exclusive, blocking)) if lease.named else True

    def _succeeding(self, lease: FileLease) -> Steps[bool]:
        lease.named = yield Enter(os.path.basename(lease.path), *lease.key)
        return (yield from lease.lease.adopt(self._predecessors)) if lease.named else True

    def _giving_back(self, lease: FileLease) -> Protocol[None]:
        if lease.named:
            yield from lease.lease.release()

    def _advance(self, lease: FileLease, blocking: bool) -> None:
        if lease.busy:
            return
        if lease.mode is not None:
            self._release(lease)
        elif lease.wanted is not None:
            self._acquire(lease, lease.wanted, blocking)

    def _acquire(self, lease: FileLease, exclusive: bool, blocking: bool) -> None:
        lease.busy = True
        lease.contended = False
        lease.holder = None
        lease.asked = lease.since = clock()

        def ended(granted: bool | None, error: Exception | None) -> None:
            lease.busy = False
            lease.run = None
            if error:
                lost = isinstance(error, WorkerLostError)
                self._release(lease, error if isinstance(error, OSError) and not lost else None)
                return
            lease.hand_overs = 0
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

        run = self.runner.run(lease.directory.path, self._asking(lease, exclusive, blocking), ended, waiting)
        if lease.busy:
            lease.run = run

    def _release(self, lease: FileLease, cause: OSError | None = None) -> None:
        lease.busy = True
        lease.mode = None

        def ended(_: None, error: Exception | None) -> None:
            if isinstance(error, OSError) and error.errno in GONE:
                # uv removes whole directories in which it has locked a file: there is nothing to give back.
                lease.named = error = None
            if error:
                # Our entry must go, whatever the server does now: others would wait for it for a lease time.
                self.runner.at(time.monotonic() + 1.0, lambda: self._release(lease))
            else:
                lease.busy = False
            if cause:
                # Something may be otherwise than it was when we looked at it.
                lease.named = None
                self._told.failed(lease.key, cause)
            elif not error:
                self._told.changed(lease.key)

        self.runner.run(lease.directory.path, self._giving_back(lease), ended)

    # Vouching

    def tick(self) -> None:
        """Vouch where something is held or waited for longer than a heartbeat; stop vouching where nothing is."""
        heartbeat = self._seconds / HEARTBEATS
        now = clock()
        for place, lease in list(self._idle.items()):
            if now - lease.since >= IDLE_SECONDS:
                self._forget(self._idle.pop(place))
        for lease in list(self._files.values()):
            if lease.mode is not None and lease.named and not lease.busy and not lease.lease.still_mine(now):
                self._confirm(lease, lease.lease.confirm)
            elif self.is_refused(lease.key):
                self._ask(lease)
        for directory in list(self._directories.values()):
            entries = [lease for lease in directory.leases if lease.mode is not None or lease.busy]
            age = heartbeat if directory.has_file else min(heartbeat, NOTE_SECONDS)
            old = any(now - lease.since >= age for lease in entries)
            if directory.vouching:
                continue
            if directory.judge.found_dead:
                self.runner.run(directory.path, directory.judge.bury(), lambda *_: None)
            if old:
                self._vouch(directory, heartbeat)
            elif directory.has_file and not entries:
                self._withdraw(directory)
            elif not directory.leases:
                del self._directories[directory.path]
                self.runner.forget(directory.path)

    def _vouch(self, directory: Directory, heartbeat: float) -> None:
        directory.vouching = directory.has_file = True

        def ended(_: None, error: Exception | None) -> None:
            directory.vouching = False
            if not error:
                for lease in directory.leases:
                    lease.since = max(lease.since, clock())

        self.runner.run(directory.path, directory.voucher.vouch(), ended)

    def _withdraw(self, directory: Directory) -> None:
        directory.vouching = True

        def ended(_: None, error: Exception | None) -> None:
            directory.vouching = False
            directory.has_file = error is not None

        self.runner.run(directory.path, directory.voucher.withdraw(), ended)

    def is_idle(self) -> bool:
        """Return whether nothing is held, asked for, or left to be removed."""
        busy = (d.has_file or d.vouching or d.judge.found_dead for d in self._directories.values())
        return not self._files and not any(busy)

    def close(self) -> None:
        """The keeper leaves."""
        with contextlib.suppress(OSError):
            self._aliveness.end()
