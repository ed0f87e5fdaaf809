"""A supervised lock call is interrupted, stopped or killed in each of its states; and so are supervisor and keeper.

The states: before the supervisor has read of the call; while it waits at the keeper, or in the kernel; at the grant.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN, Call, Driver
from support.keepers import Keeper, end_keepers, keepers
from support.lockcommand import await_waiting
from support.proc import await_end, await_true, parent, thread_state
from support.supervision import Supervision, settings
from support.worlds import FLOCK_SYSCALL, SupervisedWorld, World

SA_RESTART = 0x10000000
WORLDS = ["supervised", "supervised, kernel"]
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


in_both = pytest.mark.parametrize("world", WORLDS, indirect=True)
by_keeper = pytest.mark.parametrize("world", ["supervised"], indirect=True)
by_kernel = pytest.mark.parametrize("world", ["supervised, kernel"], indirect=True)


def _stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    await_true(lambda: _is_stopped(pid), f"process {pid} to stop")


def _is_stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


def _await_in_flock(call: Call) -> None:
    """The thread has made its call. That it waits for anybody is not said."""

    def reached() -> bool:
        state = thread_state(call.driver.pid, call.tid)
        return state is not None and state.asleep and state.syscall == FLOCK_SYSCALL

    await_true(reached, "the call to be made")


def _held(world: World) -> tuple[Driver, int]:
    holder, fd = world.opened()
    assert holder.flock(fd, EX) == OK
    return holder, fd


# Before the supervisor has read of the call: it is stopped.


@in_both
@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
def test_interrupted_before_it_was_read(world: SupervisedWorld, own: Supervision, held: bool) -> None:
    """A call that need not wait can be interrupted too: a documented difference."""
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, 0)
    other, other_fd = world.opened()
    if held:
        assert other.flock(other_fd, EX) == OK
    _stop(own.pid)
    call = driver.start("flock", fd, EX)
    _await_in_flock(call)
    driver.signal(signal.SIGUSR1)
    assert call.result() == errno.EINTR
    os.kill(own.pid, signal.SIGCONT)
    assert other.flock(other_fd, EX | NB) == OK
    assert driver.flock(fd, EX | NB) == BUSY


@in_both
def test_restarted_before_it_was_read(world: SupervisedWorld, own: Supervision) -> None:
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, SA_RESTART)
    _stop(own.pid)
    call = driver.start("flock", fd, EX)
    for _ in range(3):
        _await_in_flock(call)
        state = thread_state(driver.pid, call.tid)
        assert state is not None
        driver.signal(signal.SIGUSR1)
        await_true(lambda: _switches(call) > state.switches, "the handler to run")  # noqa: B023
    _await_in_flock(call)
    os.kill(own.pid, signal.SIGCONT)
    assert call.result() == OK
    assert driver.ask("sigcount", signal.SIGUSR1) == 3
    assert not world.free(world.file())
    assert driver.flock(fd, UN) == OK
    assert world.free(world.file())


def _switches(call: Call) -> int:
    state = thread_state(call.driver.pid, call.tid)
    assert state is not None
    return state.switches


@in_both
def test_killed_before_it_was_read(world: SupervisedWorld, own: Supervision) -> None:
    driver, fd = world.opened()
    _stop(own.pid)
    call = driver.start("flock", fd, EX)
    _await_in_flock(call)
    driver.kill()
    os.kill(own.pid, signal.SIGCONT)
    assert world.free(world.file())


@in_both
def test_stopped_before_it_was_read(world: SupervisedWorld, own: Supervision) -> None:
    driver, fd = world.opened()
    _stop(own.pid)
    call = driver.start("flock", fd, EX)
    _await_in_flock(call)
    _stop(driver.pid)
    os.kill(own.pid, signal.SIGCONT)
    assert world.free(world.file())
    driver.signal(signal.SIGCONT)
    assert call.result() == OK
    assert not world.free(world.file())


# While it waits.


@in_both
def test_a_stopped_waiter_lets_others_go_on(world: SupervisedWorld) -> None:
    holder, held_fd = _held(world)
    stopped, stopped_fd = world.opened()
    second, second_fd = world.opened()
    first_call = stopped.flock_later(stopped_fd, EX)
    world.await_blocked(first_call)
    second_call = second.flock_later(second_fd, EX)
    world.await_blocked(second_call)
    _stop(stopped.pid)
    assert holder.flock(held_fd, UN) == OK
    assert second_call.result() == OK
    assert world.probe(world.file(), SH) == BUSY
    assert second.flock(second_fd, UN) == OK
    assert world.free(world.file())
    stopped.signal(signal.SIGCONT)
    assert first_call.result() == OK
    assert not world.free(world.file())


@in_both
def test_what_was_interrupted_is_over_at_once(world: SupervisedWorld) -> None:
    """Whoever could not have the lock alone, and now reads instead, is not disturbed by what it has given up."""
    reader, reader_fd = world.opened()
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, 0)
    third, third_fd = world.opened()
    assert reader.flock(reader_fd, SH) == OK
    for _ in range(20):
        call = driver.start("flock", fd, EX)
        world.await_blocked(call)
        driver.signal(signal.SIGUSR1)
        assert call.result() == errno.EINTR
        assert driver.flock(fd, SH | NB) == OK
        assert reader.flock(reader_fd, UN) == OK
        assert third.flock(third_fd, EX | NB) == BUSY
        assert reader.flock(reader_fd, SH) == OK
        assert driver.flock(fd, UN) == OK


@in_both
def test_who_was_interrupted_is_in_nobody_s_way(world: SupervisedWorld) -> None:
    """A reader need not wait for a writer that has given up; nor do hundreds of tries pile up anywhere."""
    reader, reader_fd = world.opened()
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, 0)
    assert reader.flock(reader_fd, SH) == OK
    for _ in range(300):
        call = driver.start("flock", fd, EX)
        _await_in_flock(call)
        driver.signal(signal.SIGUSR1)
        assert call.result() == errno.EINTR
    late, late_fd = world.opened()
    assert late.flock(late_fd, SH) == OK
    assert reader.flock(reader_fd, UN) == OK
    assert late.flock(late_fd, UN) == OK
    assert world.free(world.file())


@in_both
def test_killed_while_one_of_its_threads_waits(world: SupervisedWorld) -> None:
    holder, held_fd = _held(world)
    victim, victim_fd = world.opened()
    other, other_fd = world.opened("another")
    assert victim.flock(victim.open(world.directory / "another"), EX) == OK
    calls = [victim.flock_later(victim_fd, operation) for operation in (EX, SH)]
    world.await_blocked(*calls)
    waiting = other.flock_later(other_fd, EX)
    world.await_blocked(waiting)
    victim.kill()
    assert waiting.result() == OK
    assert holder.flock(held_fd, UN) == OK
    assert world.free(world.file())


@in_both
@pytest.mark.parametrize("killed", ["holder", "waiter"])
def test_killed(world: SupervisedWorld, killed: str) -> None:
    holder, held_fd = _held(world)
    waiter, waiting_fd = world.opened()
    call = waiter.flock_later(waiting_fd, EX)
    world.await_blocked(call)
    if killed == "holder":
        holder.kill()
        assert call.result() == OK
        assert not world.free(world.file())
    else:
        waiter.kill()
        assert holder.flock(held_fd, UN) == OK
        assert world.free(world.file())


# The supervisor


def _kill(own: Supervision) -> None:
    os.kill(own.pid, signal.SIGKILL)
    await_end(own.pid)


@pytest.fixture
def plain(own: Supervision, rendezvous: Path, nolock_dir: Path) -> Iterator[World]:
    """Preloaded programs beside the supervised ones."""
    from conftest import shim_environment  # noqa: PLC0415

    world = World("emulated", nolock_dir, shim_environment(rendezvous))
    yield world
    assert world.end() == ""


@by_keeper
def test_killing_the_supervisor(world: SupervisedWorld, own: Supervision, plain: World) -> None:
    """What waits fails as where there is no flockshim; what is held stays held until its program ends."""
    holder, held_fd = _held(world)
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
    _stop(own.pid)
    call = driver.start("flock", fd, EX)
    _await_in_flock(call)
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
    holder, held_fd = _held(world)
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
    holder, held_fd = _held(world)
    waiter, waiting_fd = world.opened()
    call = waiter.flock_later(waiting_fd, EX)
    world.await_blocked(call)
    _stop(own.pid)
    unlocking = holder.start("flock", held_fd, UN)
    _await_in_flock(unlocking)
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
    holder, held_fd = _held(world)
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
    _, _ = _held(world)
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
    holder, held_fd = _held(world)
    waiter, waiting_fd = world.opened()
    waiter.ask("sigaction", signal.SIGUSR1, restart)
    call = waiter.start("flock", waiting_fd, EX)
    world.await_blocked(call)
    victim, victim_fd = world.opened()
    processes = _keeper(rendezvous)
    for pid in processes:
        _stop(pid)
    waiter.signal(signal.SIGUSR1)
    if not restart:
        assert call.result() == errno.EINTR
    doomed = victim.start("flock", victim_fd, EX)
    _await_in_flock(doomed)
    victim.kill()
    unlocking = holder.start("flock", held_fd, UN)
    _await_in_flock(unlocking)
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
    holder, held_fd = _held(world)
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
