"""What flock(2) promises about one file, natively, under the shim and supervised alike."""

from __future__ import annotations

import errno
import os

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN
from support.worlds import ALL, BY_KEEPER, World

WORLDS = ALL

BAD_OPERATIONS = [0, NB, SH | EX, SH | UN, EX | UN, SH | EX | UN, 16, EX | 1024, 1 << 31]


@pytest.mark.parametrize(
    ("held", "wanted", "result"),
    [(SH, SH, OK), (SH, EX, BUSY), (EX, SH, BUSY), (EX, EX, BUSY)],
    ids=["SH-SH", "SH-EX", "EX-SH", "EX-EX"],
)
@pytest.mark.parametrize("same_process", [True, False], ids=["one process", "two processes"])
def test_shared_and_exclusive(world: World, held: int, wanted: int, result: int, same_process: bool) -> None:
    path = world.file()
    holder, held_fd = world.opened()
    other = holder if same_process else world.start()
    other_fd = other.open(path)
    assert holder.flock(held_fd, held | NB) == OK
    assert other.flock(other_fd, wanted | NB) == result
    assert holder.flock(held_fd, UN) == OK
    assert other.flock(other_fd, wanted | NB) == OK


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
@pytest.mark.parametrize("operation", [SH, EX])
def test_the_open_mode_does_not_matter(world: World, flags: int, operation: int) -> None:
    driver = world.start()
    fd = driver.open(world.file(), flags)
    assert driver.flock(fd, operation) == OK
    assert driver.flock(fd, UN) == OK


@pytest.mark.parametrize("operation", [SH, EX])
def test_asking_again_for_what_one_has(world: World, operation: int) -> None:
    driver, fd = world.opened()
    for _ in range(3):
        assert driver.flock(fd, operation | NB) == OK
        assert driver.flock(fd, operation) == OK
    assert driver.flock(fd, UN) == OK
    assert world.free(world.file())


def test_unlocking_nothing_succeeds(world: World) -> None:
    driver, fd = world.opened()
    for operation in (UN, UN | NB, UN):
        assert driver.flock(fd, operation) == OK
    assert driver.flock(fd, EX) == OK
    for operation in (UN, UN | NB):
        assert driver.flock(fd, operation) == OK
    assert world.free(world.file())


def test_unlocking_leaves_the_locks_of_others(world: World) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    assert other.flock(other_fd, UN) == OK
    assert not world.free(world.file())


def test_conversion_up_and_down(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, SH) == OK
    assert world.probe(path, SH) == OK
    assert driver.flock(fd, EX) == OK
    assert world.probe(path, SH) == BUSY
    assert driver.flock(fd, SH) == OK
    assert world.probe(path, SH) == OK
    assert world.probe(path, EX) == BUSY


def test_a_refused_upgrade_has_lost_the_shared_lock(world: World) -> None:
    path = world.file()
    first, first_fd = world.opened()
    second, second_fd = world.opened()
    assert first.flock(first_fd, SH) == OK
    assert second.flock(second_fd, SH) == OK
    assert second.flock(second_fd, EX | NB) == BUSY
    # Only the first one's lock is left, so that one can be made exclusive.
    assert first.flock(first_fd, EX | NB) == OK
    assert first.flock(first_fd, UN) == OK
    assert world.free(path)


def test_a_waiting_upgrade_has_lost_the_shared_lock(world: World) -> None:
    first, first_fd = world.opened()
    second, second_fd = world.opened()
    assert first.flock(first_fd, SH) == OK
    assert second.flock(second_fd, SH) == OK
    waiting = second.flock_later(second_fd, EX)
    world.await_blocked(waiting)
    # Natively first's own upgrade finds nobody holding, though second waits.
    assert first.flock(first_fd, EX | NB) == OK
    world.await_blocked(waiting)
    assert first.flock(first_fd, UN) == OK
    assert waiting.result() == OK


def test_a_downgrade_lets_waiting_readers_in(world: World) -> None:
    holder, held_fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    readers = [world.opened() for _ in range(3)]
    waiting = [driver.flock_later(fd, SH) for driver, fd in readers]
    world.await_blocked(*waiting)
    assert holder.flock(held_fd, SH) == OK
    assert [call.result() for call in waiting] == [OK, OK, OK]
    assert world.probe(world.file(), EX) == BUSY


def test_a_waiter_gets_the_lock_when_it_is_given_back(world: World) -> None:
    path = world.file()
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    waiting = other.flock_later(other_fd, EX)
    world.await_blocked(waiting)
    assert holder.flock(held_fd, UN) == OK
    assert waiting.result() == OK
    assert not world.free(path)
    other.close(other_fd)
    assert world.free(path)


def test_two_waiters_on_one_description(world: World) -> None:
    """Both calls return when the description gets the lock: they ask for the same thing."""
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    again = other.ask("dup", other_fd)
    assert holder.flock(held_fd, EX) == OK
    waiting = [other.flock_later(fd, EX) for fd in (other_fd, again)]
    world.await_blocked(*waiting)
    assert holder.flock(held_fd, UN) == OK
    assert [call.result() for call in waiting] == [OK, OK]


