"""The keeper's runner of protocol steps, whose operations a worker process does, and what its death means."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _cffi_backend
import pytest
from conftest import shim_environment
from support.driver import BUSY, EX, OK, SH, UN
from support.keepers import keepers
from support.leaserunner import Running, threads_in_open
from support.proc import await_end, await_true
from support.worlds import World

from flockshim.cluster_ops import Create, List, Look, Pause, Read, Unlink, Wait, Write
from flockshim.lease_runner import CancelledError, WorkerLostError
from flockshim.lease_worker import Enter
from flockshim.pytest_plugin import Mounts

BIG = 50_000


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path)
    yield running
    running.close()


def test_steps_get_their_results_and_their_failures(running: Running) -> None:
    running.start(Create("x", "text"), Look("x"), Read("x"))
    assert running.result() == "text"
    running.start(List(""))
    assert running.result() == ["x"]
    running.start(Read("nothing"), Read("x"))
    error = running.failure()
    assert isinstance(error, FileNotFoundError)
    assert error.filename == "nothing"


def test_who_waits_in_the_queue_is_told_so_and_goes_on(running: Running, tmp_path: Path) -> None:
    waits: list[str] = []
    running.start(Wait(0), Pause(0), Wait(0), Create("x", ""), waiting=lambda: waits.append("waits"))
    assert waits == ["waits"]
    running.result()
    assert waits == ["waits"] * 2
    assert (tmp_path / "x").exists()


def test_what_is_cancelled_while_it_waits_ends_at_once(running: Running, tmp_path: Path) -> None:
    run = running.start(Wait(1000), Create("x", ""))
    run.cancel()
    ((_, error),) = running.ended
    assert isinstance(error, CancelledError)
    running.ended.clear()
    running.start(Create("y", ""))
    running.result()
    assert os.listdir(tmp_path) == ["y"]


def test_what_is_cancelled_during_an_operation_ends_after_it(running: Running, tmp_path: Path) -> None:
    run = running.start(Create("x", ""), Create("y", ""))
    run.cancel()
    assert running.ended == []
    assert isinstance(running.failure(), CancelledError)
    assert os.listdir(tmp_path) == ["x"]


@pytest.fixture
def server(_nolock_mounts: Mounts) -> Iterator[int]:
    """The process behind the nolock_dir, which goes on in any case."""
    pid = _nolock_mounts.get("ENOSYS", "ENOSYS").server_pid
    yield pid
    os.kill(pid, signal.SIGCONT)


def kill(running: Running) -> None:
    await_end(running.signal(signal.SIGKILL))


def test_a_worker_that_was_killed_while_idle_is_replaced_without_a_word(running: Running, tmp_path: Path) -> None:
    running.start(Create("x", ""))
    running.result()
    kill(running)
    running.turn()
    running.start(Create("y", ""))
    running.result()
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_what_is_sent_to_a_worker_that_has_just_died_is_done_by_the_next(running: Running, tmp_path: Path) -> None:
    """Before the keeper has heard of its death."""
    running.start(Create("x", ""))
    running.result()
    kill(running)
    running.start(Create("y", ""), Read("x"))
    running.start(List(""))
    ended = running.ends(2)
    assert [error for _, error in ended] == [None, None]
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


@pytest.mark.parametrize("begun", [False, True])
def test_of_what_a_killed_worker_was_to_do_nobody_knows_whether_it_was_done(
    running: Running, begun: bool, nolock_dir: Path, server: int
) -> None:
    """The steps learn it, and the next ones have a new worker."""
    running.directory = running.at(nolock_dir)
    running.start(List(""))
    running.result()
    if begun:
        os.kill(server, signal.SIGSTOP)
        running.start(Create("x", ""))
        await_true(lambda: threads_in_open(running.worker()) == 1, "the worker to begin")
    else:
        running.signal(signal.SIGSTOP)
        running.start(Create("x", ""))
    pid = running.signal(signal.SIGKILL)
    os.kill(server, signal.SIGCONT)
    await_end(pid)
    error = running.failure()
    assert isinstance(error, WorkerLostError)
    assert error.filename == str(nolock_dir)
    running.start(Create("y", ""), List("y"))
    assert running.result() == ["y"]
    assert running.worker() != pid


def test_steps_may_go_on_after_the_worker_s_death(running: Running, tmp_path: Path) -> None:
    """As a release does, which is tried until it succeeds."""

    def steps() -> Any:
        try:
            yield Create("x", "")
        except WorkerLostError:
            yield Create("y", "")
        return "went on"

    running.start(List(""))
    running.result()
    running.signal(signal.SIGSTOP)
    running.runner.run(running.directory, steps(), lambda *end: running.ended.append(end))
    kill(running)
    assert running.result() == "went on"
    assert os.listdir(tmp_path) == ["y"]


def test_a_worker_that_is_stopped_does_all_when_it_goes_on(running: Running, tmp_path: Path) -> None:
    """More than a socket holds: what cannot be sent is sent later, and the keeper does not wait."""
    running.start(List(""))
    running.result()
    running.signal(signal.SIGSTOP)
    names = [f"file-{number:03}" for number in range(200)]
    for name in names:
        running.start(Write(name, "x" * BIG))
    for _ in range(20):
        running.turn(0)
    assert running.ended == []
    assert len(running.runner._pending) < len(names), "all of it was sent: nothing is tested"
    running.signal(signal.SIGCONT)
    assert {error for _, error in running.ends(len(names))} == {None}
    assert sorted(os.listdir(tmp_path)) == names
    assert {(tmp_path / name).stat().st_size for name in names} == {BIG}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def no_process(patch: pytest.MonkeyPatch) -> int:
    """Returns the errno of what fails then."""
    patch.setattr(sys, "executable", "/nothing")
    return errno.ENOENT


def no_descriptor(patch: pytest.MonkeyPatch) -> int:
    def socketpair(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    patch.setattr(socket, "socketpair", socketpair)
    return errno.EMFILE


@pytest.mark.parametrize("lack", [no_process, no_descriptor])
def test_without_a_worker_the_steps_end_with_an_error_and_later_ones_try_again(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: Callable[[pytest.MonkeyPatch], int]
) -> None:
    """And whoever has begun them is told after that, not meanwhile."""
    gc.collect()
    before = descriptors()
    with monkeypatch.context() as patch:
        number = lack(patch)
        for _ in range(3):
            running.start(Create("x", ""))
            assert running.ended == []
            error = running.failure()
            assert isinstance(error, OSError)
            assert error.errno == number
    assert descriptors() == before
    running.start(Create("y", ""))
    running.result()
    assert os.listdir(tmp_path) == ["y"]


def test_steps_may_go_on_without_a_worker(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is thrown into them, as that of any operation."""

    def steps() -> Any:
        try:
            yield Create("x", "")
        except OSError:
            monkeypatch.undo()
        return (yield List(""))

    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    running.runner.run(running.directory, steps(), lambda *end: running.ended.append(end))
    assert running.result() == []


