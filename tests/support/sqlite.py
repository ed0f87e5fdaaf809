"""Programs that use one SQLite database at once, and what must hold of it whatever they do."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Union

from support.proc import DEADLINE
from support.worlds import World

Answer = Union[str, list[list[object]]]

LOCKED = "database is locked"
PATIENCE = 60.0
"""Seconds for which SQLite tries again where it is not to give up."""
MOMENT = 0.1
"""Seconds in which a program that does not wait goes on, if the machine is not busy."""

ACCOUNTS = 8
TOTAL = 100 * ACCOUNTS

# `transfer` writes what it has read and something more: where a lock excludes nobody, updates are lost. It changes two
# rows: who sees half of a transaction sees another sum.
CLIENT = f"""
import json, random, sqlite3, sys

ACCOUNTS, TOTAL = {ACCOUNTS}, {TOTAL}
connect = dict(timeout=float(sys.argv[2]), isolation_level=None, uri=True)
databases = [sqlite3.connect(sys.argv[1], **connect)]


def one(statement, *values):
    return databases[0].execute(statement, values).fetchone()[0]


def transfer(writer, turns):
    for turn in range(turns):
        one_account, another = random.sample(range(ACCOUNTS), 2)
        databases[0].execute("begin immediate")
        less = one("select balance from account where id = ?", one_account) - 1
        more = one("select balance from account where id = ?", another) + 1
        done = one("select turns from writer where id = ?", writer) + 1
        databases[0].execute("update account set balance = ? where id = ?", (less, one_account))
        databases[0].execute("update account set balance = ? where id = ?", (more, another))
        databases[0].execute("update writer set turns = ? where id = ?", (done, writer))
        databases[0].execute("commit")
        print("turn", flush=True)
    return []


def watch(times):
    for time in range(times):
        databases[0].execute("begin")
        once = one("select sum(balance) from account")
        again = one("select sum(balance) from account")
        databases[0].execute("commit")
        if not once == again == TOTAL:
            return f"{{once}} and {{again}} instead of {{TOTAL}}"
    return []


def execute(statement, number=0):
    return databases[number].execute(statement).fetchall()


def another():
    databases.append(sqlite3.connect(sys.argv[1], **connect))
    return []


def close(number):
    databases[number].close()
    return []


print("ready", flush=True)
for line in sys.stdin:
    kind, *words = json.loads(line)
    try:
        answer = globals()[kind](*words)
    except sqlite3.Error as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that has a database open and does what it is told, or says what SQLite has against it."""

    def __init__(self, world: World, path: Path | str, timeout: float) -> None:
        """PATH may be an URI. TIMEOUT are the seconds for which SQLite tries again where it is refused."""
        self.process = subprocess.Popen(
            [*world.prefix, sys.executable, "-c", CLIENT, str(path), str(timeout)],
            env=world.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the client has ended: {self.process.communicate()[1]}")
        return line.rstrip("\n")

    def tell(self, kind: str, *words: object) -> None:
        """Let it do something, without waiting for the answer."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([kind, *words]) + "\n")
        self.process.stdin.flush()

    def await_turns(self, count: int) -> None:
        """Return when it has made COUNT more transactions."""
        for _ in range(count):
            line = self._line()
            assert line == "turn", line

    def answer(self) -> Answer:
        """What has come of the last thing that it was told."""
        while (line := self._line()) == "turn":
            pass
        answer: Answer = json.loads(line)
        return answer

    def is_silent(self) -> bool:
        """Whether it has no answer yet, nor a moment later."""
        assert self.process.stdout
        return not select.select([self.process.stdout], [], [], MOMENT)[0]

    def ask(self, kind: str, *words: object) -> Answer:
        """Let it do something, and wait for the answer."""
        self.tell(kind, *words)
        return self.answer()

    def sql(self, *statements: str) -> Answer:
        """Execute STATEMENTS; the rows of the last, or the complaint about the first that fails."""
        answer: Answer = []
        for statement in statements:
            answer = self.ask("execute", statement)
            if isinstance(answer, str):
                break
        return answer

    def rows(self, statement: str) -> list[list[object]]:
        """The rows of a statement against which SQLite must have nothing."""
        answer = self.sql(statement)
        assert not isinstance(answer, str), answer
        return answer

    def kill(self) -> int:
        """kill -9, and wait until nothing is left of it; how many more transactions it has told of."""
        self.process.kill()
        assert self.process.stdout
        turns = self.process.stdout.read().count("turn")
        self.process.wait()
        return turns

    def end(self) -> str:
        """Let it end, if it has not; what it has written on standard error."""
        try:
            return self.process.communicate(timeout=DEADLINE)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


class Bank:
    """A database of accounts, of which a transaction changes two so that the sum remains."""

    def __init__(self, world: World, writers: int = 1, journal: str = "delete", options: str = "") -> None:
        """Make it in the directory of WORLD. OPTIONS are those of the URI by which all clients open it."""
        self.path = world.directory / "bank.db"
        self.world = world
        self._options = options
        self._clients: list[Client] = []
        accounts = ", ".join(f"({number}, 100)" for number in range(ACCOUNTS))
        tallies = ", ".join(f"({number}, 0)" for number in range(writers))
        maker = self.client()
        assert maker.sql(f"pragma journal_mode = {journal}") == [[journal]]
        made = maker.sql(
            "begin",
            "create table account (id integer primary key, balance)",
            "create table writer (id integer primary key, turns)",
            "create table paper (text)",
            f"insert into account values {accounts}",
            f"insert into writer values {tallies}",
            "commit",
        )
        assert made == []
        assert maker.end() == ""

    def client(self, world: World | None = None, timeout: float = 0.0, options: str = "") -> Client:
        """A program that opens it, with OPTIONS of its own."""
        client = Client(world or self.world, f"file:{self.path}?{options or self._options}", timeout)
        self._clients.append(client)
        return client

    def turns(self) -> list[int]:
        """How many transactions each writer has made; nothing else is broken, or lost, or left half done."""
        checker = self.client(timeout=PATIENCE)
        assert checker.sql("pragma integrity_check") == [["ok"]]
        assert checker.sql("select sum(balance) from account") == [[TOTAL]]
        return [int(str(turns)) for (turns,) in checker.rows("select turns from writer order by id")]

    def rush(self, worlds: Sequence[World], turns: int, watching: int) -> None:
        """As many writers as there are make TURNS transactions each, and as many readers look WATCHING times."""
        writers = len(self.turns())
        clients = [self.client(worlds[number % len(worlds)], PATIENCE) for number in range(2 * writers)]
        for number in range(writers):
            clients[number].tell("transfer", number, turns)
            clients[writers + number].tell("watch", watching)
        assert [client.answer() for client in clients] == [[]] * len(clients)
        assert self.turns() == [turns] * writers

    def end(self) -> None:
        """End all clients, none of which may have anything to say."""
        assert [client.end() for client in self._clients] == [""] * len(self._clients)


def journal(path: Path) -> Path:
    """The rollback journal of the database PATH."""
    return path.with_name(f"{path.name}-journal")
