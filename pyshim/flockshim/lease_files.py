"""What a keeper knows of each lease, and of each directory in which it has some."""

from __future__ import annotations

import os
import time

from flockshim import cluster_notes
from flockshim.cluster_names import RECORDS
from flockshim.cluster_vouch import Judge, Voucher
from flockshim.lease_worker import former_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from flockshim.cluster import Lease
    from flockshim.cluster_notes import Program
    from flockshim.host import Key
    from flockshim.lease_runner import Run
    from flockshim.lease_worker import Place


def clock() -> float:
    """Return the seconds of CLOCK_BOOTTIME, which goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Directory:
    """What the leases of one directory share."""

    def __init__(
        self, place: Place, keeper: str, seconds: float, is_dead: Callable[[str], bool | None], told: Told
    ) -> None:
        """`seconds` is the lease time."""
        self.place = place
        self._told = told
        self.voucher = Voucher(keeper, seconds, clock, self._note)
        self.judge = Judge(seconds, clock, is_dead)
        self.leases: set[FileLease] = set()
        self.has_file = False
        # Something is under way there that is nobody's lock.
        self.busy = False
        # When to look next for vouching files of the dead; None: that is done.
        self.sweep_at: float | None = 0.0

    def _note(self) -> str:
        programs = {lease.target: self._told.programs(lease.key) for lease in self.leases}
        used = {name: some for name, some in programs.items() if some}
        return cluster_notes.text(os.urandom(8).hex(), os.uname().nodename, used)


class FileLease:
    """The lease of one file."""

    __slots__ = (
        "asked",
        "busy",
        "closing",
        "contended",
        "directory",
        "giving",
        "hand_overs",
        "holder",
        "key",
        "lease",
        "mode",
        "name",
        "named",
        "path",
        "run",
        "shared_first",
        "since",
        "suffix",
        "tries",
        "unconverted",
        "version",
        "wanted",
    )

    def __init__(self, key: Key, path: str, directory: Directory, protocol: Callable[[Directory, str], Lease]) -> None:
        """Hold nothing. Raises OSError where the name is too long."""
        self.key = key
        self.path = path
        # The one in the directory that the record goes by.
        self.name = former_name(os.path.basename(path))
        self.suffix = RECORDS if len(key) > 2 else ""
        # Whether there is to be a record: what has no name any more no other host can open. None: not known yet.
        self.named: bool | None = None
        self.directory = directory
        self.lease = protocol(directory, self.target)
        # What is held, and what is wanted: exclusive or not; None: nothing.
        self.mode: bool | None = None
        self.wanted: bool | None = None
        self.busy = False
        # It is being given back, or perhaps.
        self.giving = False
        # Others hold as well, so that it could not be made exclusive when that was asked for last.
        self.unconverted = False
        # An exclusive one was waited for, while somebody could have had a shared one at once.
        self.shared_first = False
        # How often its directory was not the one that we had thought, since somebody asked.
        self.tries = 0
        # The asking that is under way.
        self.run: Run | None = None
        # Somebody else was seen to hold since we began to ask.
        self.contended = False
        # Who holds on another host, for people, and by which version; since when that is asked.
        self.holder: str | None = None
        self.version = -1
        self.asked = clock()
        # How often it was passed on in this host; and that somebody elsewhere waits, so readers may not join for ever.
        self.hand_overs = 0
        self.closing = False
        self.since = clock()

    @property
    def target(self) -> str:
        """What the record goes by: record locks have one of their own."""
        return self.name + self.suffix


class Told:
    """What is told of a file's lease, and asked about it."""

    def programs(self, key: Key) -> list[Program]:
        """Return the programs that hold the lock or wait for it."""
        raise NotImplementedError

    def place(self, key: Key) -> tuple[int, str]:
        """Return a descriptor of the file, and its path. Raises OSError where nobody needs it any more."""
        raise NotImplementedError

    def is_held(self, key: Key) -> bool:
        """Return whether any program holds the lock."""
        raise NotImplementedError

    def changed(self, key: Key) -> None:
        """It was had, given back, or found to be held by others."""
        raise NotImplementedError

    def failed(self, key: Key, error: OSError) -> None:
        """It cannot be had."""
        raise NotImplementedError

    def doubted(self, key: Key) -> None:
        """Others may soon think us dead: nobody may go on before `trusted`."""
        raise NotImplementedError

    def trusted(self, key: Key) -> None:
        """It is ours, and was all the time."""
        raise NotImplementedError

    def lost(self, key: Key) -> None:
        """Others have thought us dead, and have it."""
        raise NotImplementedError
