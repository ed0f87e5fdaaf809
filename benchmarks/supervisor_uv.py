"""A whole ``uv sync``, supervised and not. The uv that is linked statically is the musl build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from table import Table, duration, median, quantile
from world import HERE, World

sys.path.insert(0, str(HERE.parent / "tests"))

from support.uv import NoRegistryError, Uv, fetched, index_settings, newest, succeeded
from support.uvproject import counting_index, private_python, write_project


class Way(NamedTuple):
    """How uv is run."""

    name: str
    static: bool
    shim: tuple[str, ...] | None


PRELOAD = ("--quiet", "--mode", "host", "--via", "preload")
SUPERVISE = ("--quiet", "--mode", "host", "--via", "seccomp")
LOCKABLE = [
    Way("uv, alone", False, None),
    Way("uv, preloaded", False, PRELOAD),
    Way("uv, supervised", False, SUPERVISE),
    Way("static uv, alone", True, None),
    Way("static uv, supervised", True, SUPERVISE),
]
FAILING = [
    Way("uv, preloaded", False, PRELOAD),
    Way("uv, supervised", False, SUPERVISE),
    Way("static uv, supervised", True, SUPERVISE),
]


def static_uv(version: str, directory: Path) -> Path:
    """Return the executable of the musl build, fetched into *directory*.

    :raises NoRegistryError: when pip cannot.
    """
    platform = f"musllinux_1_1_{os.uname().machine}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    choice = ["--only-binary=:all:", f"--platform={platform}", f"--target={directory}", f"uv=={version}"]
    done = subprocess.run([*pip, *choice], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoRegistryError((done.stderr.strip() or "pip fails").splitlines()[-1])
    return directory / "bin" / "uv"


class Project:
    """A project, a cache, and a Python that belong to one way of running uv."""

    def __init__(self, way: Way, executable: Path, base: Path, variables: dict[str, str], python: Path) -> None:
        """Write the project into *base*, an empty directory."""
        self.way = way
        self._uv = Uv(executable, base, variables)
        self._python = python

    def sync(self, cold: bool) -> float:
        """Set the project up from nothing, and return the nanoseconds; *cold*: with an empty cache."""
        shutil.rmtree(self._uv.project)
        self._uv.project.mkdir()
        write_project(self._uv.project)
        if cold:
            shutil.rmtree(self._uv.environment["UV_CACHE_DIR"], ignore_errors=True)
        start = time.perf_counter_ns()
        succeeded(self._uv.start("sync", "--python", str(self._python), shim=self.way.shim))
        return time.perf_counter_ns() - start


def measure(projects: list[Project], rounds: int, title: str, note: str) -> Iterable[Table]:
    """Measure with a cold and a warm cache; of others, the first is the baseline."""
    for cold, cache in ((True, "empty"), (False, "filled")):
        measured: dict[str, list[float]] = {project.way.name: [] for project in projects}
        for project in projects:
            project.sync(cold)
        for number in range(rounds):
            for project in projects if number % 2 else reversed(projects):
                measured[project.way.name].append(project.sync(cold))
        first = projects[0].way.name
        table = Table(f"{title}, {cache} cache", "", "median", "10th percentile", f"more than “{first}”", "ratio")
        for name, values in measured.items():
            more = median([one - other for one, other in zip(values, measured[first])])
            ratio = median([one / other for one, other in zip(values, measured[first])])
            shown = f"{'-' if more < 0 else ''}{duration(abs(more))}"
            table.add(name, duration(median(values)), duration(quantile(values, 0.1)), shown, f"{ratio:.3f}x")
        table.notes.append(note)
        yield table


def tables(world: World, rounds: int) -> Iterable[Table]:
    """Compare where the kernel locks, and where it refuses to."""
    try:
        version = newest()
        executables = {False: fetched(version), True: static_uv(version, world.programs / "static-uv")}
        index = counting_index()
    except NoRegistryError as error:
        print(f"skipped: uv: {error}", file=sys.stderr)
        return
    python = private_python(world.memory / "python").executable
    with index:
        variables = {**index_settings(), "UV_DEFAULT_INDEX": index.url, "FLOCKSHIM_DIR": str(world.rendezvous)}
        for ways, place, title in ((LOCKABLE, world.memory, "on tmpfs"), (FAILING, world.mount, "flock fails (FUSE)")):
            if place is None:
                continue
            projects = []
            for number, way in enumerate(ways):
                base = place / f"uv-{number}"
                base.mkdir()
                projects.append(Project(way, executables[way.static], base, variables, python))
            note = f"{rounds} rounds; flockshim's start is in it; the last columns: the medians of round by round."
            yield from measure(projects, rounds, f"uv {version} sync, {title}", note)
