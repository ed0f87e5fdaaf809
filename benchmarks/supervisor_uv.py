"""A whole ``uv sync``, supervised and not. The uv that is linked statically is the musl build."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from table import Table, duration, median, quantile
from world import HERE, Contender, World, python

sys.path.insert(0, str(HERE.parent / "tests"))

from support.uv import NoRegistryError, Uv, fetched, index_settings, newest
from support.uvproject import counting_index, private_python, write_project

PRELOADED = ["--quiet", "--mode", "host", "--via", "preload"]
SUPERVISED = ["--quiet", "--mode", "host", "--via", "seccomp"]

Ways = dict[str, tuple[bool, list[str]]]
"""By the name that is shown: whether uv is the static one, and flockshim's options, or none for uv alone."""

WHERE_THE_KERNEL_LOCKS: Ways = {
    "uv": (False, []),
    "uv, once more": (False, []),
    "uv, preloaded": (False, PRELOADED),
    "uv, supervised": (False, SUPERVISED),
    "static uv": (True, []),
    "static uv, supervised": (True, SUPERVISED),
}
WHERE_IT_REFUSES: Ways = {
    "uv, preloaded": (False, PRELOADED),
    "uv, supervised": (False, SUPERVISED),
    "static uv, supervised": (True, SUPERVISED),
}
EMPTY, FILLED = 0, 1


class Syncs:
    """What the ways to run uv have in common."""

    def __init__(self, world: World, index: str) -> None:
        """Fetch both builds of uv, and make a Python that nobody else uses.

        :param index: the address of the package index.
        :raises NoRegistryError: where uv is not to be had.
        """
        self.version = newest()
        self._executables = {static: fetched(self.version, static) for static in (False, True)}
        self._python = private_python(world.memory / "python").executable
        own = {"UV_DEFAULT_INDEX": index, "FLOCKSHIM_DIR": str(world.rendezvous), "FLOCKSHIM_IDLE": "1000"}
        self._settings = {**index_settings(), **own}

    def contender(self, name: str, static: bool, options: list[str], base: Path) -> Contender:
        """Return what sets up a project of its own, with a cache of its own, in *base*."""
        base.mkdir()
        uv = Uv(self._executables[static], base, self._settings)
        write_project(uv.project)
        launcher = [sys.executable, "-m", "flockshim", *options] if options else []
        places = [str(uv.project), uv.environment["UV_CACHE_DIR"], uv.executable]
        command = [*launcher, *python("sync.py", *places, "sync", "--python", str(self._python))]
        return Contender(name, command, {**uv.environment, "FLOCKSHIM_IDLE": "1000"})


def compare(title: str, contenders: list[Contender], rounds: int) -> Iterable[Table]:
    """Measure with an empty and with a filled cache; the first is what others are compared with."""
    workers = [contender.start() for contender in contenders]
    for worker in workers:
        worker.ask(EMPTY)
    for cache, shown in ((EMPTY, "an empty cache"), (FILLED, "a filled cache")):
        measured: dict[str, list[float]] = {worker.name: [] for worker in workers}
        for number in range(rounds):
            for worker in workers if number % 2 else reversed(workers):
                measured[worker.name].append(worker.ask(cache)[0])
        first = workers[0].name
        columns = ("median", "10th percentile", "of the first", "10th percentile of the first's")
        table = Table(f"{title}, {shown}", "", *columns)
        for name, values in measured.items():
            ratio = median([one / other for one, other in zip(values, measured[first])])
            low = quantile(values, 0.1)
            fastest = f"{low / quantile(measured[first], 0.1):.3f}x"
            table.add(name, duration(median(values)), duration(low), f"{ratio:.3f}x", fastest)
        table.notes.append(f"{rounds} rounds; flockshim was started before.")
        yield table
    for worker in workers:
        worker.stop()


def tables(world: World, rounds: int) -> Iterable[Table]:
    """Compare where the kernel locks, and where it refuses to."""
    places = [("on tmpfs", WHERE_THE_KERNEL_LOCKS, world.memory), ("flock fails (FUSE)", WHERE_IT_REFUSES, world.mount)]
    try:
        with counting_index() as index:
            syncs = Syncs(world, index.url)
            for place, ways, directory in places:
                if directory is None:
                    continue
                contenders = [
                    syncs.contender(name, *way, base=directory / f"uv-{number}")
                    for number, (name, way) in enumerate(ways.items())
                ]
                yield from compare(f"uv {syncs.version} sync, {place}", contenders, rounds)
    except NoRegistryError as error:
        print(f"skipped: uv: {error}", file=sys.stderr)
