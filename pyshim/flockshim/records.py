"""What the keeper does about record locks, fcntl(2): requests in, answers out, by tables, proxies and neighbours."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import time

from flockshim import closing, holders
from flockshim._native import lib
from flockshim.descriptions import Description
from flockshim.grants import Grants
from flockshim.locktable import GRANTED, WAITING
from flockshim.neighbours import Neighbours
from flockshim.patience import Patience
from flockshim.recordfile import EVERYTHING, Owner, RecordFile, held_by, without_owner
from flockshim.recordtable import Range, RecordWaiter, deadlocks
from flockshim.recordundecided import RecordUndecided
from flockshim.undecided import UNDECIDED_SECONDS, cannot_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from flockshim.host import Key
    from flockshim.journal import Journal
    from flockshim.lockservice import LockService
    from flockshim.loop import Loop
    from flockshim.programs import Connection, Programs
    from flockshim.rendezvous import Rendezvous

LOCK_EX, LOCK_NB, LOCK_UN, LOCK_TEST = fcntl.LOCK_EX, fcntl.LOCK_NB, fcntl.LOCK_UN, lib.LOCK_TEST
RECORDS = 1
"""The third member of the key of a file's record locks, which are independent of those of flock(2)."""
IDLE_PROXY_SECONDS = 1.0


