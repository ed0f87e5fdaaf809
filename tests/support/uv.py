"""Real uv: fetched as a wheel once, and run with everything it writes below one directory."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from support.proc import await_true, children, thread_state

RECVFROM_SYSCALL = {"x86_64": 45, "aarch64": 207}.get(os.uname().machine, -1)
FLOCK_SYSCALL = {"x86_64": 73, "aarch64": 32}.get(os.uname().machine, -1)
DEADLINE = 60.0
"""Seconds after which a uv that has not ended counts as hanging."""


class NoRegistryError(Exception):
    """The package index cannot be reached, or has no such version."""


def newest() -> str:
    """The newest release on the package index.

    :raises NoRegistryError: when pip cannot say.
    """
    report = _pip("install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report=-", "uv")
    return str(json.loads(report)["install"][0]["metadata"]["version"])


def fetched(version: str, static: bool = False) -> Path:
    """The executable of uv VERSION, from the user's cache directory or else from the index.

    :param static: the build for musl instead of the one for this system.
    :raises NoRegistryError: when it is in neither.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flockshim-tests"
    target = cache / (f"uv-{version}-static" if static else f"uv-{version}")
    platform = [f"--platform=musllinux_1_1_{os.uname().machine}"] if static else []
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            fresh = Path(scratch) / "uv"
            _pip("install", "--no-deps", "--only-binary=:all:", *platform, f"--target={fresh}", f"uv=={version}")
            try:
                fresh.rename(target)
            except OSError:  # another session was quicker
                if not target.exists():
                    raise
    return target / "bin" / "uv"


def _pip(*arguments: str) -> str:
    quickly = ["--disable-pip-version-check", "--retries=1", "--timeout=20"]
    command = [sys.executable, "-m", "pip", *quickly, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoRegistryError((done.stderr.strip() or f"pip exited with {done.returncode}").splitlines()[-1])
    return done.stdout


def index_settings() -> dict[str, str]:
    """The index and certificate that pip is configured with, as variables that uv reads."""
    names = {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}
    settings = {}
    for line in _pip("config", "list").splitlines():  # the environment's come last and win
        key, _, value = line.partition("=")
        variable = names.get(key.rpartition(".")[2])
        if variable:
            settings[variable] = str(ast.literal_eval(value))
    return settings


class Done(NamedTuple):
    """What a command that has ended said."""

    status: int
    out: str
    err: str


class Uv:
    """One version of uv; home, cache, tools, pythons and project are all below one directory."""

    def __init__(self, executable: Path, base: Path, settings: Mapping[str, str]) -> None:
        """SETTINGS are environment variables such as those of :func:`index_settings`."""
        self.executable = str(executable)
        self.base = base
        self.project = base / "project"
        for name in ("home", "project", "tmp"):
            (base / name).mkdir()
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name == "FLOCKSHIM_DIR"
            or not name.startswith(("FLOCKSHIM_", "UV_", "XDG_", "VIRTUAL_ENV", "LD_PRELOAD"))
        }
        self.environment = {
            **inherited,
            **settings,
            "HOME": str(base / "home"),
            "TMPDIR": str(base / "tmp"),
            "UV_CACHE_DIR": str(base / "cache"),
            "UV_TOOL_DIR": str(base / "tools"),
            "UV_TOOL_BIN_DIR": str(base / "bin"),
            "XDG_DATA_HOME": str(base / "data"),
            "UV_PYTHON_INSTALL_DIR": str(base / "pythons"),
            "UV_PYTHON_DOWNLOADS": "never",
            "NO_COLOR": "1",
            "PATH": f"{base / 'bin'}:/usr/bin:/bin",
        }

    def start(self, *arguments: str, shim: tuple[str, ...] | None = ()) -> subprocess.Popen[str]:
        """Start uv with ARGUMENTS, under flockshim with the options SHIM unless that is None."""
        return self.start_program(self.executable, *arguments, shim=shim)

    def start_program(self, *command: str, shim: tuple[str, ...] | None = ()) -> subprocess.Popen[str]:
        """Start any program as :meth:`start` does; it reads and writes pipes."""
        launcher = [] if shim is None else [sys.executable, "-m", "flockshim", *shim]
        return subprocess.Popen(
            [*launcher, *command],
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, shim: tuple[str, ...] | None = ()) -> Done:
        """Run uv to its end, as :meth:`start` does."""
        return end(self.start(*arguments, shim=shim))

    def succeed(self, *arguments: str, shim: tuple[str, ...] | None = ()) -> Done:
        """Run uv, which must exit with 0."""
        return succeeded(self.start(*arguments, shim=shim))

    def tree(self) -> set[str]:
        """The name of every file and directory below the base, relative to it."""
        return {
            os.path.relpath(os.path.join(folder, name), self.base)
            for folder, folders, files in os.walk(self.base)
            for name in (*folders, *files)
        }


def end(process: subprocess.Popen[str]) -> Done:
    """Wait for a process and return what it said; a hanging one is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        kill_with_descendants(process)
        out, err = process.communicate()
        raise AssertionError(f"{process.args!r} hangs, having said: {out}{err}") from None
    return Done(process.returncode, out, err)


def kill_with_descendants(process: subprocess.Popen[str]) -> None:
    """Kill a program, also one that outlives its launcher."""
    found = [process.pid] if process.poll() is None else []
    for pid in found:
        found += children(pid)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def succeeded(process: subprocess.Popen[str]) -> Done:
    """Wait for a process that must exit with 0."""
    done = end(process)
    assert done.status == 0, f"{process.args!r} exited with {done.status}: {done.out}{done.err}"
    return done


def await_waiting(process: subprocess.Popen[str], lock: Path) -> None:
    """Return when ``uv -v`` waits for LOCK: it has said so, and sleeps in a call to the keeper.

    uv writes the line, with a path that may be relative, after LOCK_NB was refused and before it
    asks again without. Of its threads only one that waits for the keeper sleeps in recvfrom(2):
    its own sockets don't block. Under a supervisor it sleeps in flock(2) itself.
    """
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if "Waiting to acquire" in line and f"{lock.parent.name}/{lock.name}`" in line:
            break
    else:
        raise AssertionError(f"{process.args!r} did not wait for {lock}: {''.join(said)}")
    await_true(lambda: _one_sleeps_in_lock_call(process.pid), f"{process.args!r} to wait for the keeper")
    assert process.poll() is None


def _one_sleeps_in_lock_call(pid: int) -> bool:
    """Whether a thread of the process does, or of one that descends from it."""
    try:
        states = [thread_state(pid, int(tid)) for tid in os.listdir(f"/proc/{pid}/task")]
    except FileNotFoundError:
        return False
    if any(state and state.asleep and state.syscall in (RECVFROM_SYSCALL, FLOCK_SYSCALL) for state in states):
        return True
    return any(_one_sleeps_in_lock_call(child) for child in children(pid))
