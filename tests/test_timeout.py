"""FLOCKSHIM_TIMEOUT inside programs: an emulated lock is waited for so long, and no longer."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN, Driver
from support.keepers import keepers
from support.lockcommand import job, run, settings
from support.proc import await_end, await_true, thread_state
from support.worlds import World

SA_RESTART = 0x10000000


def _impatient(world: World, seconds: str, **more: str) -> Driver:
    """A process that waits for SECONDS at most."""
    return world.fleet.start({**world.environment, "FLOCKSHIM_TIMEOUT": seconds, **more})


def _held(world: World) -> tuple[Driver, int]:
    holder, fd = world.opened()
    assert holder.flock(fd, EX) == OK
    return holder, fd


def _check_line(world: World, holder: Driver) -> None:
    """One line names who holds; the fleet's standard error is empty afterwards."""
    text = world.fleet.errors()
    world.fleet.forget_errors()
    start = f"flockshim: cannot lock {world.directory}/file: timed out (--timeout), held by pid {holder.pid} "
    assert text.startswith(f"{start}(lockdriver-cc ") and f" on {os.uname().nodename} since " in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("nolock_dir", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"], indirect=True)
def test_a_wait_fails_with_the_kernels_errno(emulated: World, nolock_dir: Path, request: pytest.FixtureRequest) -> None:
    holder, _ = _held(emulated)
    driver = _impatient(emulated, "0.2")
    fd = driver.open(emulated.file())
    begin = time.monotonic()
    assert driver.flock(fd, EX) == getattr(errno, request.node.callspec.params["nolock_dir"])
    assert time.monotonic() - begin >= 0.2
    _check_line(emulated, holder)


def test_a_wait_fails_with_the_errno_that_is_simulated(emulated: World) -> None:
    """524 is one that no FUSE file system may give."""
    holder, _ = _held(emulated)
    driver = _impatient(emulated, "0.1", FLOCKSHIM_SIMULATE="524")
    assert driver.flock(driver.open(emulated.file()), EX) == 524
    _check_line(emulated, holder)


def test_it_can_wait_again(emulated: World) -> None:
    holder, held_fd = _held(emulated)
    driver = _impatient(emulated, "0.1")
    fd = driver.open(emulated.file())
    for operation in SH, EX, SH:
        assert driver.flock(fd, operation) == errno.ENOSYS
        _check_line(emulated, holder)
    assert holder.flock(held_fd, UN) == OK
    assert driver.flock(fd, EX) == OK
    assert not emulated.free(emulated.file())


def test_a_timeout_that_is_not_reached(emulated: World) -> None:
    holder, held_fd = _held(emulated)
    driver = _impatient(emulated, "600")
    call = driver.start("flock", driver.open(emulated.file()), EX)
    emulated.await_blocked(call)
    assert holder.flock(held_fd, UN) == OK
    assert call.result() == OK


def test_nothing_at_all(emulated: World) -> None:
    """With 0 a lock that is free is had, and one that is held is not waited for."""
    holder, held_fd = emulated.opened()
    driver = _impatient(emulated, "0")
    fd = driver.open(emulated.file())
    assert driver.flock(fd, EX) == OK
    assert driver.flock(fd, UN) == OK
    assert holder.flock(held_fd, EX) == OK
    assert driver.flock(fd, SH) == errno.ENOSYS
    _check_line(emulated, holder)


@pytest.mark.parametrize("seconds", ["0", "0.1", "600"])
def test_tries_are_as_without(emulated: World, seconds: str) -> None:
    holder, held_fd = _held(emulated)
    driver = _impatient(emulated, seconds)
    fd = driver.open(emulated.file())
    assert driver.flock(fd, EX | NB) == BUSY
    assert driver.flock(fd, SH | NB) == BUSY
    assert holder.flock(held_fd, UN) == OK
    assert driver.flock(fd, EX | NB) == OK
    assert driver.flock(fd, UN) == OK


def test_those_behind_are_not_disturbed(emulated: World) -> None:
    holder, held_fd = _held(emulated)
    impatient = _impatient(emulated, "0.5")
    given_up = impatient.start("flock", impatient.open(emulated.file()), EX)
    emulated.await_blocked(given_up)
    behind = []
    for _ in range(2):
        driver, fd = emulated.opened()
        behind.append((driver, fd, driver.start("flock", fd, EX)))
        emulated.await_blocked(behind[-1][2])
    assert given_up.result() == errno.ENOSYS
    _check_line(emulated, holder)
    emulated.await_blocked(*(call for _, _, call in behind))
    assert holder.flock(held_fd, UN) == OK
    for driver, fd, call in behind:
        assert call.result() == OK
        assert driver.flock(fd, UN) == OK


def test_readers_behind_a_writer_that_gives_up_go_on(emulated: World) -> None:
    holder, held_fd = emulated.opened()
    assert holder.flock(held_fd, SH) == OK
    writer = _impatient(emulated, "0.2")
    given_up = writer.start("flock", writer.open(emulated.file()), EX)
    emulated.await_blocked(given_up)
    reader, fd = emulated.opened()
    assert reader.flock(fd, SH) == OK
    assert given_up.result() == errno.ENOSYS
    _check_line(emulated, holder)


def test_an_upgrade_that_gives_up_has_lost_the_shared_lock(emulated: World) -> None:
    """As one that is interrupted: the conversion is not atomic, flock(2)."""
    holder, held_fd = emulated.opened()
    assert holder.flock(held_fd, SH) == OK
    driver = _impatient(emulated, "0.1")
    fd = driver.open(emulated.file())
    assert driver.flock(fd, SH) == OK
    assert driver.flock(fd, EX) == errno.ENOSYS
    _check_line(emulated, holder)
    assert holder.flock(held_fd, EX | NB) == OK


def test_a_signal_interrupts_as_ever(emulated: World) -> None:
    _held(emulated)
    driver = _impatient(emulated, "600")
    driver.ask("sigaction", signal.SIGUSR1, 0)
    call = driver.start("flock", driver.open(emulated.file()), EX)
    emulated.await_blocked(call)
    driver.signal(signal.SIGUSR1)
    assert call.result() == errno.EINTR


def test_signals_that_restart_do_not_end_it_nor_begin_it_anew(emulated: World) -> None:
    holder, _ = _held(emulated)
    driver = _impatient(emulated, "0.5")
    driver.ask("sigaction", signal.SIGUSR1, SA_RESTART)
    begin = time.monotonic()
    call = driver.start("flock", driver.open(emulated.file()), EX)
    emulated.await_blocked(call)
    while not call.returned():
        before = thread_state(driver.pid, call.tid)
        driver.signal(signal.SIGUSR1)
        await_true(lambda: thread_state(driver.pid, call.tid) != before, "the handler to run")  # noqa: B023
    assert call.result() == errno.ENOSYS
    assert time.monotonic() - begin >= 0.5
    _check_line(emulated, holder)


def test_a_keeper_that_is_killed_meanwhile(fresh_world: World, rendezvous: Path) -> None:
    """Whoever takes over holds the lock on, and knows nothing of the time: the program tells it what is left."""
    holder, _ = _held(fresh_world)
    driver = _impatient(fresh_world, "0.6")
    begin = time.monotonic()
    call = driver.start("flock", driver.open(fresh_world.file()), EX)
    fresh_world.await_blocked(call)
    ((_, worker),) = keepers(rendezvous)
    os.kill(worker, signal.SIGKILL)
    await_end(worker)
    assert call.result() == errno.ENOSYS
    assert time.monotonic() - begin >= 0.6
    _check_line(fresh_world, holder)


def test_several_at_once(emulated: World) -> None:
    """The one who began to wait first need not be the first to give up."""
    _held(emulated)
    seconds = ["0.4", "0.2", "0.3", "0.1"]
    calls, begins = [], []
    for each in seconds:
        driver = _impatient(emulated, each, FLOCKSHIM_QUIET="1")
        fd = driver.open(emulated.file())
        begins.append(time.monotonic())
        calls.append(driver.start("flock", fd, EX))
        emulated.await_blocked(calls[-1])
    for index in 3, 1, 2, 0:
        assert calls[index].result() == errno.ENOSYS
        assert time.monotonic() - begins[index] >= float(seconds[index])


def test_kernel_locks_are_waited_for_as_ever(emulated: World, tmp_path: Path) -> None:
    """Where the kernel answers its answer counts; another wait that ends tells that the time has passed."""
    native = tmp_path / "file"
    holder = emulated.start()
    held_fd = holder.open(native)
    assert holder.flock(held_fd, EX) == OK
    driver, clock = _impatient(emulated, "0.1"), _impatient(emulated, "0.3")
    call = driver.start("flock", driver.open(native), EX)
    own, _ = _held(emulated)
    assert clock.flock(clock.open(emulated.file()), EX) == errno.ENOSYS
    _check_line(emulated, own)
    assert not call.returned()
    assert holder.flock(held_fd, UN) == OK
    assert call.result() == OK


@pytest.mark.parametrize("value", ["soon", "-1", "1e3", "1.2345", "1s", "0x10"])
def test_a_variable_that_cannot_be_understood(emulated: World, value: str) -> None:
    """The launcher would have refused it; set by hand, no lock is given rather than another one than asked for."""
    driver = _impatient(emulated, value)
    assert driver.flock(driver.open(emulated.file()), EX) == errno.ENOSYS
    text = emulated.fleet.errors()
    emulated.fleet.forget_errors()
    assert "FLOCKSHIM_TIMEOUT cannot be understood" in text and text.count("\n") == 1
    assert emulated.free(emulated.file())


def test_by_option(emulated: World) -> None:
    """flock(1) says what it says when a lock call fails."""
    holder, held_fd = _held(emulated)
    for words, variables in (["--timeout", "0.2"], {}), ([], {"FLOCKSHIM_TIMEOUT": "0.2"}):
        done = run(emulated, *words, "flock", "file", "touch", "ran", env=settings(emulated, **variables))
        assert done.returncode not in (0, 75)
        ours, theirs = done.stderr.splitlines()
        assert re.fullmatch(rf"flockshim: cannot lock .*/file: timed out .*, held by pid {holder.pid} .*", ours)
        assert "Function not implemented" in theirs
    assert not (emulated.directory / "ran").exists()
    quiet = run(emulated, "--quiet", "--timeout", "0", "flock", "file", "true")
    assert "flockshim" not in quiet.stderr and quiet.returncode not in (0, 75)
    assert holder.flock(held_fd, UN) == OK
    assert run(emulated, "--timeout", "0", "flock", "file", "sh", "-c", "exit 3").returncode == 3


def test_the_timeout_of_lock_is_that_of_locks_inside_too(emulated: World) -> None:
    holder, _ = _held(emulated)
    with job(emulated, "--timeout", "0.2", "--lock", "other", command=["flock", "file", "true"]) as running:
        status, text = running.ended()
    assert status not in (0, 75)
    assert f"held by pid {holder.pid} " in text


def test_waiting_is_told_and_its_end_too(emulated: World) -> None:
    """With --verbose: first whom one waits for, and then that it was in vain."""
    _held(emulated)
    done = run(emulated, "--verbose", "--timeout", "0.5", "flock", "file", "true")
    lines = done.stderr.splitlines()
    assert [line.split(" ")[1] for line in lines[:2]] == ["waiting", "cannot"]
    assert len(lines) == 3
