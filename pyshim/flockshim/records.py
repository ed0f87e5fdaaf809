"""What the keeper does about record locks, fcntl(2): requests in, answers out, by tables, proxies and neighbours."""

from __future__ import annotations

import fcntl
import time

from flockshim import closing
from flockshim._native import lib
from flockshim.descriptions import Description
from flockshim.locktable import GRANTED, WAITING
from flockshim.neighbours import Neighbours
from flockshim.recordfile import RECORDS, Owner, RecordFile, held_by, without_owner
from flockshim.recordgrants import RecordGrants
from flockshim.recordknocks import RecordKnocks
from flockshim.recordtable import Range
from flockshim.recordundecided import RecordUndecided
from flockshim.recordwaits import RecordWaits
from flockshim.undecided import cannot_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from flockshim.host import Key
    from flockshim.journal import Journal
    from flockshim.lockservice import LockService
    from flockshim.loop import Loop
    from flockshim.programs import Connection, Programs
    from flockshim.recordleases import RecordLeases
    from flockshim.rendezvous import Rendezvous

LOCK_EX, LOCK_NB, LOCK_UN, LOCK_TEST = fcntl.LOCK_EX, fcntl.LOCK_NB, fcntl.LOCK_UN, lib.LOCK_TEST
IDLE_PROXY_SECONDS = 1.0


