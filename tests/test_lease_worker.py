"""The process that does the keeper's file operations: how it knows a directory, and what it keeps open."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.proc import DEADLINE, await_true

from flockshim import lease_worker
from flockshim.cluster_ops import Create, List, Read, Unlink, Write
from flockshim.lease_worker import Enter, Place
from flockshim.pytest_plugin import Mounts


class Worker:
    """A worker, and the keeper's end of its socket."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = Path(lease_worker.__file__)
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-I", "-S", script], stdin=theirs, cwd="/", env={})
        self.number = 0
        self.answers: dict[int, tuple[Any, Any]] = {}

    def send(self, place: Place, operation: Any) -> int:
        """Ask, and return the number under which it answers."""
        self.number += 1
        arguments, descriptors = list(operation), []
        if isinstance(operation, Enter):
            descriptors = [arguments.pop()]
        packet = json.dumps([self.number, place, type(operation).__name__, arguments]).encode()
        socket.send_fds(self.socket, [packet], descriptors)
        return self.number

    def answer(self, number: int) -> Any:
        """Wait for the answer to this request. Raises the OSError that it tells of."""
        while number not in self.answers:
            assert select.select([self.socket], [], [], DEADLINE)[0], "no answer"
            got, result, error = json.loads(self.socket.recv(lease_worker.MAX_PACKET))
            self.answers[got] = result, error
        result, error = self.answers.pop(number)
        if error:
            raise OSError(*error)
        return result

    def do(self, place: Place, operation: Any) -> Any:
        return self.answer(self.send(place, operation))

    def enter(self, place: Place, name: str, file: Path) -> Any:
        """See whether FILE is NAME in the directory; the result is the directory's identity."""
        descriptor = os.open(file, os.O_RDONLY)
        try:
            return self.do(place, Enter(name, descriptor))
        finally:
            os.close(descriptor)

    def forget(self, place: Place) -> None:
        self.socket.send(json.dumps([0, place, "forget", []]).encode())

    def open_directories(self) -> list[str]:
        """What it has open but its socket and the standard streams."""
        base = f"/proc/{self.process.pid}/fd"
        return [os.readlink(f"{base}/{name}") for name in os.listdir(base) if int(name) > 2]

    def end(self) -> None:
        self.socket.close()
        assert self.process.wait(DEADLINE) == 0


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.end()


@pytest.fixture
def below(tmp_path: Path) -> Path:
    """A directory with a file in it."""
    below = tmp_path / "below"
    below.mkdir()
    (below / "file").touch()
    return below


def place(path: Path, number: int = 1, identity: list[int] | None = None) -> Place:
    return Place(number, str(path), identity)


def identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino]


# Entering


def test_a_file_is_found_under_its_name(worker: Worker, below: Path) -> None:
    assert worker.enter(place(below), "file", below / "file") == identity(below)


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


def other_directory(file: Path) -> None:
    file.parent.rename(file.parent.with_name("moved"))
    file.parent.mkdir()
    os.link(file.parent.with_name("moved") / "file", file)


@pytest.mark.parametrize("change", [other_inode, symbolic_link, renamed])
def test_a_file_that_is_not_to_be_found_under_its_name(worker: Worker, below: Path, change: Any) -> None:
    with (below / "file").open() as file:
        os.link(below / "file", below / "second")
        change(below / "file")
        with pytest.raises(OSError, match="not to be found") as caught:
            worker.do(place(below), Enter("file", file.fileno()))
        assert caught.value.errno == errno.ESTALE


def test_a_directory_that_is_another_one_now(worker: Worker, below: Path) -> None:
    """Under its number the first is kept, whatever is at its path; under a new number there is the second."""
    assert worker.enter(place(below), "file", below / "file") == identity(below)
    other_directory(below / "file")
    with pytest.raises(OSError, match="not to be found") as caught:
        worker.enter(place(below), "file", below / "file")
    assert caught.value.errno == errno.ESTALE
    assert worker.enter(place(below, 2), "file", below / "file") == identity(below)
    worker.do(place(below), Create("x", ""))
    assert os.listdir(below) == ["file"]
    assert sorted(os.listdir(below.with_name("moved"))) == ["file", "x"]


