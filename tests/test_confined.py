"""Containers, old kernels, ordinary users, small limits: the locks are right, or refused in one clear line.

Filters of seccomp(2) stand in for old kernels and for containers: what the program starts, the keeper, has them too.
"""

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
    OLD_KERNEL,
    ORDINARY,
    UserWorld,
    confined,
    install,
    mounted,
    ordinary_interpreter,
)
from support.driver import BUSY, EX, NB, OK, SH, UN, connect, pass_descriptor
from support.groups import ControlGroup, NoControlGroups
from support.keepers import end_keepers, keeper_processes, keepers
from support.proc import await_end, await_true, snapshot
from support.programs import program
from support.worlds import World
from test_descriptors import (  # noqa: F401
    test_a_child_that_locks_and_ends_at_once,
    test_a_forked_child_can_unlock_for_its_parent,
    test_a_second_description_of_one_process_is_another_owner,
    test_a_waiter_that_is_killed_leaves_the_queue,
    test_inherited_through_generations,
    test_unlocking_any_duplicate_unlocks_all,
)
from test_passing import (  # noqa: F401
    test_a_descriptor_in_flight_holds,
    test_a_descriptor_that_nobody_will_receive_is_released,
    test_the_receiver_of_a_descriptor_holds_on,
)
from test_semantics import (  # noqa: F401
    test_a_refused_upgrade_has_lost_the_shared_lock,
    test_conversion_up_and_down,
    test_unlocking_leaves_the_locks_of_others,
)
from test_unseen import test_several_threads_at_once  # noqa: F401

from flockshim.pytest_plugin import require

PR_SET_DUMPABLE = 4


def _world(request: pytest.FixtureRequest, rendezvous: Path, *prefix: str) -> Iterator[World]:
    free = emulated_world(request, rendezvous)
    world = World("emulated", free.directory, free.environment, *prefix)
    yield world
    assert world.end() == ""
    log = rendezvous / "keeper.log"
    assert not log.exists() or log.read_text() == ""


@pytest.fixture(params=["EPERM:kcmp", "ENOSYS:kcmp"])
def world(request: pytest.FixtureRequest, rendezvous: Path) -> Iterator[World]:
    yield from _world(request, rendezvous, *confined(request.param))


@pytest.fixture(params=["EPERM:kcmp,pidfd_getfd", OLD_KERNEL], ids=["container", "old kernel"])
def blind_world(request: pytest.FixtureRequest, rendezvous: Path) -> Iterator[World]:
    """Where it cannot be told which descriptors are on their way: all of the host's count.

    So a lock may last a moment longer than it must, and tests wait for its end.
    """
    yield from _world(request, rendezvous, *confined(request.param))


@pytest.fixture
def fresh_world(world: World) -> World:
    """Every world of this module has a keeper of its own."""
    return world


@pytest.mark.parametrize("ended", ["close", "kill"])
def test_a_waiter_has_the_file_open_too(world: World, ended: str) -> None:
    """Its descriptor has the path of the holder's, and must not be taken for the holder's."""
    holder, held_fd = world.opened()
    waiter, fd = world.opened()
    assert holder.flock(held_fd, EX) == OK
    call = waiter.flock_later(fd, EX)
    world.await_blocked(call)
    if ended == "close":
        holder.close(held_fd)
    else:
        holder.kill()
    assert call.result() == OK


def test_a_second_description_of_the_holder_stays_open(world: World) -> None:
    path = world.file()
    holder, held_fd = world.opened()
    holder.open(path)
    assert holder.flock(held_fd, EX) == OK
    assert not world.free(path)
    holder.close(held_fd)
    assert world.free(path)


def test_the_flags_of_the_description_stay_as_they_were(world: World) -> None:
    holder = world.start()
    path = world.file()
    for flags in (os.O_RDWR, os.O_RDWR | os.O_NONBLOCK | os.O_APPEND):
        fd = holder.open(path, flags)
        before = Path(f"/proc/{holder.pid}/fdinfo/{fd}").read_text()
        assert holder.flock(fd, EX) == OK
        assert not world.free(path)
        child = holder.fork()
        assert child.flock(fd, UN) == OK
        child.kill()
        assert Path(f"/proc/{holder.pid}/fdinfo/{fd}").read_text() == before
        holder.close(fd)


def test_nothing_leaks_into_the_keeper(blind_world: World, rendezvous: Path) -> None:
    driver, fd = blind_world.opened()
    pipe = driver.ask("pipe")
    name = os.readlink(f"/proc/{driver.pid}/fd/{pipe % 1000}")
    for number in range(60, 64):
        driver.ask("dup2", pipe % 1000, number)
    assert driver.flock(fd, EX) == OK
    for pid in keeper_processes(rendezvous):
        assert name not in snapshot(pid).descriptors.values()


@pytest.mark.parametrize("ended", ["close", "kill"])
def test_in_a_container_a_waiter_gets_the_lock(blind_world: World, ended: str) -> None:
    holder, held_fd = blind_world.opened()
    waiter, fd = blind_world.opened()
    assert holder.flock(held_fd, EX) == OK
    assert waiter.flock(fd, SH | NB) == BUSY
    call = waiter.flock_later(fd, EX)
    blind_world.await_blocked(call)
    if ended == "close":
        holder.close(held_fd)
    else:
        holder.kill()
    assert call.result() == OK


