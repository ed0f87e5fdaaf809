"""Supervised programs among others: under the preload, under none, on other hosts; and what the kernel itself locks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LEASE, shim_environment
from support.driver import BUSY, EX, NB, OK, SH, UN, pass_descriptor
from support.supervision import Supervision, settings
from support.worlds import SupervisedWorld, World


@pytest.fixture
def preloaded(nolock_dir: Path, session_rendezvous: Path) -> Iterator[World]:
    world = World("emulated", nolock_dir, shim_environment(session_rendezvous))
    yield world
    assert world.end() == ""


@pytest.fixture
def native(native_directory: Path) -> Iterator[World]:
    world = World("native", native_directory, os.environ)
    yield world
    assert world.end() == ""


@pytest.fixture
def preloaded_kernel(native_directory: Path, session_rendezvous: Path) -> Iterator[World]:
    world = World("native", native_directory, shim_environment(session_rendezvous))
    yield world
    assert world.end() == ""


def _exclude_each_other(one: World, other: World) -> None:
    first, first_fd = one.opened()
    second, second_fd = other.opened()
    for holder, held_fd, world, driver, fd in (
        (first, first_fd, other, second, second_fd),
        (second, second_fd, one, first, first_fd),
    ):
        assert holder.flock(held_fd, SH) == OK
        assert driver.flock(fd, EX | NB) == BUSY
        assert driver.flock(fd, SH | NB) == OK
        assert holder.flock(held_fd, EX | NB) == BUSY
        assert driver.flock(fd, UN) == OK
        assert holder.flock(held_fd, EX) == OK
        assert driver.flock(fd, SH | NB) == BUSY
        waiting = driver.flock_later(fd, EX)
        world.await_blocked(waiting)
        assert holder.flock(held_fd, UN) == OK
        assert waiting.result() == OK
        assert holder.flock(held_fd, SH | NB) == BUSY
        assert driver.flock(fd, UN) == OK


def test_supervised_and_preloaded(supervised: World, preloaded: World) -> None:
    _exclude_each_other(supervised, preloaded)


def test_supervised_and_plain_where_the_kernel_locks(supervised_kernel: World, native: World) -> None:
    _exclude_each_other(supervised_kernel, native)


def test_supervised_and_preloaded_where_the_kernel_locks(supervised_kernel: World, preloaded_kernel: World) -> None:
    _exclude_each_other(supervised_kernel, preloaded_kernel)


def test_two_supervisors(supervised: World, session_rendezvous: Path, nolock_dir: Path) -> None:
    another = Supervision(settings(session_rendezvous))
    world = SupervisedWorld("supervised", nolock_dir, another, another.fleet.environment)
    _exclude_each_other(supervised, world)
    assert world.end() == ""
    another.end()


def test_one_queue(supervised: World, preloaded: World) -> None:
    """First come, first served, whoever they are."""
    holder, held_fd = supervised.opened()
    assert holder.flock(held_fd, EX) == OK
    queue = []
    for world in (supervised, preloaded) * 3:
        driver, fd = world.opened()
        queue.append((world, driver, fd, driver.flock_later(fd, EX)))
        world.await_blocked(queue[-1][3])
    assert holder.flock(held_fd, UN) == OK
    for index, (_, driver, fd, call) in enumerate(queue):
        assert call.result() == OK
        for world, _, _, later in queue[index + 1 :]:
            world.await_blocked(later)
        assert driver.flock(fd, UN) == OK


@pytest.mark.parametrize("taken_by", ["supervised", "preloaded"])
def test_one_description_in_both(supervised: World, preloaded: World, taken_by: str) -> None:
    """A lock that one has taken is the other's too, who converts it and gives it back."""
    path = supervised.file()
    worlds = (supervised, preloaded) if taken_by == "supervised" else (preloaded, supervised)
    sender, fd = worlds[0].opened()
    receiver = worlds[1].start()
    assert sender.flock(fd, EX) == OK
    got = pass_descriptor(sender, fd, receiver)
    assert receiver.flock(got, EX | NB) == OK
    assert receiver.flock(got, SH) == OK
    assert supervised.probe(path, SH) == preloaded.probe(path, SH) == OK
    assert preloaded.probe(path, EX) == BUSY
    sender.kill()
    assert supervised.probe(path, EX) == preloaded.probe(path, EX) == BUSY
    assert receiver.flock(got, UN) == OK
    assert supervised.free(path)


