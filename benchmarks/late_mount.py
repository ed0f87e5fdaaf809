"""Mounts what `flockshim.nolockfs` does, with a file server that is far away: ``late_mount.py BACKING MOUNTPOINT``.

It answers late whatever is about names, attributes and syncing, and not what the client of a network file system mostly
does by itself: reading and writing a file that it has open, and refusing to lock.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from unittest import mock

from flockshim import fuse_guard
from flockshim.fuse_protocol import Opcode, Request
from flockshim.fuse_server import Server

LATE_SECONDS = 0.0005
LATE = {
    Opcode.LOOKUP,
    Opcode.CREATE,
    Opcode.OPEN,
    Opcode.UNLINK,
    Opcode.MKDIR,
    Opcode.RMDIR,
    Opcode.RENAME,
    Opcode.RENAME2,
    Opcode.LINK,
    Opcode.SYMLINK,
    Opcode.SETATTR,
    Opcode.FSYNC,
}


class LateServer(Server):
    """A server that is far away."""

    def _answer(self, request: Request) -> None:
        if request.opcode in LATE:
            time.sleep(LATE_SECONDS)
        super()._answer(request)


def main() -> None:
    backing, mountpoint = sys.argv[1:]
    with mock.patch.object(fuse_guard, "Server", LateServer):
        fuse_guard.run(backing, mountpoint, errno.ENOSYS, errno.ENOSYS, os.getppid())


if __name__ == "__main__":
    main()
