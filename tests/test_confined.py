"""Containers, old kernels, small limits: the locks are right, or refused in one clear line.

Filters of seccomp(2) stand in for old kernels and for containers: what the program starts, the keeper, has them too.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import emulated_world
from support.confine import (
    OLD_KERNEL,
    confined,
    mounted,
)
from support.driver import BUSY, EX, NB, OK, SH, UN, connect
from support.groups import ControlGroup
from support.keepers import end_keepers, keeper_processes, keepers
from support.proc import await_true, snapshot
from support.worlds import World
from test_descriptors import (  # noqa: F401
    test_a_child_that_locks_and_ends_at_once,
    test_a_forked_child_can_unlock_for_its_parent,
    test_a_second_description_of_one_process_is_another_owner,
    test_a_waiter_that_is_killed_leaves_the_queue,
    test_inherited_through_generations,
    test_unlocking_any_duplicate_unlocks_all,
)
from test_passing import (  # noqa: F401
    test_a_descriptor_in_flight_holds,
    test_the_receiver_of_a_descriptor_holds_on,
)
from test_passing import (
    test_a_descriptor_that_nobody_will_receive_is_released as unreceived_is_released,
)
from test_semantics import (  # noqa: F401
    test_a_refused_upgrade_has_lost_the_shared_lock,
    test_conversion_up_and_down,
    test_unlocking_leaves_the_locks_of_others,
)
from test_unseen import test_several_threads_at_once  # noqa: F401

from flockshim.pytest_plugin import require


def _world(request: pytest.FixtureRequest, rendezvous: Path, *prefix: str) -> Iterator[World]:
    free = emulated_world(request, rendezvous)
    world = World("emulated", free.directory, free.environment, *prefix)
    yield world
    assert world.end() == ""
    log = rendezvous / "keeper.log"
    assert not log.exists() or log.read_text() == ""


@pytest.fixture(params=["EPERM:kcmp", "ENOSYS:kcmp"])
def world(request: pytest.FixtureRequest, rendezvous: Path) -> Iterator[World]:
    yield from _world(request, rendezvous, *confined(request.param))


@pytest.fixture(params=["EPERM:kcmp,pidfd_getfd", OLD_KERNEL], ids=["container", "old kernel"])
def blind_world(request: pytest.FixtureRequest, rendezvous: Path) -> Iterator[World]:
    """Where it cannot be told which descriptors are on their way: all of the host's count.

    So a lock may last a moment longer than it must, and tests wait for its end.
    """
    yield from _world(request, rendezvous, *confined(request.param))


def test_a_descriptor_that_nobody_will_receive_is_released(world: World) -> None:
    """Its own parameters are other worlds."""
    unreceived_is_released(world)


@pytest.fixture
def fresh_world(world: World) -> World:
    """Every world of this module has a keeper of its own."""
    return world


@pytest.mark.parametrize("ended", ["close", "kill"])
def test_a_waiter_has_the_file_open_too(world: World, ended: str) -> None:
    """Its descriptor has the path of the holder's, and must not be taken for the holder's."""
    holder, held_fd = world.opened()
    waiter, fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    call = waiter.flock_later(fd, EX)
    world.await_blocked(call)
    if ended == "close":
        holder.close(held_fd)
    else:
        holder.kill()
    assert call.result() == OK


def test_a_second_description_of_the_holder_stays_open(world: World) -> None:
    path = world.file()
    holder, held_fd = world.opened()
    holder.open(path)
    assert holder.flock(held_fd, EX) == OK
    assert not world.free(path)
    holder.close(held_fd)
    assert world.free(path)


def test_the_flags_of_the_description_stay_as_they_were(world: World) -> None:
    holder = world.start()
    path = world.file()
    for flags in (os.O_RDWR, os.O_RDWR | os.O_NONBLOCK | os.O_APPEND):
        fd = holder.open(path, flags)
        before = Path(f"/proc/{holder.pid}/fdinfo/{fd}").read_text()
        assert holder.flock(fd, EX) == OK
        assert not world.free(path)
        child = holder.fork()
        assert child.flock(fd, UN) == OK
        child.kill()
        assert Path(f"/proc/{holder.pid}/fdinfo/{fd}").read_text() == before
        holder.close(fd)


def test_nothing_leaks_into_the_keeper(blind_world: World, rendezvous: Path) -> None:
    driver, fd = blind_world.opened()
    pipe = driver.ask("pipe")
    name = os.readlink(f"/proc/{driver.pid}/fd/{pipe % 1000}")
    for number in range(60, 64):
        driver.ask("dup2", pipe % 1000, number)
    assert driver.flock(fd, EX) == OK
    for pid in keeper_processes(rendezvous):
        assert name not in snapshot(pid).descriptors.values()


@pytest.mark.parametrize("ended", ["close", "kill"])
def test_in_a_container_a_waiter_gets_the_lock(blind_world: World, ended: str) -> None:
    holder, held_fd = blind_world.opened()
    waiter, fd = blind_world.opened()
    assert holder.flock(held_fd, EX) == OK
    assert waiter.flock(fd, SH | NB) == BUSY
    call = waiter.flock_later(fd, EX)
    blind_world.await_blocked(call)
    if ended == "close":
        holder.close(held_fd)
    else:
        holder.kill()
    assert call.result() == OK


def test_in_a_container_a_description_is_shared(blind_world: World) -> None:
    """By forked children, and those who get it through a socket or have not got it yet."""
    path = blind_world.file()
    holder, fd = blind_world.opened()
    assert holder.flock(fd, EX) == OK
    child = holder.fork()
    holder.kill()
    assert blind_world.probe(path, SH) == BUSY
    receiver = blind_world.start()
    out, into = connect(child, receiver)
    child.ask("sendfd", out, fd)
    child.kill()
    assert blind_world.probe(path, SH) == BUSY
    got = receiver.ask("recvfd", into)
    assert blind_world.probe(path, SH) == BUSY
    assert receiver.flock(got, SH) == OK
    assert blind_world.probe(path, SH) == OK
    receiver.close(got)
    other, other_fd = blind_world.opened()
    assert other.flock_later(other_fd, EX).result() == OK


def test_in_a_container_two_descriptions_of_one_process(blind_world: World) -> None:
    driver, one = blind_world.opened()
    other = driver.open(blind_world.file())
    assert driver.flock(one, EX) == OK
    assert driver.flock(other, SH | NB) == BUSY
    duplicate = driver.ask("dup", one)
    assert driver.flock(duplicate, SH) == OK
    assert driver.flock(other, SH | NB) == OK
    assert driver.flock(duplicate, UN) == OK
    assert driver.flock(other, EX | NB) == OK


# Two keepers without events between them


def test_two_keepers_without_inotify(request: pytest.FixtureRequest, rendezvous: Path, group: ControlGroup) -> None:
    """They look once a second."""
    free = emulated_world(request, rendezvous)
    rule = confined("EMFILE:inotify_init1")
    here, there = (World("emulated", free.directory, free.environment, *each, *rule) for each in ([], group.prefix))
    try:
        holder, held_fd = here.opened()
        other, fd = there.opened()
        assert holder.flock(held_fd, EX) == OK
        assert other.flock(fd, SH | NB) == BUSY
        call = other.flock_later(fd, EX)
        there.await_blocked(call)
        holder.close(held_fd)
        assert call.result() == OK
        assert here.probe(here.file(), SH) == BUSY
        assert len(keepers(rendezvous)) == 2
        assert (rendezvous / "keeper.log").read_text() == ""
    finally:
        assert [side.end() for side in (here, there)] == ["", ""]
        end_keepers(rendezvous)


# /proc and /dev/shm


def _refused(world: World, *words: str) -> None:
    driver, fd = world.opened()
    for operation in (EX, SH | NB):
        world.fleet.forget_errors()
        assert driver.flock(fd, operation) == errno.ENOSYS
        (line,) = world.fleet.errors().splitlines()
        assert line.startswith("flockshim: ")
        for word in words:
            assert word in line


def test_proc_of_another_pid_namespace(request: pytest.FixtureRequest, rendezvous: Path) -> None:
    require(os.geteuid() == 0, "pid namespaces need root", "run the tests as root")
    free = emulated_world(request, rendezvous)
    world = World("emulated", free.directory, free.environment, "unshare", "--pid", "--fork", "--kill-child")
    try:
        _refused(world, "/proc", "pid namespace")
        assert keeper_processes(rendezvous) == []
    finally:
        world.end()


def test_no_proc(request: pytest.FixtureRequest, rendezvous: Path) -> None:
    require(os.geteuid() == 0, "only root can mount", "run the tests as root")
    free = emulated_world(request, rendezvous)
    world = World("emulated", free.directory, free.environment, *mounted("umount -l /proc"))
    try:
        _refused(world, "/proc is not mounted")
        assert keeper_processes(rendezvous) == []
    finally:
        world.end()


# Limits


def test_a_keeper_without_descriptors(request: pytest.FixtureRequest, rendezvous: Path) -> None:
    """What it holds stays, what is too much is refused, and unlocking always works."""
    world = emulated_world(request, rendezvous)
    for limit in range(32, 36):  # so that the last descriptor is taken by something else each time
        path = world.file()
        starter = world.start()
        started = starter.open(world.file("starter"))
        starter.ask("maxfiles", limit)
        assert starter.flock(started, EX) == OK
        holder, fd = world.opened()
        assert holder.flock(fd, EX) == OK
        child = holder.fork()
        holder.close(fd)  # so the keeper must look for it
        crowd = world.start()
        crowded = [crowd.open(world.file(f"crowd-{number}")) for number in range(limit)]
        results = [crowd.flock(each, EX) for each in crowded]
        assert set(results[-3:]) == {errno.ENOSYS}
        lines = world.fleet.errors().splitlines()
        assert len(lines) == results.count(errno.ENOSYS)
        assert all("descriptor" in line and "ulimit" in line for line in lines)
        world.fleet.forget_errors()
        (keeper,) = keepers(rendezvous)
        held = list(snapshot(keeper.worker).descriptors.values()).count(str(path))
        assert held == 1
        for each in crowded:
            assert crowd.flock(each, UN) == OK
        other, other_fd = world.opened()
        assert other.flock(other_fd, EX | NB) == BUSY
        child.kill()
        assert other.flock(other_fd, EX | NB) == OK
        assert keepers(rendezvous) == [keeper]
        for driver in (starter, crowd, other):
            driver.kill()
        end_keepers(rendezvous)
    assert world.end() == ""


def test_too_little_memory_for_a_keeper(request: pytest.FixtureRequest, rendezvous: Path) -> None:
    free = emulated_world(request, rendezvous)
    size = 12 << 20
    world = World("emulated", free.directory, free.environment, "prlimit", f"--as={size}:{size}")
    try:
        _refused(world, "keeper")
        await_true(lambda: keeper_processes(rendezvous) == [], "the keepers to have given up")
    finally:
        world.end()
