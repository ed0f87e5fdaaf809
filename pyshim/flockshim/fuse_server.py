"""The FUSE server: reads requests from the kernel, answers locks itself, passes files through."""

import errno
import os
import traceback
from typing import Callable, Literal, Union

from flockshim import fuse_counts
from flockshim import fuse_protocol as p
from flockshim.fuse_passthrough import Answer, Passthrough
from flockshim.fuse_protocol import Capability, Opcode, Request

LockAnswer = Union[int, Literal["local", "hang"]]
"""An errno; "local": the kernel locks by itself; "hang": no answer ever comes."""

_NO_REPLY = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT)
_CAPABILITIES = (
    Capability.ASYNC_READ
    | Capability.ATOMIC_O_TRUNC
    | Capability.BIG_WRITES
    | Capability.AUTO_INVAL_DATA
    | Capability.ASYNC_DIO
    | Capability.PARALLEL_DIROPS
    | Capability.MAX_PAGES
    | Capability.CACHE_SYMLINKS
)


class Server:
    """Serves one mount until it is unmounted."""

    def __init__(
        self,
        device: int,
        backing: str,
        flock: LockAnswer,
        posix: LockAnswer,
        on_ready: Callable[[], None],
    ) -> None:
        """Serve the directory *backing* to the mount of the /dev/fuse descriptor *device*.

        *on_ready* is called once, when the kernel has the answer that begins the mount.
        """
        self._device = device
        self._flock = flock
        self._posix = posix
        self._on_ready = on_ready
        self._hanging: set[int] = set()
        self._counts = fuse_counts.make()
        self._handlers = {
            **Passthrough(backing).handlers(),
            Opcode.INIT: self._init,
            Opcode.GETLK: self._lock,
            Opcode.SETLK: self._lock,
            Opcode.SETLKW: self._lock,
            Opcode.INTERRUPT: self._interrupt,
        }

    def serve(self) -> None:
        """Answer requests until the mount is gone.

        :raises OSError: when the device fails.
        """
        buffer = bytearray(p.MAX_WRITE + p.HEADER_ROOM)
        view = memoryview(buffer)
        while True:
            try:
                length = os.readv(self._device, [buffer])
            except OSError as error:
                # ECONNABORTED: unmounted by force just when a request was read.
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return
                if error.errno == errno.ENOENT:
                    continue  # the request was withdrawn before it was read
                raise
            _, opcode, unique, node, uid, gid, _, _ = p.IN_HEADER.unpack_from(buffer)
            if opcode < fuse_counts.OPCODES:
                self._counts[opcode] += 1
            body = view[p.IN_HEADER.size : length]
            self._answer(Request(opcode, unique, node, uid, gid, body))

    def _answer(self, request: Request) -> None:
        handler = self._handlers.get(request.opcode)
        answer: Answer = None
        number = errno.ENOSYS
        if handler:
            try:
                answer, number = handler(request), 0
            except OSError as error:
                number = error.errno or errno.EIO
            except Exception:
                traceback.print_exc()
                number = errno.EIO
        if request.opcode not in _NO_REPLY and request.unique not in self._hanging:
            self._reply(request.unique, number, answer)
        if request.opcode == Opcode.INIT:
            self._on_ready()

    def _reply(self, unique: int, number: int, answer: Answer = None) -> None:
        payload = answer or b""
        header = p.OUT_HEADER.pack(p.OUT_HEADER.size + len(payload), -number, unique)
        try:
            os.writev(self._device, (header, payload))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # the asker or the mount is gone
                raise

    def _init(self, request: Request) -> Answer:
        _major, _minor, readahead, offered = p.INIT_IN.unpack_from(request.body)
        wanted = _CAPABILITIES
        if self._flock != "local":
            wanted |= Capability.FLOCK_LOCKS
        if self._posix != "local":
            wanted |= Capability.POSIX_LOCKS
        return p.init_out(wanted & offered, readahead)

    def _lock(self, request: Request) -> Answer:
        *_, flags = p.LK_IN.unpack_from(request.body)
        answer = self._flock if flags & p.LK_FLOCK else self._posix
        if isinstance(answer, int):
            raise OSError(answer, "cannot lock")
        self._hanging.add(request.unique)
        return None

    def _interrupt(self, request: Request) -> Answer:
        """A signal came to a process that waits. Only a hanging lock can be waiting here."""
        (unique,) = p.INTERRUPT_IN.unpack_from(request.body)
        if unique in self._hanging:
            self._hanging.remove(unique)
            self._reply(unique, errno.EINTR)
        return None
