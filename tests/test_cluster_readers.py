"""Readers of one host that come and go, while programs of another host want the lock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import shim_environment
from support.driver import BUSY, EX, NB, OK, SH, UN
from support.keepers import end_keepers
from support.proc import await_true
from support.worlds import World

from flockshim.leases import HAND_OVERS


@pytest.fixture
def hosts(nolock_dir: Path, rendezvous: Path) -> Iterator[tuple[World, World]]:
    worlds = []
    for name in ("here", "there"):
        environment = shim_environment(rendezvous / name, FLOCKSHIM_LEASE="30")
        worlds.append(World("emulated", nolock_dir, {**environment, "FLOCKSHIM_MODE": "cluster"}))
    yield worlds[0], worlds[1]
    for world in worlds:
        world.end()
        end_keepers(world.environment["FLOCKSHIM_DIR"])


def test_many_readers_join_one_that_stays(hosts: tuple[World, World]) -> None:
    here, there = hosts
    driver, fd = here.opened()
    other, other_fd = here.opened()
    writer, writer_fd = there.opened()
    assert driver.flock(fd, SH) == OK
    wanted = writer.flock_later(writer_fd, EX)
    there.await_blocked(wanted)
    for _ in range(2 * HAND_OVERS):
        assert other.flock(other_fd, SH | NB) == OK
        assert other.flock(other_fd, UN) == OK
    assert not wanted.returned()
    assert driver.flock(fd, UN) == OK
    assert wanted.result() == OK


def test_readers_that_overlap_let_a_writer_in(hosts: tuple[World, World]) -> None:
    """One of two readers always holds, as long as that is possible; still the other host has its turn."""
    here, there = hosts
    (holder, holder_fd), (joiner, joiner_fd) = here.opened(), here.opened()
    writer, writer_fd = there.opened()
    assert holder.flock(holder_fd, SH) == OK
    wanted = writer.flock_later(writer_fd, EX)
    there.await_blocked(wanted)
    while not wanted.returned():
        joining = joiner.flock_later(joiner_fd, SH)
        await_true(lambda: joining.returned() or here.waits(joining), "the second reader to join or to wait")  # noqa: B023
        assert holder.flock(holder_fd, UN) == OK
        if joining.returned():
            assert joining.result() == OK
            (holder, holder_fd), (joiner, joiner_fd) = (joiner, joiner_fd), (holder, holder_fd)
        else:
            break
    assert wanted.result() == OK
    assert writer.flock(writer_fd, UN) == OK
    if not joining.returned():
        assert joining.result() == OK


def test_a_reader_of_mode_host_is_joined_by_one_of_mode_cluster(hosts: tuple[World, World]) -> None:
    here, there = hosts
    plain = here.fleet.start({**here.environment, "FLOCKSHIM_MODE": "host"})
    plain_fd = plain.open(here.file())
    assert plain.flock(plain_fd, SH) == OK
    driver, fd = here.opened()
    assert driver.flock(fd, SH) == OK
    writer, writer_fd = there.opened()
    assert writer.flock(writer_fd, EX | NB) == BUSY
    assert driver.flock(fd, UN) == OK
    assert plain.flock(plain_fd, UN) == OK
    assert writer.flock(writer_fd, EX | NB) == OK
