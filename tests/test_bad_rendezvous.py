"""What happens when the keeper cannot be had: the kernel's errno, one clear line, nothing left."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import emulated_world, shim_environment
from support.driver import BUSY, EX, NB, OK, SH, UN, Driver, Fleet
from support.keepers import end_keepers, keeper_processes
from support.proc import snapshot
from support.programs import program

from flockshim.pytest_plugin import require

NOBODY = 65534


@pytest.fixture
def files(request: pytest.FixtureRequest, rendezvous: Path) -> Path:
    return emulated_world(request, rendezvous).directory


class Attempt:
    """One program that tries to lock under ENVIRONMENT, and what came of it."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.fleet = Fleet(environment)
        self.driver: Driver = self.fleet.start()
        self.fd = self.driver.open(directory / "file")

    def fails(self, *words: str) -> None:
        """Lock calls fail as in the kernel, with one line that says WORDS; nothing else changed."""
        before = snapshot(self.driver.pid)
        for operation in (EX, SH, EX | NB):
            self.fleet.forget_errors()
            assert self.driver.flock(self.fd, operation) == errno.ENOSYS
            (line,) = self.fleet.errors().splitlines()
            assert line.startswith("flockshim: ")
            for word in words:
                assert word in line
        assert snapshot(self.driver.pid) == before
        with pytest.raises(ChildProcessError):
            self.driver.ask("wait")
        assert self.driver.flock(99, EX) == errno.EBADF
        assert self.driver.flock(self.fd, 0) == errno.EINVAL

    def works(self) -> None:
        assert self.driver.flock(self.fd, EX) == OK
        assert self.fleet.errors() == ""


Begin = Callable[..., Attempt]


@pytest.fixture
def attempt(files: Path) -> Iterator[Begin]:
    attempts: list[Attempt] = []

    def begin(rendezvous: Path, **variables: str) -> Attempt:
        environment = shim_environment(Path("/"))
        environment.update({"FLOCKSHIM_DIR": str(rendezvous), **variables})
        attempts.append(Attempt(files, environment))
        return attempts[-1]

    yield begin
    for each in attempts:
        end_keepers(each.fleet.environment["FLOCKSHIM_DIR"])
        each.fleet.end()


def test_the_directory_is_made_when_it_is_not_there(attempt: Begin, rendezvous: Path) -> None:
    directory = rendezvous / "new"
    attempt(directory).works()
    assert directory.stat().st_mode & 0o777 == 0o700


def test_the_directory_s_parent_does_not_exist(attempt: Begin, rendezvous: Path) -> None:
    attempt(rendezvous / "no" / "such").fails("FLOCKSHIM_DIR")
    assert list(rendezvous.iterdir()) == []


def test_the_directory_is_a_symbolic_link(attempt: Begin, rendezvous: Path) -> None:
    target, link = rendezvous / "target", rendezvous / "link"
    target.mkdir(mode=0o700)
    link.symlink_to(target)
    attempt(link).fails("FLOCKSHIM_DIR")
    assert list(target.iterdir()) == []


def test_the_directory_is_a_dangling_symbolic_link(attempt: Begin, rendezvous: Path) -> None:
    link = rendezvous / "link"
    link.symlink_to(rendezvous / "target")
    attempt(link).fails("FLOCKSHIM_DIR")
    assert list(rendezvous.iterdir()) == [link]


def test_the_directory_is_a_file(attempt: Begin, rendezvous: Path) -> None:
    file = rendezvous / "file"
    file.touch()
    attempt(file).fails("FLOCKSHIM_DIR")


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o707, 0o1777])
def test_others_may_enter_the_directory(attempt: Begin, rendezvous: Path, mode: int) -> None:
    rendezvous.chmod(mode)
    attempt(rendezvous).fails("FLOCKSHIM_DIR")
    assert list(rendezvous.iterdir()) == []


def test_the_directory_is_somebody_else_s(attempt: Begin, rendezvous: Path) -> None:
    require(os.geteuid() == 0, "only root can give files away", "run the tests as root")
    os.chown(rendezvous, NOBODY, NOBODY)
    attempt(rendezvous).fails("FLOCKSHIM_DIR")
    assert list(rendezvous.iterdir()) == []


def test_the_path_is_too_long(attempt: Begin, rendezvous: Path) -> None:
    directory = rendezvous / ("long" * 25)
    attempt(directory).fails("FLOCKSHIM_DIR")
    assert not directory.exists()


@pytest.fixture
def small_file_system(rendezvous: Path) -> Iterator[Path]:
    """A tmpfs of few inodes, of the user's own."""
    require(os.geteuid() == 0, "only root can mount", "run the tests as root")
    options = "mode=0700,size=64k,nr_inodes=10"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", rendezvous], check=True)
    yield rendezvous
    end_keepers(rendezvous)
    subprocess.run(["umount", "-l", rendezvous], check=True)


def _fill(directory: Path) -> None:
    for number in range(100):
        try:
            (directory / f"filler-{number}").touch()
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return
    raise AssertionError("the file system does not get full")


def test_the_directory_is_full(attempt: Begin, small_file_system: Path) -> None:
    _fill(small_file_system)
    before = sorted(small_file_system.iterdir())
    attempt(small_file_system).fails("full", "FLOCKSHIM_DIR")
    assert sorted(small_file_system.iterdir()) == before


