"""The cluster protocol on the model: two hosts exhaustively, three in part and at random; mistakes must be found.

The soak, which tries far more (about an hour on one core):

    FLOCKSHIM_SOAK=1 python -m pytest tests/test_cluster_exploration.py
"""

from __future__ import annotations

import os
from typing import NamedTuple

import cluster_mutations as mutations
import pytest
from cluster_directory import Violation
from cluster_explore import begin, explore, walk
from cluster_model import Faults, World, choices, follow
from cluster_program import Hold, Script

from flockshim.cluster_ops import Rename

SOAK = bool(os.environ.get("FLOCKSHIM_SOAK"))

X, S, X_NOW, S_NOW = (True, True), (False, True), (True, False), (False, False)
"""Exclusive or shared, and blocking or not."""
UP, DOWN, DOWN_UP = (*S, True), (*X, False), (*X, False, True)
"""Shared and made exclusive, exclusive and made shared, and that made exclusive again."""

pytestmark = pytest.mark.timeout(8 * 3600 if SOAK else 120)


class Case(NamedTuple):
    """Hosts and faults; the directory has a free lock already, unless it is `unborn`."""

    scripts: tuple[Script, ...]
    faults: Faults = Faults()
    unborn: bool = False
    hard_links: bool = True
    one_domain: bool = False
    switches: int | None = None

    def world(self) -> World:
        return begin(self.scripts, self.faults, self.one_domain, self.hard_links, not self.unborn)


BOUNDED = {
    "birth": Case(((X,), (X,)), unborn=True),
    "birth by symbolic links": Case(((X,), (S_NOW,)), unborn=True, hard_links=False),
    "writers": Case(((X, X), (X,))),
    "readers": Case(((S,), (S,))),
    "reader and writer": Case(((X, S), (X_NOW,))),
    "refusals": Case(((X,), (X_NOW, S_NOW))),
    "crash": Case(((X,), (X,)), Faults(crash=1)),
    "both crash": Case(((S,), (X,)), Faults(crash=2)),
    "crash and restart": Case(((X,), (X_NOW,)), Faults(crash=1, restart=1)),
    "crash in one domain": Case(((X,), (S,)), Faults(crash=1), one_domain=True),
    "lapse": Case(((X,), (X,)), Faults(lapse=1)),
    "lapse with readers": Case(((S,), (X_NOW,)), Faults(lapse=1)),
    "lost answer": Case(((X,), (S,)), Faults(lost=1)),
    "EIO": Case(((X,), (X,)), Faults(eio=1)),
    "old views": Case(((X,), (X,)), Faults(stale_look=2, stale_list=1)),
    "three hosts": Case(((X,), (X,), (X_NOW,)), switches=1),
    "two upgrades": Case(((UP,), (UP,))),
    "upgrade and writer": Case(((UP,), (X,))),
    "upgrade and reader": Case(((UP,), (S,))),
    "downgrade and reader": Case(((DOWN_UP,), (S_NOW,))),
    "downgrade and upgrade": Case(((DOWN,), (UP,))),
    "upgrade, crash": Case(((UP,), (S,)), Faults(crash=1)),
    "upgrade, lapse": Case(((UP,), (X_NOW,)), Faults(lapse=1), switches=2),
    "downgrade, lapse": Case(((DOWN,), (X_NOW,)), Faults(lapse=1), switches=1),
    "upgrade, lost answer": Case(((UP,), (S_NOW,)), Faults(lost=1), switches=1),
    "upgrade, EIO": Case(((UP,), (X_NOW,)), Faults(eio=1)),
    "upgrade, old views": Case(((UP,), (S_NOW,)), Faults(stale_look=1, stale_list=1)),
}

