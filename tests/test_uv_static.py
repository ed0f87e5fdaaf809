"""Unmodified uv as a static program, which only a supervisor reaches: the list of tests/test_uv.py, and more."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import test_uv
from support.proc import await_true
from support.uv import NoRegistryError, Uv, await_waiting, end, fetched, succeeded
from support.uvpackages import SlowPackage
from support.uvproject import ends, private_python
from test_many_jobs import ENTERED
from test_uv import (  # noqa: F401
    HOLD,
    PYTHON,
    RELEASES,
    TRY,
    Index,
    Release,
    check_refused,
    install_and_list,
    local,
    test_mode_success_does_the_job_and_protects_nothing,
    test_two_uv_that_change_an_environment_take_turns,
    test_uv_waits_for_a_lock_that_another_program_holds,
    test_with_flockshim_everything_is_as_where_locks_work,
)

from flockshim.pytest_plugin import require

SOAK = bool(os.environ.get("FLOCKSHIM_SOAK"))
if SOAK:
    from test_uv import (  # noqa: F401
        test_each_errno,
        test_many_at_once,
        test_two_uv_that_use_the_tools_take_turns,
        test_without_flockshim,
    )

# On the mount auto is cluster.
WAYS = [(name, mode) for name in RELEASES for mode in ("auto", "host")] if SOAK else [("newest", "auto")]
DAYS = WAYS if SOAK else [*WAYS, ("0.4.30", "host")]
PARALLEL = 20 if SOAK else 4
JOBS = 100 if SOAK else 12
SECONDS = 280.0 if SOAK else 100.0
"""For all jobs together; a machine that needs longer is too slow for this test."""

index = test_uv.index


def released(name: str, index: Index) -> Release:
    try:
        return Release(name, fetched(index.newest if name == "newest" else name, static=True))
    except NoRegistryError as error:
        require(False, f"no static uv {name}", f"connect pip with an index that has it for musl: {error}")
        raise


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" in metafunc.fixturenames:
        day = metafunc.function is test_with_flockshim_everything_is_as_where_locks_work
        metafunc.parametrize("way", DAYS if day else WAYS, ids="-".join)


@pytest.fixture
def release(way: tuple[str, str], index: Index) -> Release:
    return released(way[0], index)


@pytest.fixture
def uv(way: tuple[str, str], release: Release, index: Index, nolock_dir: Path) -> Uv:
    uv = Uv(release.executable, nolock_dir, index.settings)
    uv.environment["FLOCKSHIM_MODE"] = way[1]
    return uv


@pytest.fixture
def newest_uv(index: Index, nolock_dir: Path) -> Uv:
    return Uv(released("newest", index).executable, nolock_dir, index.settings)


@pytest.fixture
def dynamic(index: Index) -> str:
    """The same uv for this system's C library."""
    return str(test_uv.released("newest", index).executable)


def test_a_simulated_errno(index: Index, tmp_path: Path) -> None:
    """With a directory a supervisor answers, without one the filter."""
    uv = Uv(released("newest", index).executable, tmp_path, index.settings)
    for simulate in f"--simulate=524:{tmp_path}", "--simulate=524":
        check_refused(uv.run("tool", "install", "cowsay", shim=("--mode=fail", simulate)), ".lock`", 524)
        install_and_list(uv, simulate)
        shutil.rmtree(uv.base / "wheels")
    assert uv.succeed("tool", "list", shim=("--mode=fail", f"--simulate=524:{uv.project}")).out == ""


def test_uv_that_lies_there_and_what_it_starts(newest_uv: Uv) -> None:
    shutil.copy(newest_uv.executable, newest_uv.project)
    install = ("./uv", "tool", "install", *PYTHON, *local(newest_uv, "atool"), "atool")
    refused = end(newest_uv.start_program(*install, shim=("--mode=fail",)))
    check_refused(refused, f"`{newest_uv.base}/tools/.lock`")
    succeeded(newest_uv.start_program(*install))
    listed = newest_uv.start_program("./uv", "tool", "list", shim=("--lock", "."))
    assert succeeded(listed).out == "atool v1\n- atool\n"
    lock = str(newest_uv.base / "tools" / ".lock")
    holder = newest_uv.start_program(sys.executable, "-c", HOLD, lock)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    tried = newest_uv.start_program("./uv", "run", "--no-project", *PYTHON, "python", "-c", TRY, lock)
    assert succeeded(tried).out == "held elsewhere\n"
    succeeded(holder)