def test_the_directory_gets_full_under_a_running_keeper(attempt: Begin, small_file_system: Path) -> None:
    """The keeper is there and has no room for one more proxy; the locks it has stay."""
    attempt(small_file_system).works()
    _fill(small_file_system)
    other = attempt(small_file_system)
    assert other.driver.flock(other.fd, EX | NB) == BUSY
    second = other.driver.open(other.directory / "second")
    assert other.driver.flock(second, EX) == errno.ENOSYS
    (line,) = other.fleet.errors().splitlines()
    assert line.startswith("flockshim: ")


def test_the_directory_is_read_only(attempt: Begin, small_file_system: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_file_system], check=True)
    attempt(small_file_system).fails("FLOCKSHIM_DIR")


@pytest.mark.parametrize("kind", ["missing", "not executable", "a directory"])
def test_the_keeper_s_python_cannot_be_executed(attempt: Begin, rendezvous: Path, kind: str) -> None:
    python = rendezvous.with_name(rendezvous.name + "-python")
    if kind == "not executable":
        python.write_text("")
    elif kind == "a directory":
        python.mkdir()
    try:
        attempt(rendezvous, FLOCKSHIM_PYTHON=str(python)).fails("FLOCKSHIM_PYTHON")
    finally:
        if kind == "not executable":
            python.unlink()
        elif kind == "a directory":
            python.rmdir()
    _nothing_but_logs(rendezvous)


@pytest.mark.parametrize("python", ["/bin/true", "/bin/false"])
def test_the_keeper_ends_at_once(attempt: Begin, rendezvous: Path, python: str) -> None:
    attempt(rendezvous, FLOCKSHIM_PYTHON=python).fails("keeper")
    assert keeper_processes(rendezvous) == []


def test_the_package_is_not_there(attempt: Begin, rendezvous: Path, tmp_path: Path) -> None:
    attempt(rendezvous, FLOCKSHIM_HOME=str(tmp_path)).fails("keeper")


@pytest.mark.parametrize("name", ["FLOCKSHIM_PYTHON", "FLOCKSHIM_HOME"])
def test_a_variable_is_missing(attempt: Begin, rendezvous: Path, name: str) -> None:
    attempt(rendezvous, **{name: ""}).fails(name)
    assert list(rendezvous.iterdir()) == []


def test_quiet_says_nothing(attempt: Begin, rendezvous: Path) -> None:
    each = attempt(rendezvous / "no" / "such", FLOCKSHIM_QUIET="1")
    assert each.driver.flock(each.fd, EX) == errno.ENOSYS
    assert each.fleet.errors() == ""


def test_a_bad_directory_does_not_matter_where_the_kernel_locks(
    attempt: Begin, rendezvous: Path, tmp_path: Path
) -> None:
    each = attempt(rendezvous / "no" / "such")
    fd = each.driver.open(tmp_path / "file")
    assert each.driver.flock(fd, EX) == OK
    assert each.driver.flock(fd, UN) == OK
    assert each.fleet.errors() == ""


def test_what_was_wrong_can_be_put_right(attempt: Begin, rendezvous: Path) -> None:
    """The next call of the very same program finds the directory as it is then."""
    directory = rendezvous / "parent" / "child"
    each = attempt(directory)
    each.fails("FLOCKSHIM_DIR")
    directory.parent.mkdir(mode=0o700)
    each.fleet.forget_errors()
    each.works()


# Both are hidden in a mount namespace; what the test itself needs of /tmp is then found in /mnt.
WITHOUT_SHARED_MEMORY = """
mount --rbind /tmp /mnt && mount -t tmpfs none /tmp && mount -t tmpfs -o ro none /dev/shm &&
exec env LD_PRELOAD="$MOVED_LIBRARY" "$@"
"""


def test_there_is_no_dev_shm(files: Path) -> None:
    """Then the default directory is in /tmp."""
    require(os.geteuid() == 0, "only root can mount", "run the tests as root")
    environment = shim_environment(Path("/"))
    del environment["FLOCKSHIM_DIR"]
    # The installation may lie in /tmp too.
    environment["MOVED_LIBRARY"] = environment.pop("LD_PRELOAD")
    for name in ("MOVED_LIBRARY", "FLOCKSHIM_PYTHON", "FLOCKSHIM_HOME"):
        environment[name] = str(_moved(Path(environment[name])))
    fleet = Fleet(environment)
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    try:
        driver = fleet.start(
            None,
            *command,
            *("sh", "-c", WITHOUT_SHARED_MEMORY, "sh"),
            executable=_moved(program("lockdriver")),
        )
        path = _moved(files / "file")
        fd = driver.open(path)
        assert driver.flock(fd, EX) == OK
        assert driver.probe(path, SH) == BUSY
        assert fleet.errors() == ""
        directory = Path(f"/proc/{driver.pid}/root/tmp/flockshim-{os.geteuid()}")
        assert [entry for entry in directory.iterdir() if entry.is_socket()]
        assert directory.stat().st_mode & 0o777 == 0o700
    finally:
        fleet.end()


def _moved(path: Path) -> Path:
    return Path("/mnt", path.relative_to("/tmp")) if Path("/tmp") in path.parents else path


def _nothing_but_logs(rendezvous: Path) -> None:
    left = [entry.name for entry in rendezvous.iterdir()]
    assert [name for name in left if "sock" in name or "proxy" in name] == []
    assert keeper_processes(rendezvous) == []
