"""SQLite's programs, keepers and hosts that end in the middle of a transaction: the next one rolls it back."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.keepers import end_keepers, keepers
from support.sqlite import LOCKED, PATIENCE, TOTAL, Bank, Client, journal
from support.worlds import World, in_mode

WRITERS = 3
KILLS = 6
TURNS = 6
UNTIL_KILLED = 1000000
SHARED = """
import fcntl, sys
with open(sys.argv[1]) as file:
    fcntl.lockf(file, fcntl.LOCK_SH, 510, 0x40000002)
    print("shared", flush=True)
    sys.stdin.readline()
"""
READ = "select sum(balance) from account"
SUM = [[TOTAL]]

# So many pages that SQLite writes some of them into the database before it commits.
HALF = (
    "pragma cache_size = 4",
    "begin immediate",
    "update account set balance = 0",
    "insert into paper with recursive n(n) as (select 1 union all select n + 1 from n where n < 200) "
    "select hex(zeroblob(1000)) from n",
)


@pytest.fixture(params=["native", "host", "cluster"])
def world(request: pytest.FixtureRequest) -> World:
    """Where the kernel locks, and under the shim in both modes where it does not."""
    return in_mode(request, "fresh_world")


@pytest.fixture
def bank(world: World) -> Iterator[Bank]:
    bank = Bank(world, WRITERS)
    yield bank
    bank.end()


def half_done(bank: Bank, world: World) -> Client:
    """A program whose transaction is in the database in part, and in its journal."""
    size = bank.path.stat().st_size
    writer = bank.client(world)
    assert writer.sql(*HALF) == []
    assert bank.path.stat().st_size > size
    assert journal(bank.path).stat().st_size > 0
    return writer


def check_rolled_back(bank: Bank) -> None:
    assert bank.turns() == [0] * WRITERS
    assert not journal(bank.path).exists()


def test_half_a_transaction_is_rolled_back(bank: Bank) -> None:
    writer, reader = half_done(bank, bank.world), bank.client()
    assert reader.sql(READ) == LOCKED
    writer.kill()
    assert reader.sql(READ) == SUM
    check_rolled_back(bank)


def test_several_come_upon_half_a_transaction(bank: Bank) -> None:
    """One of them rolls it back, while the others wait: two would ruin it."""
    readers = [bank.client(timeout=PATIENCE) for _ in range(4)]
    half_done(bank, bank.world).kill()
    for reader in readers:
        reader.tell("execute", READ)
    assert [reader.answer() for reader in readers] == [SUM] * len(readers)
    check_rolled_back(bank)


def held_like_a_reader(bank: Bank, world: World) -> subprocess.Popen[str]:
    """A process that has the lock which readers have, and has not looked at anything else."""
    holder = subprocess.Popen(
        [sys.executable, "-c", SHARED, str(bank.path)],
        env=world.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout
    assert holder.stdout.readline() == "shared\n"
    return holder


def check_not_overlooked(bank: Bank, holder: subprocess.Popen[str]) -> None:
    """Half a transaction is not read while it cannot be rolled back."""
    reader = bank.client()
    assert reader.sql(READ) == LOCKED
    holder.communicate()
    assert reader.sql("pragma busy_timeout = 60000", READ) == SUM
    check_rolled_back(bank)


def test_half_a_transaction_is_not_overlooked(bank: Bank) -> None:
    """SQLite asks by F_GETLK whether its writer still lives."""
    half_done(bank, bank.world).kill()
    check_not_overlooked(bank, held_like_a_reader(bank, bank.world))


def test_writers_are_killed_at_any_time(bank: Bank) -> None:
    """What a writer has committed remains, and nothing else; it may be killed before it can tell."""
    chance = random.Random(1)
    watcher = bank.client(timeout=PATIENCE)
    for number in [*range(WRITERS)] * (KILLS // WRITERS):
        before = bank.turns()
        writers = [bank.client(timeout=PATIENCE) for _ in range(WRITERS)]
        for other, writer in enumerate(writers):
            writer.tell("transfer", other, UNTIL_KILLED if other == number else TURNS)
        watcher.tell("watch", TURNS)
        turns = chance.randrange(1, TURNS)
        writers[number].await_turns(turns)
        turns += writers[number].kill()
        del writers[number]
        assert [writer.answer() for writer in writers] == [[]] * len(writers)
        assert watcher.answer() == []
        expected = [made + TURNS for made in before]
        expected[number] = before[number] + turns
        found = bank.turns()
        assert found[number] in (expected[number], expected[number] + 1)
        assert [*found[:number], *found[number + 1 :]] == [*expected[:number], *expected[number + 1 :]]


def test_one_process_of_the_keeper_is_killed(fresh_world: World, rendezvous: Path) -> None:
    bank = Bank(fresh_world, WRITERS)
    writer, other = half_done(bank, fresh_world), bank.client()
    ((_, worker),) = keepers(rendezvous)
    os.kill(worker, signal.SIGKILL)
    assert other.sql(READ) == LOCKED
    assert writer.sql("rollback") == []
    assert other.sql(READ) == SUM
    check_rolled_back(bank)
    bank.end()


def test_on_another_host(here: World, there: World) -> None:
    bank = Bank(here, WRITERS)
    writer, reader = half_done(bank, there), bank.client(here)
    assert reader.sql(READ) == LOCKED
    writer.kill()
    assert reader.sql("pragma busy_timeout = 60000", READ) == SUM
    check_rolled_back(bank)
    bank.end()


def test_half_a_transaction_is_not_overlooked_while_another_host_reads(here: World, there: World) -> None:
    bank = Bank(here, WRITERS)
    half_done(bank, there).kill()
    check_not_overlooked(bank, held_like_a_reader(bank, there))
    bank.end()


def test_another_host_is_gone(here: World, there: World, other_rendezvous: Path) -> None:
    """Nobody is left there that could give the lock back: it is free after the lease time."""
    bank = Bank(here, WRITERS)
    writer, reader = half_done(bank, there), bank.client(here)
    os.kill(writer.process.pid, signal.SIGSTOP)
    end_keepers(other_rendezvous)
    writer.kill()
    assert reader.sql(READ) == LOCKED
    assert reader.sql("pragma busy_timeout = 60000", READ) == SUM
    check_rolled_back(bank)
    bank.end()
