"""Go locks without the C library: a program that does nothing else, and the go command with its caches."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Union

import pytest
from support import lockcommand
from support.driver import BUSY, EX, OK, UN
from support.proc import await_true
from support.programs import SOURCES
from support.uv import Done, end, succeeded
from support.uvproject import ends
from support.worlds import World

from flockshim.pytest_plugin import require

Word = Union[str, "os.PathLike[str]"]

SOAK = bool(os.environ.get("FLOCKSHIM_SOAK"))
PROCESSES, GOROUTINES, TURNS = (10, 10, 10) if SOAK else (4, 6, 5)
BUILDS = 20 if SOAK else 4
ARCHITECTURES = ["386"] if SOAK and os.uname().machine == "x86_64" else []  # go makes its library first

# Nothing of the user's, and no network.
OFFLINE = {
    "GOENV": "off",
    "GOFLAGS": "-mod=mod -modcacherw",
    "GOSUMDB": "off",
    "GOTELEMETRY": "off",
    "GOTOOLCHAIN": "local",
    "GOWORK": "off",
}
MODULES = ["one", "three", "two"]
MAIN = f"""package main

import (
{"".join(f'	"example.com/{name}"{chr(10)}' for name in MODULES)})

func main() {{ println({", ".join(f"{name}.Name()" for name in MODULES)}) }}
"""


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="flockshim-go-")


@functools.cache
def golocks(cgo: str, architecture: str = "") -> str:
    """tests/programs/golocks.go: with cgo it needs the dynamic linker, without it is static."""
    require(shutil.which("go"), "no go", "apt install golang-go")
    target = f"{scratch().name}/golocks{cgo}{architecture}"
    environment = {**os.environ, **OFFLINE, "GOCACHE": f"{scratch().name}/cache", "CGO_ENABLED": cgo}
    if architecture:
        environment["GOARCH"] = architecture
    subprocess.run(["go", "build", "-o", target, SOURCES / "golocks.go"], env=environment, check=True)
    return target


def start(world: World, mode: str | None, *words: Word, **more: str) -> subprocess.Popen[str]:
    """Start a program under flockshim, unless MODE is None; with the variables MORE."""
    launcher = [] if mode is None else [sys.executable, "-m", "flockshim", "--mode", mode]
    return subprocess.Popen(
        [*launcher, *words],
        cwd=world.directory,
        env=lockcommand.settings(world, **more),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("cgo", ["0", "1"])
def test_a_go_program_is_refused_without_flockshim(emulated: World, tmp_path: Path, cgo: str) -> None:
    count = golocks(cgo), "count", "file", "1", "1"
    refused = Done(1, "", "golocks: function not implemented\n")
    assert end(start(emulated, None, *count)) == refused
    assert end(start(emulated, "fail", *count)) == refused
    simulate = "--simulate", f"ENOLCK:{tmp_path}"
    elsewhere = golocks(cgo), "count", tmp_path / "file", "1", "1"
    assert end(start(emulated, "fail", *simulate, *elsewhere)) == Done(1, "", "golocks: no locks available\n")
    assert end(start(emulated, "host", *simulate, *elsewhere)) == Done(0, "", "")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mode", "cgo", "architecture"),
    [("host", "1", ""), ("auto", "0", ""), *(("host", "0", name) for name in ARCHITECTURES)],
)
def test_goroutines_of_several_processes_lose_no_update(
    emulated: World, mode: str, cgo: str, architecture: str
) -> None:
    counting = golocks(cgo, architecture), "count", "number", str(GOROUTINES), str(TURNS)
    for done in ends([start(emulated, mode, *counting) for _ in range(PROCESSES)], 280):
        assert done == Done(0, "", "")
    assert int((emulated.directory / "number").read_text()) == PROCESSES * GOROUTINES * TURNS


def script(world: World) -> str:
    """A script that its interpreter locks."""
    path = world.directory / "script"
    path.write_text(f"#!{golocks('0')} hold\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("way", ["itself", "by env", "as interpreter", "by go run"])
def test_a_go_program_and_preloaded_ones_exclude_each_other(emulated: World, way: str) -> None:
    words: dict[str, tuple[Word, ...]] = {
        "itself": (golocks("1"), "hold", "script"),
        "by env": ("env", "-i", golocks("0"), "hold", "script"),
        "as interpreter": ("./script",),
        "by go run": ("go", "run", SOURCES / "golocks.go", "hold", "script"),
    }
    command = words[way]
    path = Path(script(emulated))
    more = {**OFFLINE, "GOCACHE": f"{scratch().name}/cache"}
    driver = emulated.start()
    descriptor = driver.open(path, os.O_RDONLY)  # what is open for writing is not executed
    assert driver.flock(descriptor, EX) == OK
    busy = end(start(emulated, "host", *command, **more))
    assert (busy.status, busy.err.splitlines()[0]) == (1, "golocks: resource temporarily unavailable")
    driver.close(descriptor)
    holder = start(emulated, "host", *command, **more)
    assert holder.stdout
    assert holder.stdout.readline() == f"held by {os.getuid()}\n", end(holder)
    assert emulated.probe(path, EX) == BUSY
    assert holder.stdin
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "unlocked\n", end(holder)
    assert emulated.free(path)
    assert succeeded(holder).err == ""


class Modules:
    """A project of three modules, which lie in a directory that is go's proxy."""

    def __init__(self, world: World, directory: Path, proxy: Path) -> None:
        """All that go writes goes into DIRECTORY."""
        for name in MODULES:
            write_module(proxy / "example.com" / name / "@v", name)
        self._world = world
        self.project = directory / "project"
        self.project.mkdir()
        self.cache = directory / "modules"
        required = "".join(f"require example.com/{name} v1.0.0\n" for name in MODULES)
        (self.project / "go.mod").write_text(f"module example.com/main\n\ngo 1.19\n\n{required}")
        (self.project / "main.go").write_text(MAIN)
        self._variables = {
            **OFFLINE,
            "CGO_ENABLED": "0",
            "GOCACHE": str(directory / "cache"),
            "GOMODCACHE": str(self.cache),
            "GOPATH": str(directory / "path"),
            "GOPROXY": proxy.as_uri(),
        }

    def start(self, mode: str | None, *words: Word) -> subprocess.Popen[str]:
        return start(self._world, mode, "env", "-C", self.project, "go", *words, **self._variables)

    def succeed(self, mode: str | None, *words: Word) -> Done:
        return succeeded(self.start(mode, *words))

    def names(self) -> set[str]:
        """What is in the project and the module cache besides what cluster mode records (docs/cluster.md)."""
        found = [path for base in (self.project, self.cache) for path in base.rglob("*")]
        return {str(path.relative_to(self.project.parent)) for path in found if ".flockshim" not in path.name}


