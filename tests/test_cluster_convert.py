"""A lease that is made exclusive or shared without letting go: what it costs, and who stands in the way."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from test_cluster import LEASE, POLL, Site, directory, names

from flockshim.cluster_ops import Look, Rename
from flockshim.cluster_state import Entry, State

__all__ = ["directory"]


def convert(site: Site, exclusive: bool) -> bool:
    return bool(site.run(site.lease.convert(exclusive)))


def modes(site: Site) -> str:
    """Who holds: `x` or `s` each; and who waits, as capital letters."""
    state = site.run(site.lease.refresh())
    held, waiting = ("".join("sx"[entry.exclusive] for entry in some) for some in (state.holders, state.queue))
    return held + waiting.upper()


def state(holders: str, queue: str = "") -> State:
    """Holders and waiters by letters: `x` and `s`; they are called by their places."""
    entries = [Entry(f"t-{number}", letter == "x") for number, letter in enumerate(holders + queue)]
    held = tuple(entry._replace(granted=number + 1) for number, entry in enumerate(entries[: len(holders)]))
    return State(7, held, tuple(entries[len(holders) :]))


@pytest.mark.parametrize(
    ("holders", "queue", "exclusive", "result"),
    [
        ("s", "", True, ("x", "")),
        ("x", "", False, ("s", "")),
        ("ss", "", True, None),
        ("s", "xs", True, ("x", "xs")),
        ("x", "ssxs", False, ("sss", "xs")),
        ("x", "xs", False, ("s", "xs")),
        ("ss", "xs", False, ("ss", "xs")),
    ],
)
def test_the_next_state(holders: str, queue: str, exclusive: bool, result: tuple[str, str] | None) -> None:
    before = state(holders, queue)
    after = before.converted("t-0", exclusive)
    assert result == (
        after and tuple("".join("sx"[entry.exclusive] for entry in some) for some in (after.holders, after.queue))
    )
    if after is None:
        return
    assert after.version == 8
    assert [entry.ticket for entry in after.entries()] == [entry.ticket for entry in before.entries()]
    granted = {entry.ticket: entry.granted for entry in after.holders}
    assert granted["t-0"] == 8, "as of now it has another lock, with a token of its own"
    for entry in before.holders[1:]:
        assert granted[entry.ticket] == entry.granted
    assert all(granted[entry.ticket] == 8 for entry in before.queue if entry.ticket in granted)
    assert all(entry.granted == 0 for entry in after.queue)


def test_one_rename_each(directory: Path) -> None:
    site = Site(directory, "a")
    assert site.lock(exclusive=False)
    site.done.clear()
    tokens = [site.lease.token]
    for exclusive in True, False, True:
        assert convert(site, exclusive)
        tokens.append(site.lease.token)
        assert names(directory)[1].rpartition(".")[2][0] == "sx"[exclusive]
    assert [type(op) for op in site.done] == [Rename] * 3
    assert tokens == sorted(set(tokens))
    site.done.clear()
    assert convert(site, True)
    assert site.done == []


def test_other_readers_are_in_the_way(directory: Path) -> None:
    site, other = Site(directory, "a"), Site(directory, "b")
    assert site.lock(exclusive=False) and other.lock(exclusive=False)
    before = names(directory)
    assert not convert(site, True)
    assert not convert(other, True)
    assert isinstance(other.done[-1], Look), "that was made sure of"
    assert names(directory) == before
    assert site.lease.still_mine(site.time)
    other.unlock()
    assert convert(site, True)
    assert modes(site) == "x"
    assert not other.lock(exclusive=False, blocking=False)


def test_whoever_does_not_hold_converts_nothing(directory: Path) -> None:
    site, other = Site(directory, "a"), Site(directory, "b")
    assert site.lock(exclusive=False)
    other.run(other.lease.take_away(next(iter(site.lease._made))))
    assert not convert(site, True)
    assert not site.lease.still_mine(site.time)
    assert modes(other) == ""


def test_a_dead_reader_of_the_own_domain_is_not_in_the_way(directory: Path) -> None:
    dead, site = Site(directory, "a"), Site(directory, "b", dead=("a",))
    assert dead.lock(exclusive=False) and site.lock(exclusive=False)
    assert convert(site, True)
    assert modes(site) == "x"


def test_a_dead_reader_elsewhere_is_in_the_way_for_a_lease_time(directory: Path) -> None:
    dead, site = Site(directory, "a"), Site(directory, "b")
    assert dead.lock(exclusive=False) and site.lock(exclusive=False)
    since = site.time
    while not convert(site, True):
        site.time += POLL
        site.run(site.voucher.vouch())
        assert site.time - since < 2 * LEASE
    assert site.time - since >= LEASE
    assert modes(site) == "x"


def test_whoever_was_silent_gets_a_new_ticket_first(directory: Path) -> None:
    """Of the old one others may have thought that its keeper is dead."""
    site = Site(directory, "a")
    assert site.lock(exclusive=False)
    (ticket,) = (entry.ticket for entry in site.run(site.lease.refresh()).holders)
    site.time += 2 * LEASE
    assert not site.lease.still_mine(site.time)
    assert convert(site, True)
    assert site.lease.still_mine(site.time)
    (entry,) = site.run(site.lease.refresh()).holders
    assert (entry.exclusive, entry.ticket != ticket) == (True, True)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_rename_that_fails(directory: Path, exclusive: bool) -> None:
    """The error is told, and the lock is held as before."""
    site = Site(directory, "a")
    assert site.lock(exclusive=not exclusive)
    site.fails[Rename] = errno.EIO
    with pytest.raises(OSError) as caught:
        convert(site, exclusive)
    assert caught.value.errno == errno.EIO
    del site.fails[Rename]
    assert modes(site) == ("s" if exclusive else "x")
    assert convert(site, exclusive)
    assert modes(site) == ("x" if exclusive else "s")
    site.unlock()
    assert modes(site) == ""