def test_a_directory_that_is_gone(worker: Worker, below: Path) -> None:
    with (below / "file").open() as file:
        os.link(below / "file", below.with_name("kept"))
        worker.do(place(below), List(""))
        (below / "file").unlink()
        below.rmdir()
        for number, number_of_gone in ((1, errno.ESTALE), (2, errno.ENOENT)):
            with pytest.raises(OSError) as caught:
                worker.do(place(below, number), Enter("file", file.fileno()))
            assert caught.value.errno == number_of_gone


def test_a_file_without_a_name(worker: Worker, below: Path) -> None:
    """Wherever its directory may be."""
    with (below / "file").open() as file:
        (below / "file").unlink()
        assert worker.do(place(below), Enter("file", file.fileno())) is None
        below.rmdir()
        assert worker.do(place(below, 2), Enter("file", file.fileno())) is None


def test_the_root_of_a_mount_has_nothing_beside_it(worker: Worker) -> None:
    with pytest.raises(OSError, match="root of a mount") as caught:
        worker.enter(place(Path("/")), "proc", Path("/proc"))
    assert caught.value.errno == errno.EXDEV


# What another worker has entered


def test_a_directory_that_an_earlier_worker_has_entered(worker: Worker, below: Path) -> None:
    """The next one opens it by its path: that must be the same."""
    known = identity(below)
    worker.do(place(below, 1, known), Create("x", ""))
    below.rename(below.with_name("moved"))
    below.mkdir()
    with pytest.raises(OSError, match="moved away") as caught:
        worker.do(place(below, 2, known), Create("y", ""))
    assert caught.value.errno == errno.ESTALE
    assert os.listdir(below) == []
    # It has the first one open.
    worker.do(place(below, 1, known), Unlink("x"))
    assert worker.open_directories() == [str(below.with_name("moved"))]


# What it keeps open


def test_a_directory_is_open_until_it_is_forgotten(worker: Worker, below: Path, tmp_path: Path) -> None:
    for _ in range(20):
        worker.enter(place(below), "file", below / "file")
        worker.do(place(tmp_path, 2), List(""))
    assert sorted(worker.open_directories()) == [str(tmp_path), str(below)]
    worker.forget(place(below))
    await_true(lambda: worker.open_directories() == [str(tmp_path)], "it to be closed")
    worker.forget(place(below))
    assert worker.do(place(below), List("")) == ["file"]


def test_failures_leave_nothing_open(worker: Worker, below: Path) -> None:
    wrong = place(below, 2, [0, 0])
    missing = place(below / "missing", 3)
    for _ in range(20):
        for where, what in ((wrong, List("")), (missing, List("")), (place(below), Read("missing"))):
            with pytest.raises(OSError):
                worker.do(where, what)
        for where, name in ((wrong, "file"), (missing, "file"), (place(below), "missing")):
            with pytest.raises(OSError):
                worker.enter(where, name, below / "file")
    assert worker.open_directories() == [str(below)]


# An operation that hangs


@pytest.fixture
def server(_nolock_mounts: Mounts) -> Iterator[int]:
    """The process behind the nolock_dir, which goes on in any case."""
    pid = _nolock_mounts.get("ENOSYS", "ENOSYS").server_pid
    yield pid
    os.kill(pid, signal.SIGCONT)


def test_one_that_hangs_holds_up_no_other_and_what_it_uses_stays_open(
    worker: Worker, nolock_dir: Path, server: int, below: Path
) -> None:
    worker.do(place(nolock_dir), List(""))
    os.kill(server, signal.SIGSTOP)
    hanging = [worker.send(place(nolock_dir), Write(f"x{number}", "text")) for number in range(3)]
    worker.forget(place(nolock_dir))
    for _ in range(5):
        assert worker.do(place(below, 2), List("")) == ["file"]
    assert str(nolock_dir) in worker.open_directories()
    assert worker.answers == {}
    os.kill(server, signal.SIGCONT)
    for number in hanging:
        worker.answer(number)
    assert sorted(os.listdir(nolock_dir)) == ["x0", "x1", "x2"]
    await_true(lambda: worker.open_directories() == [str(below)], "the forgotten one to be closed")
