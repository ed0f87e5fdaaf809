"""Other programs that lock: Python, py-filelock, perl, cargo, and one that is linked with musl."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN
from support.programs import program
from support.worlds import World

from flockshim.pytest_plugin import require

PYTHON_HOLDS = """
import fcntl, sys
with open(sys.argv[1]) as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("busy")
    print("locked", flush=True)
    sys.stdin.readline()
print("closed", flush=True)
sys.stdin.readline()
"""

FILELOCK_HOLDS = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1], timeout=0)
try:
    with lock:
        assert type(lock) is filelock.UnixFileLock, type(lock)
        print("locked", flush=True)
        sys.stdin.readline()
except filelock.Timeout:
    sys.exit("busy")
print("closed", flush=True)
sys.stdin.readline()
"""

PERL_HOLDS = """
use Fcntl ":flock"; $| = 1;
open(my $file, ">>", $ARGV[0]) or die;
flock($file, LOCK_EX | LOCK_NB) or die "busy\\n";
print "locked\\n"; <STDIN>;
close($file); print "closed\\n"; <STDIN>;
"""

HOLDERS = {
    "python": [sys.executable, "-c", PYTHON_HOLDS],
    "filelock": [sys.executable, "-c", FILELOCK_HOLDS],
    "perl": ["perl", "-e", PERL_HOLDS],
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_program_that_holds_a_lock(world: World, name: str) -> None:
    words = HOLDERS[name]
    require(shutil.which(words[0]), f"no {name}", f"apt install {name}")
    path = world.file()
    with subprocess.Popen(
        [*words, path],
        env=world.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == "locked\n"
        assert world.probe(path, SH) == BUSY
        for other in HOLDERS.values():
            if shutil.which(other[0]):
                done = _run(world, *other, path)
                assert (done.returncode != 0, done.stderr) == (True, "busy\n")
        _say(holder.stdin)
        assert holder.stdout.readline() == "closed\n"
        assert not path.exists() or world.free(path)
        _say(holder.stdin)
    assert holder.returncode == 0


def _say(stream: IO[str]) -> None:
    stream.write("\n")
    stream.flush()


def _run(world: World, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        env=world.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_filelock_waits(world: World) -> None:
    path = world.file()
    holder, fd = world.opened()
    assert holder.flock(fd, EX) == OK
    script = "import sys, filelock\nprint(filelock.FileLock(sys.argv[1]).acquire(timeout=0.1))"
    done = _run(world, sys.executable, "-c", script, path)
    assert "filelock._error.Timeout" in done.stderr
    assert holder.flock(fd, UN) == OK
    assert _run(world, sys.executable, "-c", script, path).returncode == 0


def test_a_musl_program(world: World) -> None:
    """The same library file serves both C libraries."""
    require(shutil.which("musl-gcc"), "no musl-gcc", "apt install musl-tools")
    path = world.file()
    other, other_fd = world.opened()
    driver = world.fleet.start(None, executable=program("lockdriver", "musl-gcc"))
    fd = driver.open(path)
    assert driver.flock(fd, EX | NB) == OK
    assert other.flock(other_fd, SH | NB) == BUSY
    child = driver.fork()
    driver.close(fd)
    assert other.flock(other_fd, SH | NB) == BUSY
    assert child.flock(fd, UN) == OK
    assert other.flock(other_fd, EX | NB) == OK
    call = child.flock_later(fd, SH)
    world.await_blocked(call)
    assert other.flock(other_fd, UN) == OK
    assert call.result() == OK
    assert child.flock(99, EX) == 9


@pytest.fixture
def crate(world: World) -> Path:
    """A crate that builds without a network, with all that cargo writes in the world's directory."""
    require(shutil.which("cargo"), "no cargo", "apt install cargo")
    path = world.directory / "crate"
    (path / "src").mkdir(parents=True)
    (path / "src/main.rs").write_text("fn main() {}\n")
    (path / "Cargo.toml").write_text('[package]\nname = "tiny"\nversion = "0.1.0"\n')
    world.environment.update(CARGO_HOME=str(world.directory / "cargo"), CARGO_TARGET_DIR=str(path / "target"))
    return path


def _cargo(world: World, crate: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["cargo", "build", "--offline"],
        cwd=crate,
        env=world.environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_cargo_waits_for_its_lock(world: World, crate: Path) -> None:
    """By itself cargo goes on without a lock where flock fails; under the shim it has one."""
    with _cargo(world, crate) as build:
        _, errors = build.communicate()
    assert build.returncode == 0, errors
    locks = [path for path in (crate / "target").rglob(".cargo-lock") if path.is_file()]
    driver = world.start()
    for path in locks:
        assert driver.flock(driver.open(path, os.O_RDWR), EX) == OK
    with _cargo(world, crate) as build:
        assert build.stderr is not None
        assert any("Blocking waiting for file lock" in line for line in build.stderr)
        driver.kill()
        build.communicate()
    assert build.returncode == 0


def test_two_cargo_builds_at_once(world: World, crate: Path) -> None:
    builds = [_cargo(world, crate) for _ in range(2)]
    errors = [build.communicate()[1] for build in builds]
    assert [build.returncode for build in builds] == [0, 0], errors
    assert subprocess.run([crate / "target/debug/tiny"], check=True).returncode == 0
