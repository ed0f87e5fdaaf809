"""What many ``uv sync`` at once do to one fresh project: ``python benchmarks/many_uv.py``. See docs/many-jobs.md."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.keepers import end_keepers
from support.uv import Uv, fetched, index_settings, newest
from support.uvproject import counting_index, ends, installed, private_python, write_project

from flockshim import FlockshimError, nolockfs

OLD = "0.7.0"
SECONDS = 600.0


@dataclass(frozen=True)
class Setting:
    """Where the project lies, and how uv is run."""

    name: str
    failing: bool
    shim: tuple[str, ...] | None
    own_tmp: bool = False


SETTINGS = [
    Setting("tmpfs: uv sync", False, None),
    Setting("… each with its own TMPDIR", False, None, own_tmp=True),
    Setting("… and flockshim --lock .", False, ("--lock", "."), own_tmp=True),
    Setting("flock fails: uv sync", True, None),
    Setting("flock fails: flockshim uv sync", True, ()),
    Setting("… each with its own TMPDIR", True, (), own_tmp=True),
    Setting("… and --lock .", True, ("--lock", "."), own_tmp=True),
]


@dataclass
class Outcome:
    """What came of some rounds of one setting; one entry for each round."""

    succeeded: list[int] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    strayed: list[bool] = field(default_factory=list)
    downloads: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)


@contextlib.contextmanager
def directories(failing: bool) -> Iterator[tuple[Path, Path]]:
    """Give two empty directories: in memory or on a mount whose flock fails with ENOSYS, and in memory."""
    with contextlib.ExitStack() as stack:
        base, other = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fb-", dir="/dev/shm"))) for _ in range(2)
        )
        yield stack.enter_context(nolockfs.mount(backing=base)) if failing else base, other


def measure(outcome: Outcome, setting: Setting, version: str, processes: int) -> None:
    """Add a round: *processes* times ``uv sync``, all at once, in a fresh project with an empty cache."""
    with directories(setting.failing) as (base, other), counting_index() as index:
        python = private_python(other / "python")
        uv = Uv(fetched(version), base, {**index_settings(), "UV_DEFAULT_INDEX": index.url})
        write_project(uv.project)
        begun = time.monotonic()
        started = []
        for number in range(processes):
            if setting.own_tmp:
                uv.environment["TMPDIR"] = tempfile.mkdtemp(prefix=f"{number}-", dir=base / "tmp")
            started.append(uv.start("sync", "--python", str(python.executable), shim=setting.shim))
        ended = ends(started, SECONDS)
        outcome.seconds.append(time.monotonic() - begun)
        outcome.succeeded.append(sum(done.status == 0 for done in ended))
        outcome.errors.update(said(done.err, base) for done in ended if done.status != 0)
        outcome.downloads.append(max(index.downloads.values(), default=0))
        try:
            outcome.whole.append(bool(installed(uv)))
        except (AssertionError, OSError):
            outcome.whole.append(False)
        outcome.strayed.append(any(python.packages.iterdir()))


def said(error: str, base: Path) -> str:
    """Return the line of *error* that says most."""
    lines = [line.strip() for line in error.replace(str(base), "…").splitlines()]
    telling = [line for line in lines if line.lower().startswith(("error:", "caused by:", "cause:", "flockshim:"))]
    return " ".join(telling) or error


def span(values: list[int]) -> str:
    """Return the least and the most of *values*."""
    return str(min(values)) if min(values) == max(values) else f"{min(values)} … {max(values)}"


def table(version: str, processes: int, rounds: int, chosen: list[Setting]) -> Table:
    """Measure every setting, and return the table."""
    result = Table(
        f"uv {version}: {processes} at once, {rounds} rounds",
        *("where and how", "exit 0", "environment whole", "into Python itself", "downloads of a wheel", "time"),
    )
    for setting in chosen:
        outcome = Outcome()
        for _ in range(rounds):
            measure(outcome, setting, version, processes)
        whole, strayed = (f"{sum(values)} of {rounds}" for values in (outcome.whole, outcome.strayed))
        longest = f"{max(outcome.seconds):.1f} s"
        result.add(setting.name, span(outcome.succeeded), whole, strayed, span(outcome.downloads), longest)
        print(f"{version}: {setting.name}: {outcome.errors.most_common(4)}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Many uv sync at once in a fresh project, with an empty cache.")
    parser.add_argument("--processes", type=int, default=100, help="how many at once (default 100)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is repeated (default 3)")
    parser.add_argument("--markdown", action="store_true", help="print what docs/many-jobs.md shows")
    parser.add_argument("uv", nargs="*", help=f"releases of uv (default: {OLD} and the newest)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fb-", dir="/dev/shm") as rendezvous:
        os.environ["FLOCKSHIM_DIR"] = rendezvous
        try:
            for version in options.uv or [OLD, newest()]:
                shown = table(version, options.processes, options.rounds, SETTINGS)
                print(shown.markdown() if options.markdown else shown.text(), flush=True)
        except FlockshimError as error:
            raise SystemExit(str(error)) from None
        finally:
            end_keepers(rendezvous)


if __name__ == "__main__":
    main()
