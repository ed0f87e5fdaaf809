"""A directory as what is locked: file systems have no lock operation for it, so other hosts need a record."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import NATIVE_ROOT, shim_environment
from support.hosts import await_waiting, last_vouched
from support.keepers import end_keepers
from support.lockcommand import job, one_line, run, status
from support.proc import await_true
from support.worlds import World

from flockshim import FileLock, Timeout, filesystems, nolockfs
from flockshim._native import ffi, lib
from flockshim.filesystems import LOCAL
from flockshim.pytest_plugin import Mounts, require

BUSY_STATUS = 75  # EX_TEMPFAIL of sysexits.h


class Hosts(NamedTuple):
    """Two hosts, each with a mount of its own of one file system, since the kernel's lock is one of the mount's."""

    here: World
    there: World

    @property
    def project(self) -> Path:
        """The directory that is locked, as it is seen here."""
        return self.here.directory / "project"

    @property
    def theirs(self) -> Path:
        """The same as the other host sees it."""
        return self.there.directory / "project"


@pytest.fixture
def hosts(_nolock_mounts: Mounts, tmp_path: Path, rendezvous: Path, other_rendezvous: Path) -> Iterator[Hosts]:
    _nolock_mounts.get("ENOSYS", "ENOSYS")  # or it is skipped
    backing = tmp_path / "shared"
    (backing / "site" / "project").mkdir(parents=True)
    with nolockfs.mount(backing=backing) as here, nolockfs.mount(backing=backing) as there:
        mounts = ((here, rendezvous), (there, other_rendezvous))
        worlds = [World("emulated", mount / "site", shim_environment(place)) for mount, place in mounts]
        yield Hosts(*worlds)
        for world, (_, place) in zip(worlds, mounts):
            world.end()
            end_keepers(place)


def records(directory: Path) -> list[str]:
    """What lies in a directory because of locks."""
    return [name for name in os.listdir(directory) if "flockshim" in name]


def is_busy_on(world: World, path: Path) -> bool:
    """Whether `flockshim --lock` says so at once."""
    number = status(world, "--lock", path, "--no-wait", "true")
    assert number in (0, BUSY_STATUS)
    return number == BUSY_STATUS


def check_free_on(world: World, path: Path) -> None:
    """The lock can be had. With a wait: what a mount has cached may be a second old."""
    assert status(world, "--lock", path, "true") == 0


def kernel_locks(path: Path) -> int:
    """A descriptor with the kernel's lock on PATH. Raises BlockingIOError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def test_another_host_is_kept_out_and_told_by_whom(hosts: Hosts) -> None:
    with job(hosts.here, "--lock", hosts.project) as running:
        running.began()
        assert records(hosts.project.parent) != []
        assert records(hosts.project) == []
        await_true(lambda: last_vouched(hosts.project) > 0, "the holder to be named")
        done = run(hosts.there, "--lock", hosts.theirs, "--no-wait", "true")
        assert done.returncode == BUSY_STATUS
        line = one_line(done.stderr)
        assert f"held by pid {running.pid} (" in line and f") on {os.uname().nodename} since " in line
        assert is_busy_on(hosts.here, hosts.project)
        assert running.finish(3) == (3, "")
    check_free_on(hosts.there, hosts.theirs)


def test_another_host_that_waits_has_it_as_soon_as_it_is_unlocked(hosts: Hosts) -> None:
    with job(hosts.here, "--lock", hosts.project) as first:
        first.began()
        with job(hosts.there, "--lock", hosts.theirs) as second:
            await_waiting(hosts.project, 1)
            first.finish()
            second.began()
            assert is_busy_on(hosts.here, hosts.project)
            assert second.finish() == (0, "")
    check_free_on(hosts.here, hosts.project)


def test_readers_of_two_hosts(hosts: Hosts) -> None:
    with job(hosts.here, "--lock", hosts.project, "--shared") as reader:
        reader.began()
        assert status(hosts.there, "--lock", hosts.theirs, "--shared", "--no-wait", "true") == 0
        assert is_busy_on(hosts.there, hosts.theirs)


