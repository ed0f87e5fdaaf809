"""``flockshim --lock PATH``: what PATH may be, and what becomes of it."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

from support.confine import mounted
from support.driver import BUSY, EX, OK, SH, UN
from support.lockcommand import FLOCKSHIM, Job, await_waiting, job, one_line, run, settings, status
from support.worlds import World

from flockshim import nolockfs
from flockshim.pytest_plugin import require


def test_a_missing_file_is_made(world: World) -> None:
    path = world.directory / "new"
    assert status(world, "--lock", "new", "test", "-f", "new") == 0
    assert path.read_bytes() == b""
    assert path.stat().st_mode & 0o111 == 0
    assert world.free(path)


def test_an_existing_file_is_left_as_it_is(world: World) -> None:
    path = world.file()
    path.write_text("precious")
    os.utime(path, ns=(1, 1))
    assert status(world, "--lock", path, "true") == 0
    assert path.stat().st_mtime_ns == 1
    assert path.read_text() == "precious"


def test_a_file_that_cannot_be_written(world: World) -> None:
    path = world.file()
    require(os.geteuid() == 0, "only root can mount", "run the tests as root")
    prefix = mounted(f"mount --bind {world.directory} {world.directory} && mount -o remount,bind,ro {world.directory}")
    command = [*prefix, *FLOCKSHIM, "--lock", str(path), "sh", "-c", 'flock -n "$0" true', str(path)]
    done = subprocess.run(command, env=settings(world), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    command = [*prefix, *FLOCKSHIM, "--lock", str(world.directory / "new"), "true"]
    done = subprocess.run(command, env=settings(world), capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert f"'{world.directory}/new'" in one_line(done.stderr)


def test_nothing_is_left_in_a_directory(world: World) -> None:
    directory = world.directory / "project"
    directory.mkdir()
    with job(world, "--lock", directory) as running:
        running.began()
        assert os.listdir(directory) == []
        assert running.finish() == (0, "")
    assert os.listdir(directory) == []
    assert status(world, "--lock", ".", "sh", "-c", "exit 4") == 4


def test_a_symbolic_link_is_followed(world: World) -> None:
    path = world.file()
    link = world.directory / "link"
    link.symlink_to(path)
    with job(world, "--lock", link) as running:
        running.began()
        assert world.probe(path, SH) == BUSY
        assert running.finish() == (0, "")


def test_what_cannot_be_locked_is_refused(world: World) -> None:
    fifo = world.directory / "fifo"
    os.mkfifo(fifo)
    for path in fifo, Path("/dev/null"), world.directory / "no" / "such", world.directory / ("x" * 300):
        done = run(world, "--lock", path, "touch", "ran")
        assert (done.returncode, done.stdout) == (125, "")
        assert str(path)[:100] in one_line(done.stderr)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(world.directory / "socket"))
        assert status(world, "--lock", world.directory / "socket", "true") == 125
    assert not (world.directory / "ran").exists()


def test_a_lock_file_removed_while_waiting(world: World) -> None:
    """Whoever comes next locks what is there then, so that is what must be locked."""
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    with job(world, "--lock", path) as running:
        await_waiting(world, path, running.pid)
        path.unlink()
        assert driver.flock(fd, UN) == OK
        running.began()
        assert world.probe(path, SH) == BUSY
        assert running.finish() == (0, "")


def test_a_lock_file_replaced_while_waiting(world: World) -> None:
    path = world.file()
    driver, fd = world.opened()
    assert driver.flock(fd, EX) == OK
    with job(world, "--lock", path) as running:
        await_waiting(world, path, running.pid)
        world.file("other").rename(path)
        second = driver.open(path)
        assert driver.flock(second, EX) == OK
        assert driver.flock(fd, UN) == OK
        await_waiting(world, path, running.pid)
        assert driver.flock(second, UN) == OK
        running.began()
        assert world.probe(path, SH) == BUSY
        assert running.finish() == (0, "")


def test_a_file_system_that_goes_away(emulated: World) -> None:
    """A lock that cannot be given back must not cost COMMAND its status."""
    with nolockfs.mount() as mount:
        running = Job(emulated, "--lock", mount / "file")
        running.began()
    try:
        status, text = running.finish(4)
        assert status == 4
        assert "Traceback" not in text
    finally:
        running.end()
