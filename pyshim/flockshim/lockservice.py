"""What the keeper does about locks: requests in, answers out, by the lock tables and this host's proxies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time

from flockshim import closing, holders
from flockshim._native import lib
from flockshim.descriptions import Description, Processes, closed
from flockshim.files import File, Files
from flockshim.grants import Grants
from flockshim.host import Host, Key
from flockshim.leasing import Leasing
from flockshim.locktable import GRANTED, REFUSED
from flockshim.loop import TICK_SECONDS
from flockshim.patience import Patience
from flockshim.undecided import UNDECIDED_SECONDS, Undecided, cannot_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from flockshim.journal import Journal
    from flockshim.loop import Loop
    from flockshim.programs import Connection, Programs
    from flockshim.recordfile import RecordFile
    from flockshim.rendezvous import Rendezvous

LOCK_EX, LOCK_NB, LOCK_UN = fcntl.LOCK_EX, fcntl.LOCK_NB, fcntl.LOCK_UN


class LockService:
    """All the locks of one keeper."""

    programs: Programs

    def __init__(self, loop: Loop, rendezvous: Rendezvous, journal: Journal, most: int) -> None:
        """Set `programs` before requests come. Descriptors from `most` on are a reserve."""
        self.processes = Processes(loop.watch, loop.unwatch, most)
        self._rendezvous = rendezvous
        self._host = Host(rendezvous.directory)
        self.files = Files(self._host, journal)
        self._journal = journal
        self.undecided = Undecided(self)
        self.leasing = Leasing(self, loop, rendezvous.directory)
        self.grants = Grants(self)
        self.patience = Patience(loop, self._tell_waiting, self._time_out)
        if self._host.fileno() >= 0:
            # Before programs: what a neighbour did before a program asked must be known by then.
            loop.watch(self._host.fileno(), self._heed_neighbours, first=True)

    def adopt(self, held: list[int], proxies: dict[Key, int], predecessors: dict[str, int]) -> None:
        """Take over from a keeper that has died: descriptors of held locks, of proxies, and of its being alive."""
        recorded = set()
        for descriptor in held:
            entry = self._journal.read(descriptor)
            assert entry
            exclusive, device, inode, pid, number, since, leased = entry
            description = Description(descriptor, (device, inode), pid, number)
            description.taker, description.since = pid, since
            file = self.files.of(description.key)
            file.descriptions.add(description)
            file.lock.adopt(description, exclusive)
            self.processes.add(pid, description)
            if leased:
                recorded.add(file.key)
        # All of a file's holders together are what its lease is in doubt for.
        for key in recorded:
            self.adopt_lease(self.files[key], predecessors)
        needed = self.files.needed()
        for key, descriptor in proxies.items():
            self._host.adopt(key, descriptor, needed.get(key))
        if not self.files.leases:
            for descriptor in predecessors.values():
                os.close(descriptor)
        # What is held must be locked, whatever has become of its proxy.
        self._host.restore(needed)

    def adopt_lease(self, file: File | RecordFile, predecessors: dict[str, int]) -> None:
        """Take over the lease behind the locks of a file; without it they are lost."""
        try:
            self.leasing.adopt(file, predecessors)
        except OSError as error:
            print(f"a lock cannot be kept: {error.strerror}: {error.filename}", flush=True)
            self.leasing.lost(file.key)

    def restore_proxies(self) -> list[Key]:
        """Make the proxies again in a new directory. Returns the files that somebody else has locked meanwhile."""
        return self._host.restore(self.files.needed())

    # Requests

    def request(
        self, connection: Connection, operation: int, descriptor: int, number: int, device: int, inode: int
    ) -> None:
        """Answer a program's flock(2), now or later. `descriptor` is ours; `number` the program's."""
        file = self.files.of((device, inode))
        description = file.descriptions.find(descriptor)
        known = description is not None
        if description is None:
            description = Description(descriptor, file.key, connection.pid, number)
            file.descriptions.add(description)
        else:
            closing.close(descriptor)
            if description.pid != connection.pid:
                self.processes.discard(description.pid, description)
            description.pid, description.number = connection.pid, number
        try:
            if not known and self._redirected(connection, file, description):
                return
            if operation & LOCK_UN:
                file.lock.release(description)
                self.forget_if_unused(file, description)
                file.unlocking.append(connection)
                self.settle(file)
                self.leasing.answer_unlocked(file)
            else:
                exclusive = bool(operation & LOCK_EX)
                if connection.flags & lib.FLAG_CLUSTER and not self.leasing.need(connection, file, description):
                    return
                self._lock(connection, file, description, exclusive, not operation & LOCK_NB)
        except OSError as error:
            self.forget_if_unused(file, description)
            connection.refuse(cannot_lock(error))

    def _redirected(self, connection: Connection, file: File, description: Description) -> bool:
        if connection.flags & lib.FLAG_REDIRECTED or not self._host.may_be_shared(file.key):
            return False
        key = self._rendezvous.keeper_of(description.descriptor)
        if key is None:
            return False
        self.forget_if_unused(file, description)
        self.settle(file)
        connection.redirect(key)
        return True

    def _lock(
        self, connection: Connection, file: File, description: Description, exclusive: bool, blocking: bool
    ) -> None:
        if file.lock.conflicts(description, exclusive):
            self._check_holders([holder for holder in file.lock.holders if holder is not description])
        held = file.lock.holders.get(description)
        outcome = file.lock.request(description, exclusive, blocking, connection, time.monotonic())
        if outcome == GRANTED:
            self.processes.add(connection.pid, description)
            if file.lock.queue:
                self.settle(file)
            # An exclusive lock that has become a shared one is not given back: the program believes that it has one.
            self.answer_granted(connection, description, held is None or (exclusive and not held))
        elif outcome == REFUSED:
            elsewhere = self.files.leases is not None and self.files.leases.is_refused(file.key)
            if elsewhere or self.is_refused(file, description, exclusive):
                self.forget_if_unused(file, description)
                connection.answer(errno.EWOULDBLOCK)
            else:
                self.undecided.add(file, connection, description, exclusive)
            self.settle(file)
        else:
            description.waits += 1
            connection.waiter = file.lock.queue[-1]
            self.programs.hold(connection)
            self.processes.add(connection.pid, connection)
            self.settle(file)
            if connection.waiter:
                self.patience.begin(connection)

    def answer_granted(self, connection: Connection, description: Description, changed: bool) -> None:
        """Tell of a grant without a wait; `changed`: the description did not hold just that already."""
        if connection.is_supervised:
            # Its program may have gone.
            self.programs.hold(connection)
            self.grants.add(connection, description, changed)
        else:
            self.grants.confirm(description)
            description.answers += 1
            connection.answer(0)

    def release(self, file: File, description: Description) -> None:
        """Take a description's lock away, and forget it."""
        if file.lock.release(description):
            self.forget_if_unused(file, description)

    def is_refused(self, file: File, description: Description, exclusive: bool) -> bool:
        """Return whether a holder of ours is in the way, and surely holds."""
        return file.lock.conflicts(description, exclusive) and self.grants.unsure().isdisjoint(file.lock.holders)

    def withdraw(self, connection: Connection) -> None:
        """The program has given up waiting, or has died; `programs` has forgotten it."""
        waiter = connection.waiter
        if waiter is None:
            self.grants.take_back(connection)
            return
        file = self.files[waiter.owner.key]
        file.lock.withdraw(waiter)
        self._stop_waiting(connection)
        self.forget_if_unused(file, waiter.owner)
        self.settle(file)

    def _stop_waiting(self, connection: Connection) -> None:
        assert connection.waiter
        connection.waiter.owner.waits -= 1
        connection.waiter = None
        self.patience.forget(connection)
        self.processes.discard(connection.pid, connection)

    def _tell_waiting(self, connection: Connection) -> None:
        assert connection.waiter
        file = self.files[connection.waiter.owner.key]
        if self.files.leases and self.files.leases.may_learn(file.key):
            self.patience.tell_later(connection)
        else:
            connection.tell_waiting(self._describe(file))

    def _time_out(self, connection: Connection) -> None:
        assert connection.waiter
        file = self.files[connection.waiter.owner.key]
        leases = self.files.leases
        unknown = leases and leases.is_pending(file.key) and not leases.is_refused(file.key)
        late = time.monotonic() - connection.waiter.since - connection.timeout / 1000
        if unknown and late < UNDECIDED_SECONDS:
            self.patience.end_later(connection)
            return
        who = self._describe(file)
        self.programs.forget(connection)
        self.withdraw(connection)
        connection.time_out(who)

    def _describe(self, file: File) -> str:
        # What is only said must not end what holds the locks.
        with contextlib.suppress(OSError, ValueError):
            for description in file.lock.holders:
                return holders.describe(description.pid, description.since)
            elsewhere = self.files.leases.holder(file.key) if self.files.leases else None
            return elsewhere or self._host.other_holder(file.key) or holders.UNKNOWN
        return holders.UNKNOWN

    # What holds, and what follows

    def forget_if_unused(self, file: File, description: Description) -> None:
        """Close the duplicate of a description that neither holds nor waits."""
        if description not in file.lock.holders and not description.waits:
            self.processes.discard(description.pid, description)
            file.descriptions.remove(description)

    def _check_holders(self, suspects: Iterable[Description]) -> list[File]:
        """Release the locks whose description is no longer open anywhere. Returns the files that they were on."""
        holders = {description: description.pid for description in suspects}
        released = []
        for description in closed(holders):
            file = self.files[description.key]
            file.lock.release(description)
            self.forget_if_unused(file, description)
            released.append(file)
        self.processes.follow(holders)
        return released

    def settle(self, file: File, insist: bool = False) -> None:
        """Serve those who wait, and hold the host's lock for this file exactly as long as it is needed."""
        while True:
            try:
                self._serve(file, insist)
                if file.lock.holders:
                    return
                leases = self.files.leases
                if leases and leases.is_pending(file.key):
                    if not file.lock.queue and not file.undecided:
                        leases.abandon(file.key)
                    return
                if not file.lock.queue:
                    if leases and not file.undecided and not leases.give_back(file.key):
                        return
                    self._host.release(file.key)
                    if not len(file.descriptions):
                        self.files.pop(file.key, None)
                    return
                if not self._host.wait(file.key, file.lock.queue[0].exclusive, insist):
                    return
            except OSError as error:
                if not file.lock.queue:
                    print(f"{error.strerror}: {error.filename}", flush=True)
                    return
                self._fail_first(file, error)

    def _serve(self, file: File, insist: bool) -> None:
        for waiter in file.lock.serve(time.monotonic() - TICK_SECONDS if insist else None):
            connection = waiter.context
            self._stop_waiting(connection)
            self.processes.add(connection.pid, waiter.owner)
            self.grants.add(connection, waiter.owner, waiter.changed)

    def _fail_first(self, file: File, error: OSError) -> None:
        """The proxy cannot be had: whoever is first in line is told so."""
        self.refuse_first(file, cannot_lock(error))

    def refuse_first(self, file: File, text: str) -> None:
        """Refuse whoever is first in line."""
        waiter = file.lock.queue[0]
        connection = waiter.context
        file.lock.withdraw(waiter)
        self.programs.forget(connection)
        self._stop_waiting(connection)
        self.forget_if_unused(file, waiter.owner)
        connection.refuse(text)

    # What happens without being asked for

    def processes_ended(self, descriptions: list[Description]) -> None:
        """Release what processes have left that have ended."""
        for file in self._check_holders([one for one in descriptions if self.files.holds(one)]):
            self.settle(file)

    def tick(self, now: float) -> None:
        """Look once a second for what no event tells: descriptions closed without unlocking."""
        self._check_holders(self.files.holders())
        self.grants.look(now)
        for file in list(self.files.values()):
            self.settle(file, insist=True)
            self.undecided.decide(file, now)
        if self._host.fileno() < 0:
            self._host.recheck()
            self._heed_neighbours()
        self._host.clean()
        if self.files.leases:
            self.files.leases.tick()

    def alarm(self, now: float) -> None:
        """Do what is due."""
        self.patience.look(now)
        if self.files.leases:
            self.files.leases.runner.look(now)

    def check_file(self, file: File) -> None:
        """Release the locks of those who do not hold this file any more."""
        self._check_holders(file.lock.holders)
        self.settle(file)

    def check_all(self) -> None:
        """Release the locks of those who do not hold any more."""
        for file in self._check_holders(self.files.holders()):
            self.settle(file)

    def close(self) -> None:
        """Remove the proxies: the keeper leaves."""
        self._host.clean(everything=True)

    # Other keepers of this host

    def _heed_neighbours(self) -> None:
        host = self._host
        host.read()
        while host.knocked:
            key = host.knocked.pop()
            file = self.files.get(key)
            if file:
                self._check_holders(list(file.lock.holders))
                self.settle(file)
            host.acknowledge(key, self._describe(file) if file and file.lock.holders else "")
        while host.freed:
            file = self.files.get(host.freed.pop())
            if file:
                self.undecided.retry(file)
                self.settle(file)
        while host.opened:
            key = host.opened.pop()
            if key not in self.files:
                host.close_idle(key)
        while host.answered:
            file = self.files.get(host.answered.pop())
            if file:
                self.undecided.decide(file, float("inf"))
