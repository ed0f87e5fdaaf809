"""Reads from an ELF file's headers whether the preload library gets into it (elf(5), ld.so(8))."""

import os
import stat

from flockshim import FlockshimError, launch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

MAGIC = b"\x7fELF"

HEAD_SIZE = 4096  # holds the headers of nearly every program, and is one page to read

# elf(5). The shim exists for 64-bit little-endian machines, so only their layout is read; any other
# file has been recognised by its first bytes before that.
HEADER_SIZE = 64
PROGRAM_HEADER_SIZE = 56
SECTION_HEADER_SIZE = 64
ET_EXEC, ET_DYN = 2, 3
PT_INTERP, PT_NOTE = 3, 4
MACHINES = {3: "x86", 40: "ARM", 62: "x86-64", 183: "AArch64"}

MAX_NOTES = 65536

# The note that Go's linker writes: type 4, owner "Go". It can be switched off (-buildid=), the line
# table's section cannot.
GO_NOTE = b"\4\0\0\0Go\0\0"
GO_SECTION = b".gopclntab\0"


class UnreachableError(FlockshimError):
    """The preload library does not get into a program, but a supervisor would."""

    def __init__(self, why: str, advice: str) -> None:
        """Take the program and what it is, and what to do where there is no supervisor either."""
        super().__init__(f"{why}, so the lock shim cannot work in it: use --via seccomp")
        self.why = why
        self.advice = advice


def why_unreachable(fd: int, head: bytes) -> "Optional[tuple[str, str]]":
    """Return why the preload library does not get into this program, and what to use instead; else ``None``.

    :param fd: the open file.
    :param head: its first ``HEAD_SIZE`` bytes, or all of them.
    :raises ValueError: when the kernel could not execute the file.
    """
    if len(head) < 20:
        raise ValueError("truncated")
    if _target(head) != _shim_target():
        machine = _number(head[18:20])
        name = MACHINES.get(machine, f"ELF machine {machine}")
        bits = 32 if head[4] == 1 else 64
        kind = f"is built for another kind of machine ({bits}-bit {name})"
        return kind, "use a build for the kind that flockshim is built for"
    kinds, notes = _program_headers(fd, head)
    if GO_NOTE in notes or (PT_INTERP in kinds and _is_go_by_section(fd, head)):
        return "is a Go program, which locks without the C library", "there is no other way into it"
    if PT_INTERP not in kinds:
        return "is statically linked", "use a dynamically linked build (for uv: gnu instead of musl)"
    return None


def why_privileged(file: "int | str") -> str:
    """Return what keeps ``LD_PRELOAD`` out of a program that changes who runs it; else ``""``.

    :param file: the program's descriptor, or its path if it cannot be read.
    """
    if not _is_privileged(file):
        return ""
    return (
        "is set-uid, set-gid or has file capabilities, and the dynamic linker preloads nothing "
        "there: start flockshim behind it, not before it"
    )


def _number(field: bytes) -> int:
    return int.from_bytes(field, "little")


def _target(head: bytes) -> bytes:
    return head[4:6] + head[18:20]  # class, byte order and machine


def _shim_target() -> bytes:
    library = os.path.join(launch.HOME, launch.LIBRARY)
    try:
        fd = os.open(library, os.O_RDONLY)
    except OSError as error:
        raise FlockshimError(f"{library!r}: {error.strerror}: install flockshim again") from None
    try:
        return _target(os.pread(fd, 20, 0))
    finally:
        os.close(fd)


def _is_privileged(file: "int | str") -> bool:
    """Tell whether ``execve(2)`` would start the program in secure-execution mode (ld.so(8))."""
    status = os.stat(file)
    uid, gid = os.geteuid(), os.getegid()
    if status.st_mode & stat.S_ISUID:
        uid = status.st_uid
    # Without the execute bit, set-gid once meant mandatory locking, and is no privilege (inode(7)).
    if status.st_mode & stat.S_ISGID and status.st_mode & stat.S_IXGRP:
        gid = status.st_gid
    if (uid, gid) != (os.getuid(), os.getgid()):
        return True
    if os.getuid() == 0:
        return False  # capabilities(7): a file can give root nothing that root has not
    try:
        return bool(os.getxattr(file, "security.capability"))
    except OSError:
        return False  # no such attribute, or no attributes on this file system


def _read(fd: int, head: bytes, offset: int, size: int) -> bytes:
    if offset + size <= len(head):
        return head[offset : offset + size]
    data = os.pread(fd, size, offset)
    if len(data) < size:
        raise ValueError("truncated")
    return data


def _program_headers(fd: int, head: bytes) -> "tuple[set[int], bytes]":
    """Return the kinds of the program's segments, and what its note segments contain."""
    if len(head) < HEADER_SIZE or _number(head[16:18]) not in (ET_EXEC, ET_DYN):
        raise ValueError("not a program")
    count = _number(head[56:58])
    if not count or _number(head[54:56]) != PROGRAM_HEADER_SIZE:
        raise ValueError("no program headers")
    table = _read(fd, head, _number(head[32:40]), count * PROGRAM_HEADER_SIZE)
    kinds, notes = set(), b""
    for start in range(0, len(table), PROGRAM_HEADER_SIZE):
        entry = table[start : start + PROGRAM_HEADER_SIZE]
        kind = _number(entry[:4])
        kinds.add(kind)
        if kind == PT_NOTE:
            size = min(_number(entry[32:40]), MAX_NOTES)
            notes += _read(fd, head, _number(entry[8:16]), size)
    return kinds, notes


def _is_go_by_section(fd: int, head: bytes) -> bool:
    offset, count = _number(head[40:48]), _number(head[60:62])
    index = _number(head[62:64])
    if not offset or index >= count or _number(head[58:60]) != SECTION_HEADER_SIZE:
        return False  # section headers are optional
    try:
        names = _read(fd, head, offset + index * SECTION_HEADER_SIZE, SECTION_HEADER_SIZE)
        return GO_SECTION in _read(fd, head, _number(names[24:32]), _number(names[32:40]))
    except ValueError:
        return False  # cut off, which execution does not mind
