"""The FUSE server counts its requests, for those who measure."""

from __future__ import annotations

import os

import pytest

from flockshim import nolockfs
from flockshim.fuse_counts import read
from flockshim.fuse_protocol import Opcode


@pytest.mark.usefixtures("nolock_dir")  # skips where there is no FUSE
def test_each_request_is_counted_once_by_its_opcode() -> None:
    mount = nolockfs.mount()
    with mount as directory:
        (directory / "a").write_text("a")
        before = read(mount.server_pid)
        os.rename(directory / "a", directory / "b")
        os.rename(directory / "b", directory / "c")
        (directory / "d").mkdir()
        after = read(mount.server_pid)
    changed = {opcode: after[opcode] - before[opcode] for opcode in (Opcode.RENAME, Opcode.MKDIR, Opcode.UNLINK)}
    assert changed == {Opcode.RENAME: 2, Opcode.MKDIR: 1, Opcode.UNLINK: 0}


def test_a_process_that_is_no_server_has_no_counts() -> None:
    with pytest.raises(ProcessLookupError):
        read(os.getpid())
