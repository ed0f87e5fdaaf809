"""The file that programs load: what it gives and takes, and that one file is for every C library.

What a machine here cannot run itself, the other architecture, is built and run by an emulator (qemu-user).
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import emulated_world, shim_environment
from support.driver import BUSY, EX, NB, OK, SH, UN, Driver, Fleet
from support.keepers import keepers
from support.programs import program
from support.worlds import World

import flockshim
from flockshim.pytest_plugin import require

ROOT = Path(__file__).parent.parent
LIBRARY = Path(flockshim.__file__).parent / "libflockshim.so"
RECORD_CALLS = ["fcntl", "fcntl64", "lockf", "lockf64"]
EXPORTED = sorted(["execv", "execve", "execvp", "flock", "posix_spawn", "posix_spawnp", *RECORD_CALLS])
NEEDED = {"__errno_location": "GLOBAL"}
NEEDED.update(dict.fromkeys(["environ", "dl_iterate_phdr", "_pthread_cleanup_push", "_pthread_cleanup_pop"], "WEAK"))
CROSS_COMPILER, CROSS_ROOT, EMULATOR = "aarch64-linux-gnu-gcc", "/usr/aarch64-linux-gnu", "qemu-aarch64"


def _build(compiler: str, directory: Path, *options: str) -> Path:
    """The library as build.py makes it, by another compiler."""
    require(importlib.util.find_spec("setuptools"), "no setuptools", "pip install setuptools")
    spec = importlib.util.spec_from_file_location("flockshim_build", ROOT / "build.py")
    assert spec and spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    target = directory / "libflockshim.so"
    sources = build.sources(build.SHIM_SOURCES)
    flags = [*build.STRICT, *build.FREESTANDING, "-fPIC", "-shared", *build.LINK, *options]
    subprocess.run([compiler, *flags, "-o", str(target), *sources], cwd=ROOT, check=True)
    return target


@pytest.fixture(scope="module")
def cross_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    how = "apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    require(shutil.which(CROSS_COMPILER), f"no {CROSS_COMPILER}", how)
    return _build(CROSS_COMPILER, tmp_path_factory.mktemp("aarch64"))


@pytest.fixture(params=["this machine's", "aarch64"])
def library(request: pytest.FixtureRequest) -> Path:
    require(shutil.which("readelf"), "no readelf", "apt install binutils")
    if request.param == "aarch64":
        found: Path = request.getfixturevalue("cross_library")
        return found
    return LIBRARY


def _readelf(library: Path, *options: str) -> list[list[str]]:
    done = subprocess.run(["readelf", "--wide", *options, library], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    return [line.split() for line in done.stdout.splitlines() if line.strip()]


def _symbols(library: Path) -> list[tuple[str, str, bool]]:
    """Name, binding, and whether it is defined, of each dynamic symbol that has a name."""
    rows = [row for row in _readelf(library, "--dyn-syms") if row[0].rstrip(":").isdigit()]
    return [(row[7], row[4], row[6] != "UND") for row in rows if len(row) > 7 and row[3] != "SECTION"]


def test_it_exports_what_it_stands_for_and_nothing_else(library: Path) -> None:
    assert sorted(name for name, _, defined in _symbols(library) if defined) == EXPORTED


def test_it_cannot_do_without_errno_alone(library: Path) -> None:
    """Without a version, so any C library will do."""
    assert {name: binding for name, binding, defined in _symbols(library) if not defined} == NEEDED
    assert not any("GLIBC" in word for row in _readelf(library, "--version-info") for word in row)


def test_it_names_no_other_library_and_no_path(library: Path) -> None:
    tags = {row[1].strip("()"): row[2:] for row in _readelf(library, "--dynamic") if row[0].startswith("0x")}
    assert not {"NEEDED", "RPATH", "RUNPATH", "TEXTREL", "SONAME"} & set(tags)
    assert {"HASH", "GNU_HASH"} <= set(tags)
    assert "TEXTREL" not in tags["FLAGS"]
    assert "BIND_NOW" in tags["FLAGS"]
    assert "NOW" in tags["FLAGS_1"]


def test_its_memory_is_never_writable_and_executable(library: Path) -> None:
    rows = [row for row in _readelf(library, "--program-headers") if row[0] in ("LOAD", "GNU_STACK", "GNU_RELRO")]
    flags = {(row[0], "".join(row[6:-1])) for row in rows}
    assert {"GNU_RELRO", "GNU_STACK"} <= {name for name, _ in flags}
    assert not [entry for entry in flags if "W" in entry[1] and "E" in entry[1]]
    assert ("GNU_STACK", "RW") in flags


def test_it_has_no_thread_storage_and_no_destructor(library: Path) -> None:
    """A program may unload nothing, and end at any moment; TLS would bind it to one C library."""
    assert "TLS" not in {row[0] for row in _readelf(library, "--program-headers")}
    assert "FINI_ARRAY" not in {row[1].strip("()") for row in _readelf(library, "--dynamic") if row[0].startswith("0x")}


def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    for compiler in ("gcc", "clang"):
        if shutil.which(compiler):
            assert _build(compiler, tmp_path).stat().st_size > 0


@pytest.mark.parametrize("compiler", ["cc", "musl-gcc"])
def test_the_same_file_in_every_c_library(request: pytest.FixtureRequest, rendezvous: Path, compiler: str) -> None:
    require(shutil.which(compiler), f"no {compiler}", "apt install gcc libc6-dev musl-tools")
    world = emulated_world(request, rendezvous)
    executable = program("lockdriver", compiler)
    try:
        drivers = [world.fleet.start(executable=executable) for _ in range(2)]
        for driver in drivers:
            driver.ask("sigcount", 1)  # whoever answers has loaded its libraries
            assert str(LIBRARY) in Path(f"/proc/{driver.pid}/maps").read_text()
        _lock_in_turn(world, *drivers)
        assert len(keepers(rendezvous)) == 1
        assert world.fleet.errors() == ""
    finally:
        world.end()


@pytest.mark.parametrize("function", ["execve", "execv", "bare", "execvp", "posix_spawn"])
def test_starting_programs_where_libc_is_not_found(rendezvous: Path, tmp_path: Path, function: str) -> None:
    environment = shim_environment(rendezvous)
    plain = {name: value for name, value in environment.items() if name != "LD_PRELOAD"}
    environment["LD_PRELOAD"] = str(_build("cc", tmp_path, "-Ddl_iterate_phdr=no_such_function"))
    (tmp_path / "no").touch()
    for path in ("/bin/echo", str(tmp_path / "no"), str(tmp_path / "nowhere")):
        command = [program("starter"), "exec", function, path, "x"]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        if function in ("execvp", "posix_spawn"):
            expected = f"errno {errno.ENOSYS}, 0 descriptors more\n"
        else:
            expected = subprocess.check_output(command, env=plain, text=True)
        assert done.stdout == expected


def _lock_in_turn(world: World, one: Driver, other: Driver) -> None:
    fds = [driver.open(world.file()) for driver in (one, other)]
    assert one.flock(fds[0], EX) == OK
    assert other.flock(fds[1], SH | NB) == BUSY
    assert one.flock(fds[0], SH) == OK
    assert other.flock(fds[1], SH | NB) == OK
    assert one.flock(fds[0], EX | NB) == BUSY
    assert other.flock(fds[1], UN) == OK
    assert one.flock(fds[0], EX) == OK
    call = other.flock_later(fds[1], EX)
    assert one.flock(99, EX) == errno.EBADF
    assert one.flock(fds[0], 0) == errno.EINVAL
    one.kill()
    assert call.result() == OK
    assert world.probe(world.file(), SH) == BUSY
    other.kill()


# aarch64, under an emulator


@pytest.fixture
def emulator(cross_library: Path) -> list[str]:
    """A command that runs an aarch64 program under the shim built for it."""
    require(shutil.which(EMULATOR), f"no {EMULATOR}", "apt install qemu-user")
    return [EMULATOR, "-L", CROSS_ROOT, "-E", f"LD_PRELOAD={cross_library}"]


@pytest.fixture
def fleet(rendezvous: Path) -> Iterator[Fleet]:
    """Programs whose own library is the emulator's business."""
    fleet = Fleet({k: v for k, v in shim_environment(rendezvous).items() if k != "LD_PRELOAD"})
    yield fleet
    fleet.end()


