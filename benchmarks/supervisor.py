"""Programs that a preload cannot reach: what it costs that a supervisor answers their lock calls."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import supervisor_uv
from table import Table, duration, median, quantile, spread
from uncontended import measure
from world import HERE, IDLE_SECONDS, Contender, World, python

PROGRAMS = HERE / "programs"
TRACED = os.uname().machine == "x86_64"


def build(world: World) -> None:
    """Compile what only this section needs.

    :raises CalledProcessError: where there is no compiler, or no static libc.
    """
    compiler = [*os.environ.get("CC", "cc").split(), "-std=gnu11", "-O2", "-static", "-o"]
    sources = {"static-pairs": HERE / "pairs.c", "calls": PROGRAMS / "calls.c", "true": PROGRAMS / "true.c"}
    if TRACED:
        sources["confine"] = PROGRAMS / "confine.c"
    for name, source in sources.items():
        subprocess.run([*compiler, str(world.programs / name), str(source)], check=True)


def settings(world: World) -> dict[str, str]:
    """Return an environment in which flockshim is started."""
    own = {"FLOCKSHIM_DIR": str(world.rendezvous), "FLOCKSHIM_IDLE": str(IDLE_SECONDS), "FLOCKSHIM_MODE": "host"}
    return {**world.native(), **own}


def flockshim(*words: str) -> list[str]:
    """Return the command that runs flockshim with options and a COMMAND."""
    return [sys.executable, "-m", "flockshim", "--quiet", *words]


def supervised(*words: str) -> list[str]:
    """Return the command that runs a program supervised."""
    return flockshim("--via", "seccomp", *words)


def confined(world: World, ways: Mapping[str, str], command: list[str]) -> list[Contender]:
    """Return what flockshim is compared with, where that can be had: see confine.c."""
    if not TRACED:
        return []
    confine = str(world.programs / "confine")
    return [Contender(name, [confine, way, *command], world.native()) for way, name in ways.items()]


def compare(title: str, of: str, contenders: list[Contender], rounds: int, *baselines: str) -> Table:
    """Measure, and show how many times as long as each of the *baselines*: the median of the rounds' ratios."""
    measured = measure(contenders, rounds)
    table = Table(title, of, "median", "middle half of the rounds", *(f"of {name}" for name in baselines))
    for name, values in measured.items():
        ratios = [median([one / other for one, other in zip(values, measured[base])]) for base in baselines]
        table.add(name, duration(median(values)), spread(values), *(f"{ratio:.2f}x" for ratio in ratios))
    return table


def lock_calls(world: World, rounds: int) -> Table:
    """Compare a lock and unlock that nobody else wants."""
    path = str(world.memory / "supervised")
    static = [str(world.programs / "static-pairs"), "unlock", path]
    here = settings(world)
    native, preloaded = "native", "preloaded"
    simulated = ("--simulate", f"ENOSYS:{world.memory}")
    contenders = [
        Contender(native, static, world.native()),
        *confined(world, {"allow": "native, behind a filter that allows all"}, static),
        *confined(world, {"look": "native, behind a filter that looks at flock"}, static),
        Contender("--mode success, by a filter", supervised("--mode", "success", *static), here),
        Contender("supervised, the kernel locks", supervised(*static), here),
        Contender(preloaded, flockshim("--via", "preload", *simulated, world.pairs(), *static[1:]), here),
        Contender("supervised", supervised(*simulated, *static), here),
        *confined(world, {"trace-all": "ptrace, all calls, answers 0"}, static),
        *confined(world, {"trace-locks": "ptrace, flock only, answers 0"}, static),
    ]
    title = "A program that a preload cannot reach: tmpfs, emulated with --simulate ENOSYS"
    return compare(title, "acquire and release", contenders, rounds, native, preloaded)


def failing(world: World, directory: Path, rounds: int) -> Table:
    """Compare them on the mount whose locks fail."""
    words = ["unlock", str(directory / "supervised")]
    static = [str(world.programs / "static-pairs"), *words]
    here = settings(world)
    contenders = [
        Contender("preloaded", flockshim("--via", "preload", world.pairs(), *words), here),
        Contender("supervised, static", supervised(*static), here),
        Contender("supervised, the program that was preloaded", supervised(world.pairs(), *words), here),
    ]
    title = "The same on a mount whose flock fails (FUSE)"
    return compare(title, "acquire and release", contenders, rounds, "preloaded")


