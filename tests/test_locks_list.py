"""``flockshim --locks``, and who else names a holder: always the right one."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.confine import mounted
from support.driver import EX, OK, SH, UN
from support.keepers import end_keepers, keepers
from support.lockcommand import FLOCKSHIM, WAITING_LINE, job, locks, locks_table, run, settings, waiters
from support.proc import await_true
from support.worlds import World

from flockshim.pytest_plugin import require

CLOCK = r"(?:\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d"
HOLDER_KEYS = {"mode", "pid", "command", "since", "pid_namespace", "keeper", "taken_by", "taker_ended"}
WAITER_KEYS = {"mode", "pid", "command", "since", "pid_namespace", "keeper"}


class Held(NamedTuple):
    """By which process, and by which it was taken; 0: unknown, but another one."""

    pid: int
    command: str
    taken_by: int


@contextmanager
def _by_a_program(world: World, path: Path) -> Iterator[Held]:
    driver = world.start()
    assert driver.flock(driver.open(path), EX) == OK
    yield Held(driver.pid, "lockdriver-cc", driver.pid)
    driver.kill()


@contextmanager
def _by_a_shell(world: World, path: Path) -> Iterator[Held]:
    """flock(1) has taken the lock for the shell, and has ended."""
    script = """( flock 9; exec sh -c 'echo $$; read line' ) 9>"$0" """
    command = ["sh", "-c", script, str(path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=world.environment, **pipes) as process:
        assert process.stdin and process.stdout
        yield Held(int(process.stdout.readline()), "sh -c echo $$; read line", 0)


@contextmanager
def _by_a_child(world: World, path: Path) -> Iterator[Held]:
    """The parent has taken the lock, and has ended."""
    driver = world.start()
    assert driver.flock(driver.open(path), EX) == OK
    child = driver.fork()
    driver.exit()
    yield Held(child.pid, "lockdriver-cc", driver.pid)
    child.kill()


@pytest.mark.parametrize("way", [_by_a_program, _by_a_shell, _by_a_child])
def test_the_right_holder_is_named(world: World, way: Any) -> None:
    path = world.file()
    with way(world, path) as held:
        (file,) = locks(world, path)
        (holder,) = file["holders"]
        assert holder["pid"] == held.pid
        assert holder["command"].startswith(held.command)
        assert holder["mode"] == "exclusive"
        assert holder["taker_ended"] is (held.taken_by != held.pid)
        assert holder["taken_by"] == held.taken_by or (held.taken_by == 0 and holder["taken_by"] != held.pid)
        note = f"  [taken by pid {holder['taken_by']}, which has ended]" if holder["taker_ended"] else ""
        assert locks_table(world, path).endswith(f"{holder['command']}{note}\n")
        named = f"held by pid {held.pid} ({holder['command']}) on {os.uname().nodename}"
        assert named in run(world, "--lock", path, "--no-wait", "true").stderr
        with job(world, "--verbose", "--lock", path) as waiting:
            assert waiting.process.stderr is not None
            line = WAITING_LINE.fullmatch(waiting.process.stderr.readline())
            assert line and (int(line["pid"]), line["command"]) == (held.pid, holder["command"])
    assert locks_table(world, path) == "no locks\n"


def test_a_process_that_died(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    driver.kill()
    assert locks(world, path) == []


def test_no_keeper(fresh_world: World, rendezvous: Path) -> None:
    assert locks_table(fresh_world) == "no locks\n"
    assert locks(fresh_world) == []
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    assert driver.flock(fd, UN) == OK
    assert locks_table(fresh_world) == "no locks\n"
    end_keepers(rendezvous)
    assert list(rendezvous.glob("k-*.sock"))
    assert locks_table(fresh_world) == "no locks\n"


def test_everything_that_json_tells(fresh_world: World) -> None:
    path = fresh_world.file()
    before = time.time()
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, SH) == OK
    waiting, waiting_fd = fresh_world.opened()
    call = waiting.start("flock", waiting_fd, EX)
    fresh_world.await_blocked(call)
    (file,) = locks(fresh_world)
    after = time.time()
    assert set(file) == {"path", "device", "inode", "locks", "kind", "holders", "waiters"}
    assert (file["path"], file["locks"], file["kind"]) == (str(path), "flock", "emulated")
    assert (file["device"], file["inode"]) == (path.stat().st_dev, path.stat().st_ino)
    ((holder,), (waiter,)) = file["holders"], file["waiters"]
    assert (set(holder), set(waiter)) == (HOLDER_KEYS, WAITER_KEYS)
    ((_, worker),) = keepers(fresh_world.environment["FLOCKSHIM_DIR"])
    for program, process, mode in (holder, driver, "shared"), (waiter, waiting, "exclusive"):
        assert (program["pid"], program["mode"], program["keeper"]) == (process.pid, mode, worker)
        assert program["pid_namespace"] == os.stat("/proc/self/ns/pid").st_ino
        assert before - 0.1 <= program["since"] <= after + 0.1
    assert holder["since"] <= waiter["since"]


def test_everything_that_json_tells_of_the_kernels_locks(world: World) -> None:
    """A directory is locked by the kernel in both worlds."""
    path = world.directory
    driver = world.start()
    assert driver.flock(driver.open(path, os.O_RDONLY), SH) == OK
    (file,) = locks(world, path)
    status = path.stat()
    (holder,) = file.pop("holders")
    assert file == {
        "path": str(path),
        "device": status.st_dev,
        "inode": status.st_ino,
        "locks": "flock",
        "kind": "kernel",
        "waiters": [],
    }
    assert set(holder) == HOLDER_KEYS
    assert (holder["mode"], holder["pid"], holder["taken_by"]) == ("shared", driver.pid, driver.pid)
    assert (holder["since"], holder["keeper"], holder["taker_ended"]) == (None, None, False)


def test_the_kernels_waiters_in_order(world: World) -> None:
    path = world.directory
    driver = world.start()
    assert driver.flock(driver.open(path, os.O_RDONLY), EX) == OK
    with job(world, "--lock", path) as first:
        await_true(lambda: waiters(world, path) == [first.pid], "the first one to wait")
        with job(world, "--lock", path, "--shared") as second:
            await_true(lambda: waiters(world, path) == [first.pid, second.pid], "the second one to wait")
            (file,) = locks(world, path)
            assert "  waits   1 exclusive  pid" in locks_table(world, path)
    assert [waiter["pid"] for waiter in file["waiters"]] == [first.pid, second.pid]
    assert [waiter["mode"] for waiter in file["waiters"]] == ["exclusive", "shared"]
    assert all(set(waiter) == WAITER_KEYS and waiter["since"] is None for waiter in file["waiters"])
    assert file["waiters"][0]["command"].startswith("python -m flockshim")


def test_the_table(fresh_world: World) -> None:
    path = fresh_world.file()
    pids = []
    for operation in SH, SH, EX, SH:
        driver, fd = fresh_world.opened()
        pids.append(str(driver.pid))
        if len(pids) <= 2:
            assert driver.flock(fd, operation) == OK
        else:
            fresh_world.await_blocked(driver.start("flock", fd, operation))
    lines = locks_table(fresh_world).splitlines()
    assert lines[0] == str(path)
    fields = [
        re.fullmatch(
            rf"  (held by  |waits   \d) (exclusive|shared)  +pid (\d+) +since {CLOCK}  +lockdriver-cc \d+", line
        )
        for line in lines[1:]
    ]
    assert all(fields), lines
    shown = [field.groups() for field in fields if field]
    assert shown == [
        ("held by  ", "shared", pids[0]),
        ("held by  ", "shared", pids[1]),
        ("waits   1", "exclusive", pids[2]),
        ("waits   2", "shared", pids[3]),
    ]


def test_waiters_in_order(fresh_world: World) -> None:
    path = fresh_world.file()
    holder, fd = fresh_world.opened()
    assert holder.flock(fd, EX) == OK
    waiting = []
    for _ in range(5):
        driver, driver_fd = fresh_world.opened()
        fresh_world.await_blocked(driver.start("flock", driver_fd, EX))
        waiting.append(driver)
    (file,) = locks(fresh_world)
    assert [waiter["pid"] for waiter in file["waiters"]] == [each.pid for each in waiting]
    gone = waiting.pop(2)
    gone.kill()
    await_true(lambda: gone.pid not in waiters(fresh_world, path), "the dead to leave the queue")
    (file,) = locks(fresh_world)
    assert [waiter["pid"] for waiter in file["waiters"]] == [each.pid for each in waiting]


def test_only_the_paths_that_are_asked_for(fresh_world: World) -> None:
    """By whatever name: the file counts."""
    driver = fresh_world.start()
    paths = [fresh_world.file(name) for name in ("one", "two", "three")]
    for path in paths:
        assert driver.flock(driver.open(path), EX) == OK
    link = fresh_world.directory / "link"
    link.symlink_to(paths[1])
    assert [file["path"] for file in locks(fresh_world)] == sorted(map(str, paths))
    assert [file["path"] for file in locks(fresh_world, link)] == [str(paths[1])]
    assert [file["path"] for file in locks(fresh_world, link, paths[1], paths[0])] == [str(paths[0]), str(paths[1])]
    assert locks_table(fresh_world, fresh_world.file("free")) == "no locks\n"
    done = run(fresh_world, "--locks", fresh_world.directory / "missing")
    assert (done.returncode, done.stdout) == (125, "")
    assert str(fresh_world.directory / "missing") in done.stderr and done.stderr.count("\n") == 1


def test_a_path_given_twice_is_shown_once(world: World) -> None:
    path = world.file()
    with _by_a_program(world, path):
        assert len(locks(world, path, path)) == 1


def test_names_that_are_nolocks_table(world: World) -> None:
    """Linux names are bytes."""
    path = Path(os.fsdecode(os.fsencode(world.directory) + b"/caf\xe9"))
    path.touch()
    driver = world.start()
    with open(path) as ours:
        fd = driver.adopt(ours.fileno())
    assert driver.flock(fd, EX) == OK
    (file,) = locks(world, path)
    assert file["path"] == str(path)
    command = [*FLOCKSHIM, "--locks", str(path)]
    # As in every locale but C and its like: the name cannot be written as text.
    environment = settings(world, PYTHONIOENCODING="utf-8:strict")
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(os.fsencode(path))


def test_output_that_cannot_be_written(fresh_world: World) -> None:
    for words in [], ["--json"]:
        with open("/dev/full", "w") as full:
            command = [*FLOCKSHIM, "--locks", *words]
            done = subprocess.run(
                command, env=settings(fresh_world), stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 125
        assert done.stderr == f"flockshim: cannot write to standard output: {os.strerror(28)}\n"


def test_a_rendezvous_that_is_no_directory(world: World, tmp_path: Path) -> None:
    """Nobody can be known there; and whoever only wants to name a holder must not fail for that."""
    plain = tmp_path / "plain"
    plain.touch()
    environment = settings(world, FLOCKSHIM_DIR=str(plain))
    done = run(world, "--locks", env=environment)
    assert done.returncode in (0, 125)
    assert done.stderr.count("\n") <= 1
    driver = world.start()
    assert driver.flock(driver.open(world.directory, os.O_RDONLY), EX) == OK
    done = run(world, "--lock", world.directory, "--no-wait", "true", env=environment)
    assert done.returncode == 75
    assert f"held by pid {driver.pid} " in done.stderr and done.stderr.count("\n") == 1


def test_no_place_for_temporary_files(fresh_world: World) -> None:
    require(os.geteuid() == 0, "only root can mount", "run the tests as root")
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    # What is in them stays to be seen: the interpreter, maybe.
    read_only = "mount --bind {0} {0} && mount -o remount,bind,ro {0}"
    prefix = mounted(f"{read_only.format('/tmp')} && {read_only.format('/var/tmp')} && cd /proc")
    command = [*prefix, *FLOCKSHIM, "--locks"]
    done = subprocess.run(command, env=settings(fresh_world), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"pid {driver.pid} " in done.stdout
