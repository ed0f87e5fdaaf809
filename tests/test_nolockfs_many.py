"""The FUSE mount with many processes and many files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flockshim import nolockfs
from flockshim.pytest_plugin import require


@pytest.fixture
def fuse(nolock_dir: Path) -> None:
    """Skips where nolock_dir does."""


def test_processes_work_side_by_side(nolock_dir: Path) -> None:
    """Each makes, renames, lists and removes in one directory; nothing is lost or left."""
    script = """
        for n in 1 2 3 4 5 6 7 8 9; do
            echo $0 >$0.$n && mv $0.$n $0.new && ls >$0.list && grep -q $0.new $0.list
            read who <$0.new && test $who = $0 && rm $0.new $0.list
        done
    """
    workers = [subprocess.Popen(["sh", "-ec", script, str(number)], cwd=nolock_dir) for number in range(8)]
    assert [worker.wait() for worker in workers] == [0] * 8
    assert os.listdir(nolock_dir) == []


def test_forgotten_files_cost_no_descriptors(fuse: None) -> None:
    mount = nolockfs.mount()
    with mount as path:
        descriptors = Path(f"/proc/{mount.server_pid}/fd")
        at_first = len(os.listdir(descriptors))
        for number in range(300):
            (path / str(number)).touch()
        assert len(os.listdir(descriptors)) >= at_first + 300
        for number in range(300):
            (path / str(number)).unlink()
        while len(os.listdir(descriptors)) > at_first:
            os.statvfs(path)  # forgetting has no answer; the server gets to it between others


def test_more_files_than_descriptors(fuse: None, tmp_path: Path) -> None:
    require(os.geteuid() == 0, "needs open_by_handle_at(2)", "run as root")
    backing, path = tmp_path / "backing", tmp_path / "mount"
    backing.mkdir()
    path.mkdir()
    few = ["setpriv", "--bounding-set=-sys_resource", "prlimit", "--nofile=64:64"]
    server = subprocess.Popen(
        [*few, sys.executable, "-m", "flockshim.nolockfs", str(backing), str(path)],
        stdout=subprocess.PIPE,
    )
    # Held by O_PATH, which the server does not see: their inode numbers are soon used again.
    held: list[int] = []
    assert server.stdout
    assert server.stdout.readline().startswith(b"ready ")
    try:
        for number in range(50):
            (path / f"old{number}").touch()
            held.append(os.open(path / f"old{number}", os.O_PATH))
            (path / f"old{number}").unlink()
        for number in range(200):
            (path / f"dir{number}").mkdir()
            (path / f"dir{number}" / "file").write_text(str(number))
        inodes = {number: (path / f"dir{number}").stat().st_ino for number in range(200)}
        with open(path / "dir0" / "file", "r+") as first:
            os.unlink(first.name)
            for number in range(1, 200):
                directory = path / f"dir{number}"
                assert (directory / "file").read_text() == str(number)
                assert directory.stat().st_ino == inodes[number]
                (directory / "file").rename(path / f"file{number}")
                directory.rmdir()
                directory.touch()  # may well get the inode number of what was removed
                assert directory.is_file()
                assert directory.read_text() == ""
            assert first.read() == "0"
            assert os.fstat(first.fileno()).st_nlink == 0
        assert len(os.listdir(path)) == 399
        for fd in held:
            os.close(fd)
    finally:
        server.terminate()
        server.communicate()
    assert server.returncode == 0
