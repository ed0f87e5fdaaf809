"""Leases behind record locks: one for all of a file's, changed in place as its programs lock more or less."""

from __future__ import annotations

import time

from flockshim.lease_files import clock
from flockshim.lease_runner import WorkerLostError
from flockshim.leases import LONGEST_POLL, Leases

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flockshim.host import Key
    from flockshim.lease_files import FileLease


class RecordLeases(Leases):
    """All of one keeper's."""

    def permit_records(self, key: Key, exclusive: bool, blocking: bool, held: bool, holds: bool, hurries: bool) -> bool:
        """Return whether a record lock of this mode may be held now; if not, the lease is asked for, or for more of it.

        `held`: there are record locks on the file already, which are not given up for that, and `holds`: the asking
        owner has one. Who `hurries` does not wait for those who wait, on other hosts or for more on this one.
        """
        if key not in self._files:
            self.need(key, self._told.place(key)[1])
        lease = self._files[key]
        if lease.busy:
            if hurries and not exclusive and lease.wanted and lease.run and lease.contended:
                lease.shared_first, lease.contended = True, False
                lease.run.cancel()
            return False
        if lease.shared_first and exclusive and not lease.mode:
            return False
        if lease.mode is not None and lease.named is False:
            lease.mode |= exclusive
        suffices = lease.mode is not None and (lease.mode or not exclusive)
        if suffices and lease.named and not lease.lease.still_mine(clock()):
            self._confirm(lease, lease.lease.confirm)
        elif suffices and (holds or (held and hurries) or not lease.closing):
            lease.hand_overs += 1
            return True
        elif held and lease.mode is not None:
            if not suffices:
                self._upgrade(lease, blocking)
        else:
            lease.wanted = exclusive
            self._advance(lease, blocking)
        return False

    def end_of_turns(self, key: Key) -> None:
        """Those who wait have all asked: whoever wants more than a shared lease may ask for that the next time."""
        lease = self._files.get(key)
        if lease and not lease.busy:
            lease.shared_first = False

    def _upgrade(self, lease: FileLease, blocking: bool) -> None:
        # Whoever waits looks once a second; whoever does not may have been told already, and asks no more.
        if not lease.unconverted or (blocking and clock() - lease.asked >= LONGEST_POLL):
            self._convert(lease, True)

    def _convert(self, lease: FileLease, exclusive: bool) -> None:
        lease.busy = True
        lease.unconverted = False
        lease.asked = clock()
        # It may be done though it fails.
        lease.mode = False

        def ended(done: bool | None, error: Exception | None) -> None:
            lease.busy = False
            lease.since = clock()
            if done:
                lease.mode = exclusive
            elif exclusive:
                lease.unconverted = error is None
            else:
                self.runner.at(time.monotonic() + 1.0, lambda: self._relax_again(lease))
            if lease.lease.still_mine(clock()):
                self._told.trusted(lease.key)
            elif self._told.is_held(lease.key):
                self._confirm(lease, lease.lease.confirm)
            if exclusive and isinstance(error, OSError) and not isinstance(error, WorkerLostError):
                self._told.failed(lease.key, error)
            else:
                self._told.changed(lease.key)

        self.runner.run(lease.directory, self._holding(lease, lambda: lease.lease.convert(exclusive)), ended)

    def forbids_record(self, key: Key, exclusive: bool) -> bool:
        """Return whether others hold, so that record locks of this mode cannot be had."""
        lease = self._files.get(key)
        if lease is None:
            return False
        if lease.mode is None:
            return lease.contended and not lease.giving
        return lease.unconverted and exclusive

    def _relax_again(self, lease: FileLease) -> None:
        if self._files.get(lease.key) is lease and lease.mode is False and not lease.busy:
            self._convert(lease, False)

    def ask_again(self, key: Key) -> None:
        """Somebody else asks, who has not been told that others hold."""
        lease = self._files.get(key)
        if lease:
            lease.unconverted = False

    def relax(self, key: Key) -> None:
        """All that is left are shared record locks."""
        lease = self._files.get(key)
        if lease and lease.mode and lease.named and not lease.busy:
            self._convert(lease, False)
