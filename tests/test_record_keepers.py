"""Record locks between two keepers: every other process has another one, and what one keeper promises still holds.

Not so: circles of waiting calls (EDEADLK) are found by one keeper only, and whose lock F_GETLK shows first depends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import shim_environment
from support.driver import Driver
from support.groups import ControlGroup
from support.keepers import keepers
from support.worlds import World
from test_record_deadlocks import test_a_chain_is_no_cycle  # noqa: F401  (run once more, in the world below)
from test_record_owners import (  # noqa: F401
    test_a_child_does_not_keep_the_process_s_locks,
    test_a_child_has_none_of_the_process_s_locks,
    test_a_child_shares_the_description_s_locks,
    test_a_duplicate_keeps_the_description_s_locks,
    test_closing_ends_all_locks_of_the_process,
    test_closing_the_descriptor,
    test_closing_wakes_who_waits,
    test_exec_ends_the_locks_of_what_it_closes,
    test_exec_keeps_locks,
    test_the_end_of_the_holder,
)
from test_record_semantics import (  # noqa: F401
    test_a_downgrade_lets_readers_in,
    test_a_refused_lock_leaves_nothing,
    test_a_refused_upgrade_keeps_the_read_lock,
    test_asking_by_position_and_end,
    test_asking_shows_the_whole_lock,
    test_flock_is_another_lock,
    test_many_pieces,
    test_readers_and_writers,
    test_split_merge_and_change,
    test_unlocking_what_is_not_ones_own,
)
from test_record_waits import (  # noqa: F401
    test_a_descriptor_closed_while_its_call_waits,
    test_a_handler_with_restart_goes_on_waiting,
    test_a_handler_without_restart_interrupts,
    test_a_killed_waiter,
    test_a_stopped_waiter,
    test_a_waiting_upgrade_keeps_the_read_lock,
    test_an_interrupted_upgrade_keeps_the_read_lock,
    test_others_pass_who_does_not_concern_them,
    test_readers_are_served_together,
    test_waiters_of_different_ranges,
    test_waiters_of_one_range,
    test_waiting_ends_when_just_that_range_is_free,
    test_waiting_for_two_holders,
    test_what_is_had_after_waiting_merges,
)


class TwoKeepers(World):
    """Every other process is in a control group, and so with a keeper, of its own."""

    def __init__(self, directory: Path, rendezvous: Path, group: ControlGroup) -> None:
        super().__init__("emulated", directory, shim_environment(rendezvous))
        self._prefixes = itertools.cycle([[], group.prefix])

    def start(self) -> Driver:
        return self.fleet.start(None, *next(self._prefixes))


@pytest.fixture
def world(nolock_dir: Path, session_rendezvous: Path, group: ControlGroup) -> Iterator[World]:
    world = TwoKeepers(nolock_dir, session_rendezvous, group)
    yield world
    assert world.end() == ""


def test_there_are_two(world: World, session_rendezvous: Path) -> None:
    """Else all the others would prove nothing."""
    path = world.file()
    drivers = [world.start(), world.start()]
    for driver in drivers:
        assert driver.start("record", "fcntl", 6, driver.open(path), 0, 0, 0, 0, 0).result() == 0
    groups = {Path(f"/proc/{keeper.worker}/cgroup").read_text() for keeper in keepers(session_rendezvous)}
    assert {Path(f"/proc/{driver.pid}/cgroup").read_text() for driver in drivers} <= groups
