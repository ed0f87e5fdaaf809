"""Between hosts a lock belongs to a name in a directory: what if either is moved, removed or made anew."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import shim_environment
from support.driver import BUSY, EX, NB, OK, SH, UN, Driver
from support.hosts import is_stopped, recorded
from support.keepers import keeper_processes
from support.proc import await_end, await_true
from support.worlds import World

from flockshim import nolockfs
from flockshim.pytest_plugin import Mounts, require

LEASE = 3.0


class Hosts:
    """Two hosts, as far as locks are concerned: they have nothing in common but the directory."""

    def __init__(self, directory: Path, here: Path, there: Path) -> None:
        self.directory = directory
        self.rendezvous = here
        self.here, self.there = (self._world(place) for place in (here, there))

    def _world(self, rendezvous: Path) -> World:
        environment = shim_environment(rendezvous, FLOCKSHIM_LEASE=str(LEASE), FLOCKSHIM_IDLE="0.1")
        return World("emulated", self.directory, {**environment, "FLOCKSHIM_MODE": "cluster"})

    def errors(self) -> str:
        return self.here.fleet.errors() + self.there.fleet.errors()


@pytest.fixture
def backing(_nolock_mounts: Mounts) -> Path:
    """Where the file system's server has its files."""
    return _nolock_mounts.get("ENOSYS", "ENOSYS").backing


@pytest.fixture
def hosts(nolock_dir: Path, rendezvous: Path, other_rendezvous: Path) -> Iterator[Hosts]:
    hosts = Hosts(nolock_dir, rendezvous, other_rendezvous)
    yield hosts
    errors = hosts.errors()
    for world in (hosts.here, hosts.there):
        world.end()
    assert errors == ""


def holds(path: Path) -> bool:
    """Whether the record beside PATH names a holder."""
    state = recorded(path)
    return state is not None and bool(state.holders)


def waiting_hosts(path: Path) -> int:
    """How many hosts wait, by the record beside PATH."""
    state = recorded(path)
    return len(state.queue) if state else 0


def lock(driver: Driver, path: Path) -> int:
    """Lock PATH by a descriptor of its own, which is returned."""
    fd = driver.open(path)
    assert driver.flock(fd, EX) == OK
    return fd


def unlock(driver: Driver, fd: int) -> None:
    assert driver.flock(fd, UN) == OK
    driver.close(fd)


def check_excluded(hosts: Hosts, path: Path) -> None:
    """A lock that is held here on PATH keeps all others out."""
    assert holds(path)
    assert hosts.there.probe(path, SH) == BUSY
    assert hosts.here.probe(path, SH) == BUSY


def check_free(hosts: Hosts, path: Path) -> None:
    """Nobody holds any more, here or there, and who comes excludes the others."""
    assert not holds(path)
    assert hosts.there.free(path)
    driver = hosts.there.start()
    fd = lock(driver, path)
    assert hosts.here.probe(path, SH) == BUSY
    unlock(driver, fd)
    assert hosts.here.free(path)


# Directories


@pytest.mark.parametrize("removed", ["while it is locked", "after it was locked"])
def test_a_directory_is_removed_and_made_again(hosts: Hosts, removed: str) -> None:
    """Three times in one keeper's life: each time the record is beside the file, and keeps the others out."""
    path = hosts.directory / "below" / "file"
    driver = hosts.here.start()
    for _ in range(3):
        path.parent.mkdir()
        fd = lock(driver, path)
        check_excluded(hosts, path)
        if removed == "while it is locked":
            shutil.rmtree(path.parent)
            unlock(driver, fd)
        else:
            unlock(driver, fd)
            check_free(hosts, path)
            shutil.rmtree(path.parent)


def bring_back(path: Path, kept: Path) -> None:
    """A directory is moved away, another is made in its place, and gets a file of the first."""
    path.rename(kept)
    path.parent.rename(path.parent.with_name(f"before-{path.parent.stat().st_ino}"))
    path.parent.mkdir()
    kept.rename(path)


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_the_same_file_in_another_directory_of_the_same_path(hosts: Hosts, backing: Path, where: str) -> None:
    """As when its inode number is used again. ELSEWHERE: another host has done it, behind this one's back."""
    path = hosts.directory / "below" / "file"
    there = path if where == "here" else backing / path.relative_to(hosts.directory.parent)
    path.parent.mkdir()
    driver = hosts.here.start()
    unlock(driver, lock(driver, path))
    bring_back(there, there.parent.with_name("kept"))
    await_true(lambda: path.parent.stat().st_ino == there.parent.stat().st_ino, "this host to see it")
    fd = lock(driver, path)
    check_excluded(hosts, path)
    unlock(driver, fd)
    check_free(hosts, path)


