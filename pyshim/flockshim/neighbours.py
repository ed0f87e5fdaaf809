"""Asks the other keepers of this host whether their record locks are still needed.

Which bytes they have locked the kernel tells (`recordfile`). But only they know for whom, and can find out whether that
program has ended, or closed the file; and only they can tell when something was unlocked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

from flockshim._native import ffi, lib
from flockshim.recordtable import Range

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from flockshim.host import Key
    from flockshim.loop import Loop
    from flockshim.rendezvous import Rendezvous

_HEAD = struct.Struct("=IHHi")
_FOUND = struct.Struct("=iqqi")
_ANSWER_SIZE = 1024


class Knock:
    """One question to all of them."""

    def __init__(self, loop: Loop, answered: Callable[[], None], freed: Callable[[], None] | None) -> None:
        """`answered` is called when the last of them has answered; `freed` when it is worth trying again."""
        self._loop = loop
        self._answered = answered
        self._freed = freed
        # Descriptors, since socket objects of a keeper that has divided (`standby`) would close what is another's.
        self._pending: set[int] = set()
        self._watched: set[int] = set()
        # A lock in the way, and its process; and that in words.
        self.found: tuple[Range, int] | None = None
        self.holder = ""

    @property
    def is_answered(self) -> bool:
        """Whether all have answered that will."""
        return not self._pending

    def is_watching(self) -> bool:
        """Return whether `freed` may still be called."""
        return bool(self._watched)

    def ask(self, path: str, request: bytes) -> None:
        """Ask one of them."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            try:
                connection.setblocking(False)
                connection.connect(path)
                connection.send(request)
            except OSError:
                # Nobody is there, or it is too busy: the kernel says what it holds.
                return
            peer = connection.detach()
        self._pending.add(peer)
        self._watched.add(peer)
        self._loop.watch(peer, lambda: self._read(peer))

    def end(self) -> None:
        """Hear no more."""
        for peer in list(self._watched):
            self._leave(peer)
        self._pending.clear()

    def _leave(self, peer: int) -> None:
        self._watched.remove(peer)
        self._loop.unwatch(peer)
        os.close(peer)

    def _read(self, peer: int) -> None:
        answer = b""
        with contextlib.suppress(OSError):
            answer = os.read(peer, _ANSWER_SIZE)
        is_first = peer in self._pending
        self._pending.discard(peer)
        is_found = len(answer) >= _HEAD.size + _FOUND.size and _HEAD.unpack_from(answer)[2] == lib.KIND_FOUND
        if is_found:
            self._note(answer)
        if not (is_found and self._freed):
            self._leave(peer)
        if is_first and not self._pending:
            self._answered()
        if self._freed and not is_found and not is_first:
            self.end()
            self._freed()

    def _note(self, answer: bytes) -> None:
        exclusive, first, last, pid = _FOUND.unpack_from(answer, _HEAD.size)
        self.found = Range(first, last, bool(exclusive)), pid
        self.holder = answer[_HEAD.size + _FOUND.size :].decode(errors="replace")


class Neighbours:
    """The other keepers of this host."""

    def __init__(self, loop: Loop, rendezvous: Rendezvous) -> None:
        """Those that have sockets in the rendezvous directory."""
        self._loop = loop
        self._rendezvous = rendezvous

    def knock(
        self, key: Key, wanted: Range, answered: Callable[[], None], freed: Callable[[], None] | None = None
    ) -> Knock:
        """Ask all of them about a range. Nothing is called before this returns."""
        knock = Knock(self._loop, answered, freed)
        request = ffi.new(
            "struct protocol_request *",
            {
                "magic": lib.PROTOCOL_MAGIC,
                "version": lib.PROTOCOL_VERSION,
                "kind": lib.KIND_KNOCK,
                "device": key[0],
                "inode": key[1],
                "first": wanted.first,
                "last": wanted.last,
                "operation": fcntl.LOCK_EX if wanted.exclusive else fcntl.LOCK_SH,
                "flags": lib.FLAG_STAY if freed else 0,
            },
        )
        for path in self._rendezvous.other_sockets():
            knock.ask(path, bytes(ffi.buffer(request)))
        return knock
