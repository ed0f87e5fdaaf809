"""A lock belongs to the open file description: who shares it, and what does and doesn't end it."""

from __future__ import annotations

import os
import subprocess

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN, Driver
from support.worlds import ALL, ONCE_BY_KEEPER, World

WORLDS = ALL

CLOSINGS = ["close", "closerange", "fclose", "dup2", "exit", "kill", "exec"]


def _close_by(means: str, world: World, driver: Driver, fd: int) -> None:
    """Give up FD, or all descriptors of DRIVER, by MEANS."""
    if means in ("close", "fclose"):
        driver.ask(means, fd)
    elif means == "closerange":
        driver.ask("closerange", fd, 90)
    elif means == "dup2":
        driver.ask("dup2", driver.open(world.file("another")), fd)
    elif means == "exit":
        driver.exit()
    elif means == "kill":
        driver.kill()
    else:
        driver.exec()


@pytest.mark.parametrize("operation", [SH, EX])
@pytest.mark.parametrize("means", CLOSINGS)
def test_closing_the_only_descriptor_releases(world: World, means: str, operation: int) -> None:
    path = world.file()
    driver = world.start()
    fd = driver.open(path, os.O_RDWR | os.O_CLOEXEC)
    assert driver.flock(fd, operation) == OK
    assert not world.free(path)
    _close_by(means, world, driver, fd)
    assert world.free(path)


@pytest.mark.parametrize("world", ONCE_BY_KEEPER, indirect=True)
@pytest.mark.parametrize("means", CLOSINGS)
def test_closing_wakes_a_waiter_without_anybody_asking(world: World, means: str) -> None:
    driver = world.start()
    fd = driver.open(world.file(), os.O_RDWR | os.O_CLOEXEC)
    assert driver.flock(fd, EX) == OK
    other, other_fd = world.opened()
    waiting = other.flock_later(other_fd, EX)
    world.await_blocked(waiting)
    _close_by(means, world, driver, fd)
    assert waiting.result() == OK


@pytest.mark.parametrize("means", CLOSINGS)
def test_the_lock_lives_until_the_last_process_has_closed(world: World, means: str) -> None:
    path = world.file()
    driver = world.start()
    fd = driver.open(path, os.O_RDWR | os.O_CLOEXEC)
    assert driver.flock(fd, EX) == OK
    child = driver.fork()
    _close_by(means, world, driver, fd)
    assert not world.free(path)
    _close_by(means, world, child, fd)
    assert world.free(path)