def test_in_a_container_a_description_is_shared(blind_world: World) -> None:
    """By forked children, and those who get it through a socket or have not got it yet."""
    path = blind_world.file()
    holder, fd = blind_world.opened()
    assert holder.flock(fd, EX) == OK
    child = holder.fork()
    holder.kill()
    assert blind_world.probe(path, SH) == BUSY
    receiver = blind_world.start()
    out, into = connect(child, receiver)
    child.ask("sendfd", out, fd)
    child.kill()
    assert blind_world.probe(path, SH) == BUSY
    got = receiver.ask("recvfd", into)
    assert blind_world.probe(path, SH) == BUSY
    assert receiver.flock(got, SH) == OK
    assert blind_world.probe(path, SH) == OK
    receiver.close(got)
    other, other_fd = blind_world.opened()
    assert other.flock_later(other_fd, EX).result() == OK


def test_in_a_container_two_descriptions_of_one_process(blind_world: World) -> None:
    driver, one = blind_world.opened()
    other = driver.open(blind_world.file())
    assert driver.flock(one, EX) == OK
    assert driver.flock(other, SH | NB) == BUSY
    duplicate = driver.ask("dup", one)
    assert driver.flock(duplicate, SH) == OK
    assert driver.flock(other, SH | NB) == OK
    assert driver.flock(duplicate, UN) == OK
    assert driver.flock(other, EX | NB) == OK


# Two keepers without events between them


@pytest.fixture
def group() -> Iterator[ControlGroup]:
    try:
        group = ControlGroup()
    except NoControlGroups as error:
        require(False, f"no control group can be made: {error}", "run as root on cgroup v2 or v1")
        raise
    yield group
    group.remove()


def test_two_keepers_without_inotify(request: pytest.FixtureRequest, rendezvous: Path, group: ControlGroup) -> None:
    """They look once a second."""
    free = emulated_world(request, rendezvous)
    rule = confined("EMFILE:inotify_init1")
    here, there = (World("emulated", free.directory, free.environment, *each, *rule) for each in ([], group.prefix))
    try:
        holder, held_fd = here.opened()
        other, fd = there.opened()
        assert holder.flock(held_fd, EX) == OK
        assert other.flock(fd, SH | NB) == BUSY
        call = other.flock_later(fd, EX)
        there.await_blocked(call)
        holder.close(held_fd)
        assert call.result() == OK
        assert here.probe(here.file(), SH) == BUSY
        assert len(keepers(rendezvous)) == 2
        assert (rendezvous / "keeper.log").read_text() == ""
    finally:
        assert [side.end() for side in (here, there)] == ["", ""]
        end_keepers(rendezvous)


# An ordinary user


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


# /proc and /dev/shm


def _refused(world: World, *words: str) -> None:
    driver, fd = world.opened()
    for operation in (EX, SH | NB):
        world.fleet.forget_errors()
        assert driver.flock(fd, operation) == errno.ENOSYS
        (line,) = world.fleet.errors().splitlines()
        assert line.startswith("flockshim: ")
        for word in words:
            assert word in line


def test_proc_of_another_pid_namespace(request: pytest.FixtureRequest, rendezvous: Path) -> None:
    require(os.geteuid() == 0, "pid namespaces need root", "run the tests as root")
    free = emulated_world(request, rendezvous)
    world = World("emulated", free.directory, free.environment, "unshare", "--pid", "--fork", "--kill-child")
    try:
        _refused(world, "/proc", "pid namespace")
        assert keeper_processes(rendezvous) == []
    finally:
        world.end()


def test_no_proc(request: pytest.FixtureRequest, rendezvous: Path) -> None:
    require(os.geteuid() == 0, "only root can mount", "run the tests as root")
    free = emulated_world(request, rendezvous)
    world = World("emulated", free.directory, free.environment, *mounted("umount -l /proc"))
    try:
        _refused(world, "/proc is not mounted")
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


# Limits


def test_a_keeper_without_descriptors(request: pytest.FixtureRequest, rendezvous: Path) -> None:
    """What it holds stays, what is too much is refused, and unlocking always works."""
    world = emulated_world(request, rendezvous)
    for limit in range(32, 36):  # so that the last descriptor is taken by something else each time
        path = world.file()
        starter = world.start()
        started = starter.open(world.file("starter"))
        starter.ask("maxfiles", limit)
        assert starter.flock(started, EX) == OK
        holder, fd = world.opened()
        assert holder.flock(fd, EX) == OK
        child = holder.fork()
        holder.close(fd)  # so the keeper must look for it
        crowd = world.start()
        crowded = [crowd.open(world.file(f"crowd-{number}")) for number in range(limit)]
        results = [crowd.flock(each, EX) for each in crowded]
        assert set(results[-3:]) == {errno.ENOSYS}
        lines = world.fleet.errors().splitlines()
        assert len(lines) == results.count(errno.ENOSYS)
        assert all("descriptor" in line and "ulimit" in line for line in lines)
        world.fleet.forget_errors()
        (keeper,) = keepers(rendezvous)
        held = list(snapshot(keeper.worker).descriptors.values()).count(str(path))
        assert held == 1
        for each in crowded:
            assert crowd.flock(each, UN) == OK
        other, other_fd = world.opened()
        assert other.flock(other_fd, EX | NB) == BUSY
        child.kill()
        assert other.flock(other_fd, EX | NB) == OK
        assert keepers(rendezvous) == [keeper]
        for driver in (starter, crowd, other):
            driver.kill()
        end_keepers(rendezvous)
    assert world.end() == ""


def test_too_little_memory_for_a_keeper(request: pytest.FixtureRequest, rendezvous: Path) -> None:
    free = emulated_world(request, rendezvous)
    size = 12 << 20
    world = World("emulated", free.directory, free.environment, "prlimit", f"--as={size}:{size}")
    try:
        _refused(world, "keeper")
        await_true(lambda: keeper_processes(rendezvous) == [], "the keepers to have given up")
    finally:
        world.end()
