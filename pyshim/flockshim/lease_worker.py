"""Performs the file operations of cluster mode for a keeper, which must never wait for a file server.

Started as ``python -I -S lease_worker.py``, with one end of a SOCK_SEQPACKET pair as standard input. A request is a
list: its number, the directory (`Place`), whether that must still have the path at which it was opened (else ESTALE),
the name of the operation (`cluster_ops`), its arguments. An answer: the number, the result, and the errno, if any, with
its text and file. Each is performed in a thread of its own: one that hangs holds up no other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import signal
import socket
import sys
import threading
import traceback

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from typing import Any, NamedTuple

from flockshim import cluster_files, cluster_ops, filesystems
from flockshim.cluster_names import Names


class Enter(NamedTuple):
    """See whether `name` is the file of this descriptor, in the directory that is at the place's path now.

    The result is the name whose record counts, and the directory's st_dev and st_ino. For a file that was removed that
    is its former name, as long as there is a record (of that name and `suffix`): others may have it open too. Without
    one it is None. Raises OSError: ESTALE where the file is not found so; EXDEV where the directory is on another
    device, since beside the root of a mount nobody looks who has mounted it elsewhere; EOPNOTSUPP where no rename is
    atomic.
    """

    name: str
    suffix: str
    descriptor: int


class Place(NamedTuple):
    """A directory: the keeper's number for it, which is never used again, its path, and its identity once `Enter`ed."""

    number: int
    path: str
    identity: list[int] | None


MAX_PACKET = 1 << 20
DELETED = " (deleted)"
# Instead of a request's number: the processes that the keeper has stopped.
STOPPED = -1
# linux/sched.h; proc(5): the flags of a process.
PF_EXITING = 0x4


class _Directories:
    """Descriptors of directories, each open as long as somebody uses it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._open: dict[int, int] = {}
        self._uses: dict[int, int] = {}
        self._paths: dict[int, str] = {}

    def use(self, place: Place) -> int:
        with self._mutex:
            known = self._open.get(place.number)
            if known is not None:
                self._uses[known] += 1
                return known
        # Not under the mutex, since it may hang.
        descriptor = os.open(place.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if place.identity is not None and _identity(os.fstat(descriptor)) != place.identity:
            # A worker before us had it open under this path; another directory is there now.
            os.close(descriptor)
            raise OSError(errno.ESTALE, "the directory was moved away", place.path)
        with self._mutex:
            used = self._open.setdefault(place.number, descriptor)
            self._uses[used] = self._uses.get(used, 0) + 1
            self._paths.setdefault(used, _path(used))
        if used != descriptor:
            os.close(descriptor)
        return used

    def leave(self, place: Place, descriptor: int) -> None:
        with self._mutex:
            self._uses[descriptor] -= 1
            if not self._uses[descriptor] and self._open.get(place.number) != descriptor:
                self._close(descriptor)

    def is_moved(self, descriptor: int) -> bool:
        """Return whether one that is in use has another path now, as far as this host knows: no server is asked."""
        return self._paths[descriptor] != _path(descriptor)

    def forget(self, place: Place) -> None:
        with self._mutex:
            descriptor = self._open.pop(place.number, None)
            if descriptor is not None and not self._uses[descriptor]:
                self._close(descriptor)

    def _close(self, descriptor: int) -> None:
        del self._uses[descriptor], self._paths[descriptor]
        os.close(descriptor)


class _Threads:
    """Threads that perform what comes: as many as there are operations that have not ended."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._directories = _Directories()
        self._requests: queue.SimpleQueue[tuple[int, Place, bool, Any]] = queue.SimpleQueue()
        self._idle = 0
        self._mutex = threading.Lock()

    def take(self, request: list[Any], descriptors: list[int]) -> None:
        number, place, stays, name, arguments = request
        if name == "forget":
            self._directories.forget(Place(*place))
            return
        operation: Any = (
            Enter(*arguments, *descriptors) if name == Enter.__name__ else getattr(cluster_ops, name)(*arguments)
        )
        self._requests.put((number, Place(*place), stays, operation))
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

    def _perform(self, number: int, place: Place, stays: bool, operation: Any) -> None:
        result, error = None, None
        try:
            if isinstance(operation, Enter):
                result = self._enter(place, operation)
            else:
                result = self._do(place, stays, operation)
        except OSError as failure:
            # For listdir(3) of a descriptor that is its number.
            file = failure.filename if isinstance(failure.filename, str) else place.path
            error = [failure.errno, failure.strerror, file]
        except BaseException:
            # The keeper must not wait for an answer.
            traceback.print_exc()
            os._exit(1)
        try:
            self._peer.send(json.dumps([number, result, error]).encode())
        except ConnectionError:
            return  # the keeper has died
        except OSError as failure:  # too many names, say
            self._peer.send(json.dumps([number, None, [failure.errno, failure.strerror, place.path]]).encode())

    def _do(self, place: Place, stays: bool, operation: Any) -> Any:
        directory = self._directories.use(place)
        try:
            if stays and self._directories.is_moved(directory):
                raise OSError(errno.ESTALE, "the directory was moved away", place.path)
            return cluster_files.perform(directory, operation)
        finally:
            self._directories.leave(place, directory)

    def _enter(self, place: Place, target: Enter) -> tuple[str, list[int]] | None:
        try:
            status = os.fstat(target.descriptor)
        finally:
            os.close(target.descriptor)
        try:
            directory = self._directories.use(place)
        except FileNotFoundError:
            if status.st_nlink == 0:
                return None
            raise
        try:
            return _entered(directory, place.path, target, status)
        finally:
            self._directories.leave(place, directory)


