"""Names the programs that hold or wait, for people to read: by the keeper, the launcher and ``--locks``."""

from __future__ import annotations

import os
import time

UNKNOWN = "a program of another job"
MAX_COMMAND = 80
# Bytes that are no text in this locale, as os.fsdecode has them.
SURROGATES = {chr(0xDC00 + byte) for byte in range(128, 256)}
NAME_LENGTH = 15  # of /proc/PID/comm, as proc(5) has it


def command_of(pid: int) -> str:
    """Return the command line of a process as its user typed it, shortened; empty if there is no such process.

    A script is named by itself, not by its interpreter.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode(errors="replace").rstrip("\0").split("\0")
        with open(f"/proc/{pid}/comm", "rb") as file:
            name = file.read().decode(errors="replace").rstrip("\n")
    except OSError:
        return ""
    if words == [""]:
        return name  # a zombie, or a kernel thread
    for index, word in enumerate(words[:3]):
        if os.path.basename(word)[:NAME_LENGTH] == name:
            words = words[index:]
            break
    words[0] = os.path.basename(words[0])
    command = printable(" ".join(words))
    return command if len(command) <= MAX_COMMAND else command[: MAX_COMMAND - 3] + "..."


def printable(text: str) -> str:
    """Return a name without what would make a terminal do something."""
    return "".join(letter if letter.isprintable() or letter in SURROGATES else "?" for letter in text)


def _stat(pid: int) -> list[bytes]:
    """Return what proc(5) calls field 3, the state, and those behind it; nothing if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    """Return whether a process still runs; one that only waits to be reaped does not."""
    state = _stat(pid)[:1]
    if state:
        return state not in ([b"Z"], [b"X"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # proc(5), hidepid
        pass
    return True


def is_stopped(pid: int) -> bool:
    """Return whether a process was stopped by a signal."""
    return _stat(pid)[:1] == [b"T"]


def started_at(pid: int) -> float | None:
    """Return when a process has begun, in seconds since the epoch; None if there is no such process."""
    stat = _stat(pid)
    if not stat:
        return None
    running = time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - running


def age(pid: int) -> tuple[int, int]:
    """Return what sorts processes by their beginning, the oldest first."""
    stat = _stat(pid)
    return int(stat[19]) if stat else 0, pid


def clock(when: float) -> str:
    """Return a time (seconds since the epoch) as a clock shows it, with the date unless that is today's."""
    then = time.localtime(when)
    today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)


def pid_namespace() -> int:
    """Return the number of the pid namespace in which our pids are to be read."""
    return os.stat("/proc/self/ns/pid").st_ino


def is_of_our_pid_namespace(pid: int) -> bool:
    """Return whether a process has our pid namespace, so that it reads pids as we do."""
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino == pid_namespace()
    except OSError:
        return False


def describe(pid: int, since: float | None = None, command: str | None = None) -> str:
    """Return who process `pid` is and since when it holds a lock, or else (the kernel does not tell) runs.

    `command` is its command line, for a process that may be of another pid namespace.
    """
    text = f"pid {pid} ({command or command_of(pid) or 'unknown'}) on {os.uname().nodename}"
    if since:
        return f"{text} since {clock(since)}"
    started = started_at(pid)
    return f"{text}, running since {clock(started)}" if started else text
