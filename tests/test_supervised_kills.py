"""Supervisor, keeper or launcher is stopped or killed while supervised calls wait and locks are held."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import shim_environment
from support.driver import EX, NB, OK, SH, UN
from support.keepers import Keeper, end_keepers, keepers
from support.lockcommand import await_waiting
from support.proc import await_end, parent
from support.states import await_in_flock, held, stop
from support.supervision import Supervision, settings
from support.worlds import SupervisedWorld, World

SA_RESTART = 0x10000000
KILLED = "flockshim: the supervisor was killed: the lock calls of COMMAND fail from now on\n"


@pytest.fixture
def own(rendezvous: Path) -> Iterator[Supervision]:
    """A supervisor and a keeper for this test alone."""
    supervision = Supervision(settings(rendezvous))
    yield supervision
    supervision.end()


@pytest.fixture
def world(request: pytest.FixtureRequest, own: Supervision) -> Iterator[SupervisedWorld]:
    """Programs under it."""
    directory = request.getfixturevalue("native_directory" if "kernel" in request.param else "nolock_dir")
    world = SupervisedWorld(request.param, directory, own, own.fleet.environment)
    yield world
    assert world.end() == ""


in_both = pytest.mark.parametrize("world", ["supervised", "supervised, kernel"], indirect=True)
by_keeper = pytest.mark.parametrize("world", ["supervised"], indirect=True)
by_kernel = pytest.mark.parametrize("world", ["supervised, kernel"], indirect=True)


# The supervisor


def _kill(own: Supervision) -> None:
    os.kill(own.pid, signal.SIGKILL)
    await_end(own.pid)


@pytest.fixture
def plain(own: Supervision, rendezvous: Path, nolock_dir: Path) -> Iterator[World]:
    """Preloaded programs beside the supervised ones."""
    world = World("emulated", nolock_dir, shim_environment(rendezvous))
    yield world
    assert world.end() == ""


@by_keeper
def test_killing_the_supervisor(world: SupervisedWorld, own: Supervision, plain: World) -> None:
    """What waits fails as where there is no flockshim; what is held stays held until its program ends."""
    holder, held_fd = held(world)
    waiter, waiting_fd = world.opened()
    call = waiter.flock_later(waiting_fd, EX)
    world.await_blocked(call)
    beside, beside_fd = plain.opened()
    beside_call = beside.flock_later(beside_fd, EX)
    await_waiting(plain, world.file(), beside.pid)
    _kill(own)
    assert call.result() == errno.ENOSYS
    for operation in EX, SH, UN, EX | NB, UN:
        assert holder.flock(held_fd, operation) == errno.ENOSYS
        assert waiter.flock(waiting_fd, operation) == errno.ENOSYS
    assert not plain.free(world.file())
    plain.await_blocked(beside_call)
    holder.kill()
    assert beside_call.result() == OK
    assert own.errors() == KILLED


@by_keeper
def test_killing_the_supervisor_before_it_has_read(world: SupervisedWorld, own: Supervision, plain: World) -> None:
    driver, fd = world.opened()
    stop(own.pid)
    call = driver.start("flock", fd, EX)
    await_in_flock(call)
    _kill(own)
    assert call.result() == errno.ENOSYS
    assert plain.free(world.file())
    assert own.errors() == KILLED


@by_kernel
def test_killing_the_supervisor_where_the_kernel_locks(
    world: SupervisedWorld, own: Supervision, native_directory: Path
) -> None:
    """A call that waits in the kernel goes on; new ones fail. What is held is the program's own."""
    native = World("native", native_directory, os.environ)
    holder, held_fd = held(world)
    waiter, waiting_fd = world.opened()
    call = waiter.flock_later(waiting_fd, EX)
    world.await_blocked(call)
    _kill(own)
    assert holder.flock(held_fd, UN) == errno.ENOSYS
    assert not native.free(world.file())
    holder.close(held_fd)
    assert call.result() == OK
    assert not native.free(world.file())
    waiter.kill()
    assert native.free(world.file())
    assert own.errors() == KILLED
    assert native.end() == ""


