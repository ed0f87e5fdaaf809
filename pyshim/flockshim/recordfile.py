"""The owners of one file's record locks, and the kernel's locks on a proxy file that stand for theirs.

Every owner has an open file description of the proxy, and on it the kernel's lock (fcntl(2), F_OFD_SETLK, Linux 3.15)
on just the bytes that the owner has locked in the file. So the kernel decides between the keepers of the host, to the
byte, and keeps all that is held when a keeper's working process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time

from flockshim import closing
from flockshim._native import ffi, lib
from flockshim.descriptions import Description, closed
from flockshim.recordtable import Range, RecordLock, RecordWaiter, clipped, gaps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from flockshim.host import Key
    from flockshim.journal import Journal
    from flockshim.neighbours import Knock
    from flockshim.programs import Connection

_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
UNLOCK, SHARED, EXCLUSIVE = fcntl.LOCK_UN, fcntl.LOCK_SH, fcntl.LOCK_EX
RECORDS = 1
"""The third member of the key of a file's record locks, which are independent of those of flock(2)."""
EVERYTHING = Range(0, lib.RECORD_END, True)


def operation_of(exclusive: bool | None) -> int:
    """Return the operation of flock(2) that stands for a kind of lock, or for none."""
    return UNLOCK if exclusive is None else EXCLUSIVE if exclusive else SHARED


class Owner:
    """A process or an open file description that owns record locks of a file, or wants to.

    `places` are the descriptors by which it has locked: of a description one, by its duplicate; of a process those
    that it has used. A process loses all of its locks of the file when it closes one of them, fcntl(2).
    """

    __slots__ = (
        "answers",
        "is_process",
        "key",
        "only_warn",
        "pid",
        "places",
        "proxy",
        "since",
        "taker",
        "waits",
    )

    def __init__(self, key: Key, place: Description, is_process: bool) -> None:
        """Own nothing yet."""
        self.key = key
        self.places = [place]
        self.is_process = is_process
        self.pid = place.pid
        self.proxy = -1
        self.waits = 0
        # How many calls were told that they have a lock.
        self.answers = 0
        # Since when something is held (seconds since the epoch), and the process that took it.
        self.since = 0.0
        self.taker = 0
        self.only_warn = False

    @property
    def descriptor(self) -> int:
        """A duplicate of a descriptor of the file."""
        return self.places[-1].descriptor

    @property
    def shown_pid(self) -> int:
        """The process as F_GETLK tells it."""
        return self.pid if self.is_process else -1

    def identity(self) -> Any:
        """Return what is the same for the owners of several files that are one process."""
        return self.pid if self.is_process else self

    def place_of(self, descriptor: int, number: int) -> Description:
        """Return the place that this descriptor is, a new one if need be; `descriptor` is our duplicate of it."""
        for place in self.places:
            if place.number == number and lib.native_same_description(place.descriptor, descriptor) == 1:
                closing.close(descriptor)
                return place
        self.places.append(Description(descriptor, self.key, self.pid, number))
        return self.places[-1]

    def has_closed(self) -> bool:
        """Return whether the process has closed a descriptor by which it has locked, or has ended."""
        return any(place.was_closed() for place in self.places)

    def close_places(self) -> None:
        """Close the duplicates."""
        for place in self.places:
            closing.close(place.descriptor)


def without_owner(owners: Iterable[Owner]) -> list[Owner]:
    """Return those whose locks have ended: see `Owner.has_closed`; or the description is open nowhere any more."""
    owners = list(owners)
    processes = [owner for owner in owners if owner.is_process and owner.has_closed()]
    descriptions = {owner.places[0]: owner for owner in owners if not owner.is_process}
    ended = [descriptions[description] for description in closed(descriptions)]
    for description, owner in descriptions.items():
        owner.pid = description.pid
    return processes + ended


