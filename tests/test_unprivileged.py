"""What needs looking into other processes, by a keeper that may do no more than any user's program.

The same tests as elsewhere, in a world where root has lost every capability (capabilities(7)).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import emulated_world
from support.driver import EX, OK
from support.keepers import keeper_processes
from support.worlds import World
from test_descriptors import (  # noqa: F401
    test_a_new_program_inherits,
    test_closing_the_only_descriptor_releases,
    test_inherited_through_generations,
    test_the_lock_lives_until_the_last_process_has_closed,
)
from test_passing import (  # noqa: F401
    test_a_descriptor_in_flight_holds,
    test_a_descriptor_left_only_in_a_thread_with_its_own_table,
    test_a_descriptor_that_nobody_will_receive_is_released,
    test_a_mapping_in_a_forked_child,
    test_a_mapping_outlives_the_descriptor,
    test_a_thread_with_a_file_table_of_its_own,
    test_the_main_thread_may_be_gone,
    test_the_receiver_of_a_descriptor_holds_on,
)

from flockshim.pytest_plugin import require

PR_SET_DUMPABLE = 4
PREFIX = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


@pytest.fixture
def world(request: pytest.FixtureRequest, rendezvous: Path) -> Iterator[World]:
    privileged = emulated_world(request, rendezvous)
    prefix = PREFIX if os.geteuid() == 0 else []
    require(not prefix or shutil.which(prefix[0]), "no setpriv", "apt install util-linux")
    world = World("emulated", privileged.directory, privileged.environment, *prefix)
    yield world
    assert world.end() == ""


def test_the_keeper_has_no_capability(world: World, rendezvous: Path) -> None:
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    for pid in keeper_processes(rendezvous):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        (effective,) = [line.split()[1] for line in status if line.startswith("CapEff:")]
        assert int(effective, 16) == 0


def test_a_process_that_may_not_be_looked_into(world: World) -> None:
    """A documented difference: its lock lasts as long as the process, never shorter."""
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    driver.ask("prctl", PR_SET_DUMPABLE, 0)
    assert not world.free(path)
    driver.close(fd)
    assert not world.free(path)
    driver.kill()
    assert world.free(path)
