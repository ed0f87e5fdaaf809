"""Signals that arrive while a lock call waits."""

from __future__ import annotations

import errno
import signal
import subprocess

import pytest
from support.driver import EX, NB, OK, SH, UN, Call, Driver
from support.proc import await_true, thread_state
from support.worlds import ALL, ON_FUSE, World

WORLDS = [*ALL, ON_FUSE]

SA_RESTART = 0x10000000


def _waiting(world: World, operation: int = EX) -> tuple[Driver, int, Driver, int, Call]:
    """A holder, and a single-threaded process that waits for its lock."""
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    call = driver.start("flock", fd, operation)
    world.await_blocked(call)
    return holder, held_fd, driver, fd, call


@pytest.mark.parametrize("operation", [SH, EX])
def test_a_handler_without_restart_interrupts(world: World, operation: int) -> None:
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, 0)
    assert holder.flock(held_fd, EX) == OK
    call = driver.start("flock", fd, operation)
    world.await_blocked(call)
    driver.signal(signal.SIGUSR1)
    assert call.result() == errno.EINTR
    assert driver.ask("sigcount", signal.SIGUSR1) == 1
    assert holder.flock(held_fd, UN) == OK
    assert world.free(world.file())


def test_an_interrupted_upgrade_has_lost_the_shared_lock(world: World) -> None:
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, 0)
    assert holder.flock(held_fd, SH) == OK
    assert driver.flock(fd, SH) == OK
    call = driver.start("flock", fd, EX)
    world.await_blocked(call)
    driver.signal(signal.SIGUSR1)
    assert call.result() == errno.EINTR
    assert holder.flock(held_fd, EX | NB) == OK


def test_a_handler_with_restart_goes_on_waiting(world: World) -> None:
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, SA_RESTART)
    assert holder.flock(held_fd, EX) == OK
    call = driver.start("flock", fd, EX)
    world.await_blocked(call)
    for _ in range(3):
        before = thread_state(driver.pid, call.tid)
        assert before is not None
        driver.signal(signal.SIGUSR1)
        await_true(lambda: _switched(driver, call, before.switches), "the handler to run")  # noqa: B023
        world.await_blocked(call)
    assert holder.flock(held_fd, UN) == OK
    assert call.result() == OK
    assert driver.ask("sigcount", signal.SIGUSR1) == 3
    assert not world.free(world.file())


def _switched(driver: Driver, call: Call, switches: int) -> bool:
    now = thread_state(driver.pid, call.tid)
    return now is not None and now.switches > switches


def test_an_ignored_signal_changes_nothing(world: World) -> None:
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    driver.ask("sigignore", signal.SIGUSR1)
    assert holder.flock(held_fd, EX) == OK
    call = driver.start("flock", fd, EX)
    world.await_blocked(call)
    driver.signal(signal.SIGUSR1)
    world.await_blocked(call)
    assert holder.flock(held_fd, UN) == OK
    assert call.result() == OK


def test_stop_and_continue_while_waiting(world: World) -> None:
    """A SIGSTOP is no handler: flock(2) is restarted after SIGCONT and never says EINTR."""
    holder, held_fd, driver, fd, call = _waiting(world)
    driver.signal(signal.SIGSTOP)
    _await_stopped(driver, True)
    driver.signal(signal.SIGCONT)
    _await_stopped(driver, False)
    world.await_blocked(call)
    assert holder.flock(held_fd, UN) == OK
    assert call.result() == OK
    assert driver.flock(fd, UN) == OK


def _await_stopped(driver: Driver, stopped: bool) -> None:
    def reached() -> bool:
        with open(f"/proc/{driver.pid}/stat") as stat:
            return (stat.read().rpartition(")")[2].split()[0] == "T") == stopped

    await_true(reached, "SIGSTOP or SIGCONT to act")


def test_a_fatal_signal_ends_a_waiter(world: World) -> None:
    holder, held_fd, driver, _, _ = _waiting(world)
    driver.signal(signal.SIGTERM)
    driver.kill()
    assert holder.flock(held_fd, UN) == OK
    assert world.free(world.file())


def test_only_the_interrupted_thread_returns(world: World) -> None:
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    second_fd = driver.open(world.file())
    driver.ask("sigaction", signal.SIGUSR1, 0)
    assert holder.flock(held_fd, EX) == OK
    calls = [driver.flock_later(each, EX) for each in (fd, second_fd)]
    world.await_blocked(*calls)
    driver.ask("sigthread", calls[0].tid, signal.SIGUSR1)
    assert calls[0].result() == errno.EINTR
    world.await_blocked(calls[1])
    assert holder.flock(held_fd, UN) == OK
    assert calls[1].result() == OK


def test_the_same_call_can_be_made_again_after_eintr(world: World) -> None:
    holder, held_fd = world.opened()
    driver, fd = world.opened()
    driver.ask("sigaction", signal.SIGUSR1, 0)
    assert holder.flock(held_fd, EX) == OK
    for _ in range(5):
        call = driver.start("flock", fd, EX)
        world.await_blocked(call)
        driver.signal(signal.SIGUSR1)
        assert call.result() == errno.EINTR
    call = driver.start("flock", fd, EX)
    world.await_blocked(call)
    assert holder.flock(held_fd, UN) == OK
    assert call.result() == OK
    assert not world.free(world.file())


def test_a_signal_and_the_grant_cross(world: World) -> None:
    done = subprocess.run(
        [*world.command("crossing"), world.file(), "2000"],
        env=world.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.split()
    assert int(words[1]) + int(words[3]) == 2000


def test_a_handler_that_jumps_out_of_the_call(world: World) -> None:
    """siglongjmp(3), the old way to limit the time: the call is over, so nothing may be granted."""
    path = world.file()
    holder, held_fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    with subprocess.Popen(
        [*world.command("longjump"), path],
        env=world.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        world.await_process_blocked(int(process.stdout.readline()))
        process.send_signal(signal.SIGALRM)
        assert process.stdout.readline() == b"jumped\n"
        assert holder.flock(held_fd, UN) == OK
        assert world.free(path)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"0\n"
        assert not world.free(path)
        process.stdin.close()
    assert world.free(path)
