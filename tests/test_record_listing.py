"""Record locks in what ``flockshim --locks``, ``--break`` and ``--clean`` show and do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support.driver import EX, OK
from support.elsewhere import FLOCKSHIM, Elsewhere, files, program, settings
from support.keepers import keepers
from support.lockcommand import locks, locks_table
from support.proc import DEADLINE
from support.records import RD, UN, WR, await_waiting, lock, lock_later
from support.worlds import World

from flockshim.aliveness import Aliveness

HOLDER_KEYS = {
    "mode",
    "pid",
    "command",
    "since",
    "pid_namespace",
    "keeper",
    "taken_by",
    "taker_ended",
    "owner",
    "ranges",
}
WAITER_KEYS = {"mode", "pid", "command", "since", "pid_namespace", "keeper", "ranges"}
SUFFIX = "~records"


def part(first: int, last: int | None, mode: str = "exclusive") -> dict[str, Any]:
    return {"first": first, "last": last, "mode": mode}


# This host's


def test_everything_that_json_tells(fresh_world: World) -> None:
    path = fresh_world.file()
    before = time.time()
    driver, fd = fresh_world.opened()
    assert lock(driver, fd, RD, 0, 10) == OK
    assert lock(driver, fd, WR, 10, 5) == OK
    description, ofd = fresh_world.opened()
    assert lock(description, ofd, RD, 100, 0, ofd=True) == OK
    waiting, waiting_fd = fresh_world.opened()
    await_waiting(fresh_world, lock_later(waiting, waiting_fd, WR, 14, 3))
    (file,) = locks(fresh_world)
    after = time.time()
    assert set(file) == {"path", "device", "inode", "locks", "kind", "holders", "waiters"}
    assert (file["path"], file["locks"], file["kind"]) == (str(path), "fcntl", "emulated")
    assert (file["device"], file["inode"]) == (path.stat().st_dev, path.stat().st_ino)
    first, second = file["holders"]
    (waiter,) = file["waiters"]
    assert (set(first), set(second), set(waiter)) == (HOLDER_KEYS, HOLDER_KEYS, WAITER_KEYS)
    assert [one["owner"] for one in (first, second)] == ["process", "description"]
    assert first["ranges"] == [part(0, 9, "shared"), part(10, 14)]
    assert second["ranges"] == [part(100, None, "shared")]
    assert waiter["ranges"] == [part(14, 16)]
    assert [one["mode"] for one in (first, second, waiter)] == ["exclusive", "shared", "exclusive"]
    ((_, worker),) = keepers(fresh_world.environment["FLOCKSHIM_DIR"])
    for shown, process in (first, driver), (second, description), (waiter, waiting):
        assert (shown["pid"], shown["keeper"]) == (process.pid, worker)
        assert before - 0.1 <= shown["since"] <= after + 0.1
    for shown in first, second:
        assert (shown["taken_by"], shown["taker_ended"]) == (shown["pid"], False)


def test_flock_and_record_locks_of_one_file(fresh_world: World) -> None:
    path = fresh_world.file()
    (one, fd), (other, other_fd) = fresh_world.opened(), fresh_world.opened()
    assert one.flock(fd, EX) == OK
    assert lock(other, other_fd, WR) == OK
    for asked in (), (path,):
        shown = {file["locks"]: file for file in locks(fresh_world, *asked)}
        assert set(shown) == {"flock", "fcntl"}
        assert [shown[locks]["holders"][0]["pid"] for locks in ("flock", "fcntl")] == [one.pid, other.pid]
    assert "ranges" not in shown["flock"]["holders"][0]
    heads = [line for line in locks_table(fresh_world).splitlines() if not line.startswith(" ")]
    assert sorted(heads) == [str(path), f"{path}  (record locks)"]
    assert lock(other, other_fd, UN) == OK
    assert [file["locks"] for file in locks(fresh_world)] == ["flock"]


def test_the_table(fresh_world: World) -> None:
    path = fresh_world.file()
    driver, fd = fresh_world.opened()
    for place in range(0, 40, 2):
        assert lock(driver, fd, WR, place, 1) == OK
    other, other_fd = fresh_world.opened()
    assert lock(other, other_fd, RD, 1, 1, ofd=True) == OK
    waiting, waiting_fd = fresh_world.opened()
    await_waiting(fresh_world, lock_later(waiting, waiting_fd, RD, 6, 0))
    head, *lines = locks_table(fresh_world, path).splitlines()
    assert head == f"{path}  (record locks)"
    shown = [re.sub(r" +", " ", line) for line in lines]
    kept = re.fullmatch(
        rf" held by exclusive pid {driver.pid} since \S+ lockdriver-cc \d+ \[bytes ([0-9, -]+) and (\d+) more\]",
        shown[0],
    )
    assert kept, shown
    parts = kept[1].split(", ")
    assert parts == [f"{place}-{place}" for place in range(0, 2 * len(parts), 2)]
    assert len(parts) + int(kept[2]) == 20
    assert re.fullmatch(rf" held by shared pid {other.pid} since \S+ lockdriver-cc \d+ \[bytes 1-1\]", shown[1])
    assert re.fullmatch(rf" waits 1 shared pid {waiting.pid} since \S+ lockdriver-cc \d+ \[bytes 6-\]", shown[2])


def test_a_description_whose_taker_has_ended(fresh_world: World) -> None:
    driver, fd = fresh_world.opened()
    assert lock(driver, fd, WR, 0, 3, ofd=True) == OK
    child = driver.fork()
    driver.exit()
    (file,) = locks(fresh_world, fresh_world.file())
    (holder,) = file["holders"]
    assert (holder["pid"], holder["taken_by"], holder["taker_ended"]) == (child.pid, driver.pid, True)
    assert f"[taken by pid {driver.pid}, which has ended]" in locks_table(fresh_world)


def test_only_what_is_held_now(fresh_world: World) -> None:
    path = fresh_world.file()
    driver, fd = fresh_world.opened()
    assert lock(driver, fd, WR, 0, 9) == OK
    assert lock(driver, fd, UN, 3, 3) == OK
    assert lock(driver, fd, RD, 6, 1) == OK
    (file,) = locks(fresh_world)
    assert file["holders"][0]["ranges"] == [part(0, 2), part(6, 6, "shared"), part(7, 8)]
    driver.kill()
    assert locks(fresh_world, path) == []


# The kernel's


@pytest.mark.parametrize("world", ["native"], indirect=True)
def test_the_kernels(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert lock(driver, fd, WR, 5, 5) == OK
    assert lock(driver, fd, RD, 20, 0) == OK
    description, ofd = world.opened()
    assert lock(description, ofd, RD, 0, 1, ofd=True) == OK
    (file,) = locks(world, path)
    assert (file["path"], file["locks"], file["kind"]) == (str(path), "fcntl", "kernel")
    found = [(one["pid"], one["owner"], one["mode"], one["ranges"]) for one in file["holders"]]
    assert found == [
        (description.pid, "description", "shared", [part(0, 0, "shared")]),
        (driver.pid, "process", "exclusive", [part(5, 9)]),
        (driver.pid, "process", "shared", [part(20, None, "shared")]),
    ]
    assert all(set(one) == HOLDER_KEYS and one["since"] is None for one in file["holders"])
    lines = locks_table(world, path).splitlines()
    assert lines[0] == f"{path}  (record locks)  (locked by the kernel, which does not tell since when)"
    assert [line[line.index("[") :] for line in lines[1:]] == ["[bytes 0-0]", "[bytes 5-9]", "[bytes 20-]"]


@pytest.mark.parametrize("world", ["native"], indirect=True)
def test_the_kernels_description_of_several_processes_is_one(world: World) -> None:
    driver, fd = world.opened()
    assert lock(driver, fd, WR, 0, 3, ofd=True) == OK
    child = driver.fork()
    (file,) = locks(world, world.file())
    (holder,) = file["holders"]
    assert holder["pid"] in (driver.pid, child.pid)
    assert holder["ranges"] == [part(0, 2)]


@pytest.mark.parametrize("world", ["native"], indirect=True)
def test_the_kernels_flock_and_record_locks(world: World) -> None:
    driver, fd = world.opened()
    assert lock(driver, fd, WR, 0, 3) == OK
    assert driver.flock(fd, EX) == OK
    assert [file["locks"] for file in locks(world, world.file())] == ["flock", "fcntl"]


# Those of other hosts


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "lock"
    path.touch()
    return path


def records_of(target: Path, keeper: str | None = None) -> Elsewhere:
    """A keeper of another host, as it locks TARGET by record locks."""
    return Elsewhere(target.with_name(target.name + SUFFIX), keeper)


def command(rendezvous: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FLOCKSHIM, *map(str, words)],
        env=settings(rendezvous),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )


def between_hosts(rendezvous: Path, target: Path) -> dict[str, dict[str, Any]]:
    """What ``--locks`` tells of leases, by the kind of locks."""
    done = command(rendezvous, "--locks", "--json", target)
    assert (done.returncode, done.stderr) == (0, "")
    return {file["locks"]: file for file in json.loads(done.stdout)["files"] if file["kind"] == "cluster"}


def test_leases_of_both_kinds(target: Path, rendezvous: Path) -> None:
    holder, reader, writer = Elsewhere(target), records_of(target), records_of(target)
    assert [holder.lock(), reader.lock(exclusive=False), writer.lock()] == [True, True, False]
    reader.vouch("node7", program(4711, "sqlite3")._replace(exclusive=False))
    shown = between_hosts(rendezvous, target)
    assert set(shown) == {"flock", "fcntl"}
    assert [one["keeper"] for one in shown["flock"]["holders"]] == [holder.keeper]
    (held,), (waits,) = shown["fcntl"]["holders"], shown["fcntl"]["waiters"]
    assert shown["fcntl"]["path"] == str(target)
    assert (held["mode"], held["keeper"], held["host"]) == ("shared", reader.keeper, "node7")
    assert [(one["pid"], one["command"]) for one in held["programs"]] == [(4711, "sqlite3")]
    assert (waits["mode"], waits["keeper"]) == ("exclusive", writer.keeper)
    lines = command(rendezvous, "--locks", target).stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        f"{target}  (between hosts)",
        f"{target}  (record locks)  (between hosts)",
    ]


def test_a_dead_hosts_record_locks_are_broken(target: Path, rendezvous: Path) -> None:
    """And they alone: there was no flock."""
    dead, heir = records_of(target), records_of(target)
    assert [dead.lock(), heir.lock()] == [True, False]
    dead.vouch("node7", program(4711, "sqlite3"))
    done = command(rendezvous, "--break", target, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    shown, did = done.stdout.splitlines()
    assert shown.startswith(f"{target} (record locks): held by pid 4711 (sqlite3) on node7 since ")
    assert did.startswith("taken away from pid 4711 (sqlite3) on node7 since ")
    state = heir.state()
    assert heir.token == state.version > 0
    assert not (target.parent / ".lock.flockshim").exists()


def test_both_kinds_are_broken(target: Path, rendezvous: Path) -> None:
    keepers = [Elsewhere(target), records_of(target)]
    assert all(keeper.lock() for keeper in keepers)
    done = command(rendezvous, "--break", target)
    assert done.returncode == 125 and "add --yes" in done.stderr
    done = command(rendezvous, "--break", target, "--yes")
    assert (done.returncode, done.stdout.count("taken away from ")) == (0, 2)
    assert [keeper.state().entries() for keeper in keepers] == [(), ()]
    done = command(rendezvous, "--break", target, "--yes")
    assert (done.returncode, done.stdout) == (0, f"nobody holds the lock on {target} between hosts\n")


def test_one_that_is_alive_here_keeps_its_record_locks(target: Path, rendezvous: Path) -> None:
    aliveness = Aliveness(str(rendezvous))
    keeper, dead = records_of(target, aliveness.keeper), Elsewhere(target)
    assert keeper.lock() and dead.lock()
    done = command(rendezvous, "--break", target, "--yes")
    assert done.returncode == 1
    assert "alive, so the lock stays" in done.stderr
    assert len(keeper.state().holders) == 1
    assert dead.state().holders == (), "the other kind's"
    os.close(aliveness.descriptor)


def test_what_crashes_have_left_is_cleaned(target: Path, rendezvous: Path) -> None:
    aliveness = Aliveness(str(rendezvous))
    aliveness.end()
    dead = records_of(target, aliveness.keeper)
    assert dead.lock()
    dead.vouch("here")
    done = command(rendezvous, "--clean", target.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "and the dead from 1 locks" in done.stdout
    assert dead.state().entries() == ()
    assert not dead.vouching_file().exists()
    kept = [name for name in files(target.parent) if name != "lock"]
    assert len(kept) == 2 and all(name.startswith(f".lock{SUFFIX}.flockshim") for name in kept)
