"""The process that does the keeper's file operations: how it knows a directory, and what it keeps open."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.leaserunner import Running, threads_in_open
from support.proc import await_true

from flockshim.cluster_ops import Create, List, Read, Unlink, Write
from flockshim.lease_files import Directory
from flockshim.lease_worker import Enter
from flockshim.pytest_plugin import Mounts


@pytest.fixture
def below(tmp_path: Path) -> Path:
    """A directory with a file in it."""
    below = tmp_path / "below"
    below.mkdir()
    (below / "file").touch()
    return below


@pytest.fixture
def running(below: Path) -> Iterator[Running]:
    running = Running(below)
    yield running
    running.close()


def identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino]


def enter(running: Running, name: str, file: Path, directory: Directory | None = None) -> object:
    """See whether FILE is NAME in the directory; the result is the name, and the directory's identity."""
    with file.open() as opened:
        return running.do(Enter(name, "", opened.fileno()), directory)


# Entering


def test_a_file_is_found_under_its_name(running: Running, below: Path) -> None:
    assert enter(running, "file", below / "file") == ["file", identity(below)]


def other_inode(file: Path) -> None:
    other = file.with_name("other")
    other.touch()
    other.rename(file)


def symbolic_link(file: Path) -> None:
    """The program has opened what it leads to, which has a name of its own."""
    file.rename(file.with_name("other"))
    file.symlink_to("other")


def renamed(file: Path) -> None:
    file.rename(file.with_name("other"))


@pytest.mark.parametrize("change", [other_inode, symbolic_link, renamed])
def test_a_file_that_is_not_to_be_found_under_its_name(
    running: Running, below: Path, change: Callable[[Path], None]
) -> None:
    with (below / "file").open() as file:
        os.link(below / "file", below / "second")
        change(below / "file")
        with pytest.raises(OSError, match="not to be found") as caught:
            running.do(Enter("file", "", file.fileno()))
        assert caught.value.errno == errno.ESTALE


def test_a_directory_that_is_another_one_now(running: Running, below: Path) -> None:
    """It is kept, whatever is at its path; what is there now is another directory."""
    moved = below.with_name("moved")
    assert enter(running, "file", below / "file") == ["file", identity(below)]
    below.rename(moved)
    below.mkdir()
    os.link(moved / "file", below / "file")
    with pytest.raises(OSError, match="not to be found") as caught:
        enter(running, "file", below / "file")
    assert caught.value.errno == errno.ESTALE
    assert enter(running, "file", below / "file", running.at(below)) == ["file", identity(below)]
    running.do(Create("x", ""))
    assert os.listdir(below) == ["file"]
    assert sorted(os.listdir(moved)) == ["file", "x"]


def test_a_directory_that_is_gone(running: Running, below: Path) -> None:
    with (below / "file").open() as file:
        os.link(below / "file", below.with_name("kept"))
        running.do(List(""))
        (below / "file").unlink()
        below.rmdir()
        for directory, number in ((running.directory, errno.ESTALE), (running.at(below), errno.ENOENT)):
            with pytest.raises(OSError) as caught:
                running.do(Enter("file", "", file.fileno()), directory)
            assert caught.value.errno == number


def test_a_file_without_a_name(running: Running, below: Path) -> None:
    """Wherever its directory may be."""
    with (below / "file").open() as file:
        (below / "file").unlink()
        assert running.do(Enter("file", "", file.fileno())) is None
        below.rmdir()
        assert running.do(Enter("file", "", file.fileno()), running.at(below)) is None


def test_a_record_left_of_a_file_without_a_name(running: Running, below: Path) -> None:
    """Others may have it open. Record locks, with a suffix, and flock have records of their own."""
    with (below / "file").open() as file:
        (below / "file").unlink()
        (below / ".file~records.flockshim").touch()
        assert running.do(Enter("file", "", file.fileno())) is None
        assert running.do(Enter("file", "~records", file.fileno())) == ["file", identity(below)]


def test_the_root_of_a_mount_has_nothing_beside_it(running: Running) -> None:
    descriptor = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError, match="root of a mount") as caught:
        running.do(Enter("proc", "", descriptor), running.at(Path("/")))
    os.close(descriptor)
    assert caught.value.errno == errno.EXDEV


# What another worker has entered


def test_a_directory_that_an_earlier_worker_has_entered(running: Running, below: Path) -> None:
    """The next one opens it by its path: that must be the same."""
    known, moved = identity(below), below.with_name("moved")
    first = running.at(below, known)
    running.do(Create("x", ""), first)
    below.rename(moved)
    below.mkdir()
    with pytest.raises(OSError, match="moved away") as caught:
        running.do(Create("y", ""), running.at(below, known))
    assert caught.value.errno == errno.ESTALE
    assert os.listdir(below) == []
    running.do(Unlink("x"), first)
    assert running.descriptors() == [str(moved)]


# What it keeps open


def test_a_directory_is_open_until_it_is_forgotten(running: Running, below: Path, tmp_path: Path) -> None:
    other = running.at(tmp_path)
    for _ in range(20):
        enter(running, "file", below / "file")
        running.do(List(""), other)
    assert sorted(running.descriptors()) == [str(tmp_path), str(below)]
    for _ in range(2):
        running.runner.forget(running.directory)
        await_true(lambda: running.descriptors() == [str(tmp_path)], "it to be closed")
    assert running.do(List("")) == ["file"]


def test_failures_leave_nothing_open(running: Running, below: Path) -> None:
    wrong, missing = running.at(below, [0, 0]), running.at(below / "missing")
    running.do(List(""))
    for _ in range(20):
        for operation, directory in ((List(""), wrong), (List(""), missing), (Read("missing"), None)):
            with pytest.raises(OSError):
                running.do(operation, directory)
        for name, directory in (("file", wrong), ("file", missing), ("missing", None)):
            with pytest.raises(OSError):
                enter(running, name, below / "file", directory)
    assert running.descriptors() == [str(below)]


# An operation that hangs


@pytest.fixture
def server(_nolock_mounts: Mounts) -> Iterator[int]:
    """The process behind the nolock_dir, which goes on in any case."""
    pid = _nolock_mounts.get("ENOSYS", "ENOSYS").server_pid
    yield pid
    os.kill(pid, signal.SIGCONT)


def test_one_that_hangs_holds_up_no_other_and_what_it_uses_stays_open(
    running: Running, nolock_dir: Path, server: int, below: Path
) -> None:
    shared = running.at(nolock_dir)
    running.do(List(""), shared)
    os.kill(server, signal.SIGSTOP)
    names = ["x0", "x1", "x2"]
    for name in names:
        running.start(Write(name, "text"), directory=shared)
    await_true(lambda: threads_in_open(running.worker()) == len(names), "them to begin")
    running.runner.forget(shared)
    for _ in range(5):
        assert running.do(List("")) == ["file"]
    assert str(nolock_dir) in running.descriptors()
    os.kill(server, signal.SIGCONT)
    assert running.ends(3) == [(None, None)] * 3
    assert sorted(os.listdir(nolock_dir)) == names
    await_true(lambda: running.descriptors() == [str(below)], "the forgotten one to be closed")
