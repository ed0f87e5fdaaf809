"""A description that lives where no descriptor table shows it: in flight, mapped, in a thread."""

from __future__ import annotations

import os

import pytest
from support.driver import BUSY, EX, OK, SH, UN, connect, pass_descriptor
from support.worlds import ALL, BY_KEEPER, ONCE_BY_KEEPER, World

WORLDS = ALL


@pytest.mark.parametrize("ended", ["close", "kill"])
def test_the_receiver_of_a_descriptor_holds_on(world: World, ended: str) -> None:
    path = world.file()
    sender, fd = world.opened()
    receiver = world.start()
    assert sender.flock(fd, EX) == OK
    got = pass_descriptor(sender, fd, receiver)
    if ended == "close":
        sender.close(fd)
    else:
        sender.kill()
    assert not world.free(path)
    assert receiver.flock(got, SH) == OK
    assert world.probe(path, SH) == OK
    receiver.close(got)
    assert world.free(path)


@pytest.mark.parametrize("ended", ["close", "kill"])
def test_a_descriptor_in_flight_holds(world: World, ended: str) -> None:
    path = world.file()
    sender, fd = world.opened()
    receiver = world.start()
    out, into = connect(sender, receiver)
    assert sender.flock(fd, EX) == OK
    sender.ask("sendfd", out, fd)
    if ended == "close":
        sender.close(fd)
    else:
        sender.kill()
    assert world.probe(path, SH) == BUSY
    got = receiver.ask("recvfd", into)
    assert world.probe(path, SH) == BUSY
    receiver.close(got)
    assert world.free(path)


@pytest.mark.parametrize("world", ONCE_BY_KEEPER, indirect=True)
def test_a_descriptor_that_nobody_will_receive_is_released(world: World) -> None:
    sender, fd = world.opened()
    receiver = world.start()
    out, into = connect(sender, receiver)
    assert sender.flock(fd, EX) == OK
    sender.ask("sendfd", out, fd)
    sender.kill()
    other, other_fd = world.opened()
    waiting = other.flock_later(other_fd, EX)
    world.await_blocked(waiting)
    receiver.close(into)
    assert waiting.result() == OK


@pytest.mark.parametrize("world", ONCE_BY_KEEPER, indirect=True)
def test_a_stranger_s_descriptors_in_flight_do_not_hold(world: World) -> None:
    """A file that has nothing to do with the lock may stay unread in a socket for ever."""
    path = world.file()
    stranger, stranger_fd = world.opened("another")
    receiver = world.start()
    out, _ = connect(stranger, receiver)
    stranger.ask("sendfd", out, stranger_fd)
    driver, fd = world.opened()
    for _ in range(20):
        assert driver.flock(fd, EX) == OK
        driver.close(fd)
        assert world.free(path)
        fd = driver.open(path)


def test_a_received_descriptor_can_be_locked(world: World) -> None:
    path = world.file()
    sender, fd = world.opened()
    receiver = world.start()
    got = pass_descriptor(sender, fd, receiver)
    assert receiver.flock(got, EX) == OK
    receiver.kill()
    assert not world.free(path)
    assert sender.flock(fd, UN) == OK
    assert world.free(path)


def test_a_mapping_outlives_the_descriptor(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    address = driver.ask("mmap", fd)
    driver.close(fd)
    assert not world.free(path)
    driver.ask("munmap", address)
    assert world.free(path)


def test_a_mapping_in_a_forked_child(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    driver.ask("mmap", fd)
    child = driver.fork()
    driver.kill()
    child.close(fd)
    assert not world.free(path)
    child.exec()
    assert world.free(path)


def test_a_mapping_of_another_description_does_not_hold(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    bystander, bystander_fd = world.opened()
    bystander.ask("mmap", bystander_fd)
    assert driver.flock(fd, EX) == OK
    driver.close(fd)
    assert world.free(path)


@pytest.mark.parametrize("world", BY_KEEPER, indirect=True)
def test_whose_mapping_it_is_cannot_be_told_without_a_descriptor(world: World) -> None:
    """A documented difference: then the lock lasts as long as the mapping, never shorter."""
    path = world.file()
    driver, fd = world.opened()
    bystander, bystander_fd = world.opened()
    address = bystander.ask("mmap", bystander_fd)
    bystander.close(bystander_fd)
    assert driver.flock(fd, EX) == OK
    driver.close(fd)
    assert not world.free(path)
    bystander.ask("munmap", address)
    assert world.free(path)


def test_a_mapping_of_another_description_in_the_same_process(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    other = driver.open(path)
    driver.ask("mmap", other)
    driver.close(other)
    assert driver.flock(fd, EX) == OK
    driver.kill()
    assert world.free(path)


def test_the_main_thread_may_be_gone(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    driver.start("mainexit").result()
    assert not world.free(path)
    assert driver.flock(fd, UN) == OK
    assert world.free(path)
    assert driver.flock(fd, SH) == OK
    assert world.probe(path, EX) == BUSY
    driver.close(fd)
    assert world.free(path)


def test_a_lock_call_after_the_main_thread_is_gone(world: World) -> None:
    path = world.file()
    driver = world.start()
    driver.start("mainexit").result()
    fd = driver.open(path)
    assert driver.flock(fd, EX) == OK
    assert world.probe(path, SH) == BUSY
    driver.kill()
    assert world.free(path)


def test_a_thread_with_a_file_table_of_its_own(world: World) -> None:
    """clone(2) without CLONE_FILES: /proc/PID/fd shows only the main thread's table."""
    path = world.file()
    driver = world.start()
    thread = driver.thread()
    thread.ask("unsharefiles")
    fd = thread.open(path)
    assert thread.flock(fd, EX) == OK
    assert world.probe(path, SH) == BUSY
    thread.close(fd)
    assert world.free(path)


def test_a_descriptor_left_only_in_a_thread_with_its_own_table(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    thread = driver.thread()
    thread.ask("unsharefiles")
    driver.close(fd)
    assert world.probe(path, SH) == BUSY
    thread.ask("endthread")
    # The answer comes before the thread's end, which the driver cannot announce: wait for it.
    other, other_fd = world.opened()
    assert other.flock_later(other_fd, EX).result() == OK


def test_a_reopened_path_is_no_part_of_the_description(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    bystander = world.start()
    bystander.open(path)
    bystander.open(path, os.O_PATH)
    driver.kill()
    assert world.free(path)
