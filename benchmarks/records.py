"""Record locks, fcntl(2): a byte is locked and unlocked, and SQLite makes transactions, which takes some nine calls."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from supervisor import PROGRAMS, settings, supervised
from table import Table, duration, median
from uncontended import measure
from world import Contender, World, python

FLOCK, RECORD = "flock(2)", "F_SETLK"
KINDS = {"process": RECORD, "more": "F_SETLK, another byte held", "description": "F_OFD_SETLK", "ask": "F_GETLK"}
DOTFILE = "unix-dotfile"
MODES = ("host", "cluster")


class Place(NamedTuple):
    """Where something runs, and how it is started."""

    name: str
    directory: Path
    env: dict[str, str]
    prefix: list[str]


def build(world: World) -> None:
    """Compile what only this section needs.

    :raises CalledProcessError: where there is no compiler.
    """
    compiler = [*os.environ.get("CC", "cc").split(), "-std=gnu11", "-O2", "-o"]
    subprocess.run([*compiler, str(world.programs / "records"), str(PROGRAMS / "records.c")], check=True)


def shim(world: World, mode: str) -> dict[str, str]:
    """Return an environment with the shim, and a keeper that serves this mode only."""
    return world.shim(mode, rendezvous=rendezvous(world, mode))


def rendezvous(world: World, mode: str) -> Path:
    """Return where that keeper is."""
    return world.rendezvous.with_name(f"r-{mode}")


def failing(world: World) -> list[Place]:
    """Return the ways to lock on the mount."""
    if world.mount is None:
        return []
    return [Place(f"locks fail (FUSE), mode {mode}", world.mount, shim(world, mode), []) for mode in MODES]


def lock_calls(world: World, rounds: int) -> Table:
    """Compare the kinds of locks, one process, nobody else wants them."""
    simulated = supervised("--simulate", f"ENOSYS:{world.memory}")
    places = [
        Place("kernel, tmpfs", world.memory, world.native(), []),
        Place("tmpfs, --simulate ENOSYS, preloaded", world.memory, world.shim("host", "ENOSYS"), []),
        Place("tmpfs, --simulate ENOSYS, supervised", world.memory, settings(world), simulated),
        *failing(world),
    ]
    contenders = [contender for number, place in enumerate(places) for contender in _kinds(world, place, number)]
    measured = measure(contenders, rounds)
    columns = [FLOCK, *KINDS.values()]
    table = Table("A byte is locked and unlocked that nobody else wants", "", *columns, f"{RECORD}, of {FLOCK}")
    for place in places:
        values = {column: measured[f"{place.name}: {column}"] for column in columns}
        ratio = median([one / other for one, other in zip(values[RECORD], values[FLOCK])])
        table.add(place.name, *(duration(median(some)) for some in values.values()), f"{ratio:.2f}x")
    return table


def _kinds(world: World, place: Place, number: int) -> Iterable[Contender]:
    path = f"{place.directory}/records{number}"
    yield Contender(f"{place.name}: {FLOCK}", [*place.prefix, world.pairs(), "unlock", path], place.env)
    for kind, column in KINDS.items():
        command = [*place.prefix, str(world.programs / "records"), kind, f"{path}.{kind}"]
        yield Contender(f"{place.name}: {column}", command, place.env)


class Database(NamedTuple):
    """A way to use a database."""

    name: str
    directory: Path
    env: dict[str, str]
    query: str = ""


class Load(NamedTuple):
    """What is done to a database: by how many processes, which rest after each transaction; and how it is measured."""

    processes: int
    rest_milliseconds: int
    rounds: int
    milliseconds: int

    def shown(self) -> str:
        """Return it in words."""
        writers = f"{self.processes} processes write" if self.processes > 1 else "One process writes"
        rest = f", each rests for {self.rest_milliseconds} ms after each transaction" if self.rest_milliseconds else ""
        return f"{writers} to one SQLite database{rest}"


LOADS = (Load(1, 0, 15, 300), Load(8, 0, 5, 1000), Load(8, 20, 5, 1000))


def sqlite(title: str, databases: list[Database], load: Load, synchronous: str, rounds: int) -> Table:
    """Compare how many transactions processes make that all write to the same database: see transactions.py."""
    workers = []
    for database in databases:
        path = Path(tempfile.mkdtemp(dir=database.directory)) / "counter.db"
        words = (str(load.processes), str(load.rest_milliseconds), synchronous, f"file:{path}{database.query}")
        command = python("transactions.py", *words)
        workers.append(Contender(database.name, command, database.env).start())
    measured: dict[str, list[list[int]]] = {worker.name: [] for worker in workers}
    for number in range(rounds + 1):
        for worker in workers if number % 2 else reversed(workers):
            answer = worker.ask(load.milliseconds)
            # The first lock starts a keeper.
            if number:
                measured[worker.name].append(answer)
    for worker in workers:
        worker.stop()
    table = Table(
        title,
        "database",
        "transactions a second",
        f"of {DOTFILE}",
        "a transaction, median",
        "99th percentile",
        "longest",
    )
    base = [total for total, *_ in measured[DOTFILE]]
    for name, answers in measured.items():
        totals, usual, late, longest = zip(*answers)
        table.add(
            name,
            f"{median(totals) * 1000 / load.milliseconds:.0f}",
            f"{median([one / max(1, other) for one, other in zip(totals, base)]):.2f}x",
            *(duration(one) for one in (median(usual), median(late), max(longest))),
        )
    table.notes.append(f"{rounds} rounds of {load.milliseconds} ms; every transaction was found in the database.")
    return table


class Setting(NamedTuple):
    """Where databases lie, and how flockshim is used there."""

    name: str
    directory: Path
    modes: dict[str, dict[str, str]]
    synchronous: str


def settings_on(world: World, late: Path | None) -> Iterable[Setting]:
    """Return where SQLite is measured; `late` is a mount of late_mount.py."""
    modes = {mode: shim(world, mode) for mode in MODES}
    if world.mount:
        for synchronous in ("NORMAL", "OFF"):
            yield Setting("a mount whose locks fail (FUSE)", world.mount, modes, synchronous)
    if late:
        yield Setting("the same, with a server that answers late", late, modes, "NORMAL")
    # To memory it is all the same.
    yield Setting("tmpfs, --simulate ENOSYS", world.memory, {"host": world.shim("host", "ENOSYS")}, "OFF")


def databases(world: World, setting: Setting, processes: int) -> list[Database]:
    """Return what is compared."""
    native = world.native()
    found = [
        Database("kernel, tmpfs", world.memory, native),
        *(Database(f"flockshim, mode {mode}", setting.directory, env) for mode, env in setting.modes.items()),
        Database(DOTFILE, setting.directory, native, f"?vfs={DOTFILE}"),
    ]
    if processes == 1:
        found.append(Database("nolock=1, locks nothing", setting.directory, native, "?nolock=1"))
    return found


@contextlib.contextmanager
def late_mount() -> Iterator[Path]:
    """Mount, and return the directory: see late_mount.py."""
    with tempfile.TemporaryDirectory(prefix="fb-", dir="/dev/shm") as scratch:
        backing, mountpoint = Path(scratch) / "backing", Path(scratch) / "mount"
        backing.mkdir()
        mountpoint.mkdir()
        command = python("late_mount.py", str(backing), str(mountpoint))
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout
        if not server.stdout.readline().startswith("ready"):
            raise SystemExit(f"late_mount.py ended with {server.wait()}")
        try:
            yield mountpoint
        finally:
            server.terminate()
            server.wait()


def tables(world: World, scale: float) -> Iterable[Table]:
    """Measure everything."""
    build(world)
    with contextlib.ExitStack() as stack:
        for mode in MODES:
            stack.callback(world.end_keepers, rendezvous(world, mode))
        yield lock_calls(world, int(41 * scale))
        late = None
        if world.mount:
            late = stack.enter_context(late_mount())
        else:
            print(f"skipped: the mount whose locks fail: {world.why}", file=sys.stderr)
        for load in LOADS:
            for setting in settings_on(world, late):
                title = f"{load.shown()}; on {setting.name}, synchronous {setting.synchronous}"
                compared = databases(world, setting, load.processes)
                yield sqlite(title, compared, load, setting.synchronous, max(1, int(load.rounds * scale)))
