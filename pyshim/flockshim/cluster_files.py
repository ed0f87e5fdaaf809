"""The operations of the cluster protocol on a real directory. Each may block for as long as a file server likes."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Any

from flockshim.cluster_ops import Create, Link, List, Look, Operation, Read, Rename, Symlink, Unlink, Write

MAX_TEXT = 1 << 20
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
# Other users may have to see who holds, and none but the owner may write.
_MODE = 0o644


def perform(directory: int, op: Operation) -> Any:
    """Perform an operation in the directory of this descriptor and return its result, as `cluster_ops` says.

    Raises OSError. `Pause` and `Wait` are the caller's.
    """
    if isinstance(op, Rename):
        os.rename(op.name, op.new, src_dir_fd=directory, dst_dir_fd=directory)
    elif isinstance(op, Look):
        os.close(os.open(op.name, os.O_RDONLY | _OPEN, dir_fd=directory))
    elif isinstance(op, Read):
        return _read(directory, op.name)
    elif isinstance(op, List):
        return [name for name in os.listdir(directory) if name.startswith(op.prefix)]
    elif isinstance(op, Create):
        _create(directory, op)
    elif isinstance(op, Write):
        _write(os.open(op.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _OPEN, _MODE, dir_fd=directory), op.text)
    elif isinstance(op, Link):
        os.link(op.name, op.new, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    elif isinstance(op, Symlink):
        os.symlink(op.target, op.name, dir_fd=directory)
    elif isinstance(op, Unlink):
        os.unlink(op.name, dir_fd=directory)
    else:
        raise TypeError(op)
    return None


def _read(directory: int, name: str) -> str:
    try:
        descriptor = os.open(name, os.O_RDONLY | _OPEN, dir_fd=directory)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return os.readlink(name, dir_fd=directory)
    # Not by a file object, which asks the server for more than the text.
    try:
        data = b""
        while len(data) < MAX_TEXT:
            more = os.read(descriptor, MAX_TEXT)
            if not more:
                break
            data += more
        return os.fsdecode(data)
    finally:
        os.close(descriptor)


def _create(directory: int, op: Create) -> None:
    descriptor = os.open(op.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, _MODE, dir_fd=directory)
    try:
        _write(descriptor, op.text)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(op.name, dir_fd=directory)
        raise


def _write(descriptor: int, text: str) -> None:
    """Write and close. What close(2) reports is an error of the write too: NFS and FUSE find out only then."""
    try:
        data = os.fsencode(text)
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