SOAKED = {
    "two rounds of readers and writers": Case(((X, S), (X_NOW, S))),
    "EIO and old views": Case(((X,), (S_NOW,)), Faults(eio=1, stale_look=2, stale_list=1)),
    "two lapses with readers": Case(((S,), (X_NOW,)), Faults(lapse=2)),
    "birth, lost answer": Case(((X,), (X,)), Faults(lost=1), unborn=True),
    "birth, EIO": Case(((X,), (X,)), Faults(eio=1), unborn=True),
    "birth, crash and restart": Case(((X,), (X,)), Faults(crash=1, restart=1), unborn=True),
    "birth, old views": Case(((X,), (X,)), Faults(stale_look=2, stale_list=1), unborn=True),
    "birth by symbolic links, lost answer": Case(((X,), (S,)), Faults(lost=1), unborn=True, hard_links=False),
    "two rounds": Case(((X, X), (X, X))),
    "two rounds, readers": Case(((X, S), (S, X))),
    "two rounds, lost answer": Case(((X, X), (X,)), Faults(lost=1)),
    "two rounds, lapse": Case(((X, X), (X,)), Faults(lapse=1)),
    "two lapses": Case(((X,), (X,)), Faults(lapse=2)),
    "lapse and crash": Case(((X,), (X,)), Faults(lapse=1, crash=1)),
    "lapse and lost answer": Case(((X,), (S,)), Faults(lapse=1, lost=1)),
    "lapse and old views": Case(((X,), (X,)), Faults(lapse=1, stale_look=1, stale_list=1)),
    "two lost answers": Case(((X,), (X,)), Faults(lost=2)),
    "three hosts, birth": Case(((X,), (X,), (S,)), unborn=True, switches=1),
    "three hosts, crash": Case(((X,), (X,), (S,)), Faults(crash=1), switches=1),
    "three hosts, lapse": Case(((X,), (X,), (S,)), Faults(lapse=1), switches=1),
    "three hosts, lost answer": Case(((X,), (X,), (S,)), Faults(lost=1), switches=1),
    "upgrade, lapse": Case(((UP,), (X,)), Faults(lapse=1)),
    "downgrade, lapse": Case(((DOWN,), (X,)), Faults(lapse=1)),
    "downgrade and upgrade, lapse": Case(((DOWN,), (UP,)), Faults(lapse=1)),
    "upgrade, lost answer": Case(((UP,), (S,)), Faults(lost=1)),
    "upgrade, crash and restart": Case(((UP,), (X_NOW,)), Faults(crash=1, restart=1)),
    "downgrade, EIO and old views": Case(((DOWN_UP,), (S_NOW,)), Faults(eio=1, stale_look=1, stale_list=1)),
    "upgrades on three hosts": Case(((UP,), (UP,), (S_NOW,)), switches=1),
    "upgrades on three hosts, lapse": Case(((UP,), (UP,), (X_NOW,)), Faults(lapse=1), switches=1),
    "three hosts, all interleavings": Case(((X,), (X,), (X_NOW,))),
}

WALKS = {
    "writers": Case(((X, X), (X, X), (X, X))),
    "mixed": Case(((X, S_NOW), (S, X), (S, X_NOW))),
    "crashes": Case(((X, S), (S, X), (X, X_NOW)), Faults(crash=2, restart=1)),
    "lapses": Case(((X, S), (S, X), (X, X)), Faults(lapse=3, crash=1)),
    "conversions": Case(((DOWN_UP, S), (UP, X), (UP, UP))),
    "conversions, lapses": Case(((DOWN_UP, S), (UP, X), (UP, UP)), Faults(lapse=3, crash=1)),
    "conversions, everything": Case(((DOWN, S), (UP, X), (UP, X_NOW)), Faults(1, 1, 1, 2, 1, 2, 2)),
    "everything": Case(((X, S), (S, X), (X, X_NOW)), Faults(1, 1, 1, 2, 1, 2, 2)),
    "everything, unborn": Case(((X, S), (S, X), (X, X_NOW)), Faults(1, 1, 1, 2, 1, 2, 2), unborn=True),
    "four hosts": Case(((X, S), (S, X), (X, X_NOW), (S, S)), Faults(1, 1, 2, 2, 1, 3, 3), unborn=True),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in BOUNDED.items()])
def test_all_interleavings(case: Case) -> None:
    found = explore(case.world(), switches=case.switches)
    print(f"{found.worlds} worlds, {found.ends} ends")
    assert found.ends > 0


@pytest.mark.parametrize("faults", [Faults(crash=1), Faults(stale_list=1)])
def test_worlds_that_are_taken_for_alike_go_on_alike(faults: Faults) -> None:
    """Only one of them is followed, so they must."""
    start = Case(((X,), (X_NOW,)), faults).world()
    followed: dict[bytes, set[bytes]] = {}
    todo, met_again = [start], 0
    while todo:
        world = todo.pop()
        after = [follow(world, choice) for choice in choices(world)]
        keys = {one.key() for one in after}
        if world.key() in followed:
            met_again += 1
            assert keys == followed[world.key()]
        else:
            followed[world.key()] = keys
            todo += after
    assert met_again > 100


