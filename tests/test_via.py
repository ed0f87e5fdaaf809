"""``--via auto`` finds the way into every kind of program, and says what is left where there is none."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support.lockcommand import descendants
from support.proc import await_end

from flockshim.pytest_plugin import require

FLOCKSHIM = [sys.executable, "-m", "flockshim"]
BASE = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and not name.startswith("FLOCKSHIM_")}

# Says that it runs, waits for the end of its input, and exits with 7.
PROGRAM = r"""
#include <unistd.h>
int main(void) {
    char byte;
    while (write(1, "runs\n", 5) != 5) continue;
    while (read(0, &byte, 1) > 0) continue;
    return 7;
}
"""

# The same without a C library, for which there may be none here.
PROGRAM_32 = r"""
static int call(int number, int one, const void *two, int three) {
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(one), "c"(two), "d"(three) : "memory");
    return result;
}
void _start(void) {
    char byte;
    call(4, 1, "runs\n", 5);
    while (call(3, 0, &byte, 1) > 0) continue;
    for (;;) call(1, 7, 0, 0);
}
"""

PROGRAM_GO = """
package main
import "os"
func main() {
    os.Stdout.WriteString("runs\\n")
    buffer := make([]byte, 1)
    for { if n, _ := os.Stdin.Read(buffer); n == 0 { break } }
    os.Exit(7)
}
"""


class Seen(NamedTuple):
    """How a COMMAND runs, as anybody can see."""

    program: str
    supervised: bool
    preloaded: bool


SUPERVISED = (True, False)
PRELOADED = (False, True)


def look(*words: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> Seen:
    """Run ``flockshim WORDS`` until its COMMAND runs."""
    with subprocess.Popen(
        [*FLOCKSHIM, *words],
        env={**BASE, **(env or {})},
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        line = process.stdout.readline()
        assert line == "runs\n", process.stderr.read()
        above = descendants(process.pid)
        pid = above[0] if above else process.pid
        proc = Path(f"/proc/{pid}")
        status = proc.joinpath("status").read_text().splitlines()
        filtered = "Seccomp:\t2" in status
        # Launcher, supervisor, COMMAND: or COMMAND alone.
        assert len(above) == (2 if filtered else 0)
        environment = proc.joinpath("environ").read_bytes().split(b"\0")
        preloaded = any(entry.startswith(b"LD_PRELOAD=") and b"libflockshim.so" in entry for entry in environment)
        seen = Seen(os.readlink(proc / "exe"), filtered, preloaded)
        process.stdin.close()
        assert (process.wait(), process.stderr.read()) == (7, "")
        for each in above:
            await_end(each)
    return seen


def need(tool: str, package: str) -> None:
    require(shutil.which(tool), f"{tool} is missing", f"apt install {package}")


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles PROGRAM with the compiler and options given, once each."""
    directory = tmp_path_factory.mktemp("via")

    def build(compiler: str, *options: str, source: str = PROGRAM) -> Path:
        need(compiler, {"musl-gcc": "musl-tools"}.get(compiler, compiler))
        path = directory / "-".join([compiler, *options]).replace("/", "_")
        if not path.exists():
            path.with_suffix(".c").write_text(source)
            subprocess.run([compiler, *options, "-o", path, path.with_suffix(".c")], check=True)
        return path

    return build


@pytest.fixture
def dynamic(built: Callable[..., Path]) -> Path:
    return built("gcc")


@pytest.fixture
def static(built: Callable[..., Path]) -> Path:
    return built("gcc", "-static")


@pytest.mark.parametrize(
    ("compiler", "option"), [("gcc", "-pie"), ("gcc", "-no-pie"), ("gcc", "-s"), ("musl-gcc", "-O1")]
)
def test_dynamic_programs(compiler: str, option: str, built: Callable[..., Path]) -> None:
    program = built(compiler, option)
    for words in [], ["--via", "auto"], ["--via", "preload"]:
        assert look(*words, program) == (str(program), *PRELOADED)
    assert look("--via", "seccomp", program) == (str(program), *SUPERVISED)


@pytest.mark.parametrize(
    ("compiler", "option"), [("gcc", "-static"), ("gcc", "-static-pie"), ("musl-gcc", "-static"), ("gcc", "-static -s")]
)
def test_static_programs(compiler: str, option: str, built: Callable[..., Path]) -> None:
    program = built(compiler, *option.split())
    for words in [], ["--via", "seccomp"]:
        assert look(*words, program) == (str(program), *SUPERVISED)


def test_the_variable(dynamic: Path, static: Path) -> None:
    assert look(dynamic, env={"FLOCKSHIM_VIA": "seccomp"}) == (str(dynamic), *SUPERVISED)
    assert look(static, env={"FLOCKSHIM_VIA": "auto"}) == (str(static), *SUPERVISED)
    assert look("--via", "preload", dynamic, env={"FLOCKSHIM_VIA": "seccomp"}) == (str(dynamic), *PRELOADED)
    assert look("--via", "auto", static, env={"FLOCKSHIM_VIA": "preload"}) == (str(static), *SUPERVISED)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there are 32-bit programs for x86_64 only")
