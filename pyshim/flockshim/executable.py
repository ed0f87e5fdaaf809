"""Looks at COMMAND before it starts: does the preload library get into it?

The dynamic linker loads the library, so a program without one, or told to mistrust its environment,
or making its lock calls without the C library, would run unprotected. Only what COMMAND itself
becomes is judged, through scripts and ``env``; what it starts later, as ``nice`` and ``timeout``
do, is not.
"""

import errno
import os
import stat

from flockshim import FlockshimError, elf
from flockshim.elf import UnreachableError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# linux/binfmts.h: how much of a script's first line the kernel looks at.
BINPRM_BUF_SIZE = 256

# fs/exec.c: a script's interpreter may itself be a script, this often in all.
MAX_SCRIPTS = 5

# Scripts that start each other through env never end; no honest one goes so deep.
MAX_ENVS = 8

SHELL = "/bin/sh"


def find(name: str, environ: "Mapping[str, str]", cwd: str = "") -> str:
    """Return the path of the program *name* as ``execvp(3)`` finds it.

    :param environ: holds the ``PATH`` to search.
    :param cwd: directory in which the program will start, if not the current one.
    :raises OSError: when there is none (``FileNotFoundError``) or it cannot be executed
        (``PermissionError``).
    """
    if "/" in name or not name:
        _check_executable(name, cwd)
        return name
    denied = None
    for directory in environ.get("PATH", os.defpath).split(":"):
        path = os.path.join(directory, name)
        try:
            _check_executable(path, cwd)
            return path
        except PermissionError as error:
            denied = denied or error
        except (FileNotFoundError, NotADirectoryError):
            pass
    raise denied or FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def protected(
    command: "list[str]", environ: "Mapping[str, str]", cwd: str = "", envs: int = 0
) -> "tuple[str, list[str]]":
    """Return the path and the arguments with which ``execve(2)`` starts *command* under the shim.

    :param cwd: directory in which *command* will start, if not the current one.
    :param envs: how many ``env`` commands led here.
    :raises UnreachableError: when the library does not get into the program.
    :raises FlockshimError: when nothing of ours could protect it: it is privileged, or cannot be read.
    :raises OSError: when the program is not found or cannot be executed.
    """
    start = find(command[0], environ, cwd)
    result = start, command
    path, arguments = result
    for _ in range(MAX_SCRIPTS + 1):
        subject = repr(path) if path == start else f"{start!r} is run by {path!r}, which"
        head = _head_of_reachable(path, cwd, subject)
        if head.startswith(elf.MAGIC):
            break
        script = _interpreter(head)
        if script:
            arguments = [*script, path, *arguments[1:]]
            _check_executable(script[0], cwd, path)
        else:
            # A file of no known format is given to the shell, as execvp(3) does.
            result = SHELL, [SHELL, start, *command[1:]]
            arguments = result[1]
        path = arguments[0]
    else:
        raise OSError(errno.ELOOP, "Too many scripts run one another", start)
    if os.path.basename(path) == "env" and len(arguments) > 1:
        _check_started_by_env(arguments[1:], environ, cwd, envs)
    return result


def is_for_shell(path: str, error: OSError) -> bool:
    """Tell whether the shell shall run *path*, with which ``execve(2)`` failed, as ``execvp(3)`` has it."""
    if error.errno != errno.ENOEXEC:
        return False
    with open(path, "rb") as file:
        return b"\0" not in file.read(BINPRM_BUF_SIZE)


def _check_executable(path: str, cwd: str, script: "str | None" = None) -> None:
    """Raise what ``execve(2)`` would for *path*, the interpreter of *script* if that is given."""
    whole = os.path.join(cwd, path)
    try:
        mode = os.stat(whole).st_mode
    except OSError as error:
        raise OSError(error.errno, error.strerror, path, None, script) from None
    if stat.S_ISDIR(mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EISDIR), path, None, script)
    if not stat.S_ISREG(mode) or not os.access(whole, os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path, None, script)


def _head_of_reachable(path: str, cwd: str, subject: str) -> bytes:
    """Return the first bytes of *path*; refuse it when the library does not get into it."""
    whole = os.path.join(cwd, path)
    try:
        fd = os.open(whole, os.O_RDONLY)
    except PermissionError:
        reason = elf.why_privileged(whole) or (
            "cannot be read, so flockshim cannot tell whether the lock shim works in it: make it readable"
        )
        raise FlockshimError(f"{subject} {reason}") from None
    try:
        head = os.pread(fd, elf.HEAD_SIZE, 0)
        if head.startswith(elf.MAGIC):
            _refuse_unreachable(fd, head, path, subject)
        elif b"\0" in head[:BINPRM_BUF_SIZE] and not head.startswith(b"#!"):
            # Neither a program nor text. binfmt_misc may run it, by an interpreter unknown here.
            raise OSError(errno.ENOEXEC, "Unknown executable format (name the program that runs it)", path)
        return head
    finally:
        os.close(fd)


def _refuse_unreachable(fd: int, head: bytes, path: str, subject: str) -> None:
    privileged = elf.why_privileged(fd)
    if privileged:
        raise FlockshimError(f"{subject} {privileged}")
    try:
        reason = elf.why_unreachable(fd, head)
    except ValueError:
        raise OSError(errno.ENOEXEC, os.strerror(errno.ENOEXEC), path) from None
    if reason:
        raise UnreachableError(f"{subject} {reason[0]}", reason[1])


def _interpreter(head: bytes) -> "list[str]":
    """Return a script's interpreter and its argument, if any, as fs/binfmt_script.c reads them."""
    if not head.startswith(b"#!"):
        return []
    line, newline, _ = head[2:BINPRM_BUF_SIZE].partition(b"\n")
    line = line.lstrip(b" \t")
    if not newline and len(head) >= BINPRM_BUF_SIZE:
        if not any(end in line for end in (b" ", b"\t", b"\0")):
            return []  # the interpreter's name is cut off, and the kernel refuses that
        line = line[:-1]
    line = line.partition(b"\0")[0]
    name = line.replace(b"\t", b" ").partition(b" ")[0]
    argument = line[len(name) :].strip(b" \t")
    return [os.fsdecode(word) for word in (name, argument) if word]


def _check_started_by_env(arguments: "list[str]", environ: "Mapping[str, str]", cwd: str, envs: int) -> None:
    from flockshim import env_command

    if envs == MAX_ENVS:
        raise OSError(errno.ELOOP, "Too many env commands run one another", arguments[-1])
    command, path, directory = env_command.read(arguments, environ.get("PATH"))
    if command:
        search = {} if path is None else {"PATH": path}
        protected(command, search, os.path.join(cwd, directory), envs + 1)
