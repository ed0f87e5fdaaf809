"""The cluster protocol in a real directory: what it costs, what it leaves, and what the exploration cannot reach."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flockshim import cluster_files
from flockshim.cluster import Lease
from flockshim.cluster_names import MAX_KEEPER, MAX_SERIAL_DIGITS, MAX_VERSION_DIGITS, Names, StateName
from flockshim.cluster_ops import Create, Link, List, Look, Operation, Pause, Symlink, Wait
from flockshim.cluster_state import Entry, State, of_text
from flockshim.cluster_vouch import GAP, HEARTBEATS, Judge, Voucher

TARGET = "some.lock"
CLAIM = ".some.lock.flockshim"
LEASE = 90.0
POLL = 5.0


class Site:
    """A host: what it runs is performed in a directory, and the operations are noted."""

    def __init__(self, directory: Path, keeper: str, dead: tuple[str, ...] = (), fails: dict[type, int] | None = None):
        self.descriptor = os.open(directory, os.O_RDONLY)
        self.done: list[Operation] = []
        self.fails = fails or {}
        self.time = 0.0
        self.while_it_waits: Callable[[], None] = lambda: time.sleep(0.001)
        self.keeper = keeper
        self.serial = itertools.count(1)
        self.judge = Judge(LEASE, self.clock, lambda other: True if other in dead else None)
        self.voucher = Voucher(keeper, LEASE, self.clock, lambda: str(next(self.serial)))
        self.lease = self.new_lease()

    def clock(self) -> float:
        return self.time

    def new_lease(self) -> Lease:
        lineages = itertools.count(1)
        return Lease(
            TARGET,
            lambda: f"{self.keeper}-{next(self.serial)}",
            lambda: f"{self.keeper}{next(lineages):x}",
            self.judge,
            self.voucher,
        )

    def perform(self, op: Operation) -> Any:
        self.done.append(op)
        if isinstance(op, (Pause, Wait)):
            self.while_it_waits()
            return None
        if type(op) in self.fails:
            number = self.fails[type(op)]
            raise OSError(number, os.strerror(number))
        return cluster_files.perform(self.descriptor, op)

    def run(self, protocol: Any) -> Any:
        try:
            op = next(protocol)
            while True:
                try:
                    result = self.perform(op)
                except OSError as error:
                    op = protocol.throw(error)
                else:
                    op = protocol.send(result)
        except StopIteration as stop:
            return stop.value

    def lock(self, exclusive: bool = True, blocking: bool = True) -> bool:
        return bool(self.run(self.lease.acquire(exclusive, blocking)))

    def unlock(self) -> None:
        self.run(self.lease.release())


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "shared"
    path.mkdir()
    yield path


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_one_operation_to_take_and_one_to_give_back(directory: Path) -> None:
    site = Site(directory, "a")
    site.lock()
    site.unlock()
    site.done.clear()
    for _ in range(3):
        assert site.lock()
        site.unlock()
    assert [type(op).__name__ for op in site.done] == ["Rename"] * 6


def test_what_is_left_is_a_claim_that_explains_itself_and_one_state_file(directory: Path) -> None:
    site = Site(directory, "a")
    site.lock()
    assert names(directory) == [CLAIM, f"{CLAIM}.a1.1.xa-1"]
    site.unlock()
    assert names(directory) == [CLAIM, f"{CLAIM}.a1.2.free"]
    assert "flockshim" in (directory / CLAIM).read_text()


def test_threads_as_hosts_never_overlap(directory: Path) -> None:
    inside: list[tuple[int, bool]] = []
    overlaps: list[Any] = []
    counter = [0]

    def run(number: int) -> None:
        site = Site(directory, f"{number + 10:x}")
        for turn in range(15):
            exclusive = (turn + number) % 3 > 0
            assert site.lock(exclusive)
            inside.append((number, exclusive))
            if len(inside) > 1 and any(mode for _, mode in list(inside)):
                overlaps.append(list(inside))
            if exclusive:
                count = counter[0]
                time.sleep(0.0005)
                counter[0] = count + 1
            inside.remove((number, exclusive))
            site.unlock()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == []
    assert counter[0] == 4 * 10
    assert len(names(directory)) == 2


def until_it_waits(site: Site, protocol: Any) -> Any:
    """Return the steps that are begun, when they have come to the Wait."""
    op = next(protocol)
    while not isinstance(op, Wait):
        try:
            result = site.perform(op)
        except OSError as error:
            op = protocol.throw(error)
        else:
            op = protocol.send(result)
    return protocol


def test_the_queue_can_be_seen_by_the_holder(directory: Path) -> None:
    holder, other = Site(directory, "a"), Site(directory, "b")
    holder.lock()
    waiting = until_it_waits(other, other.lease.acquire(True, True))
    state = holder.run(holder.lease.refresh())
    assert [entry.ticket for entry in state.queue] == ["b-1"]
    assert holder.lease.token == 1
    holder.unlock()
    assert other.run(waiting) is True
    assert other.lease.token == 3


def test_whoever_is_granted_the_lock_learns_so_by_one_listing(directory: Path) -> None:
    holder, other = Site(directory, "a"), Site(directory, "b")
    holder.lock()
    waiting = until_it_waits(other, other.lease.acquire(True, True))
    holder.unlock()
    other.done.clear()
    assert other.run(waiting) is True
    assert [type(op) for op in other.done] == [Look, List]


def test_a_listing_that_is_out_of_date_does_not_hide_who_waits(directory: Path) -> None:
    holder, other = Site(directory, "a"), Site(directory, "b")
    holder.lock()
    listings = [names(directory)]
    until_it_waits(other, other.lease.acquire(True, True))
    perform = holder.perform
    holder.perform = lambda op: listings.pop() if isinstance(op, List) and listings else perform(op)  # type: ignore[method-assign]
    assert len(holder.run(holder.lease.refresh()).queue) == 1


def test_a_lock_that_others_take_all_the_time_is_not_out_of_date(directory: Path) -> None:
    """However often it changes between the listing and what follows, nobody pauses for it, or thinks it was removed."""
    busy, other = Site(directory, "a"), Site(directory, "b")
    busy.lock()
    asking = other.lease.acquire(True, False)
    op = next(asking)
    for _ in range(500):
        assert not isinstance(op, Pause)
        if isinstance(op, Look):
            busy.unlock()
            busy.lock()
        try:
            result = other.perform(op)
        except OSError as error:
            op = asking.throw(error)
        else:
            op = asking.send(result)
    asking.close()


def test_a_dead_keeper_of_the_own_domain_is_replaced_at_once(directory: Path) -> None:
    Site(directory, "dead").lock()
    site = Site(directory, "a", dead=("dead",))
    assert site.lock(blocking=False)
    assert site.lease.token == 2


def test_a_keeper_that_forgot_a_target_drops_what_it_left(directory: Path) -> None:
    site = Site(directory, "a")
    site.lock()
    site.lease = site.new_lease()
    assert site.lease.token == 0
    assert site.lock(blocking=False)
    site.unlock()
    assert names(directory)[1].endswith(".free")


def test_break_removes_the_entry_that_was_shown_and_no_other(directory: Path) -> None:
    holder, other = Site(directory, "a"), Site(directory, "b")
    holder.lock()
    assert not other.run(other.lease.take_away("a-17"))
    assert other.run(other.lease.take_away("a-1"))
    assert not holder.run(holder.lease.refresh()).holders
    assert not holder.lease.still_mine(holder.clock())


def test_cleaning_removes_what_the_crashed_left_and_nothing_else(directory: Path) -> None:
    site = Site(directory, "a")
    site.lock()
    for litter in ("c1.0.free", "a1.1+b-1", "a1.0+b-2"):
        (directory / f"{CLAIM}.{litter}").write_text("")
    for other in (f"{CLAIM}.a1.2+b-3", f"{CLAIM}.mine", ".some.lock.flockshim.a1.x", ".other.flockshim.c1.0.free"):
        (directory / other).write_text("")
    site.run(site.lease.clean())
    left = {CLAIM, f"{CLAIM}.a1.1.xa-1", f"{CLAIM}.a1.2+b-3", f"{CLAIM}.mine"}
    assert set(names(directory)) == left | {".some.lock.flockshim.a1.x", ".other.flockshim.c1.0.free"}


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_without_hard_links_the_claim_is_a_symbolic_link(directory: Path, number: int) -> None:
    site = Site(directory, "a", fails={Link: number})
    site.lock()
    assert (directory / CLAIM).is_symlink()
    other = Site(directory, "b")
    assert not other.lock(blocking=False)


def test_without_any_links_the_error_is_told_and_nothing_left(directory: Path) -> None:
    with pytest.raises(PermissionError):
        Site(directory, "a", fails={Link: errno.EPERM, Symlink: errno.EPERM}).lock()
    assert names(directory) == []


def test_a_birth_takes_five_operations(directory: Path) -> None:
    site = Site(directory, "a")
    site.lock()
    assert [type(op).__name__ for op in site.done] == ["Read", "Create", "Link", "Read", "Rename"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_where_no_file_can_be_made_the_error_is_told(directory: Path, number: int) -> None:
    with pytest.raises(OSError) as caught:
        Site(directory, "a", fails={Create: number}).lock()
    assert caught.value.errno == number
    assert names(directory) == []


def test_a_claim_of_somebody_else_is_left_alone(directory: Path) -> None:
    (directory / CLAIM).write_text("not ours\n")
    with pytest.raises(OSError, match="not a file of flockshim's"):
        Site(directory, "a").lock()


def test_a_state_file_that_was_removed_is_an_error_and_not_a_new_lock(directory: Path) -> None:
    site = Site(directory, "a")
    site.lock()
    os.unlink(directory / f"{CLAIM}.a1.1.xa-1")
    with pytest.raises(OSError, match="removed by somebody"):
        Site(directory, "b").lock()


def test_a_name_is_too_long_before_it_fails_in_use() -> None:
    longest = Names("x").state(
        StateName("f" * 16, 10**MAX_VERSION_DIGITS - 1, f"x{'f' * MAX_KEEPER}-{'9' * MAX_SERIAL_DIGITS}")
    )
    room = 255 - len(longest) + 1
    assert Names("n" * room).claim
    with pytest.raises(OSError) as caught:
        Names("n" * (room + 1))
    assert caught.value.errno == errno.ENAMETOOLONG


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"holders": [1], "queue": []}', '{"holders": []}', "null"])
def test_data_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        of_text(1, text)


def test_data_is_read_as_it_was_written() -> None:
    state = State(4, (Entry("a-1", False, 2), Entry("b-1", False, 3)), (Entry("c-1", True),))
    assert state.token() is None
    assert of_text(4, state.text()) == state


def test_vouching_files_of_the_dead_are_swept(directory: Path) -> None:
    alive, dead = Site(directory, "a", dead=("dead",)), Site(directory, "dead")
    alive.run(alive.voucher.vouch())
    dead.run(dead.voucher.vouch())
    assert names(directory) == [".flockshim.a", ".flockshim.dead"]
    assert alive.run(alive.judge.sweep("a", 1)) is False
    assert names(directory) == [".flockshim.a"]
    alive.run(alive.voucher.withdraw())
    alive.run(alive.voucher.withdraw())
    assert names(directory) == []


def poll(site: Site, blocking: bool, until: float) -> bool:
    """Try for the lock, every POLL seconds of the site's own time."""

    def later() -> None:
        site.time += POLL
        if site.time > until:
            raise TimeoutError

    site.while_it_waits = later
    try:
        while not site.lock(blocking=blocking):
            later()
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("vouched", [True, False])
def test_a_keeper_elsewhere_that_has_died_is_replaced_after_a_lease_time(
    directory: Path, blocking: bool, vouched: bool
) -> None:
    dead, site = Site(directory, "dead"), Site(directory, "a")
    dead.lock()
    if vouched:
        dead.run(dead.voucher.vouch())
    assert poll(site, blocking, until=2 * LEASE)
    assert LEASE <= site.time <= LEASE + 2 * LEASE * GAP
    dead.time = site.time
    assert not dead.lease.still_mine(dead.time)
    assert not dead.run(dead.lease.confirm())


def test_a_keeper_elsewhere_that_vouches_is_not_replaced(directory: Path) -> None:
    holder, site = Site(directory, "dead"), Site(directory, "a")
    holder.lock()
    perform = site.perform

    def vouching(op: Operation) -> Any:
        if site.time >= holder.time + LEASE / HEARTBEATS:
            holder.time = site.time
            holder.run(holder.voucher.vouch())
        return perform(op)

    site.perform = vouching  # type: ignore[method-assign]
    assert not poll(site, True, until=10 * LEASE)
    assert holder.lease.still_mine(holder.time + 0.5 * LEASE)
    assert not holder.lease.still_mine(holder.time + 0.7 * LEASE)


def test_a_holder_that_was_silent_confirms_that_it_still_holds(directory: Path) -> None:
    site = Site(directory, "a")
    site.lock()
    site.time = LEASE
    assert not site.lease.still_mine(site.time)
    site.run(site.voucher.vouch())
    assert not site.lease.still_mine(site.time)
    assert site.run(site.lease.confirm())
    assert site.lease.still_mine(site.time)
    assert site.lease.token == 2
