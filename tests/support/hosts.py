"""Hosts: namespaces that share nothing but directories, each with its own /dev/shm, pids and name.

A host ends when its first process ends, which also ends when the test does. What runs in it is started by
nsenter(1): `Host.prefix` before a command. Its /dev/shm is a directory of the test's, so that two hosts can share one
and the test can look into it.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import flockshim
from flockshim import cluster_state
from flockshim.cluster_names import Names, StateName, data_of, keeper_of, lineage_of_claim, vouching_name
from flockshim.cluster_state import State
from flockshim.pytest_plugin import require
from support.keepers import Keeper
from support.proc import await_end, await_true, children, parent
from support.programs import SOURCES, WARNINGS
from support.worlds import World

RENDEZVOUS = "/dev/shm/fs"
"""Each host's, in its own /dev/shm."""

# A preload by the environment would not reach the keeper's processes; /etc itself stays as it is for all others.
SLOW = """
mkdir -p /dev/shm/etc /dev/shm/etc.real
mount --bind /etc /dev/shm/etc.real
ln -s /dev/shm/etc.real/* /dev/shm/etc/
rm -f /dev/shm/etc/ld.so.preload
echo "$3" > /dev/shm/etc/ld.so.preload
mount --bind /dev/shm/etc /etc
"""
# Children of others that end here must not stay as zombies, as they don't where there is a real init.
FIRST = f"""
set -e
mount --bind "$1" /dev/shm
hostname "$2"
if [ -n "$3" ]; then {SLOW}
fi
trap '' CHLD
echo ready
exec cat
"""


def require_hosts() -> None:
    """Skip the test where no host can be made."""
    command = ["unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "mount", "--bind", "/tmp", "/tmp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"no namespaces: {done.stderr.strip()}", "run as root with CAP_SYS_ADMIN")


@functools.cache
def _slow_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="flockshim-slowfs-")


