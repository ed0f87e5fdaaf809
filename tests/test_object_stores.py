"""Object stores mounted as files: their rename is a copy, so no record there can be a lock between hosts."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import shim_environment
from support.driver import BUSY, EX, OK, SH, UN
from support.worlds import World

import flockshim
from flockshim.filesystems import FileSystem, containing, mounted, object_store
from flockshim.pytest_plugin import require

# The server of the tests' file system, which says of itself that it is another.
SERVER = """
import sys
from flockshim import fuse_libc, nolockfs
real = fuse_libc.mount
kind, source = sys.argv.pop(1), sys.argv.pop(1)
fuse_libc.mount = lambda _, target, __, flags, options: real(source, target, kind, flags, options)
sys.exit(nolockfs._main())
"""


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mount without locks of this type and source; parametrise it by both."""
    require(os.geteuid() == 0, "only root can give a mount's type", "run the tests as root")
    kind, source = request.param
    backing, path = tmp_path / "backing", tmp_path / "mount"
    backing.mkdir()
    path.mkdir()
    command = [sys.executable, "-c", SERVER, kind, source, str(backing), str(path), f"--owner={os.getpid()}"]
    search = str(Path(flockshim.__file__).parent.parent)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": search}, cwd="/")
    assert server.stdout
    with server.stdout:
        ready = server.stdout.readline()
    require(ready, "no FUSE mount", "see its standard error")
    yield path
    server.terminate()
    assert server.wait() == 0


STORES = [("fuse.s3fs", "s3fs"), ("fuse", "goofys")]
as_store = pytest.mark.parametrize("store", STORES, indirect=True, ids=lambda store: store[1])


def records(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if "flockshim" in name]


@as_store
@pytest.mark.parametrize("mode", ["auto", "cluster"])
def test_a_lock_between_hosts_is_refused(store: Path, rendezvous: Path, mode: str) -> None:
    """By the kernel's errno and one line, and nothing is written there."""
    world = World("emulated", store, {**shim_environment(rendezvous), "FLOCKSHIM_MODE": mode})
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == errno.ENOSYS
    errors = world.end()
    assert "does not rename atomically" in errors and "use --mode host" in errors
    assert errors.count("\n") == 1
    assert records(store) == []


@as_store
def test_host_mode_locks_this_host(store: Path, rendezvous: Path) -> None:
    world = World("emulated", store, shim_environment(rendezvous))
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    assert world.probe(world.file(), SH) == BUSY
    assert driver.flock(fd, UN) == OK
    assert world.free(world.file())
    assert world.end() == ""
    assert records(store) == []


@pytest.mark.parametrize("store", [("fuse.sshfs", "me@host:")], indirect=True, ids=["sshfs"])
def test_another_fuse_file_system_is_none(store: Path, rendezvous: Path) -> None:
    world = World("emulated", store, {**shim_environment(rendezvous), "FLOCKSHIM_MODE": "cluster"})
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    assert records(store) != []
    assert world.end() == ""


@pytest.mark.parametrize(
    ("kind", "source", "name"),
    [
        ("fuse.s3fs", "s3fs", "s3fs"),
        ("fuse.s3fs", "bucket", "s3fs"),
        ("fuse", "goofys", "goofys"),
        ("fuse", "mountpoint-s3", "mountpoint-s3"),
        ("fuse.mountpoint-s3", "mountpoint-s3", "mountpoint-s3"),
        ("fuse.gcsfuse", "bucket", "gcsfuse"),
        ("fuse.rclone", "remote:bucket", "rclone"),
        ("fuse.blobfuse2", "blobfuse2", "blobfuse2"),
        ("fuse.sshfs", "me@host:/s3fs", None),
        ("fuse.juicefs", "JuiceFS:s3fs", None),
        ("fuse", "whatever", None),
        ("fuseblk", "s3fs", None),
        ("nfs4", "goofys", None),
        ("ext4", "s3fs", None),
    ],
)
def test_which_mounts_are_known_as_object_stores(kind: str, source: str, name: str | None) -> None:
    assert object_store(FileSystem(kind, source, "/mnt", ("rw",), "0:1")) == name


@as_store
def test_the_kernel_shows_type_and_source_as_expected(store: Path, request: pytest.FixtureRequest) -> None:
    system = containing(str(store / "below"), store.stat().st_dev, mounted())
    assert (system.type, system.source) == request.node.callspec.params["store"]
