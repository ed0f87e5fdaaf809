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
import queue
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


class _Directories:
    """Descriptors of directories, each open as long as somebody uses it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._open: dict[str, int] = {}
        self._uses: dict[int, int] = {}

    def use(self, path: str) -> int:
        with self._mutex:
            known = self._open.get(path)
            if known is not None:
                self._uses[known] += 1
                return known
        # Not under the mutex, since it may hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with self._mutex:
            self._open.setdefault(path, descriptor)
            self._uses[descriptor] = 1
        return descriptor

    def leave(self, path: str, descriptor: int) -> None:
        with self._mutex:
            self._uses[descriptor] -= 1
            if not self._uses[descriptor] and self._open.get(path) != descriptor:
                self._close(descriptor)

    def forget(self, path: str) -> None:
        with self._mutex:
            descriptor = self._open.pop(path, None)
            if descriptor is not None and not self._uses[descriptor]:
                self._close(descriptor)

    def _close(self, descriptor: int) -> None:
        del self._uses[descriptor]
        os.close(descriptor)


class _Threads:
    """Threads that perform what comes: as many as there are operations that have not ended."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._directories = _Directories()
        self._requests: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._idle = 0
        self._mutex = threading.Lock()

    def take(self, request: list[Any]) -> None:
        if request[2] == "forget":
            self._directories.forget(request[1])
            return
        self._requests.put(request)
        with self._mutex:
            if self._idle:
                self._idle -= 1
                return
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._perform(*self._requests.get())
            with self._mutex:
                self._idle += 1

    def _perform(self, number: int, directory: str, name: str, arguments: list[Any]) -> None:
        result, error = None, None
        try:
            descriptor = self._directories.use(directory)
            try:
                result = _do(descriptor, name, arguments)
            finally:
                self._directories.leave(directory, descriptor)
        except OSError as failure:
            error = [failure.errno, failure.strerror, os.fspath(failure.filename or "")]
        self._peer.send(json.dumps([number, result, error]).encode())


def _do(directory: int, name: str, arguments: list[Any]) -> Any:
    if name == Enter.__name__:
        return _enter(directory, Enter(*arguments))
    return cluster_files.perform(directory, getattr(cluster_ops, name)(*arguments))


def _enter(directory: int, target: Enter) -> bool:
    if os.fstat(directory).st_dev != target.device:
        raise OSError(errno.EXDEV, "it is the root of a mount", target.name)
    try:
        return os.stat(target.name, dir_fd=directory, follow_symlinks=False).st_ino == target.inode
    except FileNotFoundError:
        return False


def main() -> None:
    """Serve until the keeper has closed its end."""
    # Other users of the directory may have to see who holds.
    os.umask(0o022)
    peer = socket.socket(fileno=0)
    threads = _Threads(peer)
    while True:
        packet = peer.recv(MAX_PACKET)
        if not packet:
            # Not through the interpreter's end, which would wait for threads that hang.
            os._exit(0)
        threads.take(json.loads(packet))


if __name__ == "__main__":
    main()
