"""What a keeper costs: its start, its memory, and finding out that a holder has died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from table import Table, duration, median, quantile, spread
from world import Contender, World, keepers, python

HELD = (0, 100, 1000)
HOST_PROCESSES = (0, 50, 300)
LOST_AT_ONCE = (1, 10, 100)


def first_lock(world: World, rounds: int) -> Table:
    """Measure the first emulated lock, which starts a keeper, and the start of a bare interpreter beside it."""
    first: list[float] = []
    second: list[float] = []
    bare: list[float] = []
    for number in range(rounds):
        rendezvous = world.rendezvous.with_name(f"r{number}")
        path = str(world.memory / "first")
        env = world.shim(simulate="ENOSYS", rendezvous=rendezvous)
        worker = Contender("the first lock", [world.pairs(), "unlock", path], env).start()
        first.append(worker.ask(1)[0])
        second.append(worker.ask(1)[0])
        worker.stop()
        world.end_keepers(rendezvous)
        start = time.monotonic_ns()
        subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)
        bare.append(time.monotonic_ns() - start)
    table = Table("The first emulated lock", "", "median", "middle half of the rounds")
    table.add("first acquire and release, keeper start included", duration(median(first)), spread(first))
    table.add("second acquire and release", duration(median(second)), spread(second))
    table.add("python -I -S -c pass", duration(median(bare)), spread(bare))
    return table


def memory(world: World) -> Table:
    """Measure the keeper's memory (Pss, proc(5)) with so many locks held."""
    table = Table("Memory of a keeper", "locks held", "worker", "standby", "both")
    for held in HELD:
        rendezvous = world.rendezvous.with_name("rm")
        env = world.shim(simulate="ENOSYS", rendezvous=rendezvous)
        worker = Contender("hold", python("hold.py", str(world.memory)), env).start()
        worker.ask(held)
        standby, serving = sorted(keepers(rendezvous), key=_started)
        sizes = [_pss(serving), _pss(standby)]
        table.add(str(held), *(f"{size / 1024:.1f} MiB" for size in (*sizes, sum(sizes))))
        worker.stop()
        world.end_keepers(rendezvous)
    return table


def _started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _pss(pid: int) -> int:
    """Return KiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def dead_holder(world: World, rounds: int) -> Table:
    """Measure from the kill of a holder to the next one's having the lock."""
    simulated = world.shim(simulate="ENOSYS")
    table = Table(
        "A holder is killed while another waits",
        "processes more on the host",
        "flockshim, median",
        "90th percentile",
        "kernel flock, median",
    )
    for more in HOST_PROCESSES:
        crowd = [subprocess.Popen(["sleep", "infinity"]) for _ in range(more)]
        ours: list[float] = []
        theirs: list[float] = []
        for number in range(rounds):
            ours.append(_kill_to_lock(world, f"dead{number}", simulated))
            theirs.append(_kill_to_lock(world, f"dead{number}", world.native()))
        for process in crowd:
            process.kill()
            process.wait()
        table.add(str(more), duration(median(ours)), duration(quantile(ours, 0.9)), duration(median(theirs)))
    return table


def _kill_to_lock(world: World, name: str, env: dict[str, str]) -> float:
    place = str(world.memory / name)
    os.makedirs(place, exist_ok=True)
    holder = Contender("holder", python("hold.py", place), env).start()
    waiter = Contender("waiter", python("hold.py", place), env).start()
    holder.ask(1)
    assert waiter.process.stdin and waiter.process.stdout
    waiter.process.stdin.write("1\n")
    waiter.process.stdin.flush()
    time.sleep(0.02)
    start = time.monotonic_ns()
    holder.process.send_signal(signal.SIGKILL)
    had = int(waiter.process.stdout.readline())
    holder.stop()
    waiter.stop()
    return had - start


def many_lost(world: World, rounds: int) -> Table:
    """Measure how long others wait for the keeper when it looks after all that a killed process had locked."""
    env = world.shim(simulate="ENOSYS")
    table = Table(
        "A process that holds many locks is killed", "locks", "somebody else's next acquire and release", "usual"
    )
    place = world.memory / "many"
    place.mkdir()
    other = Contender("other", [world.pairs(), "unlock", str(world.memory / "other")], env).start()
    for count in LOST_AT_ONCE:
        usual = [float(other.ask(1)[0]) for _ in range(100)]
        delayed: list[float] = []
        for _ in range(rounds):
            holder = Contender("holder", python("hold.py", str(place)), env).start()
            holder.ask(count)
            holder.process.kill()
            holder.stop()
            delayed.append(other.ask(1)[0])
        table.add(str(count), duration(median(delayed)), duration(median(usual)))
    other.stop()
    return table
