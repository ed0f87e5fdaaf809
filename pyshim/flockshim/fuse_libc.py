"""The few system calls that a FUSE server needs and the standard library lacks."""

import ctypes
import os
from struct import Struct

MS_NOSUID = 2
MS_NODEV = 4
MNT_DETACH = 2
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_MAX_HANDLE = 128
_HANDLE_HEAD = Struct("=Ii")
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.renameat2.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
]
_libc.mount.argtypes = [
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
]
_Times = ctypes.c_long * 4


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    """Mount a file system.

    :raises OSError: as mount(2).
    """
    names = (os.fsencode(text) for text in (source, target, kind))
    _check(_libc.mount(*names, flags, os.fsencode(options)))


def umount(target: str, flags: int) -> None:
    """Unmount *target*; *flags* is 0 or MNT_DETACH.

    :raises OSError: as umount2(2).
    """
    _check(_libc.umount2(os.fsencode(target), flags))


def rename(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """Rename with *flags* such as RENAME_NOREPLACE and RENAME_EXCHANGE.

    :raises OSError: as renameat2(2).
    """
    _check(_libc.renameat2(old_dir, old, new_dir, new, flags))


def set_times(path: bytes, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set both times of *path*, each (seconds, nanoseconds).

    UTIME_NOW and UTIME_OMIT may stand for the nanoseconds: os.utime() cannot leave one out.

    :raises OSError: as utimensat(2).
    """
    _check(_libc.utimensat(_AT_FDCWD, path, _Times(*atime, *mtime), 0))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate, punch or zero a range of bytes.

    :raises OSError: as fallocate(2).
    """
    _check(_libc.fallocate(fd, mode, offset, length))


def handle(fd: int) -> bytes:
    """Return a file handle for what *fd* has open.

    :raises OSError: as name_to_handle_at(2): EOPNOTSUPP on file systems without.
    """
    buffer = ctypes.create_string_buffer(_HANDLE_HEAD.pack(_MAX_HANDLE, 0), 8 + _MAX_HANDLE)
    mount = ctypes.c_int()
    _check(_libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(mount), _AT_EMPTY_PATH))
    size, _ = _HANDLE_HEAD.unpack_from(buffer)
    return buffer.raw[: _HANDLE_HEAD.size + size]


def open_handle(mount_fd: int, handle: bytes) -> int:
    """Return an O_PATH descriptor for a *handle* on the file system of *mount_fd*.

    :raises OSError: as open_by_handle_at(2): ESTALE when the file is gone, EPERM without
        CAP_DAC_READ_SEARCH.
    """
    fd = int(_libc.open_by_handle_at(mount_fd, handle, os.O_PATH | os.O_CLOEXEC))
    _check(min(fd, 0))
    return fd


def signal_on_parent_death(number: int) -> None:
    """Have this process sent a signal when its parent ends.

    :raises OSError: as prctl(2).
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0))
