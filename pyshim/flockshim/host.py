"""Keepers of one host exclude each other by kernel locks on proxy files, and are told nothing but by inotify.

A file's proxy lies in the rendezvous directory under the file's device and inode number. A keeper that has clients
holding the file's lock holds the kernel's flock on the proxy, in the strongest mode they need. Signals between
keepers are the traces that opening and closing leave, inotify(7):

- opening the proxy is a knock: somebody was refused, so look whether your holders are alive, and make way soon;
- a change of its times answers a knock: looked, still held;
- closing it after writing was allowed (IN_CLOSE_WRITE) says that it may be free: try again.

A proxy's watch is always set before its lock is tried: whoever is refused then knocks, and the holder sees it. A
second file, the turn, is locked by the one keeper that is next; the others wait for the turn. So a keeper that was
knocked at cannot take the proxy again before the one who knocked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time

from flockshim import holders
from flockshim._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

Key = tuple[int, ...]
"""A file's st_dev and st_ino; and a third member, RECORDS, where its record locks are meant."""

IN_ATTRIB, IN_CLOSE_WRITE, IN_OPEN, IN_Q_OVERFLOW = 0x4, 0x8, 0x20, 0x4000
_EVENT = struct.Struct("=iIII")

MAX_TEXT = 400
IDLE_PROXY_SECONDS = 1.0
CONTENDED_SECONDS = 2.0


