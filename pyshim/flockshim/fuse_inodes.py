"""The inodes that the kernel knows, each reached by an O_PATH descriptor."""

import errno
import os
import resource
import sys
from collections import OrderedDict
from typing import Optional

from flockshim import fuse_libc
from flockshim import fuse_protocol as p

_CLOSED = -1


class Inode:
    """An inode, and how many times the kernel was told of it."""

    __slots__ = ("count", "fd", "handle", "key", "number")

    def __init__(self, number: int, fd: int, key: tuple[int, int]) -> None:
        """Take *fd* over; *key* is its (st_dev, st_ino)."""
        self.number = number
        self.fd = fd
        self.key = key
        self.count = 0
        self.handle: Optional[bytes] = None

    @property
    def path(self) -> bytes:
        """A magic link to the inode, for calls that take no O_PATH descriptor."""
        return b"/proc/self/fd/%d" % self.fd


class Inodes:
    """Finds inodes by the number the kernel uses and by (st_dev, st_ino).

    An open descriptor keeps the file system from giving the same inode number to another file, which
    makes (st_dev, st_ino) a safe key, and hard links one inode. The kernel may know more inodes than
    there may be descriptors: then those not used for longest are closed and opened again by their
    file handle, if that can be had (open_by_handle_at(2)).
    """

    def __init__(self, root: str) -> None:
        """Begin with the directory *root*, which is never forgotten."""
        self._last = p.ROOT - 1
        self._by_number: dict[int, Inode] = {}
        self._by_key: dict[tuple[int, int], Inode] = {}
        self._open: OrderedDict[int, Inode] = OrderedDict()
        self._root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._root_device = os.fstat(self._root_fd).st_dev
        self._limit = sys.maxsize
        self._add(os.open(root, os.O_PATH | os.O_CLOEXEC), os.fstat(self._root_fd)).count = 1
        if self._has_handles():
            self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    def __getitem__(self, number: int) -> Inode:
        """The inode the kernel calls *number*, with its descriptor open.

        :raises OSError: ESTALE when it was unlinked while its descriptor had to be closed.
        """
        inode = self._by_number[number]
        self._use(inode)
        return inode

    def tell(self, name: bytes, parent: int) -> bytes:
        """Look *name* up in the directory descriptor *parent*, and tell the kernel of the inode.

        The kernel gives the telling back with FORGET.

        :raises OSError: as open(2).
        """
        st = os.stat(name, dir_fd=parent, follow_symlinks=False)
        inode = self._known(st)
        if inode is None:
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            inode, st = self._adopt(os.open(name, flags, dir_fd=parent))
        inode.count += 1
        return p.entry_out(inode.number, st)

    def tell_open(self, fd: int) -> bytes:
        """Tell the kernel of the file that *fd* has open, whatever its names are.

        :raises OSError: as open(2).
        """
        inode, st = self._adopt(os.open(b"/proc/self/fd/%d" % fd, os.O_PATH | os.O_CLOEXEC))
        inode.count += 1
        return p.entry_out(inode.number, st)

    def forget(self, number: int, count: int) -> None:
        """Take *count* tellings back; at none the inode is let go."""
        inode = self._by_number[number]
        inode.count -= count
        if inode.count > 0 or number == p.ROOT:
            return
        del self._by_number[number]
        if self._by_key.get(inode.key) is inode:
            del self._by_key[inode.key]
        self._open.pop(number, None)
        if inode.fd != _CLOSED:
            os.close(inode.fd)

    def _add(self, fd: int, st: os.stat_result) -> Inode:
        self._last += 1
        inode = Inode(self._last, fd, (st.st_dev, st.st_ino))
        self._by_number[inode.number] = self._by_key[inode.key] = inode
        self._opened(inode)
        return inode

    def _adopt(self, fd: int) -> tuple[Inode, os.stat_result]:
        st = os.fstat(fd)
        inode = self._known(st)
        if inode is None:
            return self._add(fd, st), st
        os.close(fd)
        return inode, st

    def _known(self, st: os.stat_result) -> Optional[Inode]:
        inode = self._by_key.get((st.st_dev, st.st_ino))
        if inode is None or inode.fd != _CLOSED:
            return inode
        try:
            self._use(inode)
        except OSError as error:
            if error.errno == errno.ESTALE:
                return None  # it is gone, and another file has got its inode number
            raise
        return inode

    def _use(self, inode: Inode) -> None:
        if inode.fd != _CLOSED:
            if inode.number in self._open:
                self._open.move_to_end(inode.number)
            return
        assert inode.handle is not None
        inode.fd = fuse_libc.open_handle(self._root_fd, inode.handle)
        self._opened(inode)

    def _opened(self, inode: Inode) -> None:
        """Note that an inode was opened, and close the one not used for longest if need be."""
        if inode.key[0] != self._root_device:
            return  # a file system mounted below: its handles would need a descriptor of it
        self._open[inode.number] = inode
        if len(self._open) > self._limit:
            _, oldest = self._open.popitem(last=False)
            oldest.handle = oldest.handle or fuse_libc.handle(oldest.fd)
            os.close(oldest.fd)
            oldest.fd = _CLOSED

    def _has_handles(self) -> bool:
        """Ordinary users may not open by handle, and not every file system has handles."""
        try:
            os.close(fuse_libc.open_handle(self._root_fd, fuse_libc.handle(self._root_fd)))
        except OSError:
            return False
        return True
