"""flockshim inside flockshim, and beside other filters and listeners: as a job script inside a job has it."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.confine import confined
from support.lockcommand import FLOCKSHIM, descendants, locks, one_line, settings
from support.programs import static_program
from support.worlds import FLOCK_SYSCALL, World

LOCK = f"native:{FLOCK_SYSCALL}:3:6"
EIO, EWOULDBLOCK = 5, 11
WAYS = ["preload", "seccomp"]

both_ways = pytest.mark.parametrize(("outer", "inner"), list(itertools.product(WAYS, WAYS)))

# A program that the library reaches: says 0 or the errno, and waits for a line.
LOCK_AND_WAIT = """
import fcntl, os, sys
try:
    fcntl.flock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print(0, flush=True)
except OSError as error:
    print(-error.errno, flush=True)
sys.stdin.readline()
sys.exit(7)
"""


@pytest.fixture
def place(session_rendezvous: Path, tmp_path: Path) -> Iterator[World]:
    """A directory where the kernel locks."""
    world = World("native", tmp_path, {**os.environ, "FLOCKSHIM_DIR": str(session_rendezvous)})
    yield world
    world.end()


def locker(way: str, path: Path) -> list[str]:
    """A COMMAND for WAY that locks PATH without waiting, says the outcome, and ends with 7 after a line of input."""
    if way == "preload":
        return [FLOCKSHIM[0], "-c", LOCK_AND_WAIT, str(path)]
    return [str(static_program("rawcalls")), str(path), LOCK, "-"]


class Nest:
    """``flockshim OUTER… flockshim INNER… COMMAND``, as soon as COMMAND has locked."""

    def __init__(self, world: World, outer: Sequence[str], inner: Sequence[str], command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [*FLOCKSHIM, *outer, *FLOCKSHIM, *inner, *command],
            env=settings(world),
            cwd=world.directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.answer = self.process.stdout.readline().strip()
        self.family = descendants(self.process.pid)
        self.pid = (self.family or [self.process.pid])[0]

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate("\n")
        return self.process.returncode, errors


def nest(world: World, outer: Sequence[str], inner: Sequence[str], way: str, path: Path) -> tuple[str, int, str]:
    """What the lock call of COMMAND returned, the exit status, and the messages."""
    running = Nest(world, outer, inner, locker(way, path))
    return running.answer, *running.end()


def alone(world: World, words: Sequence[str], way: str, path: Path, *prefix: str, **more: str) -> tuple[int, str, str]:
    """Run ``flockshim WORDS`` with a COMMAND for WAY that locks PATH."""
    command = [*prefix, *FLOCKSHIM, *words, *locker(way, path)]
    done = subprocess.run(command, env=settings(world, **more), input="\n", capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@both_ways
def test_the_same_settings(place: World, outer: str, inner: str) -> None:
    """The lock is one for those outside, and one supervisor is enough."""
    path = place.directory / "file"
    words = ["--mode", "host", "--simulate", "ENOSYS"]
    running = Nest(place, [*words, "--via", outer], [*words, "--via", inner], locker(inner, path))
    assert running.answer == "0"
    assert len(running.family) == (0 if (outer, inner) == ("preload", "preload") else 2)
    (file,) = locks(place, path)
    assert [holder["pid"] for holder in file["holders"]] == [running.pid]
    for way in WAYS:
        assert alone(place, [*words, "--via", way], way, path) == (7, f"{-EWOULDBLOCK}\n", "")
    assert running.end() == (7, "")


@both_ways
def test_the_same_settings_where_the_kernel_locks(place: World, outer: str, inner: str) -> None:
    path = place.directory / "file"
    running = Nest(place, ["--via", outer], ["--via", inner], locker(inner, path))
    assert running.answer == "0"
    assert not place.free(path)
    assert running.end() == (7, "")


@pytest.mark.parametrize("inner", WAYS)
def test_other_settings_inside_a_supervisor_are_refused(place: World, inner: str) -> None:
    """The outer one is asked first, whatever the inner one would have done."""
    path = place.directory / "file"
    for outer, other in [
        (["--mode", "host"], ["--mode", "cluster"]),
        (["--mode", "cluster"], ["--mode", "host"]),
        (["--errno", "EIO"], ["--errno", "ENOSYS"]),
        (["--timeout", "5"], ["--timeout", "6"]),
    ]:
        found = nest(place, [*outer, "--via", "seccomp"], [*other, "--via", inner], inner, path)
        assert found[:2] == ("", 125)
        line = one_line(found[2])
        assert "an outer flockshim" in line and "other settings" in line
        assert not path.exists()


def test_other_settings_inside_a_supervisor_of_a_static_program(place: World) -> None:
    outer, inner = ["--mode", "host", "--via", "seccomp"], ["--mode", "cluster", "--via", "auto"]
    found = nest(place, outer, inner, "seccomp", place.directory / "file")
    assert found[:2] == ("", 125)
    line = one_line(found[2])
    assert (
        "statically linked" in line and "an outer flockshim" in line and line.endswith("(for uv: gnu instead of musl)")
    )


@pytest.mark.parametrize("inner", WAYS)
def test_other_settings_inside_the_library(place: World, inner: str) -> None:
    """They are those of the inner one alone, as ever."""
    path = place.directory / "file"
    outer = ["--mode", "cluster", "--via", "preload"]
    assert nest(place, outer, ["--mode", "host", "--via", inner], inner, path) == ("0", 7, "")
    words = ["--mode", "fail", "--simulate", "EIO", "--via", inner]
    assert nest(place, outer, words, inner, path) == (str(-EIO), 7, "")


@pytest.mark.parametrize("inner", WAYS)
def test_a_simulation_inside_a_supervisor(place: World, inner: str) -> None:
    """The library never asks the kernel then, and a filter with a constant answer comes before the supervisor."""
    path = place.directory / "file"
    words = ["--mode", "fail", "--simulate", "EIO", "--via", inner]
    assert nest(place, ["--mode", "host", "--via", "seccomp"], words, inner, path) == (str(-EIO), 7, "")


def test_an_emulation_inside_a_supervisor(place: World) -> None:
    path = place.directory / "file"
    words = ["--mode", "host", "--simulate", "ENOSYS", "--via", "preload"]
    running = Nest(place, ["--mode", "host", "--via", "seccomp"], words, locker("preload", path))
    assert running.answer == "0"
    (file,) = locks(place, path)
    assert [holder["pid"] for holder in file["holders"]] == [running.pid]
    assert place.free(path)  # for those who ask the kernel
    assert running.end() == (7, "")


@pytest.mark.parametrize("inner", WAYS)
def test_inside_a_constant_success_nothing_else_is_believed(place: World, inner: str) -> None:
    """The outer filter answers before any supervisor, and instead of the kernel."""
    path = place.directory / "file"
    outer = ["--quiet", "--mode", "success", "--via", "seccomp"]
    found = nest(place, outer, ["--mode", "host", "--via", inner], inner, path)
    assert found[:2] == ("", 125)
    one_line(found[2])
    assert nest(place, outer, ["--mode", "success", "--via", inner], inner, path)[:2] == ("0", 7)


def test_inside_a_constant_failure(place: World) -> None:
    path = place.directory / "file"
    outer = ["--mode", "fail", "--simulate", "ENOSYS", "--via", "seccomp"]
    found = nest(place, outer, ["--mode", "host", "--simulate", "ENOSYS", "--via", "seccomp"], "seccomp", path)
    assert found[:2] == ("", 125)
    one_line(found[2])
    # For the library it is a kernel that cannot lock.
    inner = ["--mode", "host", "--via", "preload"]
    running = Nest(place, outer, inner, locker("preload", path))
    assert running.answer == "0"
    (file,) = locks(place, path)
    assert len(file["holders"]) == 1
    assert running.end() == (7, "")


def test_an_inner_launcher_without_an_outer_one(place: World) -> None:
    """What a shell has exported of an outer flockshim that covers it no more says nothing."""
    for way in WAYS:
        found = alone(place, ["--via", way], way, place.directory / "file", FLOCKSHIM_SUPERVISED="1")
        assert found == (7, "0\n", "")


def test_a_shell_that_was_supervised_starts_more(place: World) -> None:
    """Each by an inner flockshim, which the job script has before every command."""
    inner = " ".join([*FLOCKSHIM, "--via", "seccomp"])
    script = f"for i in 1 2 3; do {inner} sh -c 'echo $PPID'; done; echo $$; {inner} sh -c 'exit 5'"
    done = subprocess.run(
        [*FLOCKSHIM, "--via", "seccomp", "sh", "-c", script],
        env=settings(place), capture_output=True, text=True, check=False,
    )  # fmt: skip
    parents = done.stdout.split()
    assert parents == [parents[-1]] * 4
    assert (done.returncode, done.stderr) == (5, "")


# Other people's filters


def _refused(world: World, rule: str, *words: str) -> str:
    """The only line that is said where a filter has RULE, before anything was started."""
    mark = world.directory / "mark"
    command = [*confined(rule), *FLOCKSHIM, *words, str(static_program("rawcalls")), str(mark)]
    done = subprocess.run(command, env=settings(world), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (125, "")
    assert not mark.exists()
    return one_line(done.stderr)


STATIC = "use a dynamically linked build (for uv: gnu instead of musl)"
DYNAMIC = "use --via preload, which covers dynamically linked programs"


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("NOTIFY:acct", "there can be but one supervisor"),
        ("ENOSYS:flock", "another filter answers lock calls itself"),
        ("EPERM:flock", "another filter answers lock calls itself"),
        ("0:flock", "another filter answers lock calls itself"),
    ],
)
def test_a_container_that_answers_first(place: World, rule: str, reason: str) -> None:
    line = _refused(place, rule, "--via", "seccomp")
    assert reason in line and "a container" in line and line.endswith(DYNAMIC)
    line = _refused(place, rule)
    assert reason in line and "statically linked" in line and line.endswith(STATIC)


def test_a_listener_of_a_container_leaves_what_needs_none(place: World) -> None:
    path = place.directory / "file"
    listener = confined("NOTIFY:acct")
    assert alone(place, ["--via", "preload"], "preload", path, *listener) == (7, "0\n", "")
    words = ["--mode", "fail", "--simulate", "EIO"]
    assert alone(place, words, "seccomp", path, *listener) == (7, f"{-EIO}\n", "")


def test_a_listener_that_is_gone(place: World) -> None:
    """Its filter is no obstacle."""
    close = ["sh", "-c", 'exec 3>&- 4>&- 5>&- 6>&-; exec "$@"', "sh"]
    path = place.directory / "file"
    assert alone(place, [], "seccomp", path, *confined("NOTIFY:acct"), *close) == (7, "0\n", "")
