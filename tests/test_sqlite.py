"""SQLite locks ranges of bytes by fcntl(2): with a rollback journal, and with a write-ahead log."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import lockcommand
from support.sqlite import LOCKED, PATIENCE, TOTAL, Bank
from support.worlds import World, in_mode

from flockshim.pytest_plugin import require

WRITERS, TURNS, WATCHING = 4, 15, 30
READ = "select sum(balance) from account"
WRITE = "insert into paper values ('some')"
SUM = [[TOTAL]]

# What SQLite makes of an errno of fcntl(2).
COMPLAINTS = {"ENOSYS": "disk I/O error", "EOPNOTSUPP": "disk I/O error", "ENOLCK": LOCKED}

SHELL = """
create table numbers (n);
begin;
insert into numbers with recursive n(n) as (select 0 union all select n + 1 from n where n < 999) select * from n;
commit;
vacuum;
pragma integrity_check;
select sum(n) from numbers;
"""
PYTHON = """
import sqlite3
with sqlite3.connect("numbers.db", timeout=0) as database:
    database.execute("create table numbers (n)")
    database.executemany("insert into numbers values (?)", [(n,) for n in range(1000)])
print("ok", database.execute("select sum(n) from numbers").fetchone()[0], sep="\\n")
"""
PROGRAMS = {"sqlite3": ["sqlite3", "numbers.db", SHELL], "python": [sys.executable, "-c", PYTHON]}


@pytest.fixture(params=["native", "host", "cluster"])
def world(request: pytest.FixtureRequest) -> World:
    """Where the kernel locks, and under the shim in both modes where it does not."""
    return in_mode(request)


@pytest.fixture
def bank(world: World) -> Iterator[Bank]:
    bank = Bank(world, WRITERS)
    yield bank
    bank.end()


def require_shell() -> None:
    require(shutil.which("sqlite3"), "no sqlite3", "apt install sqlite3")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("nolock_dir", COMPLAINTS, indirect=True)
def test_without_flockshim(nolock_dir: Path, emulated: World, program: str, request: pytest.FixtureRequest) -> None:
    require_shell()
    complaint = COMPLAINTS[request.node.callspec.params["nolock_dir"]]
    words = PROGRAMS[program]
    refused = subprocess.run(
        words, cwd=nolock_dir, env=lockcommand.settings(emulated), capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0 and complaint in refused.stderr, refused
    refused = lockcommand.run(emulated, "--mode=fail", *words)
    assert refused.returncode != 0 and complaint in refused.stderr, refused
    done = lockcommand.run(emulated, *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n499500\n", "")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("option", ["--mode=host", "--mode=cluster", "--via=seccomp"])
def test_with_flockshim(emulated: World, program: str, option: str) -> None:
    require_shell()
    done = lockcommand.run(emulated, option, *PROGRAMS[program])
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n499500\n", "")


def test_a_reader_lets_others_write_until_they_commit(bank: Bank) -> None:
    reader, writer = bank.client(), bank.client()
    assert reader.sql("begin", READ) == SUM
    assert writer.sql("begin", WRITE) == []
    assert writer.sql("commit") == LOCKED
    assert reader.sql(READ, "commit") == []
    assert writer.sql("commit") == []
    assert reader.sql("select * from paper") == [["some"]]


def test_who_has_begun_to_commit_lets_no_reader_begin(bank: Bank) -> None:
    reader, writer, late = bank.client(), bank.client(), bank.client()
    assert reader.sql("begin", READ) == SUM
    assert writer.sql("begin immediate", WRITE, "commit") == LOCKED
    assert late.sql(READ) == LOCKED
    assert reader.sql(READ, "commit") == []
    assert writer.sql("commit") == []
    assert late.sql(READ) == SUM


def test_one_writes_at_a_time(bank: Bank) -> None:
    first, second = bank.client(), bank.client()
    assert first.sql("begin immediate") == []
    assert second.sql(READ) == SUM
    assert second.sql("begin immediate") == LOCKED
    assert second.sql(WRITE) == LOCKED
    assert first.sql("rollback", "begin exclusive") == []
    assert second.sql(READ) == LOCKED
    assert first.sql("rollback") == []
    assert second.sql(WRITE) == []


def test_of_two_readers_that_want_to_write_one_may(bank: Bank) -> None:
    first, second = bank.client(), bank.client(timeout=PATIENCE)
    assert first.sql("begin", READ) == SUM
    assert second.sql("begin", READ) == SUM
    assert first.sql(WRITE) == []
    assert second.sql(WRITE) == LOCKED  # at once: it would wait for itself
    assert second.sql("rollback") == []
    assert first.sql("commit") == []


def test_one_that_is_patient_gets_its_turn(bank: Bank) -> None:
    first, second = bank.client(), bank.client(timeout=PATIENCE)
    assert first.sql("begin exclusive") == []
    second.tell("execute", WRITE)
    assert second.is_silent()
    assert first.sql("commit") == []
    assert second.answer() == []


@pytest.mark.parametrize("killed", [False, True])
def test_the_lock_ends_with_the_program(bank: Bank, killed: bool) -> None:
    first, second = bank.client(), bank.client()
    assert first.sql("begin exclusive") == []
    assert second.sql(READ) == LOCKED
    if killed:
        first.kill()
    else:
        assert first.end() == ""
    assert second.sql(READ) == SUM


def test_a_reader_with_a_descriptor_for_reading_only(bank: Bank) -> None:
    reader, writer = bank.client(options="mode=ro"), bank.client()
    assert reader.sql("begin", READ) == SUM
    assert reader.sql(WRITE) == "attempt to write a readonly database"
    assert writer.sql("begin exclusive") == LOCKED
    assert reader.sql("commit") == []
    assert writer.sql("begin exclusive") == []
    assert reader.sql(READ) == LOCKED


def test_two_connections_of_one_process(bank: Bank) -> None:
    """They share the process's locks: SQLite takes a lock by one descriptor and gives it back by another."""
    both, other = bank.client(), bank.client()
    assert both.ask("another") == []
    assert both.sql("begin", READ) == SUM
    assert both.ask("execute", "begin", 1) == []
    assert both.ask("execute", READ, 1) == SUM
    assert both.ask("close", 0) == []
    assert other.sql("begin exclusive") == LOCKED
    assert both.ask("execute", "commit", 1) == []
    assert other.sql("begin exclusive") == []
    assert both.ask("execute", READ, 1) == LOCKED