class RecordFile:
    """One file, its record locks and their owners."""

    def __init__(
        self, key: Key, directory: str, journal: Journal, permit_lease: Callable[[RecordFile, Range], bool]
    ) -> None:
        """Begin with none. `directory` is the rendezvous directory; `permit_lease` stands for other hosts."""
        self.key = key
        self.owners: set[Owner] = set()
        self.lock = RecordLock(self._permit)
        self.leased = False
        # Requests that cannot be answered yet: see RecordService.
        self.undecided: list[Any] = []
        self.unlocking: list[Connection] = []
        # Other keepers that wait for a change, and our own waiting for one of theirs.
        self.subscribers: list[Connection] = []
        self.knock: Knock | None = None
        self.is_changed = False
        self.idle_since = 0.0
        # What was said of a proxy that could not be made again.
        self.lost = ""
        # Whether a request may wait for the lease; and whether another keeper's lock has forbidden the last one.
        self.waits = False
        # Whether it joins those who hold though others wait.
        self.hurries = False
        self.is_refused_elsewhere = False
        # Who asks.
        self.asking: Owner | None = None
        self._permit_lease = permit_lease
        self._directory = directory
        self._journal = journal
        self._spare = -1

    @property
    def path(self) -> str:
        """Where the proxy is."""
        return record_path(self._directory, self.key)

    def any(self) -> Owner | None:
        """Return one of the owners."""
        return next(iter(self.owners), None)

    def is_shared(self) -> bool:
        """Return whether there is a proxy, so that other keepers may have locks of this file."""
        return self._spare >= 0 or bool(self.owners) or os.path.exists(self.path)

    # Owners

    def find(self, descriptor: int, is_process: bool, pid: int) -> Owner | None:
        """Return the owner that this process is, or the description that `descriptor` is a duplicate of."""
        for owner in self.owners:
            if owner.is_process == is_process and (
                owner.pid == pid
                if is_process
                else lib.native_same_description(descriptor, owner.places[0].descriptor) == 1
            ):
                return owner
        return None

    def forget(self, owner: Owner) -> None:
        """Close what an owner has open that neither holds nor waits."""
        if owner not in self.owners:
            return
        self.owners.remove(owner)
        if owner.proxy >= 0:
            self._journal.clear(owner.proxy)
            if self._spare < 0:
                self._spare = owner.proxy
            else:
                os.close(owner.proxy)
            owner.proxy = -1
        owner.close_places()

    # What is held

    def request(self, owner: Owner, wanted: Range, blocking: bool, connection: Connection, before: list[Range]) -> int:
        """Ask for a range: see `RecordLock.request`. A supervisor's program may not learn of a grant.

        `before` is what the owner holds of it: see `snapshot`.
        """
        self._begin(owner)
        firm = not connection.is_supervised
        self.is_changed |= firm and not wanted.exclusive and any(held.exclusive for held in before)
        return self.lock.request(owner, wanted, blocking, connection, time.monotonic(), firm)

    def serve(self, waiter: RecordWaiter) -> bool:
        """Grant a request that waits, if that is possible now, and return whether it was."""
        self._begin(waiter.owner)
        return self.lock.serve(waiter)

    def _begin(self, owner: Owner) -> None:
        self.is_refused_elsewhere = False
        self.asking = owner
        if owner not in self.lock.ranges:
            owner.since, owner.taker = time.time(), owner.pid

    def snapshot(self, owner: Owner, wanted: Range) -> list[Range]:
        """Return what an owner holds of these bytes."""
        return clipped(self.lock.ranges.get(owner, ()), wanted)

    def restore(self, owner: Owner, window: Range, before: list[Range]) -> None:
        """Give an owner what it held in the window before, and at no moment less."""
        for held in clipped(before, window):
            self.set(owner, *held)
        for gap in gaps(before, window):
            self.set(owner, gap.first, gap.last, None)

    def queue_or_undecided(self) -> bool:
        """Return whether any request has not been answered."""
        return bool(self.lock.queue or self.undecided)

    def is_quiet(self) -> bool:
        """Return whether nobody cares who else has locks."""
        return not (self.lock.queue or self.undecided or self.subscribers or self.knock)

    def unsubscribe(self) -> None:
        """Hear no more of other keepers' changes."""
        if self.knock:
            self.knock.end()
        self.knock = None

    def is_unused(self) -> bool:
        """Return whether nobody needs it."""
        return not (self.owners or self.unlocking or self.subscribers)

    def _permit(self, owner: Owner, wanted: Range, parts: list[Range]) -> bool:
        """Have the kernel's locks: of other keepers of this host one may be in the way."""
        if not self._permit_lease(self, wanted):
            return False
        had: list[Range] = []
        try:
            while len(had) < len(parts) and self._lock_proxy(owner, parts[len(had)]):
                had.append(parts[len(had)])
        finally:
            if len(had) < len(parts):
                # What has more than one part was not locked at all there.
                for part in had:
                    lib.native_lock_record(owner.proxy, UNLOCK, part.first, part.last)
        return len(had) == len(parts)

    def _lock_proxy(self, owner: Owner, wanted: Range) -> bool:
        while True:
            if owner.proxy < 0:
                self._open(owner)
            result = lib.native_lock_record(owner.proxy, operation_of(wanted.exclusive), wanted.first, wanted.last)
            if result >= 0:
                self.is_refused_elsewhere = not result
                return bool(result)
            if result != -errno.ENOENT:
                raise OSError(-result, os.strerror(-result), self.path)
            self._renew_proxy(owner)

    def set(self, owner: Owner, first: int, last: int, exclusive: bool | None) -> None:
        """Unlock, or lock what is known to be free."""
        self.lock.set(owner, first, last, exclusive)
        self.is_changed = True
        if owner.proxy >= 0:
            result = lib.native_lock_record(owner.proxy, operation_of(exclusive), first, last)
            if result not in (1, -errno.ENOENT):
                # Out of memory, say: then others see more than is held, which is the safe side.
                print(f"a proxy cannot be unlocked: {os.strerror(-result)}: {self.path}", flush=True)

    def drop(self, owner: Owner) -> None:
        """Take all away from an owner."""
        if owner in self.lock.ranges:
            self.set(owner, 0, lib.RECORD_END, None)

    def note(self, owner: Owner) -> None:
        """Record for a successor of this keeper's working process what the proxy's descriptor means."""
        kept = owner.places[-1]
        self._journal.note_records(
            owner.proxy, owner.is_process, kept.descriptor, self.key, kept.pid, kept.number, owner.since, self.leased
        )

    def move(self, owner: Owner) -> None:
        """The same, after its places have changed; before the former ones are closed."""
        if owner.proxy >= 0:
            kept = owner.places[-1]
            self._journal.move_records(owner.proxy, kept.descriptor, kept.pid, kept.number)

    def keep_open_places(self, owner: Owner) -> None:
        """Forget an owner's descriptors that were closed, though not the last."""
        before = owner.places
        owner.places = [one for one in before if not one.was_closed()] or before[-1:]
        self.move(owner)
        for place in before:
            if place not in owner.places:
                closing.close(place.descriptor)

    def found_elsewhere(self, owner: Owner, wanted: Range) -> Range | None:
        """Return a lock of another keeper's that is in the way. Raises OSError."""
        descriptor, is_own = owner.proxy, owner.proxy >= 0
        if not is_own:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
        found = ffi.new("struct native_range *", {"first": wanted.first, "last": wanted.last})
        result = lib.native_test_record(descriptor, operation_of(wanted.exclusive), found)
        if not is_own:
            os.close(descriptor)
        return Range(found.first, found.last, bool(found.exclusive)) if result == 1 else None

    def is_swept(self) -> bool:
        """Return whether somebody has removed the proxy of what is held."""
        return any(os.fstat(owner.proxy).st_nlink == 0 for owner in self.lock.ranges)

    def restore_proxies(self) -> bool:
        """Lock a proxy again that was removed. Returns whether all could be locked. Raises OSError."""
        self._close_spare()
        swept = [owner for owner in self.lock.ranges if os.fstat(owner.proxy).st_nlink == 0]
        return all([self._renew_proxy(owner) for owner in swept])

    def close(self) -> None:
        """Remove the proxy unless others need it: nobody here does."""
        if self._spare < 0:
            return
        if lib.native_lock_record(self._spare, EXCLUSIVE, 0, lib.RECORD_END) == 1:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        self._close_spare()

    def _close_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
        self._spare = -1

    def _open(self, owner: Owner) -> None:
        owner.proxy, self._spare = self._spare, -1
        if owner.proxy < 0:
            owner.proxy = os.open(self.path, _OPEN, 0o600)
        # Where other keepers see it, proc(5).
        os.lseek(owner.proxy, owner.pid if owner.is_process else 0, os.SEEK_SET)
        self.note(owner)

    def _renew_proxy(self, owner: Owner) -> bool:
        """Lock in a new one what was locked in one that somebody has removed. Returns whether all could be.

        Raises OSError where there can be none; then the old one stays, for who has it open.
        """
        removed, owner.proxy = owner.proxy, -1
        try:
            self._open(owner)
        except OSError:
            owner.proxy = removed
            raise
        held = self.lock.ranges.get(owner, ())
        results = [
            lib.native_lock_record(owner.proxy, operation_of(one.exclusive), one.first, one.last) for one in held
        ]
        self._journal.clear(removed)
        os.close(removed)
        return all(result == 1 for result in results)


def record_path(directory: str, key: Key) -> str:
    """Return the path of the proxy of a file's record locks."""
    return f"{directory}/r-{key[0]:x}-{key[1]:x}"


def held_by(descriptor: int) -> list[Range]:
    """Return what the kernel says that a proxy's description has locked: proc(5), fdinfo."""
    with open(f"/proc/self/fdinfo/{descriptor}") as file:
        lines = [line.split() for line in file if line.startswith("lock:") and "OFDLCK" in line]
    # lock: NUMBER: OFDLCK ADVISORY KIND PID DEVICE FIRST LAST
    return [
        Range(int(first), lib.RECORD_END if last == "EOF" else int(last), kind == "WRITE")
        for *_, kind, _, _, first, last in lines
    ]
