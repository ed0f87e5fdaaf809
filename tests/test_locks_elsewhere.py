"""The holder of another keeper: in another control group, or in another pid namespace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import emulated_world
from support.driver import EX, OK
from support.groups import ControlGroup, PidNamespace
from support.keepers import keepers
from support.lockcommand import FLOCKSHIM, await_waiting, job, locks, locks_table, run, settings
from support.worlds import World

from flockshim.pytest_plugin import require


class Border(NamedTuple):
    """Two worlds with a keeper each."""

    here: World
    there: World
    path: Path


@pytest.fixture(params=["control group", "pid namespace"])
def border(request: pytest.FixtureRequest, rendezvous: Path) -> Iterator[Border]:
    here = emulated_world(request, rendezvous)
    around: ControlGroup | PidNamespace
    if request.param == "control group":
        around = request.getfixturevalue("group")
    else:
        require(os.geteuid() == 0, "pid namespaces need root", "run the tests as root")
        around = PidNamespace()
    there = World("emulated", here.directory, here.environment, *around.prefix)
    yield Border(here, there, here.file())
    there.end()
    here.end()
    if isinstance(around, PidNamespace):
        around.remove()


def _own_pid(pid: int) -> int:
    """The id that a process has in its own pid namespace."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    (numbers,) = [line.split() for line in status if line.startswith("NSpid:")]
    return int(numbers[-1])


def test_a_holder_of_another_keeper(border: Border, rendezvous: Path) -> None:
    here, there, path = border
    driver, fd = there.opened()
    assert driver.flock(fd, EX) == OK
    pid = _own_pid(driver.pid)
    elsewhere = pid != driver.pid
    command = Path(f"/proc/{driver.pid}/cmdline").read_text().split("\0")
    named = f"pid {pid} ({os.path.basename(command[0])} {command[1]}) on {os.uname().nodename} since "
    with job(here, "--verbose", "--lock", path) as waiting:
        assert waiting.process.stderr is not None
        line = waiting.process.stderr.readline()
        assert f", held by {named}" in line
        assert line.endswith(", in another pid namespace\n") is elsewhere
        await_waiting(here, path, waiting.pid)
        (file,) = locks(here)
        (holder,), (waiter,) = file["holders"], file["waiters"]
        assert (holder["pid"], waiter["pid"]) == (pid, waiting.pid)
        assert holder["command"] == f"{os.path.basename(command[0])} {command[1]}"
        assert holder["pid_namespace"] == os.stat(f"/proc/{driver.pid}/ns/pid").st_ino
        assert holder["keeper"] != waiter["keeper"]
        assert ("of another pid namespace" in locks_table(here)) is elsewhere
        done = run(here, "--lock", path, "--no-wait", "true")
        assert f"held by {named}" in done.stderr
        assert done.stderr.endswith(", in another pid namespace\n") is elsewhere
        done = run(here, "--lock", path, "--timeout", "0.1", "true")
        assert f"held by {named}" in done.stderr
        driver.kill()
        waiting.began()
        assert waiting.finish()[0] == 0


def test_seen_from_the_other_side(border: Border) -> None:
    here, there, path = border
    driver, fd = here.opened()
    assert driver.flock(fd, EX) == OK
    command = [*there.prefix, *FLOCKSHIM, "--locks", "--json"]
    done = subprocess.run(command, env=settings(here), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (file,) = json.loads(done.stdout)["files"]
    assert file["path"] == str(path)
    (holder,) = file["holders"]
    assert holder["pid"] == driver.pid
    assert holder["command"].startswith("lockdriver-cc ")


@pytest.mark.parametrize("border", ["pid namespace"], indirect=True)
def test_a_kernel_lock_whose_holder_cannot_be_seen(border: Border) -> None:
    """The kernel shows the locks of a pid namespace to itself and those around it only: proc(5)."""
    here, there, _ = border
    driver = here.start()
    assert driver.flock(driver.open(here.directory, os.O_RDONLY), EX) == OK
    command = [*there.prefix, *FLOCKSHIM, "--lock", str(here.directory), "--no-wait", "true"]
    done = subprocess.run(command, env=settings(here), capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert "held by a program that cannot be seen from here" in done.stderr and done.stderr.count("\n") == 1
    outside = run(there, "--lock", here.directory, "--no-wait", "true")
    assert f"held by pid {driver.pid} " in outside.stderr


@pytest.mark.parametrize("border", ["control group"], indirect=True)
def test_a_keeper_that_does_not_answer(border: Border, rendezvous: Path) -> None:
    here, there, path = border
    ours, fd = here.opened()
    assert ours.flock(fd, EX) == OK
    (mine,) = keepers(rendezvous)
    theirs = there.start()
    assert theirs.flock(theirs.open(here.file("other")), EX) == OK
    (other,) = [each for each in keepers(rendezvous) if each != mine]
    os.kill(other.worker, signal.SIGSTOP)
    try:
        done = run(here, "--locks", "--json")
        answer = json.loads(done.stdout)
        assert done.returncode == 1
        assert [file["path"] for file in answer["files"]] == [str(path)]
        ((silent, reason),) = answer["silent"].items()
        assert os.path.dirname(silent) == str(rendezvous)
        assert done.stderr.startswith("flockshim: ") and done.stderr.count("\n") == 1
        assert silent in done.stderr and reason in done.stderr
    finally:
        os.kill(other.worker, signal.SIGCONT)
    assert len(locks(here)) == 2
