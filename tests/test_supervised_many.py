"""Hundreds of programs under one supervisor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.driver import EX, OK, UN
from support.proc import await_true
from support.supervision import Supervision, settings
from support.worlds import SupervisedWorld

PROGRAMS = 200


@pytest.fixture
def own(rendezvous: Path) -> Iterator[Supervision]:
    supervision = Supervision(settings(rendezvous))
    yield supervision
    supervision.end()


@pytest.mark.parametrize("directory", ["nolock_dir", "native_directory"])
def test_all_have_their_turn_and_nothing_is_left_open(
    request: pytest.FixtureRequest, own: Supervision, directory: str
) -> None:
    """In the order in which they have asked, where the keeper locks."""
    kind = "supervised" if directory == "nolock_dir" else "supervised, kernel"
    world = SupervisedWorld(kind, request.getfixturevalue(directory), own, own.fleet.environment)
    descriptors = own.descriptors()
    parent, held_fd = world.opened()
    assert parent.flock(held_fd, EX) == OK
    queue = []
    for _ in range(PROGRAMS):
        driver = parent.fork()
        fd = driver.open(world.file())
        queue.append((driver, fd, driver.start("flock", fd, EX)))
        if world.emulated:
            world.await_blocked(queue[-1][2])
    world.await_blocked(*(call for _, _, call in queue))
    assert parent.flock(held_fd, UN) == OK
    while queue:
        await_true(lambda: any(call.returned() for _, _, call in queue), "somebody to be served")
        served = next(entry for entry in queue if entry[2].returned())
        assert not world.emulated or served is queue[0]
        queue.remove(served)
        driver, fd, call = served
        assert call.result() == OK
        assert not any(call.returned() for _, _, call in queue)
        assert driver.flock(fd, UN) == OK
    assert world.free(world.file())
    assert world.end() == ""
    own.await_idle(descriptors)
