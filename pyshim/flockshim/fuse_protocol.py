"""The kernel's FUSE messages, as <linux/fuse.h> (protocol 7.31) lays them out.

The protocol is kernel ABI: the same on every architecture, and it only ever grows. That is why it
is spoken here directly rather than through libfuse, whose structures moved between 3.10 and 3.17
(libfuse issue 1029) and whose library has another name since (libfuse3.so.4).
"""

import os
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

from flockshim import fuse_libc

VERSION = (7, 31)
ROOT = 1
MAX_WRITE = 1 << 20
MAX_PAGES = MAX_WRITE // 4096
HEADER_ROOM = 4096
CACHE_SECONDS = 1

FOPEN_KEEP_CACHE = 1 << 1
FSYNC_DATA_ONLY = 1 << 0
LK_FLOCK = 1 << 0
DT_UNKNOWN, DT_DIR, DT_REG, DT_LNK = 0, 4, 8, 10


class Opcode(IntEnum):
    """What the kernel asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    CREATE = 35
    INTERRUPT = 36
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    TMPFILE = 51


class Capability(IntFlag):
    """What kernel and server agree on when the mount begins."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    FLOCK_LOCKS = 1 << 10
    AUTO_INVAL_DATA = 1 << 12
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23


class SetAttr(IntFlag):
    """Which attributes a SETATTR request sets."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8


IN_HEADER = Struct("=IIQQIIII")
OUT_HEADER = Struct("=IiQ")
INIT_IN = Struct("=4I")
INIT_OUT = Struct("=4I2H2I2HI28x")
COUNT = Struct("=Q")
FORGET_ONE = Struct("=QQ")
BATCH_FORGET_IN = Struct("=II")
SETATTR_IN = Struct("=2I3Q3q7I")
MKNOD_IN = Struct("=4I")
MKDIR_IN = Struct("=2I")
LINK_IN = Struct("=Q")
RENAME_IN = Struct("=Q")
RENAME2_IN = Struct("=QII")
OPEN_IN = Struct("=II")
CREATE_IN = Struct("=4I")
OPEN_OUT = Struct("=QII")
READ_IN = Struct("=QQI")
WRITE_IN = Struct("=QQIIQII")
WRITE_OUT = Struct("=II")
STATFS_OUT = Struct("=5Q4I24x")
FSYNC_IN = Struct("=QI")
HANDLE = Struct("=Q")
LK_IN = Struct("=QQQQIII")
FALLOCATE_IN = Struct("=QQQI")
LSEEK_IN = Struct("=QQI")
LSEEK_OUT = Struct("=q")
COPY_IN = Struct("=7Q")
INTERRUPT_IN = Struct("=Q")

_ATTR = "6Q10I"
_ATTR_OUT = Struct("=QII" + _ATTR)
_ENTRY_OUT = Struct("=QQQQII" + _ATTR)
_DIRENT = Struct("=QQII")
_TIME_MASK = (1 << 64) - 1

NO_ENTRY = _ENTRY_OUT.pack(0, 0, CACHE_SECONDS, *([0] * 19))


class Request(NamedTuple):
    """One request: its number, the inode it is about, who asks, and what the opcode adds."""

    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    body: memoryview


class NewAttributes(NamedTuple):
    """The body of SETATTR."""

    valid: int
    padding: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    unused: int
    uid: int
    gid: int

    def times(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Access and modification time as utimensat(2) takes them."""
        return (
            self._time(SetAttr.ATIME, SetAttr.ATIME_NOW, self.atime, self.atime_ns),
            self._time(SetAttr.MTIME, SetAttr.MTIME_NOW, self.mtime, self.mtime_ns),
        )

    def _time(self, is_set: int, is_now: int, seconds: int, nanoseconds: int) -> tuple[int, int]:
        if self.valid & is_now:
            return 0, fuse_libc.UTIME_NOW
        if self.valid & is_set:
            return seconds, nanoseconds
        return 0, fuse_libc.UTIME_OMIT


class DirEntry(NamedTuple):
    """One name in a directory, with its inode number and its DT_ type."""

    ino: int
    kind: int
    name: bytes


def _attr_fields(st: os.stat_result) -> tuple[int, ...]:
    atime, atime_ns = divmod(st.st_atime_ns, 1_000_000_000)
    mtime, mtime_ns = divmod(st.st_mtime_ns, 1_000_000_000)
    ctime, ctime_ns = divmod(st.st_ctime_ns, 1_000_000_000)
    return (
        st.st_ino,
        st.st_size,
        st.st_blocks,
        atime & _TIME_MASK,
        mtime & _TIME_MASK,
        ctime & _TIME_MASK,
        atime_ns,
        mtime_ns,
        ctime_ns,
        st.st_mode,
        st.st_nlink,
        st.st_uid,
        st.st_gid,
        st.st_rdev & 0xFFFFFFFF,
        st.st_blksize,
        0,
    )


def attr_out(st: os.stat_result) -> bytes:
    """The answer to GETATTR and SETATTR."""
    return _ATTR_OUT.pack(CACHE_SECONDS, 0, 0, *_attr_fields(st))


def entry_out(node: int, st: os.stat_result) -> bytes:
    """The answer to LOOKUP and everything that makes a name."""
    return _ENTRY_OUT.pack(node, 0, CACHE_SECONDS, CACHE_SECONDS, 0, 0, *_attr_fields(st))


def dirent(entry: DirEntry, next_offset: int) -> bytes:
    """One record of READDIR, padded to 8 bytes."""
    head = _DIRENT.pack(entry.ino, next_offset, len(entry.name), entry.kind)
    return head + entry.name + bytes(-len(entry.name) % 8)


def statfs_out(fs: os.statvfs_result) -> bytes:
    """The answer to STATFS."""
    return STATFS_OUT.pack(
        fs.f_blocks,
        fs.f_bfree,
        fs.f_bavail,
        fs.f_files,
        fs.f_ffree,
        fs.f_bsize,
        fs.f_namemax,
        fs.f_frsize,
        0,
    )


def init_out(capabilities: Capability, readahead: int) -> bytes:
    """The answer to INIT: version, capabilities, and the sizes that bound later requests."""
    return INIT_OUT.pack(*VERSION, readahead, capabilities, 64, 48, MAX_WRITE, 1, MAX_PAGES, 0, 0)


def names(body: memoryview) -> list[bytes]:
    """The NUL-terminated names at the end of a request."""
    return bytes(body).split(b"\0")[:-1]
