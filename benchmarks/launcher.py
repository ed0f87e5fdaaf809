"""What starting a program through flockshim adds: run ``python benchmarks/launcher.py [ROUNDS]``.

Every round starts each command once, in turn, so that whatever slows the machine slows them all.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import flockshim

ROUNDS = 300

PYTHON = sys.executable
CALL = "from flockshim.cli import main; main()"


def commands() -> dict[str, list[str]]:
    """What is measured, by the name that is printed; each ends as soon as it has started."""
    source = str(Path(flockshim.__path__[0]).parent)
    isolated = f"import sys; sys.path.append({source!r}); {CALL}"
    found = {
        "true": ["true"],
        "env true": ["env", "true"],
        "python -I -S -c pass": [PYTHON, "-I", "-S", "-c", "pass"],
        "python -I -c pass": [PYTHON, "-I", "-c", "pass"],
        "python -c pass": [PYTHON, "-c", "pass"],
        "python -I -S, launcher": [PYTHON, "-I", "-S", "-c", isolated, "true"],
        "python -c, launcher": [PYTHON, "-c", CALL, "true"],
        "python -m flockshim true": [PYTHON, "-m", "flockshim", "true"],
    }
    script = shutil.which("flockshim", path=str(Path(PYTHON).parent))
    if script:
        found["flockshim true"] = [script, "true"]
    return {name: [shutil.which(words[0]) or words[0], *words[1:]] for name, words in found.items()}


def seconds(command: list[str]) -> float:
    """Return the time in seconds from starting *command* to its end."""
    start = time.perf_counter()
    _, status = os.waitpid(os.posix_spawn(command[0], command, os.environ), 0)
    elapsed = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command} ended with wait status {status}")
    return elapsed


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    compared = commands()
    measured: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(rounds):
        for name, command in compared.items():
            measured[name].append(seconds(command))
    bare = statistics.median(measured["python -I -S -c pass"])
    print(f"{rounds} rounds, {os.cpu_count()} cores, Linux {os.uname().release}, Python {sys.version.split()[0]}")
    print(f"{'':28}{'median':>10}{'10th pct':>10}{'of bare Python':>16}")
    for name, times in measured.items():
        median = statistics.median(times)
        fast = statistics.quantiles(times, n=10)[0]
        print(f"{name:28}{median * 1e3:8.2f} ms{fast * 1e3:8.2f} ms{median / bare:15.2f}x")


if __name__ == "__main__":
    main()
