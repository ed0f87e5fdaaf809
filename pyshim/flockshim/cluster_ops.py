"""What the cluster protocol asks of the file system: it yields these, and is sent the result or thrown the OSError.

So the protocol blocks nobody: a keeper performs each operation in a thread, and the tests perform them on a model. All
names are those of files in one directory, none of them is followed if it is a symbolic link.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar, Union


class Look(NamedTuple):
    """open(2) the file by its path and close it; the result is None."""

    name: str


class Read(NamedTuple):
    """Open the file by its path; the result is its text. Of a symbolic link, its target, readlink(2)."""

    name: str


class List(NamedTuple):
    """Scan the directory; the result is the list of names that begin with `prefix`."""

    prefix: str


class Create(NamedTuple):
    """Make a file that must not exist (O_EXCL), with this text, and fsync(2) it; on an error after that, remove it."""

    name: str
    text: str


class Write(NamedTuple):
    """Open by path (O_CREAT, O_TRUNC), write this text, fsync(2)."""

    name: str
    text: str


class Link(NamedTuple):
    """link(2)."""

    name: str
    new: str


class Symlink(NamedTuple):
    """symlink(2)."""

    target: str
    name: str


class Rename(NamedTuple):
    """rename(2)."""

    name: str
    new: str


class Unlink(NamedTuple):
    """unlink(2)."""

    name: str


class Pause(NamedTuple):
    """No operation: wait a moment, longer the higher `attempt` (from 0), with jitter. What was read was out of date."""

    attempt: int


class Wait(NamedTuple):
    """No operation: we stand in the queue at `position` (0 is its head); go on when it is time to poll."""

    position: int


Operation = Union[Look, Read, List, Create, Write, Link, Symlink, Rename, Unlink, Pause, Wait]

T = TypeVar("T")
Protocol = Generator[Operation, Any, T]