def test_uv_that_a_preloaded_program_starts(newest_uv: Uv) -> None:
    """Nothing of ours is in it, which is told; a supervisor covers it."""
    command = (newest_uv.executable, "tool", "install", *PYTHON, *local(newest_uv, "atool"), "atool")
    install = ("sh", "-c", '"$@"; exit', "sh", *command)
    refused = end(newest_uv.start_program(*install))
    check_refused(refused, ".lock`")
    (line,) = [line for line in refused.err.splitlines() if line.startswith("flockshim: ")]
    assert newest_uv.executable in line and "--via seccomp" in line
    done = succeeded(newest_uv.start_program(*install, shim=("--via", "seccomp")))
    assert "flockshim" not in done.err


@pytest.mark.parametrize("static_first", [True, False])
def test_a_static_uv_and_a_dynamic_one_take_turns(
    newest_uv: Uv, dynamic: str, tmp_path: Path, static_first: bool
) -> None:
    builds, lists = (newest_uv.executable, dynamic) if static_first else (dynamic, newest_uv.executable)
    slow = SlowPackage(newest_uv.base, tmp_path)
    first = newest_uv.start_program(builds, "tool", "install", *PYTHON, "--no-index", str(slow.source))
    await_true(slow.is_building, f"{first.args!r} to build")
    lister = newest_uv.start_program(lists, "-v", "tool", "list")
    await_waiting(lister, newest_uv.base / "tools" / ".lock")
    slow.finish()
    succeeded(first)
    assert succeeded(lister).out == f"{slow.name} v1\n- {slow.name}\n"


def test_many_static_and_dynamic_at_once(newest_uv: Uv, dynamic: str) -> None:
    """Tools into one directory and packages into one environment, with one cache for all."""
    env = str(newest_uv.base / "env")
    newest_uv.succeed("venv", *PYTHON, env)
    packages = [f"package{number}" for number in range(2 * PARALLEL)]
    index = local(newest_uv, *packages)
    started = []
    for number, name in enumerate(packages):
        executable = dynamic if number % 2 else newest_uv.executable
        started.append(newest_uv.start_program(executable, "tool", "install", *PYTHON, *index, name))
        started.append(newest_uv.start_program(executable, "pip", "install", "--python", env, *index, name))
    for done in ends(started, SECONDS):
        assert done.status == 0, done.err
    listed = newest_uv.succeed("tool", "list")
    assert (listed.out, listed.err) == ("".join(f"{name} v1\n- {name}\n" for name in sorted(packages)), "")
    assert [name for name in packages if not test_uv.installed(newest_uv, name)] == []


@pytest.mark.timeout(300)
def test_many_jobs_set_up_one_project(newest_uv: Uv, tmp_path: Path) -> None:
    """Each with a TMPDIR of its own: uv's lock on the project is there and excludes nobody."""
    uv = newest_uv
    python = private_python(tmp_path / "python")
    packages = [f"package{number}" for number in range(10)]
    (uv.project / "pyproject.toml").write_text(
        f'[project]\nname = "demo"\nversion = "1"\nrequires-python = ">=3.9"\ndependencies = {packages!r}\n'
    )
    alone = uv.base / "uv-alone"
    alone.write_text(ENTERED)
    alone.chmod(0o755)
    uv.environment.update(REAL_UV=uv.executable, INSIDE=str(uv.base / "inside"))
    sync = (str(alone), "sync", "--python", str(python.executable), *local(uv, *packages))
    started = []
    for _ in range(JOBS):
        uv.environment["TMPDIR"] = tempfile.mkdtemp(dir=uv.base / "tmp")
        # The shell is dynamic, and auto judges by what it is told to start.
        started.append(uv.start_program(*sync, shim=("--via", "seccomp", "--lock", ".")))
    done = ends(started, SECONDS)
    for one in done:
        assert one.status == 0, one
    assert sum("Installed" in one.err for one in done) == 1
    imports = "; ".join(f"import {name}" for name in packages)
    succeeded(uv.start_program(str(uv.project / ".venv" / "bin" / "python"), "-c", imports, shim=None))
    assert list(python.packages.iterdir()) == []
