"""What a lock service does about leases: asks for them, and does what follows from what becomes of them."""

from __future__ import annotations

import errno
import os
import signal
import time

from flockshim import closing, holders, holding_programs
from flockshim._native import lib
from flockshim.aliveness import Aliveness
from flockshim.cluster_notes import Program
from flockshim.cluster_vouch import DEFAULT_LEASE
from flockshim.lease_files import Told
from flockshim.recordleases import RecordLeases

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from flockshim.descriptions import Description
    from flockshim.files import File
    from flockshim.host import Key
    from flockshim.lockservice import LockService
    from flockshim.loop import Loop
    from flockshim.programs import Connection
    from flockshim.recordfile import Owner, RecordFile
    from flockshim.records import RecordService

LEASE_SECONDS = float(os.environ.get("FLOCKSHIM_LEASE") or DEFAULT_LEASE)


def _path(description: Description | Owner) -> str:
    return os.readlink(f"/proc/self/fd/{description.descriptor}")


def cannot_lease(error: OSError) -> str:
    """Return the line that says why there can be no lease, and what to do."""
    return f"no lease can be recorded beside the file: {error.strerror}: {error.filename}; use --mode host"


class Leasing(Told):
    """What a lock service does about leases."""

    def __init__(self, service: LockService, loop: Loop, directory: str) -> None:
        """Serve its files; `directory` is the rendezvous directory. Nothing is made before a lease is needed."""
        self._service = service
        self._loop = loop
        self._directory = directory
        # Those whose files these are, by different keys: of flock(2), and of record locks.
        self.services: list[LockService | RecordService] = [service]
        # Who was stopped, by file.
        self._stopped: dict[Key, set[int]] = {}

    def _find(self, key: Key) -> tuple[Any, Any]:
        """Return the file of a key, or None, and who serves it."""
        for service in self.services:
            file = service.files.get(key)
            if file is not None:
                return file, service
        return None, self._service

    def need(self, connection: Connection, file: File | RecordFile, owner: Description | Owner) -> bool:
        """Have the file's lock recorded for other hosts. Where that cannot be, refuse the program and return False."""
        description, service = owner, self._find(file.key)[1]
        description.only_warn = bool(connection.flags & lib.FLAG_ONLY_WARN)
        try:
            self._leases({}).need(file.key, _path(description))
            file.leased = True
            self._check_namesakes(file.key)
            return True
        except OSError as error:
            service.forget_if_unused(file, description)
            service.settle(file)
            connection.refuse(cannot_lease(error))
            return False

    def _check_namesakes(self, key: Key) -> None:
        """A file that was locked, closed and removed may stand in the way of a new one of its name."""
        leases = self._service.files.leases
        for other in leases.namesakes(key) if leases else ():
            file, service = self._find(other)
            if file is not None:
                service.check_file(file)

    def answer_unlocked(self, file: File | RecordFile) -> None:
        """Answer those who have unlocked, unless the lease is still to be given back."""
        leases = self._service.files.leases
        if file.unlocking and not (leases and leases.is_giving_back(file.key)):
            unlocking, file.unlocking = file.unlocking, []
            for connection in unlocking:
                connection.answer(0)

    def adopt(self, file: File | RecordFile, predecessors: dict[str, int]) -> None:
        """Take over the lease of a file that is locked; `predecessors` as of `Leases`."""
        owners: dict[Any, bool] = file.lock.holders
        file.leased = True
        self._leases(predecessors).adopt(file.key, _path(next(iter(owners))), any(owners.values()))

    def _leases(self, predecessors: dict[str, int]) -> RecordLeases:
        if self._service.files.leases is None:
            closing.in_background()
            aliveness = Aliveness(self._directory)
            self._service.files.leases = RecordLeases(self._loop, aliveness, LEASE_SECONDS, self, predecessors)
        return self._service.files.leases

    def programs(self, key: Key) -> list[Program]:
        """Return the programs that hold the lock or wait for it."""
        file, _ = self._find(key)
        if file is None:
            return []
        began = time.time() - time.monotonic()
        held = [(one.pid, exclusive, False, one.since) for one, exclusive in file.lock.holders.items()]
        waiting = [(one.context.pid, one.exclusive, True, began + one.since) for one in file.lock.queue]
        return [Program(pid, holders.command_of(pid), *more) for pid, *more in held + waiting]

    def place(self, key: Key) -> tuple[int, str]:
        """Return a descriptor of the file, and its path. Raises OSError where nobody needs it any more."""
        file, _ = self._find(key)
        description = file.any() if file else None
        if description is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), f"device {key[0]} inode {key[1]}")
        return description.descriptor, _path(description)

    def is_held(self, key: Key) -> bool:
        """Return whether any program holds the lock."""
        file, _ = self._find(key)
        return file is not None and bool(file.lock.holders)

    def changed(self, key: Key) -> None:
        """Serve those who could not be served without the lease."""
        file, service = self._find(key)
        leases = self._service.files.leases
        assert leases
        if file is None:
            leases.give_back(key)
            return
        if leases.is_refused(key):
            service.undecided.refused_by_hosts(file)
        else:
            service.undecided.retry(file)
        service.settle(file)
        self.answer_unlocked(file)

    def failed(self, key: Key, error: OSError) -> None:
        """Refuse all who want it."""
        file, service = self._find(key)
        if file is None:
            assert self._service.files.leases
            self._service.files.leases.give_back(key)
            return
        text = cannot_lease(error)
        service.undecided.refuse(file, text)
        while file.lock.queue:
            service.refuse_first(file, text)
        service.settle(file)
        self.answer_unlocked(file)

    def doubted(self, key: Key) -> None:
        """Stop those who hold; again as long as the doubt lasts, since they may have been continued, or have forked."""
        file, _ = self._find(key)
        if file:
            stopped = self._stopped.setdefault(key, set())

            def begin(found: set[int]) -> None:
                stopped.update(found)
                self._entrust()

            holding_programs.stop(file.lock.holders, begin)

    def trusted(self, key: Key) -> None:
        """Let them go on."""
        if key not in self._stopped:
            return
        holding_programs.send(self._stopped.pop(key), signal.SIGCONT)
        self._entrust()

    def lost(self, key: Key) -> None:
        """End those who hold, or warn them, as they have asked for."""
        file, service = self._find(key)
        stopped = self._stopped.pop(key, set())
        if file:
            for description in list(file.lock.holders):
                pids = holding_programs.stop([description])
                line = f"the lock on {_path(description)} was lost: another host has it now, or its record was removed"
                if description.only_warn:
                    holding_programs.warn(pids, f"{line} (--on-lost warn)")
                    stopped |= pids
                else:
                    holding_programs.kill(pids, f"{line}: killed (--on-lost)")
                    stopped -= pids
                service.release(file, description)
        holding_programs.send(stopped, signal.SIGCONT)
        self._entrust()

    def _entrust(self) -> None:
        leases = self._service.files.leases
        if leases:
            leases.runner.entrust(sorted(set().union(*self._stopped.values())))