@pytest.mark.parametrize(
    ("mode", "simulated", "result"),
    [("fail", "", errno.ENOSYS), ("fail", "37", errno.ENOLCK), ("success", "", OK), ("success", "95", OK)],
)
def test_modes_on_aarch64(
    fleet: Fleet, emulator: list[str], nolock_dir: Path, mode: str, simulated: str, result: int
) -> None:
    fleet.environment.update({"FLOCKSHIM_MODE": mode, "FLOCKSHIM_SIMULATE": simulated})
    driver = fleet.start(None, *emulator, executable=program("lockdriver", CROSS_COMPILER))
    fd = driver.open(nolock_dir / "file")
    for operation in (EX, SH | NB, UN):
        assert driver.flock(fd, operation) == result
    assert driver.flock(99, EX) == errno.EBADF
    assert driver.flock(fd, 0) == errno.EINVAL
    assert fleet.errors() == ""


def test_locks_on_aarch64(request: pytest.FixtureRequest, rendezvous: Path, fleet: Fleet, emulator: list[str]) -> None:
    """The keeper is this machine's: the emulator refuses the clone(2) by which it is started (see the next test)."""
    world = emulated_world(request, rendezvous)
    try:
        assert world.free(world.file())
        executable = program("lockdriver", CROSS_COMPILER)
        _lock_in_turn(world, *(fleet.start(None, *emulator, executable=executable) for _ in range(2)))
        assert fleet.errors() == ""
    finally:
        assert world.end() == ""


@pytest.mark.parametrize("machine", [os.uname().machine, "aarch64"])
def test_a_child_on_a_stack_of_its_own(request: pytest.FixtureRequest, tmp_path: Path, machine: str) -> None:
    """The assembly that starts the keeper; as fork(2), since the emulator has no child that shares the memory."""
    emulated = machine != os.uname().machine
    prefix: list[str] = [*request.getfixturevalue("emulator")[:3]] if emulated else []
    source = tmp_path / "child.c"
    source.write_text(CHILD)
    target = tmp_path / "child"
    compiler = CROSS_COMPILER if emulated else "cc"
    flags = ["-D_GNU_SOURCE", "-O2", f"-I{ROOT}/shim"]
    subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
    assert subprocess.run([*prefix, str(target)], check=False).returncode == 42


CHILD = r"""
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>

#include "syscalls.h"

static char stack[65536] __attribute__((aligned(64)));

static void in_child(void *argument) {
    char *here = __builtin_frame_address(0);
    int status = *(int *)argument;

    sys1(SYS_exit_group, here > stack && here <= stack + sizeof stack ? status : 1);
}

int main(void) {
    int argument = 42, status;
    long child = sys_clone_call(SIGCHLD, stack + sizeof stack, in_child, &argument);

    if (child <= 0 || sys4(SYS_wait4, child, &status, 0, 0) != child || !WIFEXITED(status))
        return 2;
    return WEXITSTATUS(status);
}
"""
