"""Performs the file operations of cluster mode for a keeper, which must never wait for a file server.

Started as ``python -I -S lease_worker.py``, with one end of a SOCK_SEQPACKET pair as standard input. A request is a
list: its number, the directory, the name of the operation (`cluster_ops`), its arguments. An answer: the number, the
result, and the errno, if any, with its text and file. Each is performed in a thread of its own: one that hangs holds up
no other.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from typing import Any, NamedTuple

from flockshim import cluster_files, cluster_ops


class Enter(NamedTuple):
    """See whether `name` in the directory is the file of this device and inode; the result is false if it is not.

    Raises OSError EXDEV where the directory is on another device: beside the root of a mount nobody looks who has
    mounted it elsewhere.
    """

    name: str
    device: int
    inode: int


MAX_PACKET = 1 << 20

_directories: dict[str, int] = {}
_mutex = threading.Lock()


def _descriptor(directory: str) -> int:
    with _mutex:
        known = _directories.get(directory)
    if known is None:
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with _mutex:
            known = _directories.setdefault(directory, opened)
        if known != opened:
            os.close(opened)
    return known


def _enter(directory: int, target: Enter) -> bool:
    if os.fstat(directory).st_dev != target.device:
        raise OSError(errno.EXDEV, "it is the root of a mount", target.name)
    try:
        return os.stat(target.name, dir_fd=directory, follow_symlinks=False).st_ino == target.inode
    except FileNotFoundError:
        return False


def _perform(peer: socket.socket, number: int, directory: str, name: str, arguments: list[Any]) -> None:
    result, error = None, None
    try:
        descriptor = _descriptor(directory)
        if name == Enter.__name__:
            result = _enter(descriptor, Enter(*arguments))
        else:
            result = cluster_files.perform(descriptor, getattr(cluster_ops, name)(*arguments))
    except OSError as failure:
        error = [failure.errno, failure.strerror, os.fspath(failure.filename or "")]
    peer.send(json.dumps([number, result, error]).encode())


def main() -> None:
    """Serve until the keeper has closed its end."""
    # Other users of the directory may have to see who holds.
    os.umask(0o022)
    peer = socket.socket(fileno=0)
    while True:
        packet = peer.recv(MAX_PACKET)
        if not packet:
            # Not through the interpreter's end, which would wait for threads that hang.
            os._exit(0)
        number, directory, name, arguments = json.loads(packet)
        if name == "forget":
            with _mutex:
                descriptor = _directories.pop(directory, None)
            if descriptor is not None:
                os.close(descriptor)
            continue
        threading.Thread(target=_perform, args=(peer, number, directory, name, arguments), daemon=True).start()


if __name__ == "__main__":
    main()