def test_one_description_of_a_supervised_and_a_plain_program(supervised_kernel: World, native: World) -> None:
    path = native.file()
    sender, fd = supervised_kernel.opened()
    receiver = native.start()
    assert sender.flock(fd, EX) == OK
    got = pass_descriptor(sender, fd, receiver)
    assert receiver.flock(got, EX | NB) == OK
    sender.kill()
    assert not native.free(path)
    assert receiver.flock(got, UN) == OK
    assert supervised_kernel.free(path)


def test_the_lock_is_the_program_s_own(supervised_kernel: World, native: World) -> None:
    """The kernel's list names the program, and nobody else keeps its description open."""
    driver, fd = supervised_kernel.opened()
    assert driver.flock(fd, EX) == OK
    locked = [line for line in Path(f"/proc/{driver.pid}/fdinfo/{fd}").read_text().splitlines() if "FLOCK" in line]
    assert len(locked) == 1
    driver.close(fd)
    assert native.free(native.file())


# Between hosts


def _supervised_host(rendezvous: Path, directory: Path) -> Iterator[SupervisedWorld]:
    more = {"FLOCKSHIM_MODE": "cluster", "FLOCKSHIM_LEASE": str(LEASE), "FLOCKSHIM_IDLE": "0.1"}
    supervision = Supervision(settings(rendezvous, **more))
    world = SupervisedWorld("supervised", directory, supervision, supervision.fleet.environment)
    yield world
    assert world.end() == ""
    supervision.end()


@pytest.fixture
def supervised_here(rendezvous: Path, nolock_dir: Path) -> Iterator[SupervisedWorld]:
    """Supervised programs of the host `here`."""
    yield from _supervised_host(rendezvous, nolock_dir)


@pytest.fixture
def supervised_there(other_rendezvous: Path, nolock_dir: Path) -> Iterator[SupervisedWorld]:
    """And of the host `there`."""
    yield from _supervised_host(other_rendezvous, nolock_dir)


@pytest.mark.parametrize("who", ["preloaded", "supervised"])
def test_programs_of_two_hosts(request: pytest.FixtureRequest, supervised_here: World, who: str) -> None:
    there = request.getfixturevalue("there" if who == "preloaded" else "supervised_there")
    first, first_fd = supervised_here.opened()
    second, second_fd = there.opened()
    for holder, held_fd, driver, fd in ((first, first_fd, second, second_fd), (second, second_fd, first, first_fd)):
        assert holder.flock(held_fd, SH) == OK
        assert driver.flock(fd, EX | NB) == BUSY
        assert driver.flock(fd, SH) == OK
        assert driver.flock(fd, UN) == OK
        assert holder.flock(held_fd, EX) == OK
        assert driver.flock(fd, SH | NB) == BUSY
        waiting = driver.flock_later(fd, EX)
        assert not waiting.returned()
        assert holder.flock(held_fd, UN) == OK
        assert waiting.result() == OK
        assert holder.flock(held_fd, SH | NB) == BUSY
        driver.flock(fd, UN)


def test_killed_on_one_of_two_hosts(supervised_here: World, supervised_there: World) -> None:
    first, first_fd = supervised_here.opened()
    second, second_fd = supervised_there.opened()
    assert first.flock(first_fd, EX) == OK
    waiting = second.flock_later(second_fd, EX)
    first.kill()
    assert waiting.result() == OK


def test_three_kinds_of_programs_on_two_hosts(supervised_here: World, here: World, there: World) -> None:
    """The supervised program and the preloaded one beside it have one keeper, and so one lease."""
    first, first_fd = supervised_here.opened()
    beside, beside_fd = here.opened()
    other, other_fd = there.opened()
    assert first.flock(first_fd, SH) == OK
    assert beside.flock(beside_fd, SH) == OK
    assert other.flock(other_fd, EX | NB) == BUSY
    assert first.flock(first_fd, UN) == OK
    assert other.flock(other_fd, EX | NB) == BUSY
    assert beside.flock(beside_fd, UN) == OK
    assert other.flock(other_fd, EX) == OK
    assert first.flock(first_fd, SH | NB) == BUSY
    assert beside.flock(beside_fd, SH | NB) == BUSY