def test_a_lock_taken_after_the_fork_is_shared_too(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    child = driver.fork()
    assert child.flock(fd, EX) == OK
    child.kill()
    assert not world.free(path)
    assert driver.flock(fd, EX | NB) == OK
    driver.close(fd)
    assert world.free(path)


def test_the_shell_idiom(world: World) -> None:
    """The process that locks ends at once, and the shell that opened the file still holds."""
    path = world.file()
    shell = subprocess.Popen(
        [*world.prefix, "bash", "-c", '( flock 9; echo locked; read line; ) 9>"$0"; echo free; read line', path],
        env=world.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with shell:
        assert shell.stdin is not None and shell.stdout is not None
        assert shell.stdout.readline() == b"locked\n"
        assert world.probe(path, SH) == BUSY
        shell.stdin.write(b"\n")
        shell.stdin.flush()
        assert shell.stdout.readline() == b"free\n"
        assert world.free(path)
        shell.stdin.close()


@pytest.mark.parametrize("name", ["dup", "dup2"])
def test_duplicates_share(world: World, name: str) -> None:
    path = world.file()
    driver, fd = world.opened()
    copy = driver.ask(name, fd) if name == "dup" else driver.ask(name, fd, 40)
    assert driver.flock(fd, EX) == OK
    assert driver.flock(copy, EX | NB) == OK
    driver.close(fd)
    assert not world.free(path)
    assert driver.flock(copy, SH | NB) == OK
    assert world.probe(path, SH) == OK
    driver.close(copy)
    assert world.free(path)


def test_unlocking_any_duplicate_unlocks_all(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    copy = driver.ask("dup", fd)
    assert driver.flock(fd, EX) == OK
    assert driver.flock(copy, UN) == OK
    assert world.free(path)


def test_a_second_description_of_one_process_is_another_owner(world: World) -> None:
    """Closing it must not touch the first one's lock, as it would with fcntl(2) record locks."""
    path = world.file()
    driver, first = world.opened()
    second = driver.open(path)
    assert driver.flock(first, EX) == OK
    assert driver.flock(second, EX | NB) == BUSY
    driver.close(second)
    assert not world.free(path)
    reopened = driver.open(f"/proc/self/fd/{first}")
    assert driver.flock(reopened, SH | NB) == BUSY


def test_a_forked_child_can_unlock_for_its_parent(world: World) -> None:
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    assert driver.fork().flock(fd, UN) == OK
    assert world.free(world.file())


@pytest.mark.parametrize("plain", [False, True], ids=["with preload", "without preload"])
@pytest.mark.parametrize("how", ["exec", "spawn"])
def test_a_new_program_inherits(world: World, how: str, plain: bool) -> None:
    """Even one that the shim is not in keeps the lock for as long as it has the descriptor."""
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    if how == "exec":
        driver.exec(without_preload=plain)
        heir = driver
    else:
        heir = driver.spawn(without_preload=plain)
        if plain and world.emulated and not world.supervised:
            assert "is started without LD_PRELOAD and not covered" in world.fleet.errors()
            world.fleet.forget_errors()
        driver.exit()
    assert not world.free(path)
    heir.close(fd)
    assert world.free(path)


def test_inherited_through_generations(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    for _ in range(4):
        child = driver.fork()
        driver.exit()
        driver = child
        assert not world.free(path)
    driver.exit()
    assert world.free(path)


def test_a_child_that_locks_and_ends_at_once(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    child = driver.fork()
    assert child.flock(fd, EX) == OK
    child.exit()
    assert not world.free(path)
    driver.close(fd)
    assert world.free(path)


@pytest.mark.parametrize("operation", [SH, EX])
def test_a_vfork_child_locks_for_its_parent(world: World, operation: int) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.start("vforkflock", fd, operation).result() == OK
    assert not world.free(path)
    assert driver.start("vforkflock", fd, UN).result() == OK
    assert world.free(path)


@pytest.mark.parametrize("world", ONCE_BY_KEEPER, indirect=True)
def test_one_description_many_files_one_process(world: World) -> None:
    """Locks of different files don't meet, however many one process has."""
    paths = [world.file(f"file-{index}") for index in range(20)]
    driver = world.start()
    fds = [driver.open(path) for path in paths]
    for fd in fds:
        assert driver.flock(fd, EX) == OK
    for path, fd in zip(paths, fds):
        assert not world.free(path)
        driver.close(fd)
        assert world.free(path)


def test_a_waiter_that_is_killed_leaves_the_queue(world: World) -> None:
    path = world.file()
    holder, held_fd = world.opened()
    victim, victim_fd = world.opened()
    other, other_fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    doomed = victim.flock_later(victim_fd, EX)
    world.await_blocked(doomed)
    waiting = other.flock_later(other_fd, EX)
    world.await_blocked(waiting)
    victim.kill()
    world.await_blocked(waiting)
    assert holder.flock(held_fd, UN) == OK
    assert waiting.result() == OK
    other.kill()
    assert world.free(path)


def test_closing_the_descriptor_of_a_waiting_call(world: World) -> None:
    """The call goes on: the kernel holds the description for it, and drops the lock at its end."""
    path = world.file()
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    waiting = other.flock_later(other_fd, EX)
    world.await_blocked(waiting)
    other.close(other_fd)
    world.await_blocked(waiting)
    assert holder.flock(held_fd, UN) == OK
    assert waiting.result() == OK
    assert world.free(path)


def test_closing_all_descriptors_while_a_call_waits(world: World) -> None:
    """A daemon's start-up code does that, and knows nothing of a thread that waits for a lock."""
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    waiting = other.flock_later(other_fd, EX)
    world.await_blocked(waiting)
    other.ask("closerange", 3, 90)
    for _ in range(5):
        other.open(world.file("another"))
    world.await_blocked(waiting)
    assert holder.flock(held_fd, UN) == OK
    assert waiting.result() == OK
    assert world.free(world.file())


def test_forking_while_another_thread_waits(world: World) -> None:
    """The child has the description, but not the call: it dies with the parent."""
    path = world.file()
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    world.await_blocked(other.flock_later(other_fd, EX))
    child = other.fork()
    other.kill()
    assert holder.flock(held_fd, UN) == OK
    assert world.free(path)
    assert child.flock(other_fd, EX | NB) == OK
    assert not world.free(path)


def test_a_call_that_ends_by_exec_is_not_served_later(world: World) -> None:
    """Though a child, forked while it waited, may have inherited whatever it waited with."""
    path = world.file()
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert holder.flock(held_fd, SH) == OK
    world.await_blocked(other.flock_later(other_fd, EX))
    child = other.fork()
    other.exec()
    assert holder.flock(held_fd, UN) == OK
    assert world.free(path)
    assert child.flock(other_fd, SH) == OK
    assert world.probe(path, SH) == OK
