"""Unmodified uv, old and new, with everything it has on a file system whose flock fails."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from support.proc import await_true
from support.uv import (
    Done,
    NoRegistryError,
    Uv,
    await_waiting,
    end,
    fetched,
    index_settings,
    newest,
    succeeded,
)
from support.uvpackages import SlowPackage, write_wheel

from flockshim.pytest_plugin import require

# What 0.7.21 locks, those around it lock too.
RELEASES = ["0.4.30", *(["0.7.21", "0.8.22"] if os.environ.get("FLOCKSHIM_SOAK") else []), "newest"]
PYTHON = ("--python", sys.executable)
PARALLEL = 8

HOLD = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""
TRY = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("held elsewhere")
"""


class Index(NamedTuple):
    """What the package index says, and how uv reaches it."""

    newest: str
    settings: dict[str, str]


class Release(NamedTuple):
    """One of RELEASES."""

    name: str
    executable: Path


@pytest.fixture(scope="session")
def index() -> Index:
    try:
        return Index(newest(), index_settings())
    except NoRegistryError as error:
        require(False, "no package index", f"connect pip with one: {error}")
        raise


def released(name: str, index: Index) -> Release:
    try:
        return Release(name, fetched(index.newest if name == "newest" else name))
    except NoRegistryError as error:
        require(False, f"no uv {name}", f"connect pip with an index: {error}")
        raise


@pytest.fixture(scope="session", params=RELEASES)
def release(request: pytest.FixtureRequest, index: Index) -> Release:
    return released(request.param, index)


@pytest.fixture
def uv(release: Release, index: Index, nolock_dir: Path) -> Uv:
    return Uv(release.executable, nolock_dir, index.settings)


@pytest.fixture
def newest_uv(index: Index, nolock_dir: Path) -> Uv:
    return Uv(released("newest", index).executable, nolock_dir, index.settings)


def commands(uv: Uv) -> dict[str, tuple[str, ...]]:
    """Every command of uv that is tried without flockshim, in an order that makes sense."""
    env = str(uv.base / "env")
    return {
        "tool install": ("tool", "install", *PYTHON, "cowsay"),
        "tool list": ("tool", "list"),
        "tool uninstall": ("tool", "uninstall", "cowsay"),
        "venv": ("venv", *PYTHON, str(uv.base / "another")),
        "pip install": ("pip", "install", "--python", env, "cowsay"),
        "init": ("init", *PYTHON, "--name", "demo", "."),
        "add": ("add", *PYTHON, "cowsay"),
        "sync": ("sync", *PYTHON),
        "run": ("run", *PYTHON, "python", "-c", "import cowsay"),
        "python uninstall": ("python", "uninstall", "3.99"),
        "cache prune": ("cache", "prune"),
        "cache clean": ("cache", "clean"),
    }


# Which commands stop without flockshim, and for want of which directory's lock.
TOOLS_REFUSED = {
    "tool install": "tools",
    "tool list": "tools",
    "tool uninstall": "tools",
    "python uninstall": "pythons",
}
CACHE_REFUSED = ["tool install", "tool list", "venv", "pip install", "init", "add", "sync", "run"]
REFUSED = {
    "0.4.30": {**TOOLS_REFUSED, "pip install": "env"},
    "0.7.21": TOOLS_REFUSED,
    "0.8.22": {**TOOLS_REFUSED, **dict.fromkeys([*CACHE_REFUSED, "cache prune", "cache clean"], "cache")},
    "newest": {**TOOLS_REFUSED, "cache prune": "cache", "cache clean": "cache"},
}


def check_refused(done: Done, lock: str, number: int = errno.ENOSYS) -> None:
    """What uv says for itself when it cannot have LOCK."""
    assert done.status == 2, done
    assert "Could not acquire" in done.err, done
    assert lock in done.err, done
    assert f"(os error {number})" in done.err, done


def test_without_flockshim(uv: Uv, release: Release) -> None:
    """Each release stops at other commands; those that don't have gone on without their lock."""
    succeeded(uv.start_program(sys.executable, "-m", "venv", "--without-pip", str(uv.base / "env"), shim=None))
    results = {name: uv.run(*arguments, shim=None) for name, arguments in commands(uv).items()}
    for name, directory in REFUSED[release.name].items():
        check_refused(results[name], f"`{uv.base / directory}/.lock`")
    refused = {name for name, done in results.items() if done.status != 0}
    if release.name == "newest":  # the next release may well go on where this one stops
        for name in refused:
            check_refused(results[name], ".lock`")
    else:
        assert refused == set(REFUSED[release.name])


