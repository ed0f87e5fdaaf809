"""Programs of all kinds that lock by fcntl(2): alone, beside each other, many at once."""

from __future__ import annotations

import errno
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import lockcommand
from support.proc import DEADLINE
from support.recordprograms import PROGRAMS
from support.worlds import World, in_mode

from flockshim.pytest_plugin import require

TURNS = 5
MOMENT = 0.1
"""Seconds in which a program that does not wait goes on, if the machine is not busy."""
UNTOUCHED = 1234
"""The errno that the C program sets before each call."""


@pytest.fixture(params=["native", "host", "cluster"])
def world(request: pytest.FixtureRequest) -> World:
    """Where the kernel locks, and under the shim in both modes where it does not."""
    return in_mode(request)


def started(world: World, name: str, *words: object, unshimmed: bool = False) -> subprocess.Popen[str]:
    """Start the program NAME."""
    return subprocess.Popen(
        [*world.prefix, *PROGRAMS[name].words(), *map(str, words)],
        env=lockcommand.settings(world) if unshimmed else world.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def say(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def refused(world: World, name: str, path: Path, unshimmed: bool = False) -> str:
    """What the program says that cannot have the lock."""
    process = started(world, name, "hold", path, 0, unshimmed=unshimmed)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    return errors


def has(world: World, name: str, path: Path) -> bool:
    """Whether the program can have the lock. It gives it back and ends."""
    process = started(world, name, "hold", path, 0)
    output, errors = process.communicate(timeout=DEADLINE)
    return (process.returncode, output, errors) == (0, "locked\nunlocked\n", "")


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_flockshim(emulated: World, name: str) -> None:
    assert PROGRAMS[name].refused in refused(emulated, name, emulated.file(), unshimmed=True)


@pytest.mark.parametrize("name", PROGRAMS)
def test_beside_another_program(world: World, name: str) -> None:
    path = world.file()
    other = "perl" if name == "lockf" else "lockf"
    first = started(world, other, "hold", path, 0)
    assert line(first) == "locked\n"
    assert PROGRAMS[name].busy in refused(world, name, path)
    first.communicate()
    holder = started(world, name, "hold", path, 0)
    assert line(holder) == "locked\n"
    assert PROGRAMS[other].busy in refused(world, other, path)
    say(holder)
    assert line(holder) == "unlocked\n"
    assert has(world, other, path)
    assert holder.communicate("\n", timeout=DEADLINE) == ("", "")
    killed = started(world, name, "hold", path, 0)
    assert line(killed) == "locked\n"
    killed.kill()
    killed.communicate()
    assert has(world, other, path)


def test_all_of_them_at_once(world: World) -> None:
    check_that_no_update_is_lost(world, world)


def test_all_of_them_on_two_hosts(here: World, there: World) -> None:
    check_that_no_update_is_lost(here, there)


def check_that_no_update_is_lost(*worlds: World) -> None:
    path = worlds[0].file()
    number = path.with_name(f"{path.name}.number")
    number.write_text("0\n")
    counting = [started(world, name, "count", path, TURNS) for world in worlds for name in PROGRAMS]
    for process in counting:
        _, errors = process.communicate(timeout=DEADLINE)
        assert (process.returncode, errors) == (0, "")
    assert number.read_text() == f"{len(counting) * TURNS}\n"


def test_a_wait_in_a_thread_that_is_cancelled(world: World) -> None:
    """As mamba gives up. Its process goes on, and does not get the lock later."""
    path = world.file()
    holder = started(world, "lockf", "hold", path, 0)
    assert line(holder) == "locked\n"
    cancelled = started(world, "mamba", "hold", path, 100)
    patient = started(world, "mamba", "hold", path, 60000)
    assert cancelled.stderr
    assert cancelled.stderr.readline() == f"{PROGRAMS['mamba'].busy}\n"
    assert holder.communicate() == ("unlocked\n", "")
    assert line(patient) == "locked\n"
    patient.communicate()
    cancelled.communicate()
    assert cancelled.returncode == 1


class Lockf:
    """A process that calls lockf(3) on a file."""

    def __init__(self, world: World, function: str, path: Path) -> None:
        self.function = function
        self.process = subprocess.Popen(
            [*world.command("lockf"), path],
            env=world.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.output = self.process.stdout

    def tell(self, operation: str, position: int, length: int) -> None:
        """Let it call, without waiting for the answer."""
        assert self.process.stdin
        self.process.stdin.write(f"{self.function} {operation} {position} {length}\n")
        self.process.stdin.flush()

    def answer(self) -> int:
        """0, or the errno."""
        value, number = map(int, line(self.process).split())
        assert (value, number) == (0, UNTOUCHED) or value == -1
        return 0 if value == 0 else number

    def __call__(self, operation: str, position: int, length: int) -> int:
        self.tell(operation, position, length)
        return self.answer()


@pytest.fixture(params=["lockf", "lockf64"])
def lockfs(world: World, request: pytest.FixtureRequest) -> Iterator[tuple[Lockf, Lockf]]:
    """Two processes."""
    path = world.file()
    pair = Lockf(world, request.param, path), Lockf(world, request.param, path)
    yield pair
    for lockf in pair:
        lockf.process.communicate(timeout=DEADLINE)
        assert lockf.process.returncode == 0


def test_lockf(lockfs: tuple[Lockf, Lockf]) -> None:
    first, second = lockfs
    assert first("F_LOCK", 10, 10) == 0
    assert first("F_TEST", 0, 0) == 0
    assert second("F_TEST", 0, 0) == errno.EACCES
    assert second("F_TEST", 19, 1) == errno.EACCES
    assert second("F_TEST", 20, 0) == 0
    assert second("F_TLOCK", 19, 1) == errno.EAGAIN
    assert second("F_TLOCK", 20, 0) == 0
    assert second("F_TLOCK", 10, -10) == 0
    assert first("F_TLOCK", 1 << 40, 1) == errno.EAGAIN
    assert first("F_TLOCK", 9, 1) == errno.EAGAIN
    assert first("F_ULOCK", 12, 2) == 0
    assert second("F_TLOCK", 12, 2) == 0
    assert second("F_TLOCK", 14, 1) == errno.EAGAIN
    assert second("F_TLOCK", 11, 1) == errno.EAGAIN
    assert second("F_ULOCK", 0, 0) == 0
    assert first("F_TLOCK", 0, 0) == 0


def test_lockf_refuses_what_makes_no_sense(lockfs: tuple[Lockf, Lockf]) -> None:
    first, _ = lockfs
    assert first("nonsense", 0, 1) == errno.EINVAL
    assert first("F_LOCK", 5, -10) == errno.EINVAL
    assert first("F_LOCK", 5, -5) == 0


def test_lockf_waits(lockfs: tuple[Lockf, Lockf]) -> None:
    first, second = lockfs
    assert first("F_LOCK", 0, 10) == 0
    second.tell("F_LOCK", 5, 10)
    assert first("F_ULOCK", 0, 5) == 0
    assert select.select([second.output], [], [], MOMENT)[0] == []
    assert first("F_ULOCK", 5, 5) == 0
    assert second.answer() == 0


def test_lockf_does_not_wait_for_each_other(lockfs: tuple[Lockf, Lockf]) -> None:
    for number, lockf in enumerate(lockfs):
        assert lockf("F_LOCK", number, 1) == 0
    for lockf in lockfs:
        lockf.tell("F_LOCK", 0, 2)
    (output,) = select.select([lockf.output for lockf in lockfs], [], [], DEADLINE)[0]
    refused, waiting = lockfs if output is lockfs[0].output else reversed(lockfs)
    assert refused.answer() == errno.EDEADLK
    assert refused("F_ULOCK", 0, 2) == 0
    assert waiting.answer() == 0


HDF5 = """
import h5py, sys
mode = sys.argv[1]
swmr = sys.argv[2:] == ["swmr"]
file = h5py.File("data.h5", mode, libver="latest", swmr=swmr and mode == "r")
if mode == "w":
    file["numbers"] = range(1000)
if mode == "a":
    file.swmr_mode = swmr
print(file["numbers"][:].sum(), flush=True)
sys.stdin.readline()
"""
LOCKED_HDF5 = "unable to lock file, errno = 11"


def hdf5(environment: dict[str, str], directory: Path, *words: str) -> subprocess.Popen[str]:
    """Start Debian's Python, and open a file with its HDF5."""
    python = "/usr/bin/python3"
    found = Path(python).exists() and subprocess.run([python, "-c", "import h5py"], capture_output=True, check=False)
    require(found and found.returncode == 0, f"no h5py in {python}", "apt install python3-h5py")
    return subprocess.Popen(
        [python, "-c", HDF5, *words],
        cwd=directory,
        env={**environment, "HDF5_USE_FILE_LOCKING": "TRUE"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_hdf5_without_flockshim(emulated: World) -> None:
    _, errors = hdf5(lockcommand.settings(emulated), emulated.directory, "w").communicate()
    assert "unable to lock file, errno = 38, error message = 'Function not implemented'" in errors


def test_hdf5(world: World) -> None:
    """It locks the file by flock(2), shared or exclusive."""

    def start(*words: str) -> subprocess.Popen[str]:
        return hdf5(world.environment, world.directory, *words)

    writer = start("w")
    assert line(writer) == "499500\n"
    assert LOCKED_HDF5 in start("r").communicate()[1]
    assert writer.communicate() == ("", "")
    reader = start("r")
    assert line(reader) == "499500\n"
    assert LOCKED_HDF5 in start("a").communicate()[1]
    assert reader.communicate() == ("", "")
    writer = start("a", "swmr")
    assert line(writer) == "499500\n"
    assert start("r", "swmr").communicate() == ("499500\n", "")
    assert writer.communicate() == ("", "")