def write_module(directory: Path, name: str) -> None:
    """Write a module as a proxy has it."""
    directory.mkdir(parents=True)
    module = f"module example.com/{name}\n\ngo 1.19\n"
    (directory / "list").write_text("v1.0.0\n")
    (directory / "v1.0.0.info").write_text(json.dumps({"Version": "v1.0.0", "Time": "2020-01-01T00:00:00Z"}))
    (directory / "v1.0.0.mod").write_text(module)
    with zipfile.ZipFile(directory / "v1.0.0.zip", "w") as archive:
        prefix = f"example.com/{name}@v1.0.0"
        archive.writestr(f"{prefix}/go.mod", module)
        archive.writestr(f"{prefix}/{name}.go", f'package {name}\n\nfunc Name() string {{ return "{name}" }}\n')


@pytest.fixture
def modules(emulated: World, tmp_path: Path) -> Modules:
    require(shutil.which("go"), "no go", "apt install golang-go")
    return Modules(emulated, emulated.directory, tmp_path / "proxy")


COMMANDS = [
    ("mod", "download"),
    ("mod", "verify"),
    ("list", "-m", "all"),
    ("list", "-deps", "."),
    ("mod", "tidy"),
    ("build", "-o", "main", "."),
]


@pytest.mark.parametrize("mode", [None, "fail"])
def test_go_stops_without_flockshim(modules: Modules, mode: str | None) -> None:
    for words in COMMANDS:
        done = end(modules.start(mode, *words))
        assert (done.status, done.out) == (1, ""), words
        assert re.fullmatch(r"go: RLock .*/go\.mod: function not implemented\n", done.err), words
    assert not modules.cache.exists()


@pytest.mark.parametrize("mode", ["auto", "host"] if SOAK else ["auto"])
def test_go_does_under_flockshim_what_it_does_where_locks_work(
    modules: Modules, emulated: World, tmp_path: Path, mode: str
) -> None:
    native = Modules(emulated, tmp_path, tmp_path / "again")
    for words in COMMANDS:
        done, expected = modules.succeed(mode, *words), native.succeed(None, *words)
        assert done == expected, words
        assert modules.names() == native.names(), words
    assert subprocess.run([modules.project / "main"], capture_output=True, check=True).stderr == b"one three two\n"
    modules.succeed(mode, "clean", "-cache", "-modcache")
    assert not modules.cache.exists()


def test_go_waits_for_another_program(modules: Modules, emulated: World) -> None:
    lock = modules.cache / "cache/download/example.com/one/@v/v1.0.0.lock"
    lock.parent.mkdir(parents=True)
    driver = emulated.start()
    descriptor = driver.open(lock, os.O_RDWR | os.O_CREAT)
    assert driver.flock(descriptor, EX) == OK
    waiter = modules.start("host", "mod", "download")
    await_true(lambda: len(lockcommand.waiters(emulated, lock)) == 1, "go to wait")
    assert not (modules.cache / "example.com/one@v1.0.0").exists()
    assert driver.flock(descriptor, UN) == OK
    assert succeeded(waiter) == Done(0, "", "")
    assert (modules.cache / "example.com/one@v1.0.0").is_dir()


def test_many_builds_at_once(modules: Modules) -> None:
    """From one project with one cache for all, both of which are empty."""
    started = [modules.start("auto", "build", "-o", f"main{number}", ".") for number in range(BUILDS)]
    started += [modules.start("auto", *words) for words in COMMANDS[:3]]
    assert [end(process).status for process in started] == [0] * len(started)
    for number in range(BUILDS):
        main = modules.project / f"main{number}"
        assert subprocess.run([main], capture_output=True, check=True).stderr == b"one three two\n"
    assert modules.succeed("auto", "mod", "verify").out == "all modules verified\n"