def test_with_flockshim_everything_is_as_where_locks_work(
    uv: Uv, release: Release, index: Index, tmp_path: Path
) -> None:
    """No error, the results are there, and on the mount is nothing that uv alone would not leave."""
    native = Uv(release.executable, tmp_path, index.settings)
    assert whole_day(uv, ()) == whole_day(native, None)


def whole_day(uv: Uv, shim: tuple[str, ...] | None) -> tuple[set[str], set[str]]:
    """Do everything with uv; the names of all files before and after the cleaning up."""
    use_tool(uv, shim)
    use_environment(uv, shim)
    use_project(uv, shim)
    busy = {name for name in names(uv) if not name.startswith("cache/")}
    uv.succeed("cache", "prune", shim=shim)
    uv.succeed("tool", "uninstall", "cowsay", shim=shim)
    assert not (uv.base / "bin" / "cowsay").exists()
    listed = uv.succeed("tool", "list", shim=shim)
    assert "No tools installed" in listed.out + listed.err
    uv.succeed("cache", "clean", shim=shim)
    return busy, names(uv)


def names(uv: Uv) -> set[str]:
    """Every name below the base; hashes of its path don't count, nor what cluster mode records (docs/cluster.md)."""
    return {re.sub(r"[0-9a-f]{16,}", "HASH", name) for name in uv.tree() if ".flockshim" not in name}


def use_tool(uv: Uv, shim: tuple[str, ...] | None) -> None:
    uv.succeed("tool", "install", *PYTHON, "cowsay", shim=shim)
    listed = uv.succeed("tool", "list", shim=shim)
    assert re.fullmatch(r"cowsay v[\d.]+\n- cowsay\n", listed.out)
    assert listed.err == ""
    said = succeeded(uv.start_program(str(uv.base / "bin" / "cowsay"), "-t", "moo", shim=shim))
    assert "moo" in said.out


def use_environment(uv: Uv, shim: tuple[str, ...] | None) -> None:
    env = str(uv.base / "env")
    uv.succeed("venv", *PYTHON, env, shim=shim)
    uv.succeed("pip", "install", "--python", env, "cowsay", shim=shim)
    succeeded(uv.start_program(f"{env}/bin/python", "-c", "import cowsay", shim=shim))


def use_project(uv: Uv, shim: tuple[str, ...] | None) -> None:
    uv.succeed("init", *PYTHON, "--name", "demo", ".", shim=shim)
    uv.succeed("add", *PYTHON, "cowsay", shim=shim)
    uv.succeed("sync", *PYTHON, shim=shim)
    script = "import cowsay; print(cowsay.__file__)"
    ran = uv.succeed("run", *PYTHON, "python", "-c", script, shim=shim)
    assert ran.out.startswith(f"{uv.project}/.venv/")


def local(uv: Uv, *packages: str) -> list[str]:
    """The options with which uv finds PACKAGES, that are made here, and asks nobody else."""
    wheels = uv.base / "wheels"
    wheels.mkdir(exist_ok=True)
    for name in packages:
        write_wheel(wheels, name)
    return ["--no-index", f"--find-links={wheels}"]


def installed(uv: Uv, package: str) -> bool:
    return bool(list((uv.base / "env").glob(f"lib/python*/site-packages/{package}.py")))


def locks_cache(release: Release) -> bool:
    return release.name not in ("0.4.30", "0.7.21")


def locks_project(release: Release) -> bool:
    return release.name != "0.4.30"


def test_uv_waits_for_a_lock_that_another_program_holds(uv: Uv, release: Release) -> None:
    env = str(uv.base / "env")
    (uv.project / "pyproject.toml").write_text('[project]\nname = "demo"\nversion = "1"\nrequires-python = ">=3.9"\n')
    uv.succeed("venv", *PYTHON, env)
    uv.succeed("venv", *PYTHON)
    commands = {
        "tools": ("tool", "install", *PYTHON, *local(uv, "atool"), "atool"),
        "env": ("pip", "install", "--python", env, *local(uv, "package"), "package"),
        "pythons": ("python", "uninstall", "3.99"),
    }
    if locks_project(release):
        commands["project/.venv"] = ("sync", *PYTHON, "--no-index")
    if locks_cache(release):
        commands["cache"] = ("cache", "clean")
    for directory, command in commands.items():
        lock = uv.base / directory / ".lock"
        lock.parent.mkdir(exist_ok=True)
        holder = uv.start_program(sys.executable, "-c", HOLD, str(lock))
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        waiter = uv.start("-v", *command)
        await_waiting(waiter, lock)
        assert not (uv.base / "bin" / "atool").exists() or directory != "tools"
        assert not installed(uv, "package") or directory != "env"
        succeeded(holder)
        succeeded(waiter)
    assert (uv.base / "bin" / "atool").exists()
    assert installed(uv, "package")


