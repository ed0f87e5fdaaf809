"""The directory in which keepers and programs meet, and this keeper's socket in it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import time

from flockshim import holders
from flockshim._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

LISTENER = 3
BACKLOG = 4096
IN_ATTRIB = 0x4
SURELY_LATER = 100_000_000
MARKER_SECONDS = 24 * 60 * 60


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


class Rendezvous:
    """The rendezvous directory, as the keeper with this key sees it."""

    def __init__(self, directory: str, key: str) -> None:
        """The keeper listens at descriptor LISTENER already; the shim has bound it."""
        self.directory = directory
        self.key = key
        self.socket_path = self._socket_of(key)
        # Becomes readable when the socket is unlinked, inotify(7); negative where that cannot be had.
        self.inotify = lib.native_inotify_init()
        self._keys: set[str] = set()
        # The time of the directory that they are of.
        self._keys_at = -1
        # The processes of those keepers, and the time of the directory when they were sought.
        self._keepers: list[tuple[int, str]] = []
        self._keepers_at = -1
        self._note_socket()

    def _note_socket(self) -> None:
        self._identity = _identity(self.socket_path)
        if self.inotify >= 0:
            lib.native_inotify_add_watch(self.inotify, os.fsencode(self.socket_path), IN_ATTRIB)

    def _socket_of(self, key: str) -> str:
        return f"{self.directory}/k-{key}.sock"

    def _open_start_lock(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(f"{self.directory}/start.lock", flags, 0o600)

    def leave(self) -> bool:
        """Make the way free for another keeper, unless a program is just coming: starting takes the same lock.

        Exit at once afterwards: that closes the socket, and who has connected meanwhile asks again.
        """
        try:
            start = self._open_start_lock()
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(start, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if select.select([LISTENER], [], [], 0)[0]:
                return False
            if not self.is_swept():
                os.unlink(self.socket_path)
            self._remove_dead_sockets()
            self._remove_old_markers()
        except OSError:
            # Somebody starts a keeper; or the file system has become read-only.
            return False
        finally:
            os.close(start)
        return True

    def _remove_dead_sockets(self) -> None:
        """Remove what keepers have left that were killed, with nobody coming after them."""
        for key in self._other_keys():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                probe.setblocking(False)
                if probe.connect_ex(self._socket_of(key)) == errno.ECONNREFUSED:
                    os.unlink(self._socket_of(key))

    def _remove_old_markers(self) -> None:
        """Remove what programs have left to say something once in a run of flockshim: shim/told.c does so, too."""
        for name in os.listdir(self.directory):
            if name.startswith("told-"):
                with contextlib.suppress(FileNotFoundError):
                    path = f"{self.directory}/{name}"
                    if os.lstat(path).st_mtime < time.time() - MARKER_SECONDS:
                        os.unlink(path)

    def is_swept(self) -> bool:
        """Return whether our socket is gone: systemd-logind empties /dev/shm at a user's last logout."""
        if self.inotify >= 0:
            with contextlib.suppress(BlockingIOError):
                os.read(self.inotify, 4096)
        now = _identity(self.socket_path)
        return now is None or now != self._identity

    def restore(self) -> Iterator[None]:
        """Make the directory again, and listen in it. Yields once, for the proxies to be made before programs come.

        Raises OSError where that is impossible, for instance because another keeper of this key listens already.
        """
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        status = os.lstat(self.directory)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(1, "not a directory of ours", self.directory)
        start = self._open_start_lock()
        try:
            fcntl.flock(start, fcntl.LOCK_EX)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.setblocking(False)
                yield
                listener.bind(self.socket_path)
                listener.listen(BACKLOG)
                os.dup2(listener.fileno(), LISTENER, inheritable=False)
            self._note_socket()
        finally:
            os.close(start)

    def _other_keys(self) -> set[str]:
        """Sought anew where the directory may have changed: its time is as coarse as the kernel's clock."""
        try:
            changed = os.stat(self.directory).st_mtime_ns
            names = os.listdir(self.directory) if changed != self._keys_at else None
        except FileNotFoundError:
            return set()
        if names is not None:
            self._keys = {n[2:-5] for n in names if n.startswith("k-") and n.endswith(".sock")} - {self.key}
            self._keys_at = changed if time.time_ns() - changed > SURELY_LATER else -1
        return self._keys

    def keeper_of(self, descriptor: int) -> str | None:
        """Return the key of the other keeper that has this description, or None.

        A process that is moved to another control group, or shares a description with one there, asks the wrong
        keeper.
        """
        return next((key for pid, key in self._other_keepers() if lib.native_is_open_in(descriptor, pid)), None)

    def keeper_of_records(self, proxy: str, pid: int, descriptor: int) -> str | None:
        """Return the key of the other keeper that has record locks of process `pid`, or None.

        `proxy` is the path of the file's proxy: keepers show by the offset of its descriptions whose they are; 0 are
        those of descriptions, of which this `descriptor` must be one.
        """
        for keeper, key in self._other_keepers():
            if pid == 0 and not lib.native_is_open_in(descriptor, keeper):
                continue
            if holders.is_of_our_pid_namespace(keeper) and _has_proxy_of(keeper, proxy, pid):
                return key
        return None

    def other_sockets(self) -> list[str]:
        """Return where the other keepers listen."""
        return [self._socket_of(key) for key in self._other_keys()]

    def _other_keepers(self) -> list[tuple[int, str]]:
        """Return the processes of other keepers. All are looked at only where there may be others than before."""
        keys = self._other_keys()
        known = [(pid, key) for pid, key in self._keepers if key in keys]
        if self._keepers_at != self._keys_at or self._keys_at < 0 or any(_key_of(pid) != key for pid, key in known):
            found = [(int(name), _key_of(int(name))) for name in os.listdir("/proc") if keys and name.isdigit()]
            known = [(pid, key) for pid, key in found if key in keys]
            self._keepers_at = self._keys_at
        self._keepers = known
        return known


def _key_of(pid: int) -> str:
    """Return the key of the keeper that this process is; empty if it is none."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = os.fsdecode(file.read()).split("\0")
    except OSError:
        return ""
    return arguments[5] if len(arguments) > 5 and arguments[3].endswith("/keeper.py") else ""


def _has_proxy_of(keeper: int, proxy: str, pid: int) -> bool:
    try:
        numbers = os.listdir(f"/proc/{keeper}/fd")
    except OSError:
        return False
    for number in numbers:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{keeper}/fd/{number}") == proxy:
                with open(f"/proc/{keeper}/fdinfo/{number}") as file:
                    information = file.read()
                if f"pos:\t{pid}\n" in information and "\nlock:" in information:
                    return True
    return False
