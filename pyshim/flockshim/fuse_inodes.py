"""The inodes that the kernel knows, each held by an O_PATH descriptor."""

import os

from flockshim import fuse_protocol as p

_OPEN_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Inode:
    """An inode, and how many times the kernel was told of it."""

    __slots__ = ("count", "fd", "key", "number", "path")

    def __init__(self, number: int, fd: int, key: tuple[int, int]) -> None:
        """Take *fd* over; *key* is its (st_dev, st_ino)."""
        self.number = number
        self.fd = fd
        self.key = key
        self.path = b"/proc/self/fd/%d" % fd
        self.count = 0


class Inodes:
    """Finds inodes by the number the kernel uses and by (st_dev, st_ino).

    Holding a descriptor keeps the file system from giving the same inode number to another file,
    which is what makes (st_dev, st_ino) a safe key, and hard links one inode.
    """

    def __init__(self, root: str) -> None:
        """Begin with the directory *root*, which is never forgotten."""
        self._last = p.ROOT - 1
        self._by_number: dict[int, Inode] = {}
        self._by_key: dict[tuple[int, int], Inode] = {}
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._add(fd, os.fstat(fd)).count = 1

    def __getitem__(self, number: int) -> Inode:
        """The inode the kernel calls *number*."""
        return self._by_number[number]

    def _add(self, fd: int, st: os.stat_result) -> Inode:
        self._last += 1
        inode = Inode(self._last, fd, (st.st_dev, st.st_ino))
        self._by_number[inode.number] = self._by_key[inode.key] = inode
        return inode

    def tell(self, name: bytes, parent: int) -> bytes:
        """Look *name* up in the directory descriptor *parent*, and tell the kernel of the inode.

        The kernel gives the telling back with FORGET.

        :raises OSError: as open(2).
        """
        st = os.stat(name, dir_fd=parent, follow_symlinks=False)
        inode = self._by_key.get((st.st_dev, st.st_ino))
        if inode is None:
            fd = os.open(name, _OPEN_PATH, dir_fd=parent)
            inode, st = self._adopt(fd)
        inode.count += 1
        return p.entry_out(inode.number, st)

    def tell_open(self, fd: int) -> bytes:
        """Tell the kernel of the file that *fd* has open, whatever its names are."""
        path_fd = os.open(b"/proc/self/fd/%d" % fd, os.O_PATH | os.O_CLOEXEC)
        inode, st = self._adopt(path_fd)
        inode.count += 1
        return p.entry_out(inode.number, st)

    def _adopt(self, fd: int) -> tuple[Inode, os.stat_result]:
        st = os.fstat(fd)
        inode = self._by_key.get((st.st_dev, st.st_ino))
        if inode is None:
            return self._add(fd, st), st
        os.close(fd)
        return inode, st

    def forget(self, number: int, count: int) -> None:
        """Take *count* tellings back; at none the inode is let go."""
        inode = self._by_number[number]
        inode.count -= count
        if inode.count <= 0 and number != p.ROOT:
            del self._by_number[number], self._by_key[inode.key]
            os.close(inode.fd)
