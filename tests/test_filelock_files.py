"""flockshim.FileLock: which file is locked, with which settings, and that nothing is left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.driver import EX, NB, OK, UN
from support.threads import ThreadCall, descriptors, times_open
from support.worlds import World

import flockshim
from flockshim import FileLock, FlockshimError, Timeout


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_the_name_means_another_file_when_the_lock_is_had(world: World, how: str) -> None:
    driver, fd = world.opened()
    driver.flock(fd, EX)
    lock = FileLock(world.file(), thread_local=False)
    waiting = ThreadCall(lock.acquire)
    world.await_blocked(waiting)
    if how == "deleted":
        world.file().unlink()
    else:
        world.file("new").replace(world.directory / "file")
    driver.flock(fd, UN)
    waiting.value()
    assert not world.free(world.directory / "file")
    assert driver.flock(fd, EX | NB) == OK
    assert times_open(world.file()) == 1
    lock.release()
    assert world.free(world.file())


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    program = """
import os, sys, flockshim
path = sys.argv[1]
lock, other = flockshim.FileLock(path), flockshim.FileLock(path, timeout=0)
def excluded():
    with lock:
        try:
            other.acquire()
        except flockshim.Timeout:
            return True
# What is imported late is imported now: the other user may not be able to.
excluded()
os.chmod(path, 0o444)
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 0)
try:
    open(path, "r+")
except PermissionError:
    print("cannot be written")
print(excluded())
"""
    directory = tmp_path
    while directory != Path(tempfile.gettempdir()):
        if directory.stat().st_uid == os.geteuid():
            directory.chmod(0o755)
        directory = directory.parent
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("cannot be written\nTrue\n", "")


def test_what_the_file_has_stays(world: World) -> None:
    world.file().write_text("something")
    with FileLock(world.file()):
        assert world.file().read_text() == "something"
    assert world.file().read_text() == "something"


def test_a_symbolic_link(world: World) -> None:
    link = world.directory / "link"
    link.symlink_to("made")
    with FileLock(link):
        assert link.is_symlink()
        assert not world.free(world.directory / "made")


def test_a_relative_path(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.directory)
    lock = FileLock("file")
    with lock:
        assert lock.lock_file == "file"
        assert not world.free(world.file())
        monkeypatch.chdir("/")
    assert world.free(world.file())


@pytest.mark.parametrize("name", ["no file", "file/below"])
def test_a_path_that_cannot_be_opened(world: World, name: str) -> None:
    world.file()
    (world.directory / "no file").symlink_to("/nowhere/at/all")
    lock = FileLock(world.directory / name)
    before = descriptors()
    with pytest.raises(OSError) as raised:
        lock.acquire()
    assert raised.value.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
    assert lock.lock_counter == 0
    assert descriptors() == before


# Settings


def test_nothing_is_left_open(world: World) -> None:
    lock = FileLock(world.file(), timeout=0)
    with lock, lock:
        assert times_open(world.file()) == 1
    assert times_open(world.file()) == 0
    lock.release()
    before = descriptors()
    for _ in range(3):
        with lock:
            pass
    assert descriptors() == before


def test_modes(emulated: World, capfd: pytest.CaptureFixture[str]) -> None:
    path = emulated.file()
    emulated.round_trip()
    before = descriptors()
    with FileLock(path, mode="success"), FileLock(path, 0, "success"):
        assert emulated.free(path)
    with pytest.raises(OSError) as raised, FileLock(path, mode="fail"):
        pass
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSYS, str(path))
    assert not list(path.parent.glob(".file.flockshim*"))
    with FileLock(path, mode="cluster"), pytest.raises(Timeout), FileLock(path, 0, mode="host"):
        assert list(path.parent.glob(".file.flockshim.*.x*"))
    with FileLock(path, mode="host"), pytest.raises(Timeout), FileLock(path, 0, 0o600):
        pass
    assert descriptors() == before
    assert capfd.readouterr() == ("", "")
    with pytest.raises(FlockshimError, match="wrong"):
        FileLock(path, mode="wrong")


def test_the_environment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOCKSHIM_MODE", "fail")
    monkeypatch.setenv("FLOCKSHIM_SIMULATE", f"ENOLCK:{tmp_path}")
    lock = FileLock(tmp_path / "file")
    with pytest.raises(OSError) as raised:
        lock.acquire()
    assert raised.value.errno == errno.ENOLCK
    monkeypatch.setenv("FLOCKSHIM_MODE", "success")
    with FileLock(tmp_path / "file"), FileLock(tmp_path / "file", 0):
        pass
    with FileLock(tmp_path / "file", mode="host"), pytest.raises(Timeout), FileLock(tmp_path / "file", 0, "host"):
        pass


def test_the_keeper_cannot_be_had(
    emulated: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLOCKSHIM_DIR", "/" + 100 * "long")
    monkeypatch.setenv("FLOCKSHIM_VERBOSE", "1")
    lock = FileLock(emulated.file())
    before = descriptors()
    with pytest.raises(FlockshimError, match="rendezvous") as raised:
        lock.acquire()
    assert repr(str(emulated.file())) in str(raised.value)
    assert lock.lock_counter == 0
    assert descriptors() == before
    assert capfd.readouterr() == ("", "")


def test_a_library_prints_nothing(
    emulated: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLOCKSHIM_VERBOSE", "1")
    driver, fd = emulated.opened()
    driver.flock(fd, EX)
    with pytest.raises(Timeout):
        FileLock(emulated.file()).acquire(timeout=0.3)  # programs tell whom they wait for after 0.1 s
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("wrong", [-1.0, float("inf"), float("nan")])
def test_a_poll_interval_that_is_none(tmp_path: Path, wrong: float) -> None:
    with pytest.raises(ValueError):
        FileLock(tmp_path / "file", poll_interval=wrong)
    with pytest.raises(ValueError):
        FileLock(tmp_path / "file").acquire(poll_interval=wrong)
    with pytest.raises(ValueError):
        FileLock(tmp_path / "file").acquire(timeout=float("nan"))


def test_wrong_arguments_leave_nothing_to_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    with pytest.raises(TypeError):
        FileLock()  # type: ignore[call-arg]
    assert errors == []


def test_it_is_imported_late() -> None:
    program = "import sys, flockshim; print(*(name for name in sys.modules if name.startswith('flockshim')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "flockshim\n"
    assert flockshim.Timeout is Timeout
    with pytest.raises(AttributeError):
        flockshim.nothing  # noqa: B018