class RecordService:
    """All the record locks of one keeper."""

    programs: Programs

    def __init__(self, loop: Loop, rendezvous: Rendezvous, journal: Journal, flock: LockService) -> None:
        """Set `programs` before requests come. Shares with the other service what it knows of processes and leases."""
        self.processes = flock.processes
        self.files: dict[Key, RecordFile] = {}
        self.undecided = RecordUndecided(self)
        self.grants = Grants(self)
        self.neighbours = Neighbours(loop, rendezvous)
        self.patience = Patience(loop, self._tell_waiting, self._time_out)
        self._flock = flock
        self._rendezvous = rendezvous
        self._journal = journal

    def _file(self, device: int, inode: int) -> RecordFile:
        key = (device, inode, RECORDS)
        file = self.files.get(key)
        if file is None:
            file = self.files[key] = RecordFile(key, self._rendezvous.directory, self._journal, self.permit_lease)
        return file

    def permit_lease(self, file: RecordFile, wanted: Range) -> bool:
        """Return whether no other host forbids a range; if one may, it is asked."""
        leases = self._flock.files.leases
        if not file.leased:
            return True
        waits = file.waits or bool(file.lock.queue)
        holders = file.lock.ranges
        return leases is not None and leases.permit_records(
            file.key, wanted.exclusive, waits, bool(holders), file.asking in holders
        )

    def adopt(self, proxies: list[int], predecessors: dict[str, int]) -> None:
        """Take over from a keeper that has died: descriptors of proxies that the journal names; see `Leases`."""
        for descriptor in proxies:
            entry = self._journal.read_records(descriptor)
            assert entry
            is_process, kept, device, inode, pid, number, since, leased = entry
            file = self._file(device, inode)
            owner = Owner(file.key, Description(kept, file.key, pid, number), is_process)
            owner.proxy, owner.since, owner.taker = descriptor, since, pid
            file.owners.add(owner)
            for held in held_by(descriptor):
                file.lock.set(owner, *held)
            file.leased |= leased
            self.processes.add(pid, owner)
            self.forget_if_unused(file, owner)
        for file in self.files.values():
            if file.leased and file.lock.ranges:
                self._flock.leasing.adopt(file, predecessors)

    def restore_proxies(self) -> list[Key]:
        """Make the proxies again in a new directory. Returns the files that somebody else has locked meanwhile."""
        return [key for key, file in self.files.items() if not file.restore()]

    # Requests

    def request(
        self, connection: Connection, operation: int, descriptor: int, number: int, device: int, inode: int
    ) -> None:
        """Answer a program's fcntl(2), now or later. `descriptor` is ours; `number` the program's."""
        file = self._file(device, inode)
        is_process = connection.family == lib.FAMILY_PROCESS
        owner = file.find(descriptor, is_process, connection.pid)
        if owner is None and file.is_shared() and self._redirected(connection, file, descriptor, is_process):
            return
        owner = self._known(file, owner, connection, descriptor, number, is_process)
        wanted = Range(connection.first, connection.last, bool(operation & LOCK_EX))
        try:
            if operation & LOCK_TEST:
                self._test(connection, file, owner, wanted, bool(operation & LOCK_UN))
            elif operation & LOCK_UN:
                self._unlock(connection, file, owner, wanted)
            elif self._has_lease(connection, file, owner):
                self._lock(connection, file, owner, wanted, not operation & LOCK_NB)
        except OSError as error:
            self.forget_if_unused(file, owner)
            connection.refuse(cannot_lock(error))

    def _has_lease(self, connection: Connection, file: RecordFile, owner: Owner) -> bool:
        """Return whether other hosts can be asked, where they must be; if not, the program has been refused."""
        if not connection.flags & lib.FLAG_CLUSTER:
            return True
        if not self._flock.leasing.need(connection, file, owner):
            return False
        if self._flock.files.leases:
            self._flock.files.leases.ask_again(file.key)
        return True

    def _redirected(self, connection: Connection, file: RecordFile, descriptor: int, is_process: bool) -> bool:
        """A process that was moved to another control group has its locks with another keeper."""
        if is_process:
            key = self._rendezvous.keeper_of_records(file.path, connection.pid)
        else:
            key = self._rendezvous.keeper_of(descriptor)
        if key is None:
            return False
        closing.close(descriptor)
        connection.redirect(key)
        return True

    def _known(
        self,
        file: RecordFile,
        owner: Owner | None,
        connection: Connection,
        descriptor: int,
        number: int,
        is_process: bool,
    ) -> Owner:
        """Return the owner, who has at least this place; what it has lost by closing another is taken away before."""
        if owner is None:
            owner = Owner(file.key, Description(descriptor, file.key, connection.pid, number), is_process)
            file.owners.add(owner)
        elif is_process:
            owner.add_place(descriptor, number)
            if len(owner.places) > 1 or owner.places[0].number != number:
                self._check_places(file, owner)
        else:
            closing.close(descriptor)
            place = owner.places[0]
            if owner.pid != connection.pid:
                self.processes.discard(owner.pid, owner)
            owner.pid = place.pid = connection.pid
            place.number = number
        return owner

    def _check_places(self, file: RecordFile, owner: Owner) -> None:
        if owner.is_process and owner.has_closed():
            file.drop(owner)
            owner.keep_open_places()

    def _unlock(self, connection: Connection, file: RecordFile, owner: Owner, wanted: Range) -> None:
        if owner in file.lock.ranges:
            file.set(owner, wanted.first, wanted.last, None)
            self.grants.heed(owner, wanted)
        self.forget_if_unused(file, owner)
        if file.leased:
            file.unlocking.append(connection)
            self.settle(file)
            self.answer_unlocked(file)
        else:
            connection.answer(0)
            self.settle(file)

    def answer_unlocked(self, file: RecordFile) -> None:
        """Answer those who have unlocked, unless the lease is still to be given back."""
        leases = self._flock.files.leases
        if file.unlocking and not (leases and leases.is_giving_back(file.key)):
            unlocking, file.unlocking = file.unlocking, []
            for connection in unlocking:
                connection.answer(0)

    def _test(self, connection: Connection, file: RecordFile, owner: Owner, wanted: Range, own: bool) -> None:
        if own:
            found = next(file.lock.own(owner, wanted), None)
            self._answer_test(connection, found)
            self.forget_if_unused(file, owner)
            return
        self._check_conflicting(file, owner, wanted)
        if not self._has_lease(connection, file, owner):
            return
        self.undecided.add(file, connection, owner, wanted, True)
        self.undecided.retry(file)
        self.settle(file)

    def _answer_test(self, connection: Connection, found: tuple[Owner, Range] | None) -> None:
        if found is None:
            connection.answer(0)
        else:
            holder, held = found
            connection.answer_found(held, holder.shown_pid, "")

    def _lock(self, connection: Connection, file: RecordFile, owner: Owner, wanted: Range, blocking: bool) -> None:
        self._check_conflicting(file, owner, wanted)
        before = file.snapshot(owner, wanted)
        file.waits = blocking
        outcome = file.request(owner, wanted, blocking, connection)
        if outcome == GRANTED:
            self.granted(file, connection, owner, wanted, before)
        elif outcome == WAITING:
            waiter = file.lock.queue[-1]
            if self._deadlocks(waiter):
                file.lock.queue.remove(waiter)
                self.forget_if_unused(file, owner)
                connection.answer(errno.EDEADLK)
                return
            owner.waits += 1
            connection.waiter = waiter
            self.programs.hold(connection)
            self.processes.add(connection.pid, connection)
            self.settle(file)
            if connection.waiter:
                self.patience.begin(connection)
        else:
            self.undecided.add(file, connection, owner, wanted, False)
            self.undecided.retry(file)
            if file.queue_or_undecided():
                self.settle(file)

    def granted(
        self, file: RecordFile, connection: Connection, owner: Owner, wanted: Range, before: list[Range]
    ) -> None:
        """Tell of a grant without a wait. `before` is what the owner held there."""
        self.processes.add(connection.pid, owner)
        self.grants.heed(owner, wanted)
        if connection.is_supervised:
            # Its program may have gone.
            self.programs.hold(connection)
            self._add_grant(connection, owner, wanted, before)
        else:
            connection.answer(0)

    def _add_grant(self, connection: Connection, owner: Owner, wanted: Range, before: list[Range]) -> None:
        connection.undo = wanted, before
        self.grants.add(connection, owner, before != [wanted])

    def undo(self, file: RecordFile, connection: Connection, others: list[Connection]) -> None:
        """A grant has not reached its program: give the owner what it held there before."""
        owner, (wanted, before) = connection.granted, connection.undo
        if not connection.changed or owner not in file.owners:
            return
        for other in others:
            if other.undo[0].overlaps(wanted):
                return
        file.set(owner, wanted.first, wanted.last, None)
        for held in before:
            file.set(owner, *held)
        self.forget_if_unused(file, owner)

    def is_refused(self, file: RecordFile, owner: Owner, wanted: Range) -> bool:
        """Return whether a holder of ours is in the way, and surely holds."""
        unsure = self.grants.unsure()
        return any(holder not in unsure for holder, _ in file.lock.conflicts(owner, wanted))

    def is_refused_by_hosts(self, file: RecordFile, wanted: Range) -> bool:
        """Return whether another host's lease forbids this."""
        leases = self._flock.files.leases
        return file.leased and leases is not None and leases.forbids_record(file.key, wanted.exclusive)

    def refuse(self, connection: Connection, error: OSError) -> None:
        """The proxy cannot be had."""
        connection.refuse(cannot_lock(error))

    # Waiting

    def withdraw(self, connection: Connection) -> None:
        """The program has given up waiting, or has died; `programs` has forgotten it."""
        waiter = connection.waiter
        if waiter is None:
            self.grants.take_back(connection)
            return
        file = self.files[waiter.owner.key]
        file.lock.queue.remove(waiter)
        self._stop_waiting(connection)
        self.forget_if_unused(file, waiter.owner)
        self.settle(file)

    def _stop_waiting(self, connection: Connection) -> None:
        assert connection.waiter
        connection.waiter.owner.waits -= 1
        connection.waiter = None
        self.patience.forget(connection)
        self.processes.discard(connection.pid, connection)

    def _deadlocks(self, waiter: RecordWaiter) -> bool:
        if not waiter.owner.is_process or waiter.blocker is None:
            return False
        waiters = [one for file in self.files.values() for one in file.lock.queue if one is not waiter]
        return deadlocks(waiter.owner, waiter.blocker, waiters, Owner.identity)

    def _tell_waiting(self, connection: Connection) -> None:
        assert connection.waiter
        file = self.files[connection.waiter.owner.key]
        leases = self._flock.files.leases
        if leases and leases.may_learn(file.key):
            self.patience.tell_later(connection)
        else:
            connection.tell_waiting(self._describe(file, connection.waiter))

    def _time_out(self, connection: Connection) -> None:
        assert connection.waiter
        file = self.files[connection.waiter.owner.key]
        leases = self._flock.files.leases
        unknown = leases and leases.is_pending(file.key) and not leases.is_refused(file.key)
        late = time.monotonic() - connection.waiter.since - connection.timeout / 1000
        if unknown and late < UNDECIDED_SECONDS:
            self.patience.end_later(connection)
            return
        who = self._describe(file, connection.waiter)
        self.programs.forget(connection)
        self.withdraw(connection)
        connection.time_out(who)

    def _describe(self, file: RecordFile, waiter: RecordWaiter) -> str:
        # What is only said must not end what holds the locks.
        with contextlib.suppress(OSError, ValueError):
            for owner, _ in file.lock.conflicts(waiter.owner, waiter.wanted):
                return holders.describe(owner.pid, owner.since)
            leases = self._flock.files.leases
            elsewhere = leases.holder(file.key) if leases else None
            return elsewhere or (file.knock.holder if file.knock else "") or holders.UNKNOWN
        return holders.UNKNOWN

    # What holds, and what follows

    def forget_if_unused(self, file: RecordFile, owner: Owner) -> None:
        """Close what is open of an owner that neither holds nor waits."""
        if owner.waits or owner in file.lock.ranges:
            return
        self.processes.discard(owner.pid, owner)
        file.forget(owner)

    def _check_conflicting(self, file: RecordFile, owner: Owner, wanted: Range) -> None:
        conflicting = [holder for holder, _ in file.lock.conflicts(owner, wanted)]
        if conflicting:
            self.check(conflicting)

    def check(self, owners: Iterable[Owner]) -> list[RecordFile]:
        """Release what has ended. Returns the files that it was on."""
        owners = list(owners)
        places = [owner.pid for owner in owners]
        released = []
        for owner in without_owner(owners):
            file = self.files[owner.key]
            file.drop(owner)
            owner.keep_open_places()
            self.forget_if_unused(file, owner)
            released.append(file)
        for owner, pid in zip(owners, places):
            if owner.pid != pid:
                self.processes.discard(pid, owner)
                self.processes.add(owner.pid, owner)
        return released

    def release(self, file: RecordFile, owner: Owner) -> None:
        """Take all away from an owner, and forget it."""
        file.drop(owner)
        self.forget_if_unused(file, owner)

    def settle(self, file: RecordFile) -> None:
        """Serve those who wait, tell other keepers, and hold the lease exactly as long as it is needed."""
        waits_elsewhere = False
        for waiter in list(file.lock.queue):
            if waiter in file.lock.queue:
                waits_elsewhere |= self._serve(file, waiter)
        if file.is_changed:
            file.is_changed = False
            self.undecided.retry(file)
            self._tell_subscribers(file)
        self._subscribe(file, waits_elsewhere)
        self._settle_lease(file)
        if not file.owners:
            file.idle_since = file.idle_since or time.monotonic()

    def _serve(self, file: RecordFile, waiter: RecordWaiter) -> bool:
        """Return whether it waits for another keeper."""
        connection, owner, blocker = waiter.context, waiter.owner, waiter.blocker
        self._check_places(file, owner)
        before = file.snapshot(owner, waiter.wanted)
        file.waits = True
        try:
            served = file.serve(waiter)
        except OSError as error:
            self._refuse(file, waiter, cannot_lock(error))
            return False
        if served:
            self._stop_waiting(connection)
            self.processes.add(connection.pid, owner)
            self._add_grant(connection, owner, waiter.wanted, before)
        elif waiter.blocker is not blocker and self._deadlocks(waiter):
            self._end_wait(file, waiter)
            connection.answer(errno.EDEADLK)
        return not served and file.is_refused_elsewhere

    def _end_wait(self, file: RecordFile, waiter: RecordWaiter) -> None:
        file.lock.queue.remove(waiter)
        self.programs.forget(waiter.context)
        self._stop_waiting(waiter.context)
        self.forget_if_unused(file, waiter.owner)

    def _refuse(self, file: RecordFile, waiter: RecordWaiter, text: str) -> None:
        self._end_wait(file, waiter)
        waiter.context.refuse(text)

    def refuse_first(self, file: RecordFile, text: str) -> None:
        """Refuse whoever is first in line."""
        self._refuse(file, file.lock.queue[0], text)

    def _settle_lease(self, file: RecordFile) -> None:
        leases = self._flock.files.leases
        if not file.leased or leases is None:
            return
        if file.lock.ranges:
            return
        if leases.is_pending(file.key):
            if not file.queue_or_undecided():
                leases.abandon(file.key)
        elif not file.queue_or_undecided():
            leases.give_back(file.key)

    # Other keepers of this host

    def knocked(self, connection: Connection, device: int, inode: int, wanted: Range) -> None:
        """Tell another keeper whether a lock of ours forbids this one; and, if it stays, when that has changed."""
        file = self.files.get((device, inode, RECORDS))
        nobody = None
        if file:
            self.check([owner for owner, _ in file.lock.conflicts(nobody, wanted)])
            self.settle(file)
        found = next(file.lock.conflicts(nobody, wanted), None) if file else None
        if file is None or found is None:
            connection.answer(0)
            return
        holder, held = found
        text = holders.describe(holder.pid, holder.since)
        if connection.flags & lib.FLAG_STAY:
            file.subscribers.append(connection)
            self.programs.hold(connection)
            connection.ends = lambda: file.subscribers.remove(connection)
            connection.tell_found(held, holder.shown_pid, text)
        else:
            connection.answer_found(held, holder.shown_pid, text)

    def _tell_subscribers(self, file: RecordFile) -> None:
        subscribers, file.subscribers = file.subscribers, []
        for connection in subscribers:
            self.programs.forget(connection)
            connection.answer(0)

    def _subscribe(self, file: RecordFile, waits_elsewhere: bool) -> None:
        """Those who wait for other keepers must learn when these have unlocked something."""
        if waits_elsewhere and file.knock is None:
            file.knock = self.neighbours.knock(
                file.key, EVERYTHING, lambda: self._answered(file), lambda: self._freed(file)
            )
        elif not file.lock.queue:
            file.unsubscribe()

    def _answered(self, file: RecordFile) -> None:
        """What was in the way may have gone before the other keeper was asked."""
        if file.knock and not file.knock.is_watching():
            self.settle(file)

    def _freed(self, file: RecordFile) -> None:
        file.knock = None
        if self.files.get(file.key) is file:
            self.settle(file)

    # What happens without being asked for

    def processes_ended(self, owners: list[Owner]) -> None:
        """Release what processes have left that have ended."""
        for file in self.check([owner for owner in owners if owner in self._owners_of(owner)]):
            self.settle(file)

    def _owners_of(self, owner: Owner) -> set[Owner]:
        file = self.files.get(owner.key)
        return file.owners if file else set()

    def tick(self, now: float) -> None:
        """Look once a second for what no event tells: descriptors closed without unlocking."""
        self.check_all()
        self.grants.look(now)
        for file in list(self.files.values()):
            if file.knock and not file.knock.is_watching():
                file.unsubscribe()
            self.settle(file)
            self.undecided.decide(file, now)
            leases = self._flock.files.leases
            if file.leased and leases and file.lock.ranges and not any(file.lock.holders.values()):
                leases.relax(file.key)
            if file.is_unused() and now - file.idle_since >= IDLE_PROXY_SECONDS:
                file.close()
                del self.files[file.key]

    def check_all(self) -> None:
        """Release the locks of those who do not hold any more."""
        for released in self.check([owner for file in self.files.values() for owner in file.lock.ranges]):
            self.settle(released)

    def close(self) -> None:
        """Remove the proxies: the keeper leaves."""
        for file in self.files.values():
            file.close()

    def is_idle(self) -> bool:
        """Return whether nobody holds or wants anything."""
        return not self.files