def test_a_directory_is_moved_while_a_file_in_it_is_locked(hosts: Hosts) -> None:
    """The lock goes with it; what is made in its place is something else."""
    path, moved = hosts.directory / "below" / "file", hosts.directory / "moved" / "file"
    path.parent.mkdir()
    driver, other = hosts.here.start(), hosts.here.start()
    fd = lock(driver, path)
    path.parent.rename(moved.parent)
    path.parent.mkdir()
    new = lock(other, path)
    for each in (path, moved):
        check_excluded(hosts, each)
    unlock(other, new)
    check_free(hosts, path)
    check_excluded(hosts, moved)
    unlock(driver, fd)
    check_free(hosts, moved)


def test_a_directory_is_moved_while_others_wait(hosts: Hosts) -> None:
    path, moved = hosts.directory / "below" / "file", hosts.directory / "moved" / "file"
    path.parent.mkdir()
    driver, other = hosts.here.start(), hosts.there.start()
    fd = lock(driver, path)
    wanted = other.open(path)
    waiting = other.flock_later(wanted, EX)
    await_true(lambda: waiting_hosts(path) == 1, "the other host to wait")
    path.parent.rename(moved.parent)
    path.parent.mkdir()
    assert not waiting.returned()
    unlock(driver, fd)
    assert waiting.result() == OK
    assert hosts.here.probe(moved, SH) == BUSY
    unlock(other, wanted)
    check_free(hosts, moved)


def test_a_directory_is_removed_and_another_made_while_a_file_in_it_is_locked(hosts: Hosts) -> None:
    """Who unlocks what is gone must leave alone what is there now."""
    path = hosts.directory / "below" / "file"
    path.parent.mkdir()
    driver, other = hosts.here.start(), hosts.here.start()
    fd = lock(driver, path)
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    new = lock(other, path)
    check_excluded(hosts, path)
    unlock(driver, fd)
    check_excluded(hosts, path)
    unlock(other, new)
    check_free(hosts, path)


def test_a_directory_is_removed_while_others_wait(hosts: Hosts) -> None:
    """They get their lock at the end, on a file that has no name any more."""
    path = hosts.directory / "below" / "file"
    path.parent.mkdir()
    driver, other = hosts.here.start(), hosts.there.start()
    fd = lock(driver, path)
    wanted = other.open(path)
    waiting = other.flock_later(wanted, EX)
    await_true(lambda: waiting_hosts(path) == 1, "the other host to wait")
    shutil.rmtree(path.parent)
    unlock(driver, fd)
    assert waiting.result() == OK
    unlock(other, wanted)


def test_two_directories_change_places(hosts: Hosts) -> None:
    """What a keeper knows of the one must not be used for the other."""
    a, b, between = (hosts.directory / name for name in ("a", "b", "between"))
    driver = hosts.here.start()
    for each in (a, b):
        each.mkdir()
        unlock(driver, lock(driver, each / "file"))
    for _ in range(3):
        a.rename(between)
        b.rename(a)
        between.rename(b)
        for each in (a / "file", b / "file"):
            fd = lock(driver, each)
            check_excluded(hosts, each)
            unlock(driver, fd)
            check_free(hosts, each)


# Files


def replace(path: Path) -> None:
    """As those do who write a file anew and rename it into its place."""
    new = path.with_name("new")
    new.touch()
    new.rename(path)


def rename_away(path: Path) -> None:
    """Rename it, and make another in its place."""
    path.rename(path.with_name("renamed"))
    path.touch()


def make_anew(path: Path) -> None:
    """As those do who remove their lock file under its lock."""
    path.unlink()
    path.touch()


@pytest.mark.parametrize("put", [replace, rename_away, make_anew])
def test_another_file_takes_the_name_of_one_that_is_locked(hosts: Hosts, put: Callable[[Path], None]) -> None:
    """They are two locks with one record, and the one must not give back what the other has."""
    path = hosts.here.file()
    driver, other = hosts.here.start(), hosts.here.start()
    old = lock(driver, path)
    put(path)
    new = other.open(path)
    # At once, or after the other: here the record may be the stricter.
    waiting = other.flock_later(new, EX)
    hosts.here.round_trip()
    unlock(driver, old)
    assert waiting.result() == OK
    check_excluded(hosts, path)
    unlock(other, new)
    check_free(hosts, path)