class RecordService:
    """All the record locks of one keeper."""

    programs: Programs

    def __init__(self, loop: Loop, rendezvous: Rendezvous, journal: Journal, flock: LockService) -> None:
        """Set `programs` before requests come. Shares with the other service what it knows of processes and leases."""
        self.processes = flock.processes
        self.files: dict[Key, RecordFile] = {}
        self.undecided = RecordUndecided(self)
        self.grants = RecordGrants(self)
        self.waits = RecordWaits(self, loop)
        self.knocks = RecordKnocks(self, Neighbours(loop, rendezvous))
        # Of what files which processes have no locks with other keepers, for a second: so long the library, too,
        # remembers which keeper a process has.
        self._only_here: set[tuple[Key, int]] = set()
        self._flock = flock
        self._rendezvous = rendezvous
        self._journal = journal

    @property
    def leases(self) -> RecordLeases | None:
        """What other hosts are asked by, once that was needed."""
        return self._flock.files.leases

    def _file(self, device: int, inode: int) -> RecordFile:
        key = (device, inode, RECORDS)
        file = self.files.get(key)
        if file is None:
            file = self.files[key] = RecordFile(key, self._rendezvous.directory, self._journal, self.permit_lease)
        return file

    def permit_lease(self, file: RecordFile, wanted: Range) -> bool:
        """Return whether no other host forbids a range; if one may, it is asked."""
        leases = self.leases
        if not file.leased:
            return True
        waits = file.waits or bool(file.lock.queue)
        held = file.lock.ranges
        return leases is not None and leases.permit_records(
            file.key, wanted.exclusive, waits, bool(held), file.asking in held, file.hurries
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
                self._flock.adopt_lease(file, predecessors)

    def restore_proxies(self) -> list[Key]:
        """Make the proxies again in a new directory. Returns the files that somebody else has locked meanwhile."""
        return [key for key, file in self.files.items() if not file.restore_proxies()]

    # Requests

    def request(
        self, connection: Connection, operation: int, descriptor: int, number: int, device: int, inode: int
    ) -> None:
        """Answer a program's fcntl(2), now or later. `descriptor` is ours; `number` the program's."""
        file = self._file(device, inode)
        is_process = connection.family == lib.FAMILY_PROCESS
        if is_process and connection.pid <= 0:
            closing.close(descriptor)
            connection.refuse(
                "the program is in a pid namespace that the keeper does not see; start it by flockshim there"
            )
            return
        owner = file.find(descriptor, is_process, connection.pid)
        if owner is None and file.is_shared() and self._redirected(connection, file, descriptor, is_process):
            return
        owner, place = self._known(file, owner, connection, descriptor, number, is_process)
        wanted = Range(connection.first, connection.last, bool(operation & LOCK_EX))
        try:
            if operation & LOCK_TEST:
                self._test(connection, file, owner, wanted, bool(operation & LOCK_UN))
            elif operation & LOCK_UN:
                self._unlock(connection, file, owner, wanted)
            elif self._has_lease(connection, file, owner):
                self._lock(connection, file, owner, wanted, None if operation & LOCK_NB else place)
        except OSError as error:
            self.forget_if_unused(file, owner)
            connection.refuse(cannot_lock(error))

    def _has_lease(self, connection: Connection, file: RecordFile, owner: Owner) -> bool:
        """Return whether other hosts can be asked, where they must be; if not, the program has been refused."""
        if not connection.flags & lib.FLAG_CLUSTER:
            return True
        if not self._flock.leasing.need(connection, file, owner):
            return False
        if self.leases:
            self.leases.ask_again(file.key)
        return True

    def _redirected(self, connection: Connection, file: RecordFile, descriptor: int, is_process: bool) -> bool:
        """A process that was moved to another control group has its locks with another keeper."""
        asked = file.key, connection.pid
        if connection.flags & lib.FLAG_REDIRECTED or (is_process and asked in self._only_here):
            return False
        key = self._rendezvous.keeper_of_records(file.path, connection.pid if is_process else 0, descriptor)
        if key is None:
            if is_process:
                self._only_here.add(asked)
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
    ) -> tuple[Owner, Description]:
        """Return the owner and its place; what it has lost by closing another is taken away before."""
        if owner is None:
            owner = Owner(file.key, Description(descriptor, file.key, connection.pid, number), is_process)
            file.owners.add(owner)
            file.idle_since = 0.0
            return owner, owner.places[0]
        if is_process:
            place = owner.place_of(descriptor, number)
            if len(owner.places) > 1:
                file.move(owner)
                self.check_places(file, owner)
            return owner, place
        closing.close(descriptor)
        place = owner.places[0]
        if owner.pid != connection.pid:
            self.processes.discard(owner.pid, owner)
        if (place.pid, place.number) != (connection.pid, number):
            owner.pid = place.pid = connection.pid
            place.number = number
            file.move(owner)
        return owner, place

    def check_places(self, file: RecordFile, owner: Owner) -> None:
        """Take away what a process has lost by closing a descriptor."""
        if owner.is_process and owner.has_closed():
            file.drop(owner)
            file.keep_open_places(owner)

    def _unlock(self, connection: Connection, file: RecordFile, owner: Owner, wanted: Range) -> None:
        if owner in file.lock.ranges:
            file.set(owner, wanted.first, wanted.last, None)
            self.grants.heed(owner, wanted)
        self.forget_if_unused(file, owner)
        if file.leased:
            file.unlocking.append(connection)
            self.settle(file)
            self._flock.leasing.answer_unlocked(file)
            return
        connection.answer(0)
        if file.is_quiet():
            file.is_changed = False
            file.idle_since = time.monotonic()
        else:
            self.settle(file)

    def _test(self, connection: Connection, file: RecordFile, owner: Owner, wanted: Range, own: bool) -> None:
        if own:
            found = next(file.lock.own(owner, wanted), None)
            if found:
                connection.answer_found(found[1], owner.shown_pid, "")
            else:
                connection.answer(0)
            self.forget_if_unused(file, owner)
            return
        self._check_conflicting(file, owner, wanted)
        if not self._has_lease(connection, file, owner):
            return
        self.undecided.add(file, connection, owner, wanted, True)
        self.undecided.retry(file)
        self.settle(file)

    def _lock(
        self, connection: Connection, file: RecordFile, owner: Owner, wanted: Range, place: Description | None
    ) -> None:
        """Whoever may wait does so by a `place`."""
        self._check_conflicting(file, owner, wanted)
        before = file.snapshot(owner, wanted)
        file.waits, file.hurries = place is not None, place is None
        outcome = file.request(owner, wanted, file.waits, connection, before)
        if outcome == GRANTED:
            self.granted(file, connection, owner, wanted, before)
            if file.is_changed:
                self.settle(file)
        elif outcome == WAITING and place:
            self.waits.begin(file, connection, place)
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
            self.grants.give(connection, owner, wanted, before)
        else:
            connection.answer(0)

    def is_refused(self, file: RecordFile, owner: Owner, wanted: Range) -> bool:
        """Return whether a holder of ours is in the way, and surely holds."""
        unsure = self.grants.unsure()
        return any(holder not in unsure for holder, _ in file.lock.conflicts(owner, wanted))

    def is_refused_by_hosts(self, file: RecordFile, exclusive: bool) -> bool:
        """Return whether another host's lease forbids a lock of this mode."""
        leases = self.leases
        return file.leased and leases is not None and leases.forbids_record(file.key, exclusive)

    def withdraw(self, connection: Connection) -> None:
        """The program has given up waiting, or has died; `programs` has forgotten it."""
        if connection.waiter:
            self.waits.withdraw(connection)
        else:
            self.grants.take_back(connection)

    def refuse_first(self, file: RecordFile, text: str) -> None:
        """Refuse whoever is first in line."""
        self.waits.refuse(file, file.lock.queue[0], text)

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
        before = {owner: owner.pid for owner in owners}
        released = []
        for owner in without_owner(before):
            file = self.files[owner.key]
            file.drop(owner)
            file.keep_open_places(owner)
            self.forget_if_unused(file, owner)
            released.append(file)
        self.processes.follow(before)
        return released

    def check_file(self, file: RecordFile) -> None:
        """Release the locks of those who do not hold this file any more."""
        self.check(file.lock.ranges)
        self.settle(file)

    def release(self, file: RecordFile, owner: Owner) -> None:
        """Take all away from an owner, and forget it."""
        file.drop(owner)
        self.forget_if_unused(file, owner)

    def settle(self, file: RecordFile) -> None:
        """Serve those who wait, tell other keepers, and hold the lease exactly as long as it is needed."""
        waits_elsewhere = self.waits.serve(file)
        if file.leased and self.leases:
            self.leases.end_of_turns(file.key)
        if file.is_changed:
            file.is_changed = False
            self.undecided.retry(file)
            self.knocks.tell(file)
        self.knocks.subscribe(file, waits_elsewhere)
        self._settle_lease(file)
        if not file.owners:
            file.idle_since = file.idle_since or time.monotonic()

    def _settle_lease(self, file: RecordFile) -> None:
        leases = self.leases
        if not file.leased or leases is None:
            return
        if file.lock.ranges:
            return
        if leases.is_pending(file.key):
            if not file.queue_or_undecided():
                leases.abandon(file.key)
        elif not file.queue_or_undecided():
            leases.give_back(file.key)

    # What happens without being asked for

    def processes_ended(self, owners: list[Owner]) -> None:
        """Release what processes have left that have ended."""
        concerned = [(self.files[owner.key], owner) for owner in owners if owner.key in self.files]
        concerned = [(file, owner) for file, owner in concerned if owner in file.owners]
        # Another process may have the number already.
        for file, owner in concerned:
            if owner.is_process:
                self.release(file, owner)
        self.check([owner for _, owner in concerned if not owner.is_process])
        for file in {file.key: file for file, _ in concerned}.values():
            self.settle(file)

    def tick(self, now: float) -> None:
        """Look once a second for what no event tells: descriptors closed without unlocking."""
        self._only_here.clear()
        self.check_all()
        for file in [file for file in self.files.values() if file.is_swept()]:
            self._restore(file)
        self.grants.look(now)
        self.waits.look_at_suspects()
        for file in list(self.files.values()):
            if file.knock and not file.knock.is_watching():
                file.unsubscribe()
            self.settle(file)
            self.undecided.decide(file, now)
            leases = self.leases
            if file.leased and leases and file.lock.ranges and not any(file.lock.holders.values()):
                leases.relax(file.key)
            if file.is_unused() and now - file.idle_since >= IDLE_PROXY_SECONDS:
                file.close()
                del self.files[file.key]

    def _restore(self, file: RecordFile) -> None:
        """Somebody has removed a proxy alone: see also `restore_proxies`."""
        lost = ""
        try:
            if not file.restore_proxies():
                lost = "was taken while its proxy was away"
        except OSError as error:
            lost = f"is not known to other keepers: {error.strerror}"
        if lost and lost != file.lost:
            print(f"a record lock on device {file.key[0]} inode {file.key[1]} {lost}", flush=True)
        file.lost = lost

    def check_all(self) -> None:
        """Release the locks of those who do not hold any more."""
        for released in self.check([owner for file in self.files.values() for owner in file.lock.ranges]):
            self.settle(released)