@pytest.mark.skipif(not SOAK, reason="takes an hour: set FLOCKSHIM_SOAK=1")
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in SOAKED.items()])
def test_all_interleavings_at_length(case: Case) -> None:
    found = explore(case.world(), switches=case.switches)
    print(f"{found.worlds} worlds, {found.ends} ends")
    assert found.ends > 0


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in WALKS.items()])
def test_three_hosts_at_random(case: Case) -> None:
    start = case.world()
    for seed in range(20000 if SOAK else 8):
        walk(start, seed)


_TWO_WRITERS = Case(((X,), (X,)))
_LAPSE = Case(((X,), (X,)), Faults(lapse=1))
_READERS = Case(((UP,), (S,)))
_MUTATIONS: list[tuple[mutations.Mutation, Case]] = [
    (mutations.no_claim, Case(((X,), (X,)), unborn=True)),
    (mutations.trusted_link, Case(((X,), (X,)), Faults(lost=1), unborn=True)),
    (mutations.eager_birth_cleaner, Case(((X,), (X,)), Faults(lost=1), unborn=True)),
    (mutations.create_and_unlink, _TWO_WRITERS),
    (mutations.unlink_and_create, _TWO_WRITERS),
    (mutations.blind_break, _TWO_WRITERS),
    (mutations.trusted_memory, Case(((X,), (X_NOW, X_NOW)))),
    (mutations.unopened, Case(((X,), (X_NOW, X_NOW)), Faults(stale_list=1))),
    (mutations.queued_twice, _TWO_WRITERS),
    (mutations.lost_answer, Case(((X,), (X_NOW,)), Faults(lost=1))),
    (mutations.forgotten_ticket, _TWO_WRITERS),
    (mutations.forgotten_queue, _TWO_WRITERS),
    (mutations.no_hand_over, _TWO_WRITERS),
    (mutations.last_come_first_served, Case(((X,), (X,), (X,)))),
    (mutations.no_confirmation, _LAPSE),
    (mutations.grant_taken_late, _LAPSE),
    (mutations.same_ticket, _LAPSE),
    (mutations.no_floor, Case(((X,), (X,)), Faults(stale_look=1, stale_list=1))),
    (mutations.no_doubt, Case(((X,),), Faults(eio=1, stale_look=1, stale_list=1))),
    (mutations.same_version, _TWO_WRITERS),
    (mutations.reader_joins_writer, Case(((X,), (S,)))),
    (mutations.data_afterwards, _TWO_WRITERS),
    (mutations.data_removed_before, _TWO_WRITERS),
    (mutations.litter_left, _TWO_WRITERS),
    (mutations.quick_judge, _TWO_WRITERS),
    (mutations.upgrade_over_readers, _READERS),
    (mutations.upgrade_unwritten, _READERS),
    (mutations.upgrade_by_letting_go, Case(((UP,), (X,)))),
    (mutations.upgrade_puts_readers_out, _READERS),
    (mutations.conversion_of_the_forgotten, Case(((UP,), (X_NOW,)), Faults(lapse=1))),
    (mutations.conversion_without_the_queue, Case(((UP,), (X,)))),
]


@pytest.mark.parametrize(("mutation", "case"), [pytest.param(*pair, id=pair[0].__name__) for pair in _MUTATIONS])
def test_a_mistake_is_found(mutation: mutations.Mutation, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    with pytest.raises(Violation) as caught:
        explore(case.world(), limit=20000)
    assert "Errno" not in str(caught.value), "the mistake was not found, but does not run"
    print(str(caught.value)[:300])


def test_removing_the_data_of_others_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes three hosts: one that holds, one that is about to queue, one that is refused and cleans.

    Of the 400,000 worlds of these, which only the soak tries, the bad ones lie on this way.
    """
    mutations.eager_cleaner(monkeypatch)
    world = Case(((X,), (X,), (X_NOW,))).world()
    for number, until in ((0, Hold), (1, Rename), (2, type(None))):
        while not isinstance(world.hosts[number].op, until):
            world = follow(world, ("step", number))
    with pytest.raises(Violation, match="data file is missing"):
        follow(world, ("step", 1))