def test_two_uv_that_use_the_tools_take_turns(uv: Uv, release: Release, tmp_path: Path) -> None:
    """And, where there is a lock for it, the cache is not cleaned under one that uses it."""
    slow = SlowPackage(uv.base, tmp_path)
    first = uv.start("tool", "install", *PYTHON, "--no-index", str(slow.source))
    await_true(slow.is_building, f"{first.args!r} to build")
    tools, cache = uv.base / "tools" / ".lock", uv.base / "cache" / ".lock"
    tried = succeeded(uv.start_program(sys.executable, "-c", TRY, str(tools)))
    assert tried.out == "held elsewhere\n"
    lister = uv.start("-v", "tool", "list")
    await_waiting(lister, tools)
    cleaner = None
    if locks_cache(release):
        cleaner = uv.start("-v", "cache", "clean")
        await_waiting(cleaner, cache)
    assert first.poll() is None
    slow.finish()
    succeeded(first)
    assert succeeded(lister).out == f"{slow.name} v1\n- {slow.name}\n"
    if cleaner:
        succeeded(cleaner)


def test_two_uv_that_change_an_environment_take_turns(uv: Uv, tmp_path: Path) -> None:
    slow = SlowPackage(uv.base, tmp_path)
    env = str(uv.base / "env")
    uv.succeed("venv", *PYTHON, env)
    install = ("pip", "install", "--python", env, *local(uv, "package"))
    first = uv.start(*install, str(slow.source))
    await_true(slow.is_building, f"{first.args!r} to build")
    second = uv.start("-v", *install, "package")
    await_waiting(second, uv.base / "env" / ".lock")
    assert not installed(uv, "package")
    slow.finish()
    succeeded(first)
    succeeded(second)
    assert installed(uv, "package") and installed(uv, slow.name)


def test_many_at_once(uv: Uv) -> None:
    """Tools into one directory and packages into one environment, with one cache for all."""
    env = str(uv.base / "env")
    uv.succeed("venv", *PYTHON, env)
    packages = [f"package{number}" for number in range(PARALLEL)]
    index = local(uv, *packages)
    started = [uv.start("tool", "install", *PYTHON, *index, name) for name in packages]
    started += [uv.start("pip", "install", "--python", env, *index, name) for name in packages]
    for done in [end(process) for process in started]:
        assert done.status == 0, done.err
    listed = uv.succeed("tool", "list")
    assert listed.out == "".join(f"{name} v1\n- {name}\n" for name in packages)
    assert listed.err == ""
    assert [name for name in packages if not installed(uv, name)] == []


def install_and_list(uv: Uv, *shim: str) -> None:
    uv.succeed("tool", "install", *PYTHON, *local(uv, "atool"), "atool", shim=shim)
    listed = uv.succeed("tool", "list", shim=shim)
    assert listed.out == "atool v1\n- atool\n"
    uv.succeed("tool", "uninstall", "atool", shim=shim)


@pytest.mark.parametrize("nolock_dir", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"], indirect=True)
def test_each_errno(newest_uv: Uv, request: pytest.FixtureRequest) -> None:
    number = getattr(errno, request.node.callspec.params["nolock_dir"])
    check_refused(newest_uv.run("tool", "install", "cowsay", shim=None), ".lock`", number)
    install_and_list(newest_uv)


def test_errno_524(index: Index, tmp_path: Path) -> None:
    """Simulated: a FUSE server cannot answer it."""
    uv = Uv(released("newest", index).executable, tmp_path, index.settings)
    simulate = f"--simulate=524:{tmp_path}"
    check_refused(uv.run("tool", "install", "cowsay", shim=("--mode=fail", simulate)), ".lock`", 524)
    install_and_list(uv, simulate)


def test_mode_success_does_the_job_and_protects_nothing(newest_uv: Uv) -> None:
    install_and_list(newest_uv, "--mode=success")
    lock = str(newest_uv.base / "tools" / ".lock")
    holder = newest_uv.start_program(sys.executable, "-c", HOLD, lock, shim=("--mode=success",))
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    listed = newest_uv.succeed("tool", "list", shim=("--mode=success",))
    assert listed.err.startswith("flockshim: warning: ")
    assert holder.poll() is None
    succeeded(holder)
