"""A file server, or a whole host, that stands still for a while: who may run on, and who goes on afterwards."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import cluster_world
from support.driver import EX, OK, SH, UN
from support.groups import PidNamespace
from support.hosts import await_waiting, is_stopped, last_vouched, recorded
from support.keepers import Keeper, keeper_processes, keepers
from support.proc import await_true, children, thread_state
from support.worlds import World

from flockshim.pytest_plugin import Mounts, require

CLOSE = {"x86_64": 3, "aarch64": 57}.get(platform.machine(), -1)

# Most real servers answer FLUSH, so that close(2) waits for them; nolockfs says ENOSYS, and is not asked again.
FLUSHING_SERVER = """
import sys
from flockshim import nolockfs
from flockshim.fuse_passthrough import Passthrough

FLUSH = 25
handlers = Passthrough.handlers
Passthrough.handlers = lambda self: {**handlers(self), FLUSH: lambda request: b""}
sys.exit(nolockfs._main())
"""


@pytest.fixture
def beside(nolock_dir: Path, rendezvous: Path) -> Iterator[World]:
    """Programs of the same host as `here` that have a keeper of their own."""
    require(os.geteuid() == 0, "pid namespaces need root", "run the tests as root")
    namespace = PidNamespace()
    world = cluster_world(nolock_dir, rendezvous, *namespace.prefix)
    yield world
    world.end()
    namespace.remove()


@pytest.fixture
def server(_nolock_mounts: Mounts) -> int:
    """The process behind the nolock_dir."""
    return _nolock_mounts.get("ENOSYS", "ENOSYS").server_pid


@contextmanager
def stalled(server: int) -> Iterator[None]:
    """The file system stands still."""
    os.kill(server, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server, signal.SIGCONT)


def killed_and_succeeded(keeper: Keeper, rendezvous: Path) -> Keeper:
    """Kill the working half of KEEPER; the keeper as it is when the next one has begun to ask the file server."""
    os.kill(keeper.worker, signal.SIGKILL)

    def successors() -> list[Keeper]:
        found = [one for one in keepers(rendezvous) if one.standby == keeper.standby and one.worker != keeper.worker]
        return [one for one in found if lease_workers(one)]

    await_true(lambda: bool(successors()), "the next one")
    return successors()[0]


def lease_workers(keeper: Keeper) -> list[int]:
    """The process, if there is one, that does the file operations."""

    def runs(pid: int) -> bool:
        return b"lease_worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()

    return [pid for pid in children(keeper.worker) if runs(pid)]


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has a descriptor of this file."""
    base = f"/proc/{pid}/fd"
    for name in os.listdir(base):
        with suppress(FileNotFoundError):
            if os.readlink(f"{base}/{name}") == str(path):
                return True
    return False


def test_a_waiter_is_not_given_a_lease_that_has_lapsed(here: World, there: World, rendezvous: Path) -> None:
    """A host is frozen for longer than the lease time, and the first it sees is that its holder has died."""
    path = here.file()
    holder, held = here.opened()
    waiter, wanted = here.opened()
    other, theirs = there.opened()
    assert holder.flock(held, EX) == OK
    waiting = waiter.flock_later(wanted, EX)
    here.await_blocked(waiting)
    call = other.flock_later(theirs, EX)
    await_waiting(path, 1)
    frozen = keeper_processes(rendezvous)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    assert call.result() == OK
    holder.kill()
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)

    def asks_anew() -> bool:
        state = recorded(path)
        return state is not None and len(state.queue) == 1

    await_true(lambda: asks_anew() or waiting.returned(), "the waiter to stand in the queue")
    assert not waiting.returned()
    assert other.flock(theirs, UN) == OK
    assert waiting.result() == OK


def test_all_readers_are_stopped_until_the_next_keeper_knows(
    here: World, there: World, rendezvous: Path, server: int
) -> None:
    path = here.file()
    readers = [here.opened() for _ in range(3)]
    for reader, fd in readers:
        assert reader.flock(fd, SH) == OK
    writer, wanted = there.opened()
    call = writer.flock_later(wanted, EX)
    await_waiting(path, 1)
    (keeper,) = keepers(rendezvous)
    with stalled(server):
        os.kill(keeper.worker, signal.SIGKILL)
        await_true(lambda: all(is_stopped(reader.pid) for reader, _ in readers), "all to be stopped")
    await_true(lambda: not any(is_stopped(reader.pid) for reader, _ in readers), "all to go on")
    assert not call.returned()
    for reader, fd in readers:
        assert reader.flock(fd, UN) == OK
    assert call.result() == OK


def test_a_holder_dies_while_the_next_keeper_cannot_know(
    here: World, beside: World, rendezvous: Path, server: int
) -> None:
    """Others of the host have the lock then, and the keeper, which nobody needs, leaves."""
    holder, held = here.opened()
    assert holder.flock(held, EX) == OK
    (keeper,) = keepers(rendezvous)
    other, wanted = beside.opened()
    with stalled(server):
        successor = killed_and_succeeded(keeper, rendezvous)
        holder.kill()
        await_true(lambda: not has_open(successor.worker, here.directory / "file"), "the keeper to see that")
        for pid in lease_workers(successor):
            os.kill(pid, signal.SIGKILL)
    call = other.flock_later(wanted, EX)
    assert call.result() == OK
    await_true(lambda: successor not in keepers(rendezvous), "the keeper to leave")


@contextmanager
def flushing_mount(directory: Path) -> Iterator[tuple[Path, int]]:
    """A mount where close(2) waits for the server, and that server."""
    backing, mount = directory / "backing", directory / "mount"
    backing.mkdir()
    mount.mkdir()
    guard = subprocess.Popen(
        [sys.executable, "-c", FLUSHING_SERVER, str(backing), str(mount)], stdout=subprocess.PIPE, text=True
    )
    assert guard.stdout
    with guard.stdout:
        server = int(guard.stdout.readline().removeprefix("ready "))
        try:
            yield mount, server
        finally:
            guard.terminate()
            assert guard.wait() == 0


def closing(pid: int) -> bool:
    """Whether a thread of the process sleeps in close(2)."""
    states = [thread_state(pid, int(task)) for task in os.listdir(f"/proc/{pid}/task")]
    return any(state and state.syscall == CLOSE for state in states)


def test_a_keeper_whose_close_hangs_goes_on_vouching(here: World, tmp_path: Path, rendezvous: Path) -> None:
    """Its duplicate of a dead program's file is on one file system, and another program's lock on another."""
    path = here.file()
    holder, held = here.opened()
    assert holder.flock(held, EX) == OK
    with flushing_mount(tmp_path) as (mount, server):
        other = here.start()
        assert other.flock(other.open(mount / "file"), EX) == OK
        with stalled(server):
            other.signal(signal.SIGKILL)  # its own end hangs too
            (keeper,) = keepers(rendezvous)
            await_true(lambda: closing(keeper.worker), "the keeper to close what the program had")
            before = last_vouched(path)
            await_true(lambda: last_vouched(path) > before, "the keeper to vouch")
            assert holder.flock(held, UN) == OK
            assert here.free(path)
