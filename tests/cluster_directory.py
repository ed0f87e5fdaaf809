"""A directory on a model server: operations that are done at once, scans in two steps, what must always be there."""

from __future__ import annotations

import errno
import functools
import os
import zlib
from collections.abc import Collection
from typing import Any

from flockshim import cluster_ops as ops
from flockshim.cluster_names import Names, StateName, data_of, lineage_of_claim
from flockshim.cluster_state import State, of_text, of_token

TARGET = "lock"
NAMES = Names(TARGET)


class Violation(AssertionError):
    """Something that must never be."""


@functools.lru_cache(maxsize=4096)
def state_of(directory: tuple[tuple[str, str], ...]) -> tuple[StateName, State] | None:
    """The state of the claimed lineage; raises Violation where there is not exactly one, or it cannot be read."""
    files = dict(directory)
    if NAMES.claim not in files:
        return None
    lineage = lineage_of_claim(files[NAMES.claim])
    parsed = [NAMES.parse(name) for name in files]
    states = [name for name in parsed if isinstance(name, StateName) and name.lineage == lineage]
    if len(states) != 1:
        raise Violation(f"{len(states)} state files of the claimed lineage: {sorted(files)}")
    data = data_of(states[0])
    if data is None:
        return states[0], of_token(states[0].version, states[0].token)
    if NAMES.data(data) not in files:
        raise Violation(f"the state's data file is missing: {sorted(files)}")
    return states[0], of_text(states[0].version, files[NAMES.data(data)])


def perform(files: dict[str, str], op: Any, hard_links: bool) -> Any:
    """Do an operation on the server; raises OSError."""
    name = getattr(op, "name", "")
    if isinstance(op, ops.Create):
        _must(name not in files, errno.EEXIST)
        files[name] = op.text
    elif isinstance(op, ops.Write):
        files[name] = op.text
    elif isinstance(op, ops.Symlink):
        _must(name not in files, errno.EEXIST)
        files[name] = op.target
    elif isinstance(op, ops.Link):
        _must(hard_links, errno.EPERM)
        _must(name in files, errno.ENOENT)
        _must(op.new not in files, errno.EEXIST)
        files[op.new] = files[name]
    else:
        _must(name in files, errno.ENOENT)
        if isinstance(op, ops.Rename):
            files[op.new] = files.pop(name)
        elif isinstance(op, ops.Unlink):
            del files[name]
        else:
            return files[name] if isinstance(op, ops.Read) else None
    return None


def _must(condition: bool, number: int) -> None:
    if not condition:
        raise OSError(number, os.strerror(number))


REPEATED = {ops.Create: errno.EEXIST, ops.Symlink: errno.EEXIST, ops.Link: errno.EEXIST}
REPEATED.update({ops.Rename: errno.ENOENT, ops.Unlink: errno.ENOENT})


def half(names: Collection[str], which: int) -> tuple[str, ...]:
    """What one of the two steps of a scan finds: a rename may move a name to the other half, either way."""
    return tuple(sorted(name for name in names if zlib.crc32(name.encode()) & 1 == which))