@in_both
def test_stopping_the_supervisor(world: SupervisedWorld, own: Supervision) -> None:
    """Calls wait for it, and nothing that is held or waits is lost."""
    holder, held_fd = held(world)
    waiter, waiting_fd = world.opened()
    call = waiter.flock_later(waiting_fd, EX)
    world.await_blocked(call)
    stop(own.pid)
    unlocking = holder.start("flock", held_fd, UN)
    await_in_flock(unlocking)
    world.await_blocked(call)
    os.kill(own.pid, signal.SIGCONT)
    assert unlocking.result() == OK
    assert call.result() == OK
    assert not world.free(world.file())


# The keeper


def _keeper(rendezvous: Path) -> Keeper:
    (keeper,) = keepers(rendezvous)
    return keeper


@by_keeper
@pytest.mark.parametrize("half", ["standby", "worker"])
def test_killing_half_of_the_keeper(world: SupervisedWorld, rendezvous: Path, half: str) -> None:
    holder, held_fd = held(world)
    waiter, waiting_fd = world.opened()
    call = waiter.flock_later(waiting_fd, EX)
    world.await_blocked(call)
    victim = getattr(_keeper(rendezvous), half)
    os.kill(victim, signal.SIGKILL)
    await_end(victim)
    assert not world.free(world.file())
    world.await_blocked(call)
    assert holder.flock(held_fd, UN) == OK
    assert call.result() == OK
    assert not world.free(world.file())
    assert waiter.flock(waiting_fd, UN) == OK
    assert world.free(world.file())


@by_keeper
def test_killing_the_keeper(world: SupervisedWorld, rendezvous: Path) -> None:
    """Both halves at once: locks are lost, as semantics.md says, but who waits does not hang."""
    _, _ = held(world)
    waiter, waiting_fd = world.opened()
    call = waiter.flock_later(waiting_fd, EX)
    world.await_blocked(call)
    end_keepers(rendezvous)
    assert call.result() == OK
    assert not world.free(world.file())


@by_keeper
@pytest.mark.parametrize("restart", [0, SA_RESTART], ids=["EINTR", "SA_RESTART"])
def test_stopping_the_keeper(world: SupervisedWorld, rendezvous: Path, restart: int) -> None:
    """A program can be interrupted and can end all the same."""
    holder, held_fd = held(world)
    waiter, waiting_fd = world.opened()
    waiter.ask("sigaction", signal.SIGUSR1, restart)
    call = waiter.start("flock", waiting_fd, EX)
    world.await_blocked(call)
    victim, victim_fd = world.opened()
    processes = _keeper(rendezvous)
    for pid in processes:
        stop(pid)
    waiter.signal(signal.SIGUSR1)
    if not restart:
        assert call.result() == errno.EINTR
    doomed = victim.start("flock", victim_fd, EX)
    await_in_flock(doomed)
    victim.kill()
    unlocking = holder.start("flock", held_fd, UN)
    await_in_flock(unlocking)
    for pid in processes:
        os.kill(pid, signal.SIGCONT)
    assert unlocking.result() == OK
    if restart:
        assert call.result() == OK
        assert waiter.ask("sigcount", signal.SIGUSR1) == 1
        assert waiter.flock(waiting_fd, UN) == OK
    assert world.free(world.file())


@in_both
def test_the_launcher_is_killed(world: SupervisedWorld, own: Supervision) -> None:
    """Nothing changes for those who are supervised."""
    holder, held_fd = held(world)
    waiter, waiting_fd = world.opened()
    call = waiter.flock_later(waiting_fd, EX)
    world.await_blocked(call)
    os.kill(own.launcher, signal.SIGKILL)
    await_end(own.launcher)
    world.await_blocked(call)
    assert holder.flock(held_fd, UN) == OK
    assert call.result() == OK
    assert not world.free(world.file())
    assert parent(own.nursery.pid) == own.pid