def test_the_kernels_lock_counts_on_its_host(hosts: Hosts) -> None:
    """Such as that of `flock DIR`, without flockshim."""
    with job(hosts.here, "--lock", hosts.project) as running:
        running.began()
        with pytest.raises(BlockingIOError):
            kernel_locks(hosts.project)
        os.close(kernel_locks(hosts.theirs))
        running.finish()
    descriptor = kernel_locks(hosts.project)
    assert is_busy_on(hosts.here, hosts.project)
    check_free_on(hosts.there, hosts.theirs)
    os.close(descriptor)
    check_free_on(hosts.here, hosts.project)


def test_from_python(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOCKSHIM_DIR", hosts.here.environment["FLOCKSHIM_DIR"])
    with FileLock(hosts.project):
        assert is_busy_on(hosts.there, hosts.theirs)
    with job(hosts.there, "--lock", hosts.theirs) as running:
        running.began()
        with pytest.raises(Timeout):
            FileLock(hosts.project).acquire(timeout=0)
        assert running.finish() == (0, "")
    with FileLock(hosts.project, timeout=0):
        pass
    assert records(hosts.project) == []


def test_in_mode_host_nothing_is_recorded(hosts: Hosts) -> None:
    with job(hosts.here, "--mode", "host", "--lock", hosts.project) as running:
        running.began()
        assert records(hosts.project.parent) == []
        assert status(hosts.here, "--mode", "host", "--lock", hosts.project, "--no-wait", "true") == BUSY_STATUS
        check_free_on(hosts.there, hosts.theirs)
        assert running.finish() == (0, "")


def test_in_memory_nothing_is_recorded(hosts: Hosts) -> None:
    with tempfile.TemporaryDirectory(dir=NATIVE_ROOT) as memory:
        project = Path(memory) / "project"
        project.mkdir()
        with job(hosts.here, "--lock", project) as running:
            running.began()
            assert is_busy_on(hosts.there, project)  # it is this host's kernel that locks
            assert os.listdir(memory) == ["project"]
            assert running.finish() == (0, "")


def test_the_root_of_a_mount_is_refused(hosts: Hosts) -> None:
    root = hosts.here.directory.parent
    done = run(hosts.here, "--lock", root, "touch", "ran")
    assert done.returncode == 125
    line = one_line(done.stderr)
    assert f"'{root}'" in line and "root of a mount" in line and "--mode host" in line
    assert not (hosts.here.directory / "ran").exists()
    assert status(hosts.here, "--mode", "host", "--lock", root, "true") == 0


# Which file systems are taken for those of several hosts


def is_for_all_hosts(mode: str, path: Path) -> bool:
    """Whether a lock on PATH is to be one between hosts."""
    config = ffi.new("struct config *")
    entry = ffi.new("char[]", f"FLOCKSHIM_MODE={mode}".encode())
    lib.config_read(config, ffi.new("char *[]", [entry, ffi.NULL]))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return bool(lib.is_for_all_hosts(config, descriptor))
    finally:
        os.close(descriptor)


def test_memory_and_the_disk_are_of_one_host() -> None:
    assert not is_for_all_hosts("auto", Path("/dev/shm"))
    disk = filesystems.containing("/", os.stat("/").st_dev, filesystems.mounted())
    known = filesystems.reach(disk, os.uname().release).scope == LOCAL
    require(known, f"/ is of type {disk.type}", "run the tests where / is a local disk")
    assert not is_for_all_hosts("auto", Path("/"))


def test_what_is_not_known_may_be_of_several_hosts(nolock_dir: Path) -> None:
    assert is_for_all_hosts("auto", nolock_dir)
    assert is_for_all_hosts("auto", Path("/proc"))


def test_a_mode_that_is_given_decides(nolock_dir: Path) -> None:
    for path in (Path("/dev/shm"), Path("/"), nolock_dir):
        assert is_for_all_hosts("cluster", path)
        assert not is_for_all_hosts("host", path)
