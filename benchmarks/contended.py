"""Many processes want one lock, and each is to have it once: see chain.py."""

from __future__ import annotations

from table import Table, duration, median, quantile
from world import Contender, World, python


def contenders(world: World) -> list[Contender]:
    """Return those that are compared."""
    directory = world.mount or world.memory
    simulate = None if world.mount else "ENOSYS"
    shared, soft = str(directory / "chain"), str(directory / "chain.s")
    floor = str(world.memory / "chain.k")
    return [
        Contender("flockshim", python("chain.py", "flock", shared), world.shim("host", simulate)),
        Contender("SoftFileLock", python("chain.py", "SoftFileLock", soft), world.native()),
        Contender("SoftFileLock, polling each 5 ms", python("chain.py", "SoftFileLock", soft, "0.005"), world.native()),
        Contender("kernel flock on tmpfs", python("chain.py", "flock", floor), world.native()),
    ]


def handing_on(world: World, processes: int, rounds: int) -> Table:
    """Compare how a lock goes through a queue."""
    workers = [contender.start() for contender in contenders(world)]
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
        f"{processes} processes wait for one lock, and each has it once",
        "hands on the lock",
        "all of them, median",
        "a hand-off, median",
        "99th percentile",
    )
    for name, hand_offs in latencies.items():
        table.add(
            name, duration(median(totals[name])), duration(median(hand_offs)), duration(quantile(hand_offs, 0.99))
        )
    return table