@functools.cache
def slow_library() -> Path:
    """The preload that makes the protocol's operations slow at random."""
    target = Path(_slow_directory().name) / "slowfs.so"
    source = SOURCES / "slowfs.c"
    subprocess.run(["cc", *WARNINGS, "-O1", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    return target


def environment(lease: float, **more: str) -> dict[str, str]:
    """The environment of cluster mode on any host; LEASE is the lease time in seconds."""
    base = {key: value for key, value in os.environ.items() if not key.startswith(("FLOCKSHIM_", "LD_PRELOAD"))}
    base = {**base, "FLOCKSHIM_DIR": RENDEZVOUS, "FLOCKSHIM_LEASE": str(lease), **more}
    return flockshim.environ(mode="cluster", base=base)


class Host:
    """One host."""

    def __init__(self, name: str, shm: Path, slow: bool = False) -> None:
        """SHM becomes its /dev/shm. SLOW: with `slow_library` in every process."""
        self.name = name
        self.shm = shm
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "--ipc"]
        self._entrance = subprocess.Popen(
            [*namespaces, "sh", "-c", FIRST, "sh", str(shm), name, str(slow_library()) if slow else ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._entrance.stdout
        assert self._entrance.stdout.readline() == "ready\n", f"host {name} cannot be made"
        (self.first,) = children(self._entrance.pid)
        self._namespace = os.readlink(f"/proc/{self.first}/ns/pid")

    @property
    def prefix(self) -> list[str]:
        """A command that runs the one behind it, as its child, on this host."""
        return ["nsenter", "--target", str(self.first), "--pid", "--mount", "--uts", "--ipc"]

    @property
    def rendezvous(self) -> Path:
        """Its rendezvous directory as the test sees it."""
        return self.shm / Path(RENDEZVOUS).name

    def run_in_background(self, script: str, *arguments: str, env: Mapping[str, str]) -> None:
        """Run a script of sh(1) on this host; what it leaves in the background goes on there, unwaited for."""
        subprocess.run([*self.prefix, "sh", "-c", script, "sh", *arguments], env=dict(env), check=True)

    def processes(self) -> list[int]:
        """Every process that runs on it."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and os.readlink(f"/proc/{entry}/ns/pid") == self._namespace:
                    found.append(int(entry))
            except OSError:
                continue
        return found

    def running(self, word: str) -> list[int]:
        """Its processes that have WORD in an argument."""
        return [pid for pid in self.processes() if any(word in argument for argument in _arguments(pid))]

    def commands(self) -> list[list[str]]:
        """The arguments of every process that runs on it."""
        return [_arguments(pid) for pid in self.processes()]

    def keepers(self) -> list[Keeper]:
        """Its complete keepers."""
        processes = self.running("flockshim/keeper.py")
        return [Keeper(parent(pid), pid) for pid in processes if parent(pid) in processes]

    def freeze(self) -> None:
        """Stop everything that runs on it, and return when it has stopped."""
        await_true(self._all_stopped, f"host {self.name} to be frozen")

    def _all_stopped(self) -> bool:
        running = [pid for pid in self.processes() if _state(pid) not in ("T", "Z", "X")]
        for pid in running:
            _signal(pid, signal.SIGSTOP)
        return not running

    def thaw(self) -> None:
        """Let everything go on. nsenter(1) has stopped with its child."""
        for pid in [*self._entrances(), *self.processes()]:
            _signal(pid, signal.SIGCONT)

    def _entrances(self) -> set[int]:
        processes = set(self.processes())
        return {_parent(pid) for pid in processes} - processes - {0, os.getpid()}

    def end(self) -> None:
        """It crashes: everything on it is gone at once, and when this returns."""
        if self._entrance.returncode is not None:
            return
        entrances = self._entrances()
        self._entrance.kill()  # and so, by --kill-child, the host's first process
        for pid in entrances:
            _signal(pid, signal.SIGCONT)
        await_end(self.first)
        self._entrance.communicate()


def _arguments(pid: int) -> list[str]:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return []


def _state(pid: int) -> str:
    return _stat(pid)[0]


def _parent(pid: int) -> int:
    """Also that of a zombie, which it may have to wait for."""
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """The fields of proc(5)'s stat from the state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", "0"]


def is_stopped(pid: int) -> bool:
    """Whether a process has been stopped by a signal."""
    return _state(pid) == "T"


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and nobody has waited for it."""
    return _state(pid) == "Z"


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


class Site:
    """Hosts that share one directory, and a world of programs for each."""

    def __init__(self, directory: Path, lease: float) -> None:
        self.directory = directory
        self.lease = lease
        self.environment = environment(lease)
        self.hosts: list[Host] = []
        self._worlds: list[World] = []
        self._shm = Path(tempfile.mkdtemp(prefix="hosts-", dir="/dev/shm"))

    def host(self, name: str, shm: Path | None = None, slow: bool = False) -> Host:
        """Start a host; without SHM, the /dev/shm of another, it has an empty one."""
        if shm is None:
            shm = self._shm / f"{len(self.hosts)}"
            shm.mkdir()
        host = Host(name, shm, slow)
        self.hosts.append(host)
        return host

    def world(self, host: Host) -> World:
        """Programs on HOST."""
        world = World("emulated", self.directory, self.environment, *host.prefix)
        self._worlds.append(world)
        return world

    def errors(self) -> str:
        """What the programs of all worlds have said on standard error."""
        return "".join(world.fleet.errors() for world in self._worlds)

    def logs(self) -> str:
        """What the keepers of all hosts have said."""
        return "".join(path.read_text() for path in self._shm.glob("*/fs/*.log"))

    def end(self) -> None:
        """End all."""
        for host in self.hosts:
            host.end()
        for world in self._worlds:
            world.end()
        shutil.rmtree(self._shm)


def recorded(path: Path) -> State | None:
    """The state of the lock on PATH as it is on the file system; None before its birth."""
    while True:
        names = Names(path.name)
        try:
            claim = path.parent / names.claim
            lineage = lineage_of_claim(os.readlink(claim) if claim.is_symlink() else claim.read_text())
        except FileNotFoundError:
            return None
        found = [names.parse(name) for name in os.listdir(path.parent)]
        states = [name for name in found if isinstance(name, StateName) and name.lineage == lineage]
        if states:
            state = max(states)
            data = data_of(state)
            try:
                if data is None:
                    return cluster_state.of_token(state.version, state.token)
                return cluster_state.of_text(state.version, (path.parent / names.data(data)).read_text())
            except FileNotFoundError:
                pass
        time.sleep(0.001)


def await_waiting(path: Path, hosts: int) -> None:
    """Return when HOSTS hosts wait in the queue of the lock on PATH."""

    def waiting() -> bool:
        state = recorded(path)
        return state is not None and len(state.queue) == hosts

    await_true(waiting, f"{hosts} hosts to wait for {path}")


def last_vouched(path: Path) -> float:
    """When the holder of the lock on PATH has vouched last (seconds of time.time()), or 0 if it never has."""
    state = recorded(path)
    assert state and state.holders
    try:
        return (path.parent / vouching_name(keeper_of(state.holders[0].ticket))).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def undocumented(path: Path) -> list[str]:
    """Every file beside the target PATH, which nobody uses, that docs/cluster.md does not let stay."""
    names = Names(path.name)
    ours = [name for name in os.listdir(path.parent) if name.startswith((names.claim, vouching_name("")))]
    states = [name for name in ours if isinstance(names.parse(name), StateName)]
    return [name for name in ours if name != names.claim and [name] != states]
