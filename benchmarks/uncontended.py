"""One process takes and gives back a lock that nobody else wants."""

from __future__ import annotations

from pathlib import Path

from table import Table, duration, median, quantile, spread
from world import Contender, Worker, World, python

ROUND_NANOSECONDS = 20e6
NATIVE_PAIRS = 20000


def measure(contenders: list[Contender], rounds: int, pairs: int | None = None) -> dict[str, list[float]]:
    """Return nanoseconds a pair, one value a round, by contender's name.

    They take turns, forwards and backwards, each for about the same time, so that noise hits all alike.
    """
    workers = [contender.start() for contender in contenders]
    counts = {worker.name: pairs or _count(worker) for worker in workers}
    measured: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for number in range(rounds):
        for worker in workers if number % 2 else reversed(workers):
            count = counts[worker.name]
            measured[worker.name].append(worker.ask(count)[0] / count)
    for worker in workers:
        worker.stop()
    return measured


def _count(worker: Worker) -> int:
    worker.ask(5)
    return max(5, int(ROUND_NANOSECONDS / (worker.ask(20)[0] / 20)))


def contenders_in(world: World, directory: Path, shim: dict[str, str], pretending: dict[str, str]) -> list[Contender]:
    """Return those that can lock in a directory where the kernel's lock fails."""
    path = str(directory / "lock")
    native = world.native()
    return [
        Contender("flockshim, C", [world.pairs(), "unlock", path], shim),
        Contender("flockshim, Python fcntl.flock", python("pairs.py", "flock", path), shim),
        Contender("flockshim, C, given back by close", [world.pairs(), "close", path + ".c"], shim),
        Contender("FileLock under flockshim", python("pairs.py", "FileLock", path + ".f"), shim),
        Contender("FileLock alone", python("pairs.py", "FileLock", path + ".g"), native),
        Contender("SoftFileLock", python("pairs.py", "SoftFileLock", path + ".s"), native),
        Contender("--mode success, C", [world.pairs(), "unlock", path], pretending),
    ]


def kernel(world: World) -> list[Contender]:
    """Return the floor: the kernel's own lock in memory."""
    path = str(world.memory / "kernel")
    native = world.native()
    return [
        Contender("kernel flock on tmpfs, C", [world.pairs(), "unlock", path], native),
        Contender("kernel flock on tmpfs, Python fcntl.flock", python("pairs.py", "flock", path), native),
        Contender("FileLock on tmpfs (kernel flock)", python("pairs.py", "FileLock", path + ".f"), native),
    ]


def failing(world: World, title: str, directory: Path, rounds: int, simulate: str | None) -> Table:
    """Compare what can lock where the kernel cannot."""
    contenders = contenders_in(world, directory, world.shim("host", simulate), world.shim("success", simulate))
    measured = measure([*contenders, *kernel(world)], rounds)
    soft = median(measured["SoftFileLock"])
    table = Table(title, "acquire and release", "median", "middle half of the rounds", "faster than SoftFileLock")
    for name, values in measured.items():
        table.add(name, duration(median(values)), spread(values), f"{soft / median(values):.2f}x")
    return table


def lockable(world: World, rounds: int) -> Table:
    """Compare flock under the shim and alone where the kernel can lock."""
    path = str(world.memory / "native")
    command = [world.pairs(), "unlock", path]
    contenders = [Contender("alone", command, world.native()), Contender("under flockshim", command, world.shim())]
    contenders.append(Contender("alone, once more", command, world.native()))
    measured = measure(contenders, rounds, NATIVE_PAIRS)
    alone = measured["alone"]
    table = Table(
        "Where the kernel can lock (tmpfs), C",
        "acquire and release",
        "median",
        "ratio of medians",
        "ratio round by round",
    )
    for name, values in measured.items():
        ratios = [one / other for one, other in zip(values, alone)]
        shown = f"{quantile(ratios, 0.1):.3f} … {median(ratios):.3f} … {quantile(ratios, 0.9):.3f}"
        table.add(name, duration(median(values)), f"{median(values) / median(alone):.3f}", shown)
    table.notes.append(f"{rounds} rounds of {NATIVE_PAIRS} pairs; the last column: 10th percentile, median, 90th.")
    return table
