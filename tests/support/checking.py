"""Runs ``flockshim --check``, and what it needs to be tried."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flockshim.pytest_plugin import require

SLOW = "60"
"""Seconds that a call which works will never take."""
SHORT = "2"
"""Seconds after which a call that never returns is given up, and in which others of the test do return."""
SHORTEST = "0.5"
"""The same where no call returns."""

KEYS = ["version", "directory", "filesystem", "probes", "scope", "status", "command", "summary"]
LOCK_PROBES = ("shared", "exclusive", "nonblocking", "conflict")
NAME_PROBES = ("exclusive_create", "link", "rename", "symlink")
ALL_PROBES = [*(f"{kind}_{probe}" for kind in ("flock", "fcntl", "ofd") for probe in LOCK_PROBES), *NAME_PROBES]
ALL_OK = dict.fromkeys(ALL_PROBES, "ok")


class Answer(NamedTuple):
    """What ``--check`` has said."""

    status: int
    output: str
    errors: str

    @property
    def report(self) -> dict[str, Any]:
        report = json.loads(self.output)
        assert list(report) == KEYS
        assert sorted(report["probes"]) == sorted(ALL_PROBES)
        assert report["status"] == self.status
        return dict(report)

    def kind(self, kind: str) -> list[str]:
        return [self.report["probes"][f"{kind}_{probe}"] for probe in LOCK_PROBES]


def command(*options: str | Path, seconds: str = SLOW, python: str = sys.executable) -> list[str]:
    return [python, "-m", "flockshim", "--check", *map(str, options), "--timeout", seconds]


def checked(*options: str | Path, seconds: str = SLOW, prefix: Sequence[str] = (), **more: Any) -> Answer:
    """Run ``--check``, whose last option is mostly the directory."""
    done = subprocess.run(
        [*prefix, *command(*options, seconds=seconds)], capture_output=True, text=True, check=False, **more
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def as_root() -> None:
    require(os.geteuid() == 0, "only root can mount", "run the tests as root")


def refused(answer: Answer, *words: str) -> None:
    """It is said in one line why nothing could be checked."""
    assert answer.status == 125
    assert answer.errors.count("\n") == 1
    for word in words:
        assert word in answer.errors


def flock_under(words: str, file: Path, rendezvous: Path) -> tuple[int, str, str]:
    """What flock(1) on FILE does as the command of ``flockshim … COMMAND``."""
    require(shutil.which("flock"), "no flock(1)", "apt install util-linux")
    program, *options, last = words.split()
    assert (program, last) == ("flockshim", "COMMAND")
    done = subprocess.run(
        [sys.executable, "-m", "flockshim", *options, "flock", "--nonblock", file, "echo", "held"],
        env={**os.environ, "FLOCKSHIM_DIR": str(rendezvous)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


FLOCK_NUMBER, FCNTL_NUMBER = {"x86_64": (73, 72), "aarch64": (32, 25)}.get(platform.machine(), (-1, -1))
F_OFD_SETLK, F_OFD_SETLKW = 37, 38
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22


def answering(error: int, operation: int | None = None, call: int = FLOCK_NUMBER) -> Callable[[], None]:
    """A function that makes the kernel answer CALL, or only OPERATION of it, with ERROR and do nothing.

    By a filter of seccomp(2), where 0 is an errno too: success.
    """
    load, equal, give = 0x20, 0x15, 0x06
    steps = [(load, 0, 0, 0), (equal, 0, 4, call)]
    # The lower half of the second argument.
    steps += [(load, 0, 0, 24), (equal, 0, 1, operation) if operation is not None else (load, 0, 0, 24)]
    steps += [(give, 0, 0, 0x00050000 | error), (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x7FFF0000)]
    filter_code = b"".join(struct.pack("HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)

    def confine() -> None:
        code = ctypes.create_string_buffer(filter_code)
        program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")

    return confine