@pytest.mark.parametrize("world", BY_KEEPER, indirect=True)
def test_two_waiters_on_one_description_and_another_between(world: World) -> None:
    """Natively the other one may be the first to get the lock; if not, there too both calls return."""
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    third, third_fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    calls = []
    for driver, fd in (other, other_fd), (third, third_fd), (other, other_fd):
        calls.append(driver.flock_later(fd, EX))
        world.await_blocked(*calls)
    assert holder.flock(held_fd, UN) == OK
    assert [calls[0].result(), calls[2].result()] == [OK, OK]
    world.await_blocked(calls[1])
    assert other.flock(other_fd, UN) == OK
    assert calls[1].result() == OK


def test_a_shared_try_succeeds_while_a_writer_waits(world: World) -> None:
    path = world.file()
    reader, reader_fd = world.opened()
    writer, writer_fd = world.opened()
    assert reader.flock(reader_fd, SH) == OK
    waiting = writer.flock_later(writer_fd, EX)
    world.await_blocked(waiting)
    assert world.probe(path, SH) == OK
    world.await_blocked(waiting)
    assert reader.flock(reader_fd, UN) == OK
    assert waiting.result() == OK


def test_an_upgrade_passes_a_waiting_writer(world: World) -> None:
    """flock looks for conflicts with holders only, so the sole reader need not wait."""
    reader, reader_fd = world.opened()
    writer, writer_fd = world.opened()
    assert reader.flock(reader_fd, SH) == OK
    waiting = writer.flock_later(writer_fd, EX)
    world.await_blocked(waiting)
    assert reader.flock(reader_fd, EX | NB) == OK
    world.await_blocked(waiting)
    assert reader.flock(reader_fd, UN) == OK
    assert waiting.result() == OK


@pytest.mark.parametrize("world", BY_KEEPER, indirect=True)
def test_a_later_reader_waits_behind_a_writer(world: World) -> None:
    """First come, first served: natively the late reader may pass, and starve the writer."""
    first, first_fd = world.opened()
    writer, writer_fd = world.opened()
    late, late_fd = world.opened()
    assert first.flock(first_fd, SH) == OK
    writing = writer.flock_later(writer_fd, EX)
    world.await_blocked(writing)
    reading = late.flock_later(late_fd, SH)
    world.await_blocked(writing, reading)
    assert first.flock(first_fd, UN) == OK
    assert writing.result() == OK
    world.await_blocked(reading)
    assert writer.flock(writer_fd, UN) == OK
    assert reading.result() == OK


@pytest.mark.parametrize("world", BY_KEEPER, indirect=True)
def test_writers_are_served_in_the_order_of_their_requests(world: World) -> None:
    holder, held_fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    queue = []
    for _ in range(5):
        driver, fd = world.opened()
        queue.append((driver, fd, driver.flock_later(fd, EX)))
        world.await_blocked(queue[-1][2])
    assert holder.flock(held_fd, UN) == OK
    for index, (driver, fd, call) in enumerate(queue):
        assert call.result() == OK
        world.await_blocked(*(later for _, _, later in queue[index + 1 :]))
        assert driver.flock(fd, UN) == OK


@pytest.mark.parametrize("operation", [SH, EX, UN, SH | NB, EX | NB, UN | NB])
def test_a_bad_descriptor_is_ebadf(world: World, operation: int) -> None:
    driver = world.start()
    for fd in (50, -1, 1 << 30):
        assert driver.flock(fd, operation) == errno.EBADF


@pytest.mark.parametrize("operation", BAD_OPERATIONS)
def test_a_bad_operation_is_einval(world: World, operation: int) -> None:
    driver, fd = world.opened()
    assert driver.flock(fd, operation) == errno.EINVAL
    assert world.free(world.file())


def test_mandatory_locks_are_accepted_and_do_nothing(world: World) -> None:
    """LOCK_MAND: since Linux 5.15 the kernel ignores it before it asks the file system."""
    driver, fd = world.opened()
    for operation in (32, 32 | EX, -1):
        assert driver.flock(fd, operation) == OK
    assert world.free(world.file())


def test_a_bad_operation_is_looked_at_before_a_bad_descriptor(world: World) -> None:
    driver = world.start()
    for operation in (0, SH | EX, 16):
        assert driver.flock(50, operation) == errno.EINVAL


def test_a_bad_operation_keeps_the_lock(world: World) -> None:
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    assert driver.flock(fd, SH | EX) == errno.EINVAL
    assert not world.free(world.file())


@pytest.mark.parametrize("operation", [SH | NB, EX | NB, UN])
def test_an_o_path_descriptor_is_ebadf(world: World, operation: int) -> None:
    path = world.file()
    driver = world.start()
    fd = driver.open(path, os.O_PATH)
    assert driver.flock(fd, operation) == errno.EBADF
    assert world.free(path)
