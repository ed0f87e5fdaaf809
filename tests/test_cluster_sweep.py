"""Vouching files that crashes have left: each is removed when its keeper is surely dead, none of the living."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from flockshim.cluster_names import vouching_name
from flockshim.cluster_ops import Create, List, Read, Unlink
from flockshim.cluster_vouch import GAP, Judge

LEASE = 90.0
POLL = LEASE * GAP / 2
MOST = 3
OWN = "8"


class Directory:
    """The vouching files in one directory, a clock, and the judge of keeper OWN."""

    def __init__(self, domain: dict[str, bool] | None = None) -> None:
        """DOMAIN tells of the keepers of its own domain whether they are dead."""
        self.files: dict[str, str] = {}
        self.now = 1000.0
        self.reads: list[str] = []
        self.fails: set[type] = set()
        self.judge = Judge(LEASE, lambda: self.now, (domain or {}).get)

    def vouch(self, *keepers: str) -> None:
        for keeper in keepers:
            self.files[vouching_name(keeper)] = f"{keeper} at {self.now}"

    def keepers(self) -> str:
        """Those whose files are there."""
        return "".join(sorted(name.rpartition(".")[2] for name in self.files))

    def perform(self, op: Any) -> Any:
        if type(op) in self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if isinstance(op, List):
            return [name for name in self.files if name.startswith(op.prefix)]
        if isinstance(op, Create):
            if op.name in self.files:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            self.files[op.name] = op.text
            return None
        if op.name not in self.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if isinstance(op, Read):
            self.reads.append(op.name.rpartition(".")[2])
            return self.files[op.name]
        assert isinstance(op, Unlink)
        del self.files[op.name]
        return None

    def sweep(self) -> bool:
        """Once, and return whether to come again."""
        steps = self.judge.sweep(OWN, MOST)
        resume, argument = steps.send, None
        try:
            while True:
                op = resume(argument)
                try:
                    resume, argument = steps.send, self.perform(op)
                except OSError as error:
                    resume, argument = steps.throw, error
        except StopIteration as stop:
            return bool(stop.value)

    def sweep_for(self, seconds: float, *living: str) -> float:
        """As a keeper does, while LIVING go on vouching, until there is no more to do. Returns after how long."""
        begun = self.now
        while self.sweep():
            if self.now - begun >= seconds:
                raise AssertionError(f"there is always more to do: {self.keepers()}")
            self.now += POLL
            self.vouch(*living)
        return self.now - begun


def test_the_dead_of_the_own_domain_go_at_once() -> None:
    directory = Directory({"a": True, "b": False, OWN: False, "1": True})
    directory.vouch("a", "b", OWN, "1")
    assert not directory.sweep()
    assert directory.keepers() == OWN + "b"
    assert directory.reads == []


def test_the_silent_of_other_domains_go_after_a_lease_time() -> None:
    directory = Directory()
    directory.vouch("a", "1")
    assert LEASE <= directory.sweep_for(2 * LEASE) <= LEASE + 2 * POLL
    assert directory.keepers() == ""


def test_who_is_seen_to_live_is_left_and_not_watched_any_longer() -> None:
    directory = Directory()
    directory.vouch("a")
    assert directory.sweep_for(2 * LEASE, "a") < LEASE
    assert directory.keepers() == "a"


def test_the_living_stay_among_the_dead() -> None:
    directory = Directory({"b": True, "c": False, OWN: False})
    directory.vouch("a", "b", "c", OWN)
    directory.sweep_for(2 * LEASE, "c", OWN)
    assert directory.keepers() == OWN + "c"
    directory.vouch("a", "b", "d")
    directory.sweep_for(2 * LEASE, "a", "c", "d", OWN)
    assert directory.keepers() == OWN + "acd"


def test_a_living_one_that_vouches_late_is_not_removed() -> None:
    """Its file has not changed for almost a lease time, and then it has."""
    directory = Directory()
    directory.vouch("a")
    while directory.now < 1000.0 + LEASE - POLL:
        assert directory.sweep()
        directory.now += POLL
    directory.vouch("a")
    assert not directory.sweep()
    assert directory.keepers() == "a"


@pytest.mark.parametrize(("there", "first"), [("12349abcd", "9ab"), ("1234ef", "1ef"), ("1234", "123")])
def test_so_many_are_watched_at_a_time_and_each_observer_begins_behind_itself(there: str, first: str) -> None:
    directory = Directory()
    directory.vouch(*there)
    directory.sweep()
    assert "".join(sorted(directory.reads)) == first
    directory.sweep_for(2 * LEASE)
    assert len(directory.files) == len(there) - MOST
    while directory.files:
        directory.sweep_for(2 * LEASE)


def test_what_cannot_be_observed_stays() -> None:
    """Failures are no silence: the row of observations begins anew."""
    directory = Directory()
    directory.vouch("a")
    directory.fails = {Read}
    for _ in range(20):
        assert directory.sweep()
        directory.now += POLL
    assert directory.keepers() == "a"
    directory.fails = set()
    assert directory.sweep_for(2 * LEASE) >= LEASE
    assert directory.keepers() == ""


def test_observations_with_too_long_a_gap_do_not_count_together() -> None:
    directory = Directory()
    directory.vouch("a")
    for _ in range(5):
        assert directory.sweep()
        directory.now += 2 * LEASE
    assert directory.keepers() == "a"


def test_one_that_another_has_removed_meanwhile_is_done_with() -> None:
    directory = Directory()
    directory.vouch("a", "b")
    assert directory.sweep()
    del directory.files[vouching_name("a")]
    directory.now += POLL
    directory.vouch("b")
    assert not directory.sweep()
    assert directory.keepers() == "b"


def test_what_cannot_be_removed_does_not_keep_us() -> None:
    directory = Directory({"a": True})
    directory.vouch("a", "b")
    directory.fails = {Unlink}
    assert directory.sweep_for(2 * LEASE) >= LEASE
    assert directory.keepers() == "ab"


def test_other_names_are_none_of_ours() -> None:
    directory = Directory()
    others = {".flockshim.": "", ".flockshim.Not-one": "", ".flockshim.0.1": "", ".file.flockshim": "lineage a\n"}
    directory.files = dict(others)
    assert not directory.sweep()
    assert directory.files == others