def test_a_32_bit_program(built: Callable[..., Path]) -> None:
    program = built("gcc", "-m32", "-static", "-nostdlib", "-ffreestanding", "-fno-pic", source=PROGRAM_32)
    try:
        subprocess.run([program], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs: {error.strerror}")
    assert look(program) == (str(program), *SUPERVISED)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-ldflags=-buildid="],
        ["-buildmode=pie"],
        ["-buildmode=pie", "-ldflags=-buildid= -s -w"],
    ],
)
def test_go_programs(options: list[str], tmp_path: Path) -> None:
    need("go", "golang")
    source = tmp_path / "main.go"
    source.write_text(PROGRAM_GO)
    program = tmp_path / "program"
    env = {**BASE, "GOFLAGS": "", "GO111MODULE": "off"}
    subprocess.run(["go", "build", *options, "-o", program, source], env=env, check=True)
    assert look(program) == (str(program), *SUPERVISED)


def test_scripts(static: Path, dynamic: Path, tmp_path: Path) -> None:
    inner = script(tmp_path / "inner", f"#!{static}\n")
    outer = script(tmp_path / "outer", f"#!{inner} word\n")
    assert look(outer) == (str(static), *SUPERVISED)
    assert look(script(tmp_path / "dynamic", f"#!{dynamic}\n")) == (str(dynamic), *PRELOADED)
    found = {"PATH": f"{static.parent}:{os.environ['PATH']}"}
    by_env = script(tmp_path / "env", f"#!/usr/bin/env {static.name}\n")
    assert look(by_env, env=found) == (str(static), *SUPERVISED)
    by_env = script(tmp_path / "env", f"#!/usr/bin/env -S A=1 {dynamic.name} word\n")
    assert look(by_env, env=found) == (str(dynamic), *PRELOADED)
    shutil.copy(static, tmp_path / "relative")
    script(tmp_path / "near", "#!relative\n")
    assert look("./near", cwd=tmp_path) == (str(tmp_path / "relative"), *SUPERVISED)


@pytest.mark.parametrize(
    "options",
    ["-i {}", "- {}", "-u LD_PRELOAD {}", "LD_PRELOAD= {}", "-S'{}'", "-u A --unset=LD_PRELOAD A=1 {}", "env -i {}"],
)
def test_env_that_takes_the_library_away(options: str, dynamic: Path) -> None:
    """Or might: what cannot be read exactly is not taken for harmless."""
    assert look("env", *options.format(dynamic).split()) == (str(dynamic), *SUPERVISED)


def test_env_that_leaves_the_library(dynamic: Path, static: Path) -> None:
    assert look("env", "A=1", dynamic) == (str(dynamic), *PRELOADED)
    assert look("env", "A=1", static) == (str(static), *SUPERVISED)
    assert look("env", "A=1", "env", "-u", "A", static) == (str(static), *SUPERVISED)


def test_what_was_preloaded_besides_stays(static: Path, dynamic: Path, tmp_path: Path) -> None:
    """For the dynamic programs among those that COMMAND starts."""
    other = tmp_path / "other.so"
    subprocess.run(["gcc", "-shared", "-o", other, "-x", "c", "/dev/null"], check=True)
    show = "import os; print(os.environ.get('LD_PRELOAD'))"

    def preloaded(**variables: str) -> str:
        command = [*FLOCKSHIM, "--via", "seccomp", sys.executable, "-c", show]
        done = subprocess.run(command, env={**BASE, **variables}, capture_output=True, text=True, check=True)
        return done.stdout.rstrip("\n")

    assert preloaded() == "None"
    assert preloaded(LD_PRELOAD=str(other)) == str(other)
    # As it is inside a preloaded shell.
    exported = subprocess.run(
        [*FLOCKSHIM, "env"], env={**BASE, "LD_PRELOAD": str(other)}, capture_output=True, text=True, check=True
    )
    variables = dict(line.split("=", 1) for line in exported.stdout.splitlines())
    assert "libflockshim.so" in variables["LD_PRELOAD"]
    assert preloaded(**variables) == str(other)


def test_mode_fail_needs_nothing(static: Path) -> None:
    for via in "auto", "preload", "seccomp":
        assert not look("--mode", "fail", "--via", via, static).supervised


def test_all_that_command_starts_is_supervised(static: Path) -> None:
    command = ["sh", "-c", f"nice {static} | cat; exit 7"]
    with subprocess.Popen(
        [*FLOCKSHIM, "--via", "seccomp", *command], env=BASE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        family = descendants(process.pid)
        seen = [Path(f"/proc/{pid}/status").read_text().count("Seccomp:\t2") for pid in family]
        # All but the supervisor, which is their ancestor and so the last.
        assert seen == [1] * (len(family) - 1) + [0] and len(family) >= 4
        process.stdin.close()
        assert process.wait() == 7


def test_set_uid_programs_are_refused_as_before(dynamic: Path) -> None:
    """No filter leaves them their privileges, but root's, who needs none."""
    require(os.geteuid() == 0, "only root can make files of somebody else's", "run the tests as root")
    other = dynamic.with_name("set-uid")
    shutil.copy(dynamic, other)
    os.chown(other, 65534, 65534)
    other.chmod(0o4755)
    command = [*FLOCKSHIM, str(other)]
    done = subprocess.run(command, env=BASE, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (125, "")
    assert "set-uid" in done.stderr and "start flockshim behind it, not before it" in done.stderr
    assert look("--via", "seccomp", other) == (str(other), *SUPERVISED)
