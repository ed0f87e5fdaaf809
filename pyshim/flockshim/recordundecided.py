"""Requests about record locks that cannot be answered yet: it is not known what others make of them."""

from __future__ import annotations

import contextlib
import errno
import time

from flockshim._native import lib
from flockshim.locktable import GRANTED
from flockshim.recordtable import Range
from flockshim.undecided import UNDECIDED_SECONDS, cannot_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flockshim.neighbours import Knock
    from flockshim.programs import Connection
    from flockshim.recordfile import Owner, RecordFile
    from flockshim.records import RecordService

# What is known of a lock on another host: a lease is for the whole file.
ON_ANOTHER_HOST = Range(0, lib.RECORD_END, True)
NO_PID = -1


class _Request:
    """One of F_SETLK, or, if `is_test`, of F_GETLK."""

    __slots__ = ("connection", "is_test", "knock", "limit", "owner", "wanted")

    def __init__(self, connection: Connection, owner: Owner, wanted: Range, is_test: bool) -> None:
        self.connection = connection
        self.owner = owner
        self.wanted = wanted
        self.is_test = is_test
        self.limit = time.monotonic() + UNDECIDED_SECONDS
        self.knock: Knock | None = None


class RecordUndecided:
    """Those of a record service."""

    def __init__(self, service: RecordService) -> None:
        """Serve its files."""
        self._service = service

    def add(self, file: RecordFile, connection: Connection, owner: Owner, wanted: Range, is_test: bool) -> None:
        """Answer as soon as that can be done; call `retry`."""
        owner.waits += 1
        file.undecided.append(_Request(connection, owner, wanted, is_test))

    def retry(self, file: RecordFile) -> None:
        """Answer those that can be answered now."""
        undecided, file.undecided = file.undecided, []
        for request in undecided:
            decide = self._test if request.is_test else self._lock
            try:
                if not decide(file, request):
                    file.undecided.append(request)
            except OSError as error:
                self._end(file, request)
                request.connection.refuse(cannot_lock(error))

    def decide(self, file: RecordFile, now: float) -> None:
        """Refuse those whose time is up: whoever should answer is stopped, or another host holds."""
        undecided, file.undecided = file.undecided, []
        for request in undecided:
            if request.limit > now:
                file.undecided.append(request)
            elif request.is_test:
                here = None
                with contextlib.suppress(OSError):
                    here = file.found_elsewhere(request.owner, request.wanted)
                self._found(file, request, here or ON_ANOTHER_HOST, NO_PID)
            else:
                self._refuse(file, request)

    def refused_by_hosts(self, file: RecordFile) -> None:
        """Refuse those that another host's lease forbids, and see about the others."""
        undecided, file.undecided = file.undecided, []
        for request in undecided:
            if not self._service.is_refused_by_hosts(file, request.wanted.exclusive and not request.is_test):
                file.undecided.append(request)
            elif request.is_test:
                self._found(file, request, ON_ANOTHER_HOST, NO_PID)
            else:
                self._refuse(file, request)
        self.retry(file)

    def refuse(self, file: RecordFile, text: str) -> None:
        """Say of all why no protection can be given."""
        undecided, file.undecided = file.undecided, []
        for request in undecided:
            self._end(file, request)
            request.connection.refuse(text)

    def _lock(self, file: RecordFile, request: _Request) -> bool:
        service, owner, wanted = self._service, request.owner, request.wanted
        before = file.snapshot(owner, wanted)
        file.waits, file.hurries = False, True
        if file.request(owner, wanted, False, request.connection, before) == GRANTED:
            service.granted(file, request.connection, owner, wanted, before)
            self._end(file, request)
            return True
        if service.is_refused(file, owner, wanted):
            self._refuse(file, request)
            return True
        if service.is_refused_by_hosts(file, wanted.exclusive) or (
            file.is_refused_elsewhere and self._have_answered(file, request)
        ):
            self._refuse(file, request)
            return True
        return False

    def _test(self, file: RecordFile, request: _Request) -> bool:
        """A shared lease tells that nobody elsewhere has anything exclusive, which is what SQLite asks.

        Of readers on other hosts we say nothing: else it took the journal of a writer that has died for a living one's.
        """
        service, owner, wanted = self._service, request.owner, request.wanted
        file.waits, file.asking, file.hurries = False, owner, True
        found = next(file.lock.conflicts(owner, wanted), None)
        if found and not service.is_refused(file, owner, wanted):
            # A grant is under way, after which the one found may have less.
            return False
        if found:
            self._found(file, request, found[1], found[0].shown_pid)
            return True
        if not service.permit_lease(file, wanted._replace(exclusive=False)):
            if service.is_refused_by_hosts(file, False):
                self._found(file, request, ON_ANOTHER_HOST, NO_PID)
                return True
            return False
        elsewhere = file.found_elsewhere(owner, wanted)
        if elsewhere is None:
            self._end(file, request)
            request.connection.answer(0)
        elif self._have_answered(file, request):
            assert request.knock
            self._found(file, request, *(request.knock.found or (elsewhere, NO_PID)))
        else:
            return False
        return True

    def _have_answered(self, file: RecordFile, request: _Request) -> bool:
        """Have the other keepers look whether their holders are alive, and return whether they have."""
        if request.knock is None:
            request.knock = self._service.knocks.ask(file, request.wanted, lambda: self._answered(file))
        return request.knock.is_answered

    def _answered(self, file: RecordFile) -> None:
        self.retry(file)
        self._service.settle(file)

    def _found(self, file: RecordFile, request: _Request, held: Range, pid: int) -> None:
        self._end(file, request)
        request.connection.answer_found(held, pid, "")

    def _refuse(self, file: RecordFile, request: _Request) -> None:
        self._end(file, request)
        request.connection.answer(errno.EAGAIN)

    def _end(self, file: RecordFile, request: _Request) -> None:
        if request.knock:
            request.knock.end()
        request.owner.waits -= 1
        self._service.forget_if_unused(file, request.owner)
