"""All benchmarks in one go: ``python benchmarks/run.py [--quick] [--markdown] [SECTION ...]``. See README.md."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable

import cluster_contended
import cluster_hosts
import cluster_idle
import cluster_uncontended
import contended
import keeper_costs
import launcher
import records
import supervisor
import uncontended
from table import Table, duration, median, spread
from world import World


def _failing_mount(world: World, scale: float) -> Iterable[Table]:
    if world.mount is None:
        print(f"skipped: the mount whose locks fail: {world.why}", file=sys.stderr)
        return
    yield uncontended.failing(world, "On a mount whose flock fails (FUSE)", world.mount, int(41 * scale), None)


def _simulated(world: World, scale: float) -> Iterable[Table]:
    title = "The same without FUSE: tmpfs, --simulate ENOSYS"
    yield uncontended.failing(world, title, world.memory, int(41 * scale), "ENOSYS")


def _native(world: World, scale: float) -> Iterable[Table]:
    yield uncontended.lockable(world, int(201 * scale))


def _contended(world: World, scale: float) -> Iterable[Table]:
    for processes, rounds in ((16, 20), (100, 10), (500, 3)):
        yield contended.handing_on(world, processes, max(1, int(rounds * scale)))


def _first(world: World, scale: float) -> Iterable[Table]:
    yield keeper_costs.first_lock(world, int(40 * scale))


def _memory(world: World, scale: float) -> Iterable[Table]:
    yield keeper_costs.memory(world)


def _dead(world: World, scale: float) -> Iterable[Table]:
    yield keeper_costs.dead_holder(world, int(20 * scale))
    yield keeper_costs.many_lost(world, max(1, int(3 * scale)))


def _launcher(world: World, scale: float) -> Iterable[Table]:
    compared = launcher.commands()
    measured: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(int(200 * scale)):
        for name, command in compared.items():
            measured[name].append(launcher.seconds(command) * 1e9)
    bare = median(measured["python -I -S -c pass"])
    table = Table("Starting a program through flockshim", "command", "median", "middle half", "of bare Python")
    for name, values in measured.items():
        table.add(name, duration(median(values)), spread(values), f"{median(values) / bare:.2f}x")
    yield table


def _cluster(world: World, scale: float) -> Iterable[Table]:
    lacking = cluster_hosts.lacking(world)
    if lacking:
        print(f"skipped: cluster mode: {lacking}", file=sys.stderr)
        return
    yield cluster_uncontended.compare(int(20 * scale))
    for hosts, processes in ((1, 10), (2, 10), (4, 10), (8, 10), (1, 100)):
        yield cluster_contended.compare(hosts, processes, int(cluster_contended.TURNS * scale), max(5, 10 * scale))
    yield cluster_idle.compare(60 * scale)


SECTIONS: dict[str, Callable[[World, float], Iterable[Table]]] = {
    "mount": _failing_mount,
    "simulated": _simulated,
    "native": _native,
    "contended": _contended,
    "first": _first,
    "dead": _dead,
    "memory": _memory,
    "launcher": _launcher,
    "supervisor": supervisor.tables,
    "records": records.tables,
    "cluster": _cluster,
}


def machine() -> str:
    """Return what is said of the machine."""
    return f"{os.cpu_count()} cores, Linux {os.uname().release.split('-')[0]}, Python {sys.version.split()[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure flockshim side by side with others.")
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds")
    parser.add_argument("--markdown", action="store_true", help="print what README.md shows")
    parser.add_argument("section", nargs="*", choices=[[], *SECTIONS], help="only these (default: all)")
    options = parser.parse_args()
    print(machine(), end="\n\n")
    with World() as world:
        for name in options.section or SECTIONS:
            for table in SECTIONS[name](world, 0.2 if options.quick else 1.0):
                print(table.markdown() if options.markdown else table.text(), flush=True)


if __name__ == "__main__":
    main()