def other_calls(world: World, rounds: int) -> Iterable[Table]:
    """Compare system calls that have nothing to do with locks."""
    here = settings(world)
    for name, what in (("getppid", "getppid"), ("read", "read of /dev/zero"), ("openat", "openat and close")):
        command = [str(world.programs / "calls"), name]
        contenders = [
            Contender("alone", command, world.native()),
            Contender("alone, once more", command, world.native()),
            *confined(world, {"allow": "behind a filter that allows all"}, command),
            Contender("flockshim --mode success", supervised("--mode", "success", *command), here),
            Contender("supervised", supervised(*command), here),
            *confined(world, {"trace-all": "ptrace, all calls", "trace-locks": "ptrace, flock only"}, command),
        ]
        yield compare(f"Calls that are none of flockshim's: {what}", "a call", contenders, rounds, "alone")


def handing_on(world: World, processes: int, rounds: int) -> Table:
    """Compare how a lock goes through a queue of processes: see chain.py."""
    directory = world.mount or world.memory
    simulated = [] if world.mount else ["--simulate", f"ENOSYS:{world.memory}"]
    emulated = python("chain.py", "flock", str(directory / "supervised-chain"))
    free = python("chain.py", "flock", str(world.memory / "supervised-chain.k"))
    here = settings(world)
    preloaded = "preloaded, emulated"
    contenders = [
        Contender("kernel lock on tmpfs", free, world.native()),
        Contender("… supervised", supervised(*free), here),
        Contender(preloaded, flockshim("--via", "preload", *simulated, *emulated), here),
        Contender("supervised, emulated", supervised(*simulated, *emulated), here),
    ]
    workers = [contender.start() for contender in contenders]
    totals: dict[str, list[int]] = {worker.name: [] for worker in workers}
    latencies: dict[str, list[int]] = {worker.name: [] for worker in workers}
    for number in range(rounds):
        for worker in workers if number % 2 else reversed(workers):
            total, *each = worker.ask(processes)
            totals[worker.name].append(total)
            latencies[worker.name] += each
    for worker in workers:
        worker.stop()
    table = Table(
        f"{processes} supervised processes wait for one lock, and each has it once",
        "hands on the lock",
        "all of them, median",
        f"of {preloaded}",
        "a hand-off, median",
        "99th percentile",
    )
    for name, hand_offs in latencies.items():
        ratio = median([one / other for one, other in zip(totals[name], totals[preloaded])])
        times = (median(totals[name]), median(hand_offs), quantile(hand_offs, 0.99))
        whole, usual, longest = map(duration, times)
        table.add(name, whole, f"{ratio:.2f}x", usual, longest)
    return table


def starting(world: World, rounds: int) -> Table:
    """Compare the start of a static program that ends at once."""
    program = str(world.programs / "true")
    bare, preloaded = "python -I -S -c pass", "flockshim --via preload true"
    compared = {
        "static true": [program],
        bare: [sys.executable, "-I", "-S", "-c", "pass"],
        preloaded: flockshim("--via", "preload", "true"),
        "flockshim --mode success, static true": flockshim("--mode", "success", program),
        "flockshim, static true": flockshim(program),
    }
    here = settings(world)
    measured: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(rounds):
        for name, command in compared.items():
            measured[name].append(run(command, here))
    table = Table("Starting a static program", "command", "median", "middle half", "of bare Python", "of preloading")
    for name, values in measured.items():
        ratios = (median([one / other for one, other in zip(values, measured[base])]) for base in (bare, preloaded))
        table.add(name, duration(median(values)), spread(values), *(f"{ratio:.2f}x" for ratio in ratios))
    return table


def run(command: list[str], environment: Mapping[str, str]) -> float:
    """Return the nanoseconds from starting *command* to its end."""
    start = time.perf_counter_ns()
    _, status = os.waitpid(os.posix_spawn(command[0], command, environment), 0)
    elapsed = time.perf_counter_ns() - start
    if status:
        raise SystemExit(f"{command} ended with wait status {status}")
    return elapsed


def tables(world: World, scale: float) -> Iterable[Table]:
    """Measure everything."""
    build(world)
    yield lock_calls(world, int(41 * scale))
    if world.mount:
        yield failing(world, world.mount, int(41 * scale))
    else:
        print(f"skipped: the mount whose locks fail: {world.why}", file=sys.stderr)
    yield handing_on(world, 16, max(1, int(20 * scale)))
    yield from other_calls(world, int(41 * scale))
    yield starting(world, int(60 * scale))
    yield from supervisor_uv.tables(world, int(31 * scale))