class _LockFile:
    """A file in the rendezvous directory, and this keeper's kernel lock on it."""

    __slots__ = ("alone", "descriptor", "mode", "path", "proxy", "watch", "watcher")

    def __init__(self, path: str, proxy: Proxy, watcher: _Watcher) -> None:
        self.path = path
        self.proxy = proxy
        self.watcher = watcher
        self.descriptor = -1
        self.watch = -1
        self.mode: bool | None = None
        # We made the file, and nobody has opened it since.
        self.alone = False

    def open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self.descriptor = os.open(self.path, flags | os.O_EXCL, 0o600)
            self.alone = True
        except FileExistsError:
            self.descriptor = os.open(self.path, flags, 0o600)
            self.alone = False
        self.watcher.add(self)

    def adopt(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.alone = False
        self.watcher.add(self)

    def try_lock(self, exclusive: bool) -> bool:
        """Take or convert the lock if it is free; as in flock(2), a refused conversion loses what was held."""
        while True:
            if self.descriptor < 0:
                self.open()
            result = lib.native_try_lock(self.descriptor, exclusive)
            if result == 1:
                self.mode = exclusive
                return True
            self.mode = None
            if result == 0:
                return False
            self.close()
            if result != -errno.ENOENT:
                raise OSError(-result, os.strerror(-result), self.path)

    def is_unlinked(self) -> bool:
        return os.fstat(self.descriptor).st_nlink == 0

    def unlock(self) -> None:
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        self.mode = None

    def knock(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.close(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))

    def announce(self) -> None:
        """Have the others try again, though the file stays open."""
        os.close(os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the file system is full: it is only a name
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, text.encode(errors="replace"), 0)

    def read(self) -> str:
        return os.pread(self.descriptor, MAX_TEXT, 0).decode(errors="replace")

    def close(self) -> None:
        if self.descriptor >= 0:
            self.watcher.remove(self)
            os.close(self.descriptor)
        self.descriptor = -1
        self.mode = None

    def remove(self) -> None:
        """Unlink the file if nobody else has it locked, and close it."""
        if self.descriptor >= 0:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self.is_unlinked():
                    os.unlink(self.path)
            except OSError:
                pass
        self.close()


class _Watcher:
    """The keeper's inotify descriptor. Without one (limits, inotify(7)) the once-a-second look must do."""

    def __init__(self) -> None:
        self.descriptor = lib.native_inotify_init()
        self.files: dict[int, _LockFile] = {}

    def add(self, file: _LockFile) -> None:
        if self.descriptor >= 0:
            path = b"/proc/self/fd/%d" % file.descriptor
            mask = IN_OPEN | IN_CLOSE_WRITE | IN_ATTRIB
            file.watch = lib.native_inotify_add_watch(self.descriptor, path, mask)
            if file.watch >= 0:
                self.files[file.watch] = file

    def remove(self, file: _LockFile) -> None:
        if self.files.pop(file.watch, None):
            lib.native_inotify_rm_watch(self.descriptor, file.watch)
        file.watch = -1

    def read(self) -> Iterable[tuple[_LockFile | None, int]]:
        """Yield (file, event mask); file is None where events were lost."""
        if self.descriptor < 0:
            return
        try:
            data = os.read(self.descriptor, 65536)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            if mask & IN_Q_OVERFLOW:
                yield None, mask
            elif watch in self.files:
                yield self.files[watch], mask


class Proxy:
    """One file's standing between the keepers of this host."""

    __slots__ = ("contended_until", "idle_since", "key", "main", "turn", "waiting")

    def __init__(self, directory: str, key: Key, watcher: _Watcher) -> None:
        """Nothing is opened before it is needed."""
        path = proxy_path(directory, key)
        self.key = key
        self.main = _LockFile(path, self, watcher)
        self.turn = _LockFile(path + ".next", self, watcher)
        self.waiting: bool | None = None
        self.contended_until = 0.0
        self.idle_since = 0.0

    @property
    def contended(self) -> bool:
        """Another keeper was refused lately; one that waits knocks again every second."""
        return self.contended_until > 0 and time.monotonic() < self.contended_until

    def advance(self, insist: bool) -> bool:
        """Go on waiting: get the turn, then the lock. Returns whether the lock is held now."""
        assert self.waiting is not None
        if self.turn.mode is None and not self.turn.try_lock(True) and not insist:
            return False
        if not self.main.try_lock(self.waiting):
            self.main.knock()
            return False
        self.waiting = None
        self.contended_until = 0.0
        self.turn.remove()
        return True


def proxy_path(directory: str, key: Key) -> str:
    """Return the path of the proxy of a file (st_dev, st_ino)."""
    return f"{directory}/p-{key[0]:x}-{key[1]:x}"


def key_of_path(path: str, directory: str) -> Key | None:
    """Return the file whose proxy lies at `path`, or None if it is no proxy of `directory`."""
    name = path[len(directory) + 1 :] if path.startswith(directory + "/p-") else ""
    try:
        _, device, inode = name.split("-")
        return int(device, 16), int(inode, 16)
    except ValueError:
        return None


class Host:
    """This keeper among the keepers of the host.

    `read` collects what the others have done: the files at which they have `knocked`, those that they have `opened`
    while nobody here used them, those that may have been `freed`, and those of which a knock was `answered`.
    """

    def __init__(self, directory: str) -> None:
        """`directory` is the rendezvous directory."""
        self._directory = directory
        self._watcher = _Watcher()
        self.proxies: dict[Key, Proxy] = {}
        self.knocked: set[Key] = set()
        self.opened: set[Key] = set()
        self.freed: set[Key] = set()
        self.answered: set[Key] = set()

    def fileno(self) -> int:
        """Return the inotify descriptor, or a negative number where there is none."""
        return int(self._watcher.descriptor)

    def _proxy(self, key: Key) -> Proxy:
        proxy = self.proxies.get(key)
        if proxy is None:
            proxy = self.proxies[key] = Proxy(self._directory, key, self._watcher)
        return proxy

    def permit(self, key: Key, exclusive: bool, barging: bool) -> bool:
        """Return whether a client may be granted this mode now, having locked the proxy for it.

        Unless `barging`, not while another keeper waits: `wait` is fair. Raises OSError where the proxy cannot be
        made (rendezvous directory full or gone).
        """
        proxy = self._proxy(key)
        held = proxy.main.mode
        if held == exclusive:
            return barging or not proxy.contended
        if not barging and (proxy.contended or proxy.waiting is not None):
            return False
        if not proxy.main.try_lock(exclusive):
            proxy.main.knock()
            return False
        if held and proxy.contended:
            # A downgrade leaves no trace by itself, but lets readers in.
            proxy.main.announce()
        return True

    def may_be_shared(self, key: Key) -> bool:
        """Return whether another keeper may have clients that hold or want this file's lock."""
        proxy = self.proxies.get(key)
        if proxy and proxy.main.descriptor >= 0:
            return not proxy.main.alone
        return os.path.exists(proxy_path(self._directory, key))

    def restore(self, needed: dict[Key, bool]) -> list[Key]:
        """Make proxies again that were removed. Returns those that are `needed` but that somebody else has locked."""
        for proxy in self.proxies.values():
            if proxy.main.descriptor >= 0 and proxy.main.is_unlinked():
                proxy.main.close()
                proxy.turn.close()
        return [key for key, exclusive in needed.items() if not self._proxy(key).main.try_lock(exclusive)]

    def wait(self, key: Key, exclusive: bool, insist: bool) -> bool:
        """None of our clients holds but one wants to: get in line. Returns whether the lock was had now.

        To `insist` is for those who have waited long: whoever has the turn may be a keeper that is stopped.
        """
        proxy = self._proxy(key)
        if proxy.main.mode is not None:
            proxy.main.close()
        proxy.waiting = exclusive
        return proxy.advance(insist)

    def release(self, key: Key) -> None:
        """None of our clients holds or waits."""
        proxy = self.proxies.get(key)
        if proxy is None:
            return
        proxy.waiting = None
        proxy.turn.remove()
        if proxy.main.mode is not None:
            if proxy.contended:
                proxy.main.close()
            else:
                proxy.main.unlock()
        proxy.idle_since = time.monotonic()

    def acknowledge(self, key: Key, holder: str) -> None:
        """Answer a knock: our clients are alive. `holder` is who, for people to read."""
        proxy = self.proxies.get(key)
        if proxy and proxy.main.mode is not None:
            proxy.main.write(f"{holders.pid_namespace()} {holder}" if holder else "")
            os.utime(proxy.main.descriptor)

    def other_holder(self, key: Key) -> str:
        """Return whom another keeper has named as holder when it was knocked at; empty where it has not."""
        proxy = self.proxies.get(key)
        text = proxy.main.read() if proxy and proxy.main.descriptor >= 0 else ""
        namespace, _, holder = text.partition(" ")
        return (
            holder if namespace == str(holders.pid_namespace()) or not holder else f"{holder}, in another pid namespace"
        )

    def read(self) -> None:
        """Look at what the other keepers have done."""
        for file, mask in self._watcher.read():
            if file is None:
                self.recheck()
                continue
            key = file.proxy.key
            if mask & IN_OPEN:
                file.alone = False
            if mask & IN_OPEN and file is file.proxy.main:
                if file.mode is None:
                    self.opened.add(key)
                else:
                    file.proxy.contended_until = time.monotonic() + CONTENDED_SECONDS
                    self.knocked.add(key)
            if mask & IN_CLOSE_WRITE or (mask & IN_ATTRIB and file.is_unlinked()):
                self.freed.add(key)
            elif mask & IN_ATTRIB:
                self.answered.add(key)

    def recheck(self) -> None:
        """Have every file looked at, since events may have been lost."""
        self.freed.update(self.proxies)
        self.knocked.update(k for k, p in self.proxies.items() if p.main.mode is not None)

    def close_idle(self, key: Key) -> None:
        """Close a proxy that is open for later use only, so that whoever was refused just before tries again."""
        proxy = self.proxies.get(key)
        if proxy and proxy.main.mode is None and proxy.waiting is None:
            proxy.main.close()

    def clean(self, everything: bool = False) -> None:
        """Remove proxies that have not been used for a while."""
        limit = time.monotonic() - (0.0 if everything else IDLE_PROXY_SECONDS)
        for key, proxy in list(self.proxies.items()):
            if proxy.main.mode is None and proxy.waiting is None and proxy.idle_since <= limit:
                proxy.main.remove()
                proxy.turn.close()
                del self.proxies[key]

    def adopt(self, key: Key, descriptor: int, exclusive: bool | None) -> None:
        """Take over the proxy of a keeper that has died; None: nobody holds, so give it back."""
        if exclusive is None:
            os.close(descriptor)
            return
        proxy = self._proxy(key)
        proxy.main.adopt(descriptor)
        if not proxy.main.try_lock(exclusive):
            proxy.main.try_lock(False)