def test_locking_mode_exclusive(bank: Bank) -> None:
    keeping, other = bank.client(), bank.client()
    assert keeping.sql("pragma locking_mode = exclusive", WRITE) == []
    assert other.sql(READ) == LOCKED
    assert keeping.end() == ""
    assert other.sql(READ) == SUM


def test_the_shell_and_a_program(bank: Bank) -> None:
    require_shell()
    holder = bank.client()
    assert holder.sql("begin immediate", WRITE) == []

    def shell(statement: str) -> tuple[int, str, str]:
        done = subprocess.run(
            ["sqlite3", bank.path, statement],
            env=bank.world.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    assert shell(READ) == (0, f"{TOTAL}\n", "")
    status, out, err = shell(WRITE)
    assert (status, out) == (5, "") and f"{LOCKED} (5)" in err
    assert holder.sql("commit") == []
    assert shell(f"{WRITE}; select count(*) from paper") == (0, "2\n", "")


def test_many_writers_and_readers_at_once(bank: Bank) -> None:
    bank.rush([bank.world], TURNS, WATCHING)


def test_supervised_and_preloaded_programs(emulated: World) -> None:
    launcher = [*lockcommand.FLOCKSHIM, "--mode=host", "--via=seccomp"]
    supervised = World("emulated", emulated.directory, lockcommand.settings(emulated), *launcher)
    bank = Bank(emulated, WRITERS)
    holder, other = bank.client(supervised), bank.client()
    assert holder.sql("begin immediate") == []
    assert other.sql(WRITE) == LOCKED
    assert holder.sql("commit") == []
    bank.rush([emulated, supervised], TURNS, WATCHING)
    bank.end()


@pytest.fixture
def wal(world: World) -> Iterator[Bank]:
    """A database with a write-ahead log, which its programs find their way in by memory that they share."""
    bank = Bank(world, WRITERS, "wal")
    yield bank
    bank.end()


def test_wal_readers_and_a_writer_beside_each_other(wal: Bank) -> None:
    reader, writer, other = wal.client(), wal.client(), wal.client()
    assert reader.sql("begin", "select * from paper") == []
    assert writer.sql("begin immediate", WRITE) == []
    assert other.sql(WRITE) == LOCKED
    assert other.sql(READ) == SUM
    assert writer.sql("commit") == []
    assert reader.sql("select * from paper") == []
    assert other.sql("select * from paper") == [["some"]]
    ((busy, *_),) = other.rows("pragma wal_checkpoint(restart)")
    assert busy == 1  # the reader still needs what was
    assert reader.sql("commit", "select * from paper") == [["some"]]


def test_wal_needs_no_shared_memory_for_one_process(wal: Bank) -> None:
    one, other = wal.client(), wal.client()
    assert one.sql("pragma locking_mode = exclusive", WRITE) == []
    assert not wal.path.with_name("bank.db-shm").exists()
    assert other.sql(READ) == LOCKED


def test_wal_many_writers_and_readers_at_once(wal: Bank) -> None:
    wal.rush([wal.world], TURNS, WATCHING)


def test_wal_is_left_for_a_rollback_journal_by_the_last_one(wal: Bank) -> None:
    first, second = wal.client(), wal.client()
    assert first.sql(READ) == second.sql(READ) == SUM
    assert first.sql("pragma journal_mode = delete") == LOCKED
    assert second.end() == ""
    assert first.sql("pragma journal_mode = delete") == [["delete"]]
    assert not wal.path.with_name("bank.db-wal").exists()


def test_unix_excl(bank: Bank) -> None:
    """Its users keep what they have locked until they close the database, and share nothing with others."""
    first, second = (bank.client(options="vfs=unix-excl") for _ in range(2))
    assert first.sql(WRITE) == []
    assert second.sql(READ) == LOCKED
    assert first.end() == ""
    assert second.sql(READ) == SUM


@pytest.mark.parametrize("options", ["immutable=1", "nolock=1", "vfs=unix-none"])
def test_without_locks_flockshim_is_not_needed(emulated: World, options: str) -> None:
    without = World("native", emulated.directory, lockcommand.settings(emulated))
    bank = Bank(without, options="nolock=1")
    assert bank.client(options=options).sql(READ) == SUM
    bank.end()


def test_unix_dotfile_needs_no_flockshim_and_outlives_its_program(emulated: World) -> None:
    without = World("native", emulated.directory, lockcommand.settings(emulated))
    bank = Bank(without, options="vfs=unix-dotfile")
    first, second = bank.client(), bank.client()
    assert first.sql("pragma journal_mode = wal") == [["delete"]]
    assert first.sql("begin", READ) == SUM
    assert second.sql(READ) == LOCKED
    first.kill()
    assert second.sql(READ) == LOCKED
    assert bank.path.with_name("bank.db.lock").is_dir()
    bank.end()


def test_hosts_take_turns(here: World, there: World) -> None:
    bank = Bank(here, 4)
    bank.rush([here, there], TURNS, WATCHING)
    bank.end()


def test_between_hosts_of_two_readers_that_want_to_write_one_must_give_way(here: World, there: World) -> None:
    bank = Bank(here)
    first, second = bank.client(here), bank.client(there, PATIENCE)
    assert first.sql("begin", READ) == SUM
    assert second.sql("begin", READ) == SUM
    assert first.sql(WRITE) == LOCKED
    assert second.sql(WRITE) == LOCKED
    assert second.sql("rollback") == []
    assert first.sql(WRITE, "commit") == []
    bank.end()


def test_between_hosts_a_writer_has_the_database_alone(here: World, there: World) -> None:
    bank = Bank(here)
    reader, writer = bank.client(here), bank.client(there)
    assert reader.sql("begin", READ) == SUM
    assert writer.sql(READ) == SUM
    assert writer.sql("begin immediate") == LOCKED
    assert reader.sql("commit") == []
    assert writer.sql("begin immediate") == []
    assert reader.sql(READ) == LOCKED
    assert writer.sql(WRITE, "commit") == []
    assert reader.sql("select * from paper") == [["some"]]
    bank.end()
