"""The file operations: each is done on the backing directory, its result given to the kernel."""

import errno
import os
import stat
from typing import Callable, Optional, Union

from flockshim import fuse_libc
from flockshim import fuse_protocol as p
from flockshim.fuse_inodes import Inode, Inodes
from flockshim.fuse_protocol import DirEntry, Opcode, Request, SetAttr

Answer = Optional[Union[bytes, bytearray, memoryview]]

# O_APPEND stays behind: the kernel gives each write its offset, and a descriptor that appends would
# misplace pages written back from a mapping. O_DIRECT would ask for an alignment we do not keep.
_KEPT_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC | os.O_CLOEXEC
_ID_BITS = stat.S_ISUID | stat.S_ISGID


class Passthrough:
    """Answers requests about files with what the backing directory answers.

    Runs in one thread, so that a file made and then given to its owner is never seen half done.
    """

    def __init__(self, backing: str) -> None:
        """Serve the directory *backing*."""
        self._inodes = Inodes(backing)
        self._read_buffer = memoryview(bytearray(p.MAX_WRITE))
        self._listings: dict[int, list[DirEntry]] = {}
        self._ids = (os.geteuid(), os.getegid())

    def handlers(self) -> dict[int, Callable[[Request], Answer]]:
        """The operation for each opcode; each raises OSError for the errno to answer."""
        return {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.READLINK: self._readlink,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.LINK: self._link,
            Opcode.OPEN: self._open,
            Opcode.CREATE: self._create,
            Opcode.TMPFILE: self._tmpfile,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            Opcode.COPY_FILE_RANGE: self._copy_file_range,
            Opcode.FSYNC: self._fsync,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.FSYNCDIR: self._fsync,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.STATFS: self._statfs,
            Opcode.IOCTL: self._ioctl,
        }

    # Names and inodes

    def _lookup(self, request: Request) -> Answer:
        (name,) = p.names(request.body)
        try:
            return self._inodes.tell(name, self._inodes[request.node].fd)
        except FileNotFoundError:
            return p.NO_ENTRY

    def _forget(self, request: Request) -> Answer:
        (count,) = p.COUNT.unpack_from(request.body)
        self._inodes.forget(request.node, count)
        return None

    def _batch_forget(self, request: Request) -> Answer:
        number, _ = p.BATCH_FORGET_IN.unpack_from(request.body)
        forgets = request.body[p.BATCH_FORGET_IN.size :][: number * p.FORGET_ONE.size]
        for node, count in p.FORGET_ONE.iter_unpack(forgets):
            self._inodes.forget(node, count)
        return None

    def _readlink(self, request: Request) -> Answer:
        return os.readlink(b"", dir_fd=self._inodes[request.node].fd)

    def _symlink(self, request: Request) -> Answer:
        name, target = p.names(request.body)
        parent = self._inodes[request.node]
        os.symlink(target, name, dir_fd=parent.fd)
        return self._made(request, parent, name, 0)

    def _mknod(self, request: Request) -> Answer:
        mode, device, _umask, _ = p.MKNOD_IN.unpack_from(request.body)
        (name,) = p.names(request.body[p.MKNOD_IN.size :])
        parent = self._inodes[request.node]
        os.mknod(name, mode, device, dir_fd=parent.fd)
        return self._made(request, parent, name, mode)

    def _mkdir(self, request: Request) -> Answer:
        mode, _umask = p.MKDIR_IN.unpack_from(request.body)
        (name,) = p.names(request.body[p.MKDIR_IN.size :])
        parent = self._inodes[request.node]
        os.mkdir(name, mode, dir_fd=parent.fd)
        return self._made(request, parent, name, 0)

    def _unlink(self, request: Request) -> Answer:
        (name,) = p.names(request.body)
        os.unlink(name, dir_fd=self._inodes[request.node].fd)
        return None

    def _rmdir(self, request: Request) -> Answer:
        (name,) = p.names(request.body)
        os.rmdir(name, dir_fd=self._inodes[request.node].fd)
        return None

    def _rename(self, request: Request) -> Answer:
        (new_parent,) = p.RENAME_IN.unpack_from(request.body)
        old, new = p.names(request.body[p.RENAME_IN.size :])
        source, target = self._inodes[request.node], self._inodes[new_parent]
        os.rename(old, new, src_dir_fd=source.fd, dst_dir_fd=target.fd)
        return None

    def _rename2(self, request: Request) -> Answer:
        new_parent, flags, _ = p.RENAME2_IN.unpack_from(request.body)
        old, new = p.names(request.body[p.RENAME2_IN.size :])
        source, target = self._inodes[request.node], self._inodes[new_parent]
        fuse_libc.rename(source.fd, old, target.fd, new, flags)
        return None

    def _link(self, request: Request) -> Answer:
        (number,) = p.LINK_IN.unpack_from(request.body)
        (name,) = p.names(request.body[p.LINK_IN.size :])
        parent = self._inodes[request.node]
        os.link(self._inodes[number].path, name, dst_dir_fd=parent.fd, follow_symlinks=True)
        return self._inodes.tell(name, parent.fd)

    def _made(self, request: Request, parent: Inode, name: bytes, mode: int) -> bytes:
        owner = self._owner(request, parent)
        if owner:
            os.chown(name, *owner, dir_fd=parent.fd, follow_symlinks=False)
            if mode & _ID_BITS:
                os.chmod(name, mode, dir_fd=parent.fd)  # chown(2) takes these bits away
        return self._inodes.tell(name, parent.fd)

    def _owner(self, request: Request, parent: Inode) -> Optional[tuple[int, int]]:
        """Who is to own a new file, unless we do; group -1: that of a set-gid directory."""
        if (request.uid, request.gid) == self._ids or self._ids[0] != 0:
            return None
        inherits = os.fstat(parent.fd).st_mode & stat.S_ISGID
        return request.uid, -1 if inherits else request.gid

    # Attributes

    def _getattr(self, request: Request) -> Answer:
        return p.attr_out(os.fstat(self._inodes[request.node].fd))

    def _setattr(self, request: Request) -> Answer:
        inode = self._inodes[request.node]
        new = p.NewAttributes(*p.SETATTR_IN.unpack_from(request.body))
        if new.valid & (SetAttr.UID | SetAttr.GID):
            uid = new.uid if new.valid & SetAttr.UID else -1
            gid = new.gid if new.valid & SetAttr.GID else -1
            os.chown(inode.path, uid, gid)
        if new.valid & SetAttr.MODE:
            os.chmod(inode.path, stat.S_IMODE(new.mode))
        if new.valid & SetAttr.SIZE:
            os.truncate(new.fh if new.valid & SetAttr.FH else inode.path, new.size)
        if new.valid & (SetAttr.ATIME | SetAttr.MTIME):
            fuse_libc.set_times(inode.path, *new.times())
        return p.attr_out(os.fstat(inode.fd))

    def _statfs(self, request: Request) -> Answer:
        return p.statfs_out(os.statvfs(self._inodes[request.node].fd))

    def _ioctl(self, request: Request) -> Answer:
        raise OSError(errno.ENOTTY, "no ioctl")

    # Open files

    def _open(self, request: Request) -> Answer:
        flags, _ = p.OPEN_IN.unpack_from(request.body)
        fd = os.open(self._inodes[request.node].path, flags & _KEPT_FLAGS)
        return p.OPEN_OUT.pack(fd, p.FOPEN_KEEP_CACHE, 0)

    def _create(self, request: Request) -> Answer:
        flags, mode, _umask, _ = p.CREATE_IN.unpack_from(request.body)
        (name,) = p.names(request.body[p.CREATE_IN.size :])
        parent = self._inodes[request.node]
        kept = flags & _KEPT_FLAGS | os.O_NOFOLLOW
        try:
            fd = os.open(name, kept | os.O_CREAT | os.O_EXCL, mode, dir_fd=parent.fd)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            return self._opened(os.open(name, kept, dir_fd=parent.fd))
        self._give(request, parent, fd, mode)
        return self._opened(fd)

    def _tmpfile(self, request: Request) -> Answer:
        flags, mode, _umask, _ = p.CREATE_IN.unpack_from(request.body)
        parent = self._inodes[request.node]
        unlinkable = flags & os.O_EXCL
        fd = os.open(parent.path, flags & _KEPT_FLAGS | os.O_TMPFILE | unlinkable, mode)
        self._give(request, parent, fd, mode)
        return self._opened(fd)

    def _give(self, request: Request, parent: Inode, fd: int, mode: int) -> None:
        owner = self._owner(request, parent)
        if owner:
            os.fchown(fd, *owner)
            if mode & _ID_BITS:
                os.fchmod(fd, mode)

    def _opened(self, fd: int) -> bytes:
        try:
            entry = self._inodes.tell_open(fd)
        except OSError:
            os.close(fd)
            raise
        return entry + p.OPEN_OUT.pack(fd, p.FOPEN_KEEP_CACHE, 0)

    def _read(self, request: Request) -> Answer:
        fh, offset, size = p.READ_IN.unpack_from(request.body)
        return self._read_buffer[: os.preadv(fh, [self._read_buffer[:size]], offset)]

    def _write(self, request: Request) -> Answer:
        fh, offset, size, *_ = p.WRITE_IN.unpack_from(request.body)
        data = request.body[p.WRITE_IN.size :][:size]
        return p.WRITE_OUT.pack(os.pwrite(fh, data, offset), 0)

    def _fallocate(self, request: Request) -> Answer:
        fh, offset, length, mode = p.FALLOCATE_IN.unpack_from(request.body)
        fuse_libc.fallocate(fh, mode, offset, length)
        return None

    def _lseek(self, request: Request) -> Answer:
        fh, offset, whence = p.LSEEK_IN.unpack_from(request.body)
        return p.LSEEK_OUT.pack(os.lseek(fh, offset, whence))

    def _copy_file_range(self, request: Request) -> Answer:
        source, source_at, _node, target, target_at, length, _ = p.COPY_IN.unpack_from(request.body)
        count = os.copy_file_range(source, target, min(length, 1 << 30), source_at, target_at)
        return p.WRITE_OUT.pack(count, 0)

    def _fsync(self, request: Request) -> Answer:
        fh, flags = p.FSYNC_IN.unpack_from(request.body)
        if flags & p.FSYNC_DATA_ONLY:
            os.fdatasync(fh)
        else:
            os.fsync(fh)
        return None

    def _release(self, request: Request) -> Answer:
        (fh,) = p.HANDLE.unpack_from(request.body)
        os.close(fh)
        return None

    # Directories

    def _opendir(self, request: Request) -> Answer:
        path = self._inodes[request.node].path
        return p.OPEN_OUT.pack(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), 0, 0)

    def _readdir(self, request: Request) -> Answer:
        fh, offset, size = p.READ_IN.unpack_from(request.body)
        # One listing from each rewind: names that stay are seen exactly once and an offset stays
        # good, whatever is made or removed meanwhile (readdir(3p)).
        if offset == 0 or fh not in self._listings:
            self._listings[fh] = _listing(fh, is_root=request.node == p.ROOT)
        answer = bytearray()
        for number, entry in enumerate(self._listings[fh][offset:], offset + 1):
            record = p.dirent(entry, number)
            if len(answer) + len(record) > size:
                break
            answer += record
        return answer

    def _releasedir(self, request: Request) -> Answer:
        (fh,) = p.HANDLE.unpack_from(request.body)
        self._listings.pop(fh, None)
        os.close(fh)
        return None


def _listing(fd: int, *, is_root: bool) -> list[DirEntry]:
    above = b"." if is_root else b".."
    dots = [DirEntry(os.stat(path, dir_fd=fd).st_ino, p.DT_DIR, name) for path, name in ((b".", b"."), (above, b".."))]
    with os.scandir(b"/proc/self/fd/%d" % fd) as entries:
        return dots + [DirEntry(entry.inode(), _kind(entry), entry.name) for entry in entries]


def _kind(entry: "os.DirEntry[bytes]") -> int:
    if entry.is_symlink():
        return p.DT_LNK
    if entry.is_dir(follow_symlinks=False):
        return p.DT_DIR
    if entry.is_file(follow_symlinks=False):
        return p.DT_REG
    return p.DT_UNKNOWN
