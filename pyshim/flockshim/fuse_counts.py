"""How many requests of each kind a FUSE server has had, for whoever owns the mount: benchmarks count what locks cost.

The counts are in memory that has a name among the server's descriptors only (memfd_create(2)), one unsigned 64-bit
number for each opcode. So reading them disturbs neither the server nor the mount.
"""

import contextlib
import errno
import mmap
import os
from array import array
from pathlib import Path

from flockshim.fuse_protocol import Opcode

OPCODES = 256
_NAME = "flockshim-fuse-counts"
_BYTES = 8


def make() -> memoryview:
    """Return the numbers, by opcode, for the server to add to; `read` finds them while this process lives."""
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    os.ftruncate(descriptor, OPCODES * _BYTES)
    return memoryview(mmap.mmap(descriptor, OPCODES * _BYTES)).cast("Q")


def read(server_pid: int) -> dict[Opcode, int]:
    """Return how many requests the server (`Mount.server_pid`) has read so far, for each opcode that it knows.

    :raises OSError: ESRCH when it has ended or is no server of this package, EACCES when it is another user's.
    """
    for name in _descriptors(f"/proc/{server_pid}/fd"):
        # Between the listing and the look the server may have closed what it had opened for a request.
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(name).startswith(f"/memfd:{_NAME}"):
                counts = array("Q", Path(name).read_bytes())
                return {opcode: counts[opcode] for opcode in Opcode}
    raise ProcessLookupError(errno.ESRCH, "serves no mount of flockshim's", str(server_pid))


def _descriptors(directory: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return [f"{directory}/{number}" for number in os.listdir(directory)]
    return []