def _entered(directory: int, path: str, target: Enter, status: os.stat_result) -> tuple[str, list[int]] | None:
    name = target.name
    identity = _identity(os.fstat(directory))
    if identity[0] != status.st_dev:
        raise OSError(errno.EXDEV, "it is the root of a mount", name)
    there = _identity_at(path, None) == identity
    if not there or _identity_at(name, directory) != _identity(status):
        # Some FUSE file systems count no links: whatever has its name is not removed.
        if status.st_nlink:
            raise OSError(errno.ESTALE, "the file is not to be found under its name", f"{path}/{name}")
        name = former_name(name)
        if not there or not _identity_at(Names(name + target.suffix).claim, directory):
            return None
    store = filesystems.object_store(filesystems.containing(path, status.st_dev, filesystems.mounted()))
    if store:
        raise OSError(errno.EOPNOTSUPP, f"{store} does not rename atomically", f"{path}/{name}")
    return name, identity


def former_name(name: str) -> str:
    """Return the name that a removed file had, from that which the kernel shows in /proc/PID/fd (proc(5))."""
    return name[: -len(DELETED)] if name.endswith(DELETED) else name


def _identity_at(path: str, directory: int | None) -> list[int] | None:
    try:
        return _identity(os.stat(path, dir_fd=directory, follow_symlinks=directory is None))
    except FileNotFoundError:
        return None


def _path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino]


class Guard:
    """What is to be done for programs that a keeper has stopped, if it does not live to continue them."""

    def __init__(self, keepers: list[int]) -> None:
        """`keepers` are the keeper and its standby: while one of them is alive, another keeper follows."""
        self._keepers = keepers
        self.stopped: list[int] = []

    def end(self) -> None:
        """The keeper has closed its end, or is dead. Their lock is lost in either case; they must not be too."""
        if not any(map(_is_alive, self._keepers)):
            for pid in self.stopped:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGCONT)


def _is_alive(pid: int) -> bool:
    """Return whether a process is neither dead nor about to be: while it ends, it closes its descriptors."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as status:
            fields = status.read().rpartition(b")")[2].split()
    except OSError:
        return False
    return fields[0] not in (b"Z", b"X") and not int(fields[6]) & PF_EXITING


def main() -> None:
    """Serve until the keeper has closed its end."""
    guard = Guard([int(pid) for pid in sys.argv[1:]])
    # Other users of the directory may have to see who holds.
    os.umask(0o022)
    peer = socket.socket(fileno=0)
    threads = _Threads(peer)
    while True:
        try:
            packet, descriptors, _, _ = socket.recv_fds(peer, MAX_PACKET, 1)
        except ConnectionError:
            # The keeper died with an answer unread: unix(7).
            packet, descriptors = b"", []
        if not packet:
            guard.end()
            # Not through the interpreter's end, which would wait for threads that hang.
            os._exit(0)
        request = json.loads(packet)
        if request[0] == STOPPED:
            guard.stopped = request[1]
        else:
            threads.take(request, descriptors)


if __name__ == "__main__":
    main()
