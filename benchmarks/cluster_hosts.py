"""Starts the "hosts" of the cluster benchmarks on one mount, and counts what they ask of the file system."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster_means import MEANS, missing
from world import HERE, IDLE_SECONDS, World

from flockshim import environ, nolockfs
from flockshim.fuse_counts import read
from flockshim.fuse_protocol import Opcode

NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "--ipc")
LOCKING = (Opcode.GETLK, Opcode.SETLK, Opcode.SETLKW)
CONTENT = (Opcode.READ, Opcode.WRITE, Opcode.FSYNC)
# The kernel asks without a program's waiting for the answer, or forgets.
SILENT = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.INIT, Opcode.RELEASE, Opcode.RELEASEDIR)


def compared() -> list[str]:
    """Return the ways to lock that can be compared here; says on standard error which cannot."""
    found = []
    for means in MEANS:
        lacking = missing(means)
        if lacking:
            print(f"skipped: {means}: {lacking}", file=sys.stderr)
        else:
            found.append(means)
    return found


def lacking(world: World) -> str | None:
    """Return what is missing for hosts at all, or None."""
    if world.mount is None:
        return world.why
    if os.geteuid() or not shutil.which("unshare"):
        return "hosts are namespaces: run as root, with unshare(1)"
    return None


class Site:
    """A mount of its own for one way to lock, and the hosts on it; alive inside `site`."""

    def __init__(self, means: str, mount: nolockfs.Mount, out: Path, stack: contextlib.ExitStack) -> None:
        """Begin without hosts."""
        self.means = means
        self.out = out
        self._mount = mount
        self._stack = stack
        self._path = str(mount.path / "target")

    def host(self, name: str, processes: int = 1) -> subprocess.Popen[str]:
        """Start a host."""
        command = [*NAMESPACES, sys.executable, str(HERE / "cluster_host.py"), name, self.means, self._path]
        keeper = {"FLOCKSHIM_DIR": "/dev/shm/flockshim", "FLOCKSHIM_IDLE": str(IDLE_SECONDS)}
        own = {**os.environ, **keeper, "PYTHONWARNINGS": "ignore"}
        started = subprocess.Popen(
            [*command, str(processes), str(self.out)],
            env=environ(mode="cluster", quiet=True, base=own) if self.means == "flockshim" else own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(lambda: _end(started))
        assert started.stdout
        started.stdout.readline()
        return started

    def counts(self) -> dict[str, int]:
        """Return how many requests there were: of `metadata`, of `content`, and of `locks` that the kernel refused."""
        counts = read(self._mount.server_pid)
        return {
            "metadata": sum(n for op, n in counts.items() if op not in (*LOCKING, *CONTENT, *SILENT)),
            "content": sum(counts[op] for op in CONTENT),
            "locks": sum(counts[op] for op in LOCKING),
        }


@contextlib.contextmanager
def site(means: str) -> Iterator[Site]:
    """Return a mount for one way to lock; its hosts end with it."""
    with contextlib.ExitStack() as stack:
        # Not below /dev/shm, which every host has for itself.
        out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fb-")))
        (out / "counter").write_text("")
        mount = nolockfs.mount()
        stack.enter_context(mount)
        yield Site(means, mount, out, stack)


def tell(host: subprocess.Popen[str], command: str) -> None:
    """Give a host a command."""
    assert host.stdin
    host.stdin.write(f"{command}\n")
    host.stdin.flush()


def answer(host: subprocess.Popen[str]) -> int:
    """Wait for a host's answer. Raises EOFError if it has ended instead."""
    assert host.stdout
    line = host.stdout.readline()
    if not line:
        raise EOFError(f"a host has ended: {host.args!r}")
    return int(line)


def _end(host: subprocess.Popen[str]) -> None:
    host.kill()
    host.communicate()