@pytest.mark.parametrize("put", [replace, rename_away, make_anew])
def test_another_file_takes_the_name_of_one_that_is_waited_for(hosts: Hosts, put: Callable[[Path], None]) -> None:
    path = hosts.here.file()
    holder, first, second = hosts.there.start(), hosts.here.start(), hosts.here.start()
    held = lock(holder, path)
    old = first.open(path)
    waits_for_old = first.flock_later(old, EX)
    await_true(lambda: waiting_hosts(path) == 1, "this host to wait")
    put(path)
    new = second.open(path)
    waits_for_new = second.flock_later(new, EX)
    hosts.here.await_blocked(waits_for_new)
    unlock(holder, held)
    assert waits_for_old.result() == OK
    unlock(first, old)
    assert waits_for_new.result() == OK
    check_excluded(hosts, path)
    unlock(second, new)
    check_free(hosts, path)


def test_a_renamed_file_stays_locked_and_can_be_locked_by_its_new_name(hosts: Hosts) -> None:
    path = hosts.here.file()
    driver = hosts.here.start()
    fd = lock(driver, path)
    new = path.rename(path.with_name("renamed"))
    assert hosts.here.probe(new, SH) == BUSY
    unlock(driver, fd)
    assert not holds(path)
    fd = lock(driver, new)
    check_excluded(hosts, new)
    unlock(driver, fd)
    check_free(hosts, new)


def test_a_file_without_a_name(hosts: Hosts) -> None:
    """It can be locked on this host as any other, and no host can open it by a name."""
    driver = hosts.here.start()
    for unlinked in ("before", "under the lock"):
        path = hosts.here.file()
        fd = driver.open(path)
        again = f"/proc/{driver.pid}/fd/{fd}"
        if unlinked == "before":
            path.unlink()
        assert driver.flock(fd, EX) == OK
        path.unlink(missing_ok=True)
        for _ in range(2):
            assert hosts.here.probe(again, SH) == BUSY
            assert driver.flock(fd, UN) == OK
            assert hosts.here.probe(again, EX) == OK
            assert driver.flock(fd, EX) == OK
        driver.close(fd)


def test_a_file_that_is_removed_while_others_wait(hosts: Hosts) -> None:
    path = hosts.here.file()
    driver, other, another = hosts.here.start(), hosts.there.start(), hosts.here.start()
    fd = lock(driver, path)
    elsewhere, wanted = other.open(path), another.open(path)
    waiting = other.flock_later(elsewhere, EX)
    await_true(lambda: waiting_hosts(path) == 1, "the other host to wait")
    waiting_here = another.flock_later(wanted, EX)
    hosts.here.await_blocked(waiting_here)
    path.unlink()
    unlock(driver, fd)
    # A host serves its own first, for a while.
    assert waiting_here.result() == OK
    unlock(another, wanted)
    assert waiting.result() == OK
    unlock(other, elsewhere)


def test_names_that_are_hard_to_tell(hosts: Hosts) -> None:
    """The program opens them by a symbolic link; what counts is the file's own name."""
    driver, link = hosts.here.start(), hosts.directory / "link"
    for name in ("line\nbreak", "x (deleted)", os.fsdecode(b"\xff"), "d\xe9j\N{SNOWMAN}", "---", "...", "\\"):
        path = hosts.directory / name
        path.touch()
        link.symlink_to(name)
        fd = lock(driver, link)
        assert holds(path), ascii(name)
        assert hosts.there.probe(link, SH) == BUSY, ascii(name)
        unlock(driver, fd)
        assert hosts.there.free(link), ascii(name)
        link.unlink()


def test_a_hard_link_in_the_directory(hosts: Hosts) -> None:
    """On this host they are one; with its first name gone it is locked by the second, when it is opened by that."""
    path, link = hosts.here.file(), hosts.directory / "link"
    os.link(path, link)
    driver = hosts.here.start()
    fd = lock(driver, path)
    assert hosts.here.probe(link, SH) == BUSY
    path.unlink()
    assert hosts.here.probe(link, SH) == BUSY
    unlock(driver, fd)
    fd = lock(driver, link)
    check_excluded(hosts, link)
    unlock(driver, fd)
    check_free(hosts, link)


# Where nothing can be recorded


def check_refused(hosts: Hosts, path: Path, why: str) -> None:
    """The program gets the kernel's errno, and the user one line that says why and what to do."""
    driver = hosts.here.start()
    fd = driver.open(path, os.O_RDONLY)
    assert driver.flock(fd, EX | NB) == errno.ENOSYS
    errors = hosts.errors()
    assert errors.count("\n") == 1
    assert why in errors and "--mode host" in errors
    hosts.here.fleet.forget_errors()
    driver.exit()


