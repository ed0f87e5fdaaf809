"""What becomes of the locks when their leases change."""

from __future__ import annotations

import os
import signal

from flockshim import holding_programs
from flockshim.leases import Told

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flockshim.files import File
    from flockshim.host import Key
    from flockshim.lockservice import LockService


def cannot_lease(error: OSError) -> str:
    """Return the line that says why there can be no lease, and what to do."""
    return f"no lease can be recorded beside the file: {error.strerror}: {error.filename}; use --mode host"


class LeaseNews(Told):
    """Tells a lock service."""

    def __init__(self, service: LockService) -> None:
        """Serve its files."""
        self._service = service
        # Who was stopped, by file.
        self._stopped: dict[Key, list[int]] = {}

    def changed(self, key: Key) -> None:
        """Serve those who could not be served without the lease."""
        service = self._service
        file = service.files.get(key)
        leases = service.files.leases
        assert leases
        if file is None:
            leases.give_back(key)
            return
        service.retry_undecided(file)
        if leases.is_refused(key):
            service.decide(file, float("inf"))
        service.settle(file)
        service.answer_unlocked(file)

    def failed(self, key: Key, error: OSError) -> None:
        """Refuse all who want it."""
        service = self._service
        file = service.files.get(key)
        if file is None:
            return
        text = cannot_lease(error)
        undecided, file.undecided = file.undecided, []
        for connection, description, _, _ in undecided:
            description.waits -= 1
            service.forget_if_unused(file, description)
            connection.refuse(text)
        while file.lock.queue:
            service.refuse_first(file, text)
        service.settle(file)
        service.answer_unlocked(file)

    def doubted(self, key: Key) -> None:
        """Stop those who hold."""
        file = self._service.files.get(key)
        if file and key not in self._stopped:
            self._stopped[key] = holding_programs.find(file.lock.holders)
            holding_programs.send(self._stopped[key], signal.SIGSTOP)

    def trusted(self, key: Key) -> None:
        """Let them go on."""
        holding_programs.send(self._stopped.pop(key, ()), signal.SIGCONT)

    def lost(self, key: Key) -> None:
        """End those who hold, or warn them, as they have asked for."""
        file = self._service.files.get(key)
        stopped = self._stopped.pop(key, [])
        if file:
            for description in list(file.lock.holders):
                pids = holding_programs.find([description])
                path = os.readlink(f"/proc/self/fd/{description.descriptor}")
                line = f"the lock on {path} was lost: another host thought this one dead, and has it now"
                if description.only_warn:
                    holding_programs.tell(pids, f"{line} (--on-lost warn)")
                else:
                    holding_programs.tell(pids, f"{line}: killed (--on-lost)")
                    holding_programs.send(pids, signal.SIGKILL)
                self._drop(file, description)
        holding_programs.send(stopped, signal.SIGCONT)

    def _drop(self, file: File, description: object) -> None:
        file.lock.release(description)
        self._service.forget_if_unused(file, description)  # type: ignore[arg-type]
