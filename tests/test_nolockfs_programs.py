"""Real programs on the FUSE mount, without the shim."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from flockshim.pytest_plugin import require


def test_git_commits_and_clones(nolock_dir: Path) -> None:
    require(shutil.which("git"), "no git", "install git")
    script = """
        git init -q one && cd one && seq 300 | while read n; do echo $n >file$n; done
        git add . && git -c user.name=n -c user.email=e commit -qm first && git gc -q
        cd .. && git clone -q one two && cd two && test "$(ls | wc -l)" = 300
        git status --porcelain && git fsck --strict
    """
    subprocess.run(["sh", "-ec", script], cwd=nolock_dir, check=True, capture_output=True)


@pytest.mark.nolock(flock="ENOSYS", posix="local")
def test_sqlite_works_where_record_locks_do(nolock_dir: Path) -> None:
    with sqlite3.connect(nolock_dir / "database") as database:
        database.execute("pragma journal_mode = wal")
        database.execute("create table numbers (n)")
        database.executemany("insert into numbers values (?)", ((n,) for n in range(1000)))
    with sqlite3.connect(nolock_dir / "database") as database:
        assert database.execute("select sum(n) from numbers").fetchone() == (499500,)


@pytest.mark.nolock(flock="local", posix="ENOSYS")
def test_sqlite_fails_where_record_locks_do(nolock_dir: Path) -> None:
    with sqlite3.connect(nolock_dir / "database") as database, pytest.raises(sqlite3.Error):
        database.execute("create table numbers (n)")