def test_no_descriptor_is_left_behind(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with file.open() as open_file:
        running.start(Enter("file", "", open_file.fileno()))
        running.result()
        gc.collect()
        before, there = descriptors(), len(os.listdir(f"/proc/{running.worker()}/fd"))
        for _ in range(50):
            running.start(Enter("file", "", open_file.fileno()), Enter("other", "", open_file.fileno()))
            error = running.failure()
            assert isinstance(error, OSError)
            assert error.errno == errno.ESTALE
        kept = descriptors(), len(os.listdir(f"/proc/{running.worker()}/fd"))
        assert kept == (before, there)
        kill(running)
        running.start(Unlink("file"))
        running.result()
        assert descriptors() == before


# In a keeper


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A link to the interpreter that can be removed under a keeper; it finds the same packages."""
    real = Path(sys.executable).resolve()
    link = tmp_path / "bin" / "python"
    packages = tmp_path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for directory in (link.parent, packages):
        directory.mkdir(parents=True)
    (tmp_path / "pyvenv.cfg").write_text(f"home = {real.parent}\n")
    (packages / "more.pth").write_text(f"{Path(_cffi_backend.__file__).parent}\n")
    link.symlink_to(real)
    return link


def test_a_keeper_that_can_start_no_worker_lives_and_locks_when_it_can(
    python: Path, nolock_dir: Path, rendezvous: Path
) -> None:
    host = {**shim_environment(rendezvous), "FLOCKSHIM_PYTHON": str(python)}
    world = World("emulated", nolock_dir, {**host, "FLOCKSHIM_MODE": "cluster"})
    holder = world.fleet.start(host)
    held = holder.open(nolock_dir / "held")
    assert holder.flock(held, EX) == OK
    before = keepers(rendezvous)
    aside = python.rename(python.with_name("aside"))
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == errno.ENOSYS
    errors = world.fleet.errors()
    assert "use --mode host" in errors and errors.count("\n") == 1
    aside.rename(python)
    assert driver.flock(fd, EX) == OK
    assert world.probe(world.file(), SH) == BUSY
    assert holder.probe(nolock_dir / "held", SH) == BUSY
    assert driver.flock(fd, UN) == OK
    assert keepers(rendezvous) == before
    world.end()
