"""Programs of an ordinary user, and what such a user may not look into."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import emulated_world
from support.confine import (
    ORDINARY,
    UserWorld,
    confined,
    install,
    mounted,
    ordinary_interpreter,
)
from support.driver import BUSY, EX, NB, OK, SH, UN, pass_descriptor
from support.keepers import end_keepers, keeper_processes, keepers
from support.proc import await_end, await_true
from support.programs import program

from flockshim.pytest_plugin import require

PR_SET_DUMPABLE = 4


@pytest.fixture
def installation() -> Iterator[tuple[Path, dict[str, str]]]:
    require(os.geteuid() == 0, "only root can become another user", "run the tests as root")
    require(shutil.which("setpriv"), "no setpriv", "apt install util-linux")
    require(ordinary_interpreter(), "no Python that everybody may execute", "apt install python3")
    directory = Path(tempfile.mkdtemp(prefix="flockshim-public-"))
    directory.chmod(0o755)
    variables = install(directory)
    shutil.copy(program("lockdriver"), directory / "lockdriver")
    yield directory, variables
    shutil.rmtree(directory)


def _user_world(
    request: pytest.FixtureRequest, rendezvous: Path, installation: tuple[Path, dict[str, str]], *prefix: str
) -> UserWorld:
    directory, variables = installation
    free = emulated_world(request, rendezvous)
    for each in (free.directory, rendezvous):
        os.chown(each, ORDINARY, ORDINARY)
    os.chown(free.file(), ORDINARY, ORDINARY)
    return UserWorld(free.directory, {**free.environment, **variables}, directory / "lockdriver", *prefix)


def _surroundings(name: str) -> list[str]:
    if name == "container":
        return confined("EPERM:kcmp")
    if name == "hidepid":
        new_enough = tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 8)
        require(new_enough, "hidepid would change every mount of /proc", "Linux 5.8")
        return mounted("mount -t proc -o hidepid=2 proc /proc")
    return []


@pytest.fixture(params=["plain", "hidepid", "container"])
def user_world(
    request: pytest.FixtureRequest, rendezvous: Path, installation: tuple[Path, dict[str, str]]
) -> Iterator[UserWorld]:
    world = _user_world(request, rendezvous, installation, *_surroundings(request.param))
    yield world
    assert world.end() == ""


def test_an_ordinary_user(user_world: UserWorld, rendezvous: Path) -> None:
    path = user_world.file()
    holder, held_fd = user_world.opened()
    other, fd = user_world.opened()
    assert holder.flock(held_fd, EX) == OK
    assert [os.stat(f"/proc/{pid}").st_uid for pid in keeper_processes(rendezvous)] == [ORDINARY] * 2
    assert other.flock(fd, EX | NB) == BUSY
    assert holder.flock(held_fd, SH) == OK
    assert other.flock(fd, SH | NB) == OK
    assert other.flock(fd, UN) == OK
    child = holder.fork()
    holder.kill()
    assert user_world.probe(path, EX) == BUSY
    passed = pass_descriptor(child, held_fd, other)
    child.kill()
    assert user_world.probe(path, EX) == BUSY
    other.close(passed)
    assert user_world.free(path)


def test_a_killed_holder_that_nobody_waits_for(user_world: UserWorld) -> None:
    """What is left of it can be looked into by root only."""
    parent, fd = user_world.opened()
    child = parent.fork()
    assert child.flock(fd, EX) == OK
    parent.close(fd)
    other, other_fd = user_world.opened()
    call = other.flock_later(other_fd, EX)
    user_world.await_blocked(call)
    os.kill(child.pid, 9)
    assert call.result() == OK
    assert Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    assert parent.ask("wait") == child.pid


def test_a_holder_that_may_not_be_looked_into(user_world: UserWorld) -> None:
    """A documented difference: its lock lasts as long as the process, never shorter."""
    path = user_world.file()
    holder, fd = user_world.opened()
    assert holder.flock(fd, EX) == OK
    holder.ask("prctl", PR_SET_DUMPABLE, 0)
    assert not user_world.free(path)
    assert holder.flock(fd, UN) == OK
    assert user_world.free(path)
    assert holder.flock(fd, EX) == OK
    holder.close(fd)
    assert not user_world.free(path)
    holder.kill()
    assert user_world.free(path)


def test_a_holder_that_becomes_a_set_uid_program(user_world: UserWorld) -> None:
    path = user_world.file()
    cat = user_world.executable.with_name("cat")
    shutil.copy("/bin/cat", cat)
    cat.chmod(0o4755)
    require(not os.statvfs(cat).f_flag & os.ST_NOSUID, f"{cat.parent} is mounted nosuid", "TMPDIR=/var/tmp")
    words = [*user_world.prefix, "flock", "--no-fork", str(path), str(cat)]
    with subprocess.Popen(
        words, env=user_world.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as holder:
        assert holder.stdin and holder.stdout
        holder.stdin.write(b"line\n")
        assert holder.stdout.readline() == b"line\n"
        assert os.stat(f"/proc/{holder.pid}/stat").st_uid == 0
        other, fd = user_world.opened()
        assert other.flock(fd, EX | NB) == BUSY
        call = other.flock_later(fd, EX)
        user_world.await_blocked(call)
        holder.kill()
        await_end(holder.pid)
        assert call.result() == OK


def _processes_of(user: int) -> list[str]:
    return [each.name for each in os.scandir("/proc") if each.name.isdigit() and _owner(each.path) == user]


def _owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except FileNotFoundError:
        return None


def test_no_more_processes_are_allowed(
    request: pytest.FixtureRequest, rendezvous: Path, installation: tuple[Path, dict[str, str]]
) -> None:
    limit = ["prlimit", "--nproc=1:1"]
    world = _user_world(request, rendezvous, installation, *limit)
    try:
        # Those of tests before count as long as nobody has waited for them.
        await_true(lambda: not _processes_of(ORDINARY), "the user's other processes to be gone")
        driver, fd = world.opened()
        assert driver.flock(fd, EX) == errno.ENOSYS
        (line,) = world.fleet.errors().splitlines()
        assert line.startswith("flockshim: ") and "no more processes" in line
        assert keeper_processes(rendezvous) == []
    finally:
        world.end()


@pytest.mark.parametrize(
    "script", ["umount -l /dev/shm && mount -t tmpfs -o mode=0700 none /dev/shm", "mount -t tmpfs none /dev"]
)
def test_no_shared_memory_file_system(
    request: pytest.FixtureRequest, rendezvous: Path, installation: tuple[Path, dict[str, str]], script: str
) -> None:
    """Another user's or none: then it is /tmp."""
    fallback = Path(f"/tmp/flockshim-{ORDINARY}")
    script += " && (test -e /dev/null || (mknod /dev/null c 1 3 && chmod 666 /dev/null))"
    world = _user_world(request, rendezvous, installation, *mounted(script))
    del world.fleet.environment["FLOCKSHIM_DIR"]
    assert not fallback.exists(), f"{fallback} is left from before"
    try:
        holder, held_fd = world.opened()
        other, fd = world.opened()
        assert holder.flock(held_fd, EX) == OK
        assert other.flock(fd, EX | NB) == BUSY
        assert len(keepers(fallback)) == 1
        assert fallback.stat().st_mode & 0o777 == 0o700
        assert world.fleet.errors() == ""
    finally:
        world.end()
        end_keepers(fallback)
        shutil.rmtree(fallback, ignore_errors=True)
