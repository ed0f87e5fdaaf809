"""The keeper: the background process that holds the emulated locks of this user's programs in one control group.

Started by the shim as ``python -I -S keeper.py DIRECTORY KEY``, with the listening socket as descriptor 3.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Last: what else lies there may have the name of a standard module.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        import _cffi_backend  # noqa: F401  (beside us in most installations, which spares importing site)
    except ImportError:
        import site

        site.main()

import signal

from flockshim import closing, limits, listing, standby
from flockshim.aliveness import keeper_of_path
from flockshim.descriptions import Description
from flockshim.host import Key, key_of_path
from flockshim.journal import Journal
from flockshim.lockservice import LockService
from flockshim.loop import Loop
from flockshim.programs import Connection, Programs
from flockshim.recordfile import Owner
from flockshim.records import RecordService
from flockshim.rendezvous import LISTENER, Rendezvous

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

RESERVE = 32
DEFAULT_IDLE_SECONDS = 10.0
OTHERS_SECONDS = 5.0


class Keeper:
    """One keeper's working process."""

    def __init__(self, directory: str, key: str, journal: Journal, idle_seconds: float) -> None:
        """Take over what the journal names; it is empty in the beginning."""
        held, record_proxies, proxies, predecessors = _take_inventory(directory, journal)
        # Above this, descriptors are for unlocking, and for looking who is alive.
        most = journal.capacity - min(RESERVE, journal.capacity // 4)
        self.idle_seconds = idle_seconds
        self.idle_since = 0.0
        self.loop = Loop()
        self.rendezvous = Rendezvous(directory, key)
        self.service = LockService(self.loop, self.rendezvous, journal, most)
        self.records = RecordService(self.loop, self.rendezvous, journal, self.service)
        self.programs = Programs(
            LISTENER,
            self.loop,
            self.service,
            self.records,
            self.records.knocks.knocked,
            self._write_list,
            most,
        )
        self.service.programs = self.records.programs = self.programs
        self.service.leasing.services.append(self.records)
        self.records.adopt(record_proxies, predecessors)
        self.service.adopt(held, proxies, predecessors)
        if self.rendezvous.inotify >= 0:
            self.loop.watch(self.rendezvous.inotify, self._restore_if_swept)

    def run(self, parent: int) -> None:
        """Serve until process `parent`, the standby, has died. Ends the process when idle for long enough."""
        self.loop.run(parent, self._after, self._tick, self._alarm)
        # Before the process is copied: a copy that is collected as garbage would close what has the number by then.
        if self.service.files.leases:
            self.service.files.leases.runner.end()
        closing.await_others(OTHERS_SECONDS)

    def _after(self) -> None:
        if not self.service.processes.ended:
            return
        ended = list(self.service.processes.ended)
        self.service.processes.ended.clear()
        self.programs.processes_ended([one for one in ended if isinstance(one, Connection)])
        self.service.processes_ended([one for one in ended if isinstance(one, Description)])
        self.records.processes_ended([one for one in ended if isinstance(one, Owner)])

    def _alarm(self, now: float) -> None:
        self.service.alarm(now)
        self.records.waits.patience.look(now)

    def _write_list(self, descriptor: int) -> None:
        """Write who holds and who waits into a file; see `listing`."""
        self.service.check_all()
        self.records.check_all()
        listing.write([*self.service.files.values(), *self.records.files.values()], descriptor)

    def _tick(self, now: float) -> None:
        self._restore_if_swept()
        self.service.tick(now)
        self.records.tick(now)
        leases = self.service.files.leases
        is_used = self.service.files or self.records.files
        if is_used or (leases and not leases.is_idle()) or len(self.programs) or self.programs.active:
            self.idle_since = now
            self.programs.active = False
        elif now - self.idle_since >= self.idle_seconds:
            self.service.close()
            if self.rendezvous.leave():
                os._exit(0)

    def _restore_if_swept(self) -> None:
        """Where somebody has emptied the rendezvous directory, make it again before others begin without us."""
        if not self.rendezvous.is_swept():
            return
        try:
            for _ in self.rendezvous.restore():
                for key in [*self.service.restore_proxies(), *self.records.restore_proxies()]:
                    print(f"the lock on device {key[0]} inode {key[1]} was taken while the directory was away")
            self.programs.listen_again()
        except OSError as error:
            print(f"the rendezvous directory cannot be restored: {error}", flush=True)


def _take_inventory(directory: str, journal: Journal) -> tuple[list[int], list[int], dict[Key, int], dict[str, int]]:
    """Close every descriptor that is neither a held lock nor a proxy; waiting programs then ask again."""
    held, record_proxies, proxies, predecessors, others = [], [], {}, {}, []
    opened = list(_open_descriptors(journal.capacity))
    # Of owners of record locks, by which they have locked.
    kept = {entry[1] for entry in map(journal.read_records, opened) if entry}
    # As the kernel shows it in the links of /proc/self/fd.
    directory = os.path.realpath(directory)
    for descriptor in opened:
        if descriptor <= LISTENER:
            continue
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue
        key = key_of_path(path, directory)
        keeper = keeper_of_path(path, directory)
        if journal.read(descriptor):
            held.append(descriptor)
        elif journal.read_records(descriptor):
            record_proxies.append(descriptor)
        elif descriptor in kept:
            continue
        elif key:
            proxies[key] = descriptor
        elif keeper:
            predecessors[keeper] = descriptor
        else:
            others.append(descriptor)
    if predecessors:
        closing.in_background()
    for descriptor in others:
        closing.close(descriptor)
    return held, record_proxies, proxies, predecessors


def _open_descriptors(capacity: int) -> Iterable[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        # None is left for listing them.
        return range(capacity)


def _ignore_signals() -> None:
    """Batch systems signal all processes of a job, for the programs, which may need their locks for cleaning up."""
    faults = ("SEGV", "BUS", "FPE", "ILL", "ABRT", "TRAP", "SYS")
    kept = {signal.Signals["SIG" + name] for name in (*faults, "KILL", "STOP", "CHLD")}
    for number in signal.valid_signals() - kept:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(standby.ORPHANED, lambda *_: None)


def main() -> None:
    """Run as a keeper: see the module."""
    directory, key = sys.argv[1:3]
    os.umask(0o077)
    _ignore_signals()
    journal = Journal(limits.raise_to_hard())
    idle_seconds = float(os.environ.get("FLOCKSHIM_IDLE") or DEFAULT_IDLE_SECONDS)
    parent = standby.split(first=True)
    while True:
        Keeper(directory, key, journal, idle_seconds).run(parent)
        parent = standby.split(first=False)


if __name__ == "__main__":
    main()