def check_lockable(hosts: Hosts, path: Path) -> None:
    driver = hosts.here.start()
    fd = driver.open(path, os.O_RDONLY)
    assert driver.flock(fd, EX) == OK
    check_excluded(hosts, path)
    unlock(driver, fd)
    driver.exit()


def test_the_root_of_a_mount_is_refused_and_what_is_in_it_is_not(hosts: Hosts, nolock_dir: Path) -> None:
    """Beside the root is another file system, where other hosts don't look. Files in it have their records in it."""
    root, path = nolock_dir.parent, nolock_dir.parent / f"{nolock_dir.name}-file"
    path.touch()
    check_lockable(hosts, path)
    hosts.here.fleet.environment["FLOCKSHIM_FORCE"] = "1"  # on directories the kernel's flock works
    check_refused(hosts, root, "root of a mount")
    assert not list(root.parent.glob(".*"))
    for left in root.glob(f"*{path.name}*"):
        left.unlink()


class Small(NamedTuple):
    """A file system without locks, with little room, and what is behind it."""

    path: Path
    backing: Path


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    require(os.geteuid() == 0, "only root can mount", "run the tests as root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755,size=64k,nr_inodes=20", "tmpfs", tmp_path], check=True)
    try:
        with nolockfs.mount(flock="ENOSYS", backing=tmp_path) as path:
            yield Small(path, tmp_path)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def fill(small: Small) -> Callable[[], None]:
    """Use its last inode; returns what undoes it."""
    fillers = []
    with pytest.raises(OSError, match="No space left") as caught:
        for number in range(100):
            fillers.append(small.backing / f"filler-{number}")
            fillers[-1].touch()
    assert caught.value.errno == errno.ENOSPC

    def empty() -> None:
        for filler in fillers:
            filler.unlink(missing_ok=True)

    return empty


def make_read_only(small: Small) -> Callable[[], None]:
    """Remount it, as it is when a server has trouble; returns what undoes it."""

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", small.backing], check=True)

    remount("ro")
    return lambda: remount("rw")


@pytest.mark.parametrize(
    ("spoil", "why"), [(fill, "No space left on device"), (make_read_only, "Read-only file system")]
)
def test_a_file_system_that_takes_no_files(
    hosts: Hosts, small: Small, spoil: Callable[[Small], Callable[[], None]], why: str
) -> None:
    """Never a lock of this host only. When there is room again, the next lock is recorded."""
    path, known = small.path / "file", small.path / "known"
    for each in (path, known):
        each.touch()
    check_lockable(hosts, known)
    repair = spoil(small)
    check_refused(hosts, path, why)
    repair()
    check_lockable(hosts, path)
    check_lockable(hosts, known)


# What a keeper cannot vouch for


def await_judged(driver: Driver) -> None:
    """Return when a holder whose keeper could not vouch was stopped and has gone on or ended, or was left alone."""
    begun = time.monotonic()
    ends = os.WCONTINUED | os.WEXITED | os.WNOHANG | os.WNOWAIT

    def judged() -> bool:
        if os.waitid(os.P_PID, driver.pid, ends) is not None:
            return True
        return time.monotonic() - begun > LEASE and not is_stopped(driver.pid)

    await_true(judged, "the holder to go on, or to be ended")


def test_a_directory_is_removed_while_a_file_in_it_is_locked_for_long(hosts: Hosts, small: Small) -> None:
    """The holder goes on where nobody else can open the file any more, else it is ended; the keeper leaves after it."""
    # Nor does it stay for what could not be recorded at all.
    unwritable = small.path / "file"
    unwritable.touch()
    make_read_only(small)
    check_refused(hosts, unwritable, "Read-only file system")
    nameless, kept = (hosts.directory / name / "file" for name in ("nameless", "kept"))
    holders = []
    for path in (nameless, kept):
        path.parent.mkdir()
        driver = hosts.here.start()
        holders.append((driver, lock(driver, path)))
    os.link(kept, hosts.directory / "link")
    for path in (nameless, kept):
        shutil.rmtree(path.parent)
    for driver, _ in holders:
        await_judged(driver)
    (holder, fd), (ended, _) = holders
    await_end(ended.pid)
    hosts.here.fleet.reap()
    errors = hosts.errors()
    assert "kept/file" in errors and "killed" in errors and errors.count("\n") == 1
    hosts.here.fleet.forget_errors()
    unlock(holder, fd)
    holder.exit()
    await_true(lambda: not keeper_processes(hosts.rendezvous), "the keeper to leave")
