"""A shell that is a static program: scripts that it runs, and what these start."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from support import lockcommand
from support.driver import BUSY, SH
from support.uv import Done, end, succeeded
from support.worlds import World

from flockshim.pytest_plugin import require

SCRIPTS = 4
FLOCKSHIM = [sys.executable, "-m", "flockshim"]
COUNT = """
while [ "${turns:=0}" != 3 ]; do
    turns=$((turns + 1))
    (
        flock 9 || exit
        read number <number
        echo $((number + 1)) >number
    ) 9>lock || exit
done
"""
HOLD = """
exec 9>>lock
flock -n 9 || exit 75
grep Seccomp: /proc/self/status
read line || exit 0
"""


@pytest.fixture
def shell() -> str:
    path = shutil.which("busybox")
    require(path and is_static(path), "no static shell", "apt install busybox-static")
    assert path
    return path


def is_static(path: str) -> bool:
    """Whether no dynamic linker complains of a library that it cannot preload."""
    done = subprocess.run([path, "true"], env={"LD_PRELOAD": "/missing"}, capture_output=True, check=True)
    return not done.stderr


def start(world: World, shell: str, text: str, *launcher: str) -> subprocess.Popen[str]:
    """Start the script TEXT by LAUNCHER."""
    script = world.directory / "script"
    if not script.exists():
        script.write_text(f"#!{shell} sh\n{text}")
        script.chmod(0o755)
    return subprocess.Popen(
        [*launcher, "./script"],
        cwd=world.directory,
        env=lockcommand.settings(world, FLOCKSHIM_MODE="host"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_scripts_count(emulated: World, shell: str) -> None:
    (emulated.directory / "number").write_text("0\n")
    refused = end(start(emulated, shell, COUNT, "env"))
    assert (refused.status != 0, refused.err) == (True, "flock: 9: Function not implemented\n")
    for process in [start(emulated, shell, COUNT, *FLOCKSHIM) for _ in range(SCRIPTS)]:
        assert end(process) == Done(0, "", "")
    assert (emulated.directory / "number").read_text() == f"{SCRIPTS * 3}\n"


def test_the_shell_holds_what_its_child_has_locked(emulated: World, shell: str) -> None:
    """The child, flock(1), is a dynamic program, and has ended."""
    path = emulated.file("lock")
    holder = start(emulated, shell, HOLD, *FLOCKSHIM)
    assert holder.stdout
    assert holder.stdout.readline() == "Seccomp:\t2\n", end(holder)
    assert emulated.probe(path, SH) == BUSY
    assert end(start(emulated, shell, HOLD, *FLOCKSHIM)) == Done(75, "", "")
    assert succeeded(holder).err == ""
    assert emulated.free(path)
