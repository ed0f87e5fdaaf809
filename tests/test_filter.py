"""The filters: which system calls they see on which architecture, and what they answer without a supervisor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.lockcommand import FLOCKSHIM, locks, settings
from support.programs import SOURCES, WARNINGS, static_program
from support.worlds import FLOCK_SYSCALL, World

from flockshim.pytest_plugin import require

SHIM = SOURCES.parent.parent / "shim"
EIO, EBADF, EINVAL, ENOSYS = 5, 9, 22, 38
BASE = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and not name.startswith("FLOCKSHIM_")}

# linux/audit.h: machine, 64 bits, little endian.
X86_64, I386, AARCH64, ARM, RISCV, MIPS = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028, 0xC00000F3, 8
X32 = 0x40000000
FLOCK = {
    "x86_64": {(X86_64, 73), (X86_64, X32 | 73), (I386, 143)},
    "aarch64": {(AARCH64, 32), (ARM, 143)},
}
FCNTL = {
    "x86_64": {(X86_64, 72): 64, (X86_64, X32 | 72): 64, (I386, 55): 32, (I386, 221): 32},
    "aarch64": {(AARCH64, 25): 64, (ARM, 55): 32, (ARM, 221): 32},
}
"""fcntl(2) and fcntl64(2), and of how many bits the programs are that call them so."""
SETTING, TESTING = {64: {6, 7, 37, 38}, 32: {6, 7, 13, 14, 37, 38}}, {64: {5, 36}, 32: {5, 12, 36}}
"""Commands for record locks. What is F_GETLK64 and so on to programs of 32 bits is unknown to others."""
ALLOW, NOTIFY, ERRNO = 0x7FFF0000, 0x7FC00000, 0x00050000

only_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="only an x86_64 has these calls")


# What the filters say, step by step: bpf(4)


def _run_filter(program: Sequence[tuple[int, int, int, int]], architecture: int, number: int, *arguments: int) -> int:
    values = {0: number, 4: architecture}
    for index, argument in enumerate(arguments):
        values[16 + 8 * index], values[20 + 8 * index] = argument & 0xFFFFFFFF, argument >> 32
    accumulator, at = 0, 0
    while True:
        code, then, otherwise, value = program[at]
        at += 1
        if code == 0x20:  # load a word
            accumulator = values[value]
        elif code == 0x54:  # and
            accumulator &= value
        elif code == 0x15:  # is it equal?
            at += then if accumulator == value else otherwise
        elif code == 0x35:  # is it at least?
            at += then if accumulator >= value else otherwise
        else:
            assert code == 0x06  # return
            return value


class Dump:
    """The filters as they are compiled for a machine."""

    def __init__(self, machine: str, directory: Path) -> None:
        compiler, self.runner = "cc", []
        if machine != platform.machine():
            compiler, self.runner = f"{machine}-linux-gnu-gcc", [f"qemu-{machine}"]
            require(shutil.which(compiler) and shutil.which(f"qemu-{machine}"), f"no {compiler}", "see .ci/run")
        self.program = directory / "filterdump"
        options = ["-D_GNU_SOURCE", *WARNINGS, "-static", f"-I{SHIM}"]
        sources = [str(SOURCES / "filterdump.c"), str(SHIM / "filter.c")]
        subprocess.run([compiler, *options, *sources, "-o", str(self.program)], check=True)

    def __call__(self, *words: str) -> list[tuple[int, int, int, int]]:
        done = subprocess.run([*self.runner, self.program, *words], capture_output=True, text=True, check=True)
        found = []
        for line in done.stdout.splitlines():
            code, then, otherwise, value = map(int, line.split())
            found.append((code, then, otherwise, value))
        return found


@pytest.fixture(scope="module", params=["x86_64", "aarch64"])
def machine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def dump(machine: str, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    return Dump(machine, tmp_path_factory.mktemp(machine))


def test_a_filter_sees_lock_calls_of_every_architecture_and_nothing_else(machine: str, dump: Dump) -> None:
    """Numbers mean other calls elsewhere: 73 of an x86_64 is flock(2), and of an i386 sigpending(2).

    The second argument is an operation of flock(2), and a command of fcntl(2) that is none for record locks.
    """
    reporting, answering = dump("report"), dump("answer", "38")
    numbers = [*range(600), *range(X32, X32 | 600), 0x80000000 | 73, X32 << 1 | 73, 0xFFFFFFFF]
    for architecture in X86_64, I386, AARCH64, ARM, RISCV, MIPS:
        for number in numbers:
            seen = (architecture, number) in FLOCK[machine]
            assert _run_filter(reporting, architecture, number, 3, 2) == (NOTIFY if seen else ALLOW)
            assert _run_filter(answering, architecture, number, 3, 2) == (ERRNO | ENOSYS if seen else ALLOW)


@pytest.mark.parametrize("error", [0, 5, 38, 524, 4095])
def test_an_answer_without_a_supervisor(machine: str, dump: Dump, error: int) -> None:
    """Only where the kernel would not refuse the call by itself, as far as can be seen."""
    answering = dump("answer", str(error))
    for architecture, number in FLOCK[machine]:
        for operation in 1, 2, 8, 5, 6, 12:
            for descriptor in 0, 3, 1 << 20, 0x7FFFFFFE, 1 << 32 | 3:
                found = _run_filter(answering, architecture, number, descriptor, operation)
                assert found == ERRNO | error
            for descriptor in 0x80000000, 0xFFFFFFFF:
                assert _run_filter(answering, architecture, number, descriptor, operation) == ALLOW
        for operation in 0, 3, 4, 7, 9, 10, 11, 16, 32, 34, 0x102, 0x80000002, 0xFFFFFFFF:
            assert _run_filter(answering, architecture, number, 3, operation) == ALLOW


COMMANDS = [*range(64), *range(1024, 1044), 0x40000006, 0x80000006, 0xFFFFFFFF]


def test_a_filter_sees_the_commands_for_record_locks_and_no_others(machine: str, dump: Dump) -> None:
    reporting = dump("report")
    for (architecture, number), bits in FCNTL[machine].items():
        seen = {c for c in COMMANDS if _run_filter(reporting, architecture, number, 3, c) == NOTIFY}
        assert seen == SETTING[bits] | TESTING[bits]
        # The kernel looks at the lower half only.
        assert _run_filter(reporting, architecture, number, 3, 7 << 32 | 6) == NOTIFY
        assert _run_filter(reporting, architecture, number, 3, 6 << 32 | 1) == ALLOW


@pytest.mark.parametrize("error", [0, 38, 4095])
def test_an_answer_to_record_locks(machine: str, dump: Dump, error: int) -> None:
    """Where the lock that is in the way would have to be written into memory, success is left to the kernel."""
    answering = dump("answer", str(error))
    for (architecture, number), bits in FCNTL[machine].items():
        answered = {c for c in COMMANDS if _run_filter(answering, architecture, number, 3, c) == ERRNO | error}
        assert answered == (SETTING[bits] | TESTING[bits] if error else SETTING[bits])
        passed = {c for c in COMMANDS if _run_filter(answering, architecture, number, 3, c) == ALLOW}
        assert passed == set(COMMANDS) - answered


# What a program finds

LOCK_ALL = """
import fcntl, sys
for path in sys.argv[1:]:
    try:
        fcntl.flock(open(path), fcntl.LOCK_SH)
        print(0)
    except OSError as error:
        print(-error.errno)
"""


def calls(way: Sequence[str], *words: str | Path, **more: str) -> list[int]:
    """What the calls of ``rawcalls WORDS`` return, under flockshim with the options WAY."""
    command = [*FLOCKSHIM, *way, str(static_program("rawcalls")), *map(str, words)]
    done = subprocess.run(command, env={**BASE, **more}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    return [int(line) for line in done.stdout.split()]


def flock(descriptor: int, operation: int) -> str:
    return f"native:{FLOCK_SYSCALL}:{descriptor}:{operation}"


CONSTANT = [
    (["--mode", "success", "--quiet"], 0),
    (["--mode", "fail", "--simulate", "EIO"], -EIO),
    (["--mode", "success", "--simulate", "EIO", "--quiet"], 0),
    (["--mode", "fail", "--simulate", "524", "--via", "seccomp"], -524),
]


@pytest.mark.parametrize(("way", "answer"), CONSTANT)
def test_a_constant_answer_needs_no_supervisor(way: list[str], answer: int, tmp_path: Path) -> None:
    command = [*FLOCKSHIM, *way, str(static_program("rawcalls")), str(tmp_path / "file"), flock(3, 2), "-"]
    with subprocess.Popen(command, env=BASE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        assert int(process.stdout.readline()) == answer
        # flockshim has become it.
        assert os.readlink(f"/proc/{process.pid}/exe") == str(static_program("rawcalls"))
        assert "Seccomp:\t2" in Path(f"/proc/{process.pid}/status").read_text()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait() == 7


@pytest.mark.parametrize(("way", "answer"), CONSTANT)
def test_what_the_kernel_refuses_it_refuses_still(way: list[str], answer: int, tmp_path: Path) -> None:
    good = [(0, 1), (3, 2), (3, 6), (3, 8), (3, 12)]
    bad = {(-1, 2): -EBADF, (0x7FFFFFFF, 2): -EBADF, (3, 0): -EINVAL, (3, 3): -EINVAL, (3, 4): -EINVAL}
    found = calls(way, tmp_path / "file", *[flock(*each) for each in [*good, *bad]])
    assert found == [answer] * len(good) + list(bad.values())


@only_x86_64
@pytest.mark.parametrize("way", [way for way, _ in CONSTANT] + [["--simulate", "EIO", "--mode", "host"]])
def test_calls_of_other_architectures_are_no_way_around(
    way: list[str], tmp_path: Path, session_rendezvous: Path
) -> None:
    probe = static_program("rawcalls")
    own = subprocess.run([probe, "i386:64:0:0"], capture_output=True, text=True, check=False)
    rendezvous = {"FLOCKSHIM_DIR": str(session_rendezvous)}
    (answer,) = calls(way, tmp_path / "file", flock(3, 2), **rendezvous)
    assert calls(way, tmp_path / "file", f"native:{X32 | 73}:3:2", **rendezvous) == [answer]
    if own.returncode < 0:
        pytest.skip("this kernel runs no 32-bit programs")
    assert calls(way, tmp_path / "file", "i386:143:3:2", **rendezvous) == [answer]


@only_x86_64
@pytest.mark.parametrize("way", [["--mode", "fail", "--simulate", "EIO"], ["--via", "seccomp"]])
def test_other_calls_are_the_kernels(way: list[str], tmp_path: Path) -> None:
    """fsync, fchmod, fcntl, dup, by their numbers: neighbours of flock, and what its number means to others."""
    words = [tmp_path / "file"]
    others = ["native:72:3:1", "native:74:3:0", "native:32:3:0", "native:77:3:5", "native:143:0:0", "native:9999:0:0"]
    plain = subprocess.run(
        [static_program("rawcalls"), *words, *others], capture_output=True, text=True, check=False
    ).stdout
    assert calls(way, *words, *others) == [int(line) for line in plain.split()]


def test_simulation_decides_by_file(tmp_path: Path) -> None:
    """As the library does."""
    directory = tmp_path / "directory"
    (directory / "below").mkdir(parents=True)
    (tmp_path / "directory-beside").mkdir()
    inside, below, beside, outside = (
        tmp_path / name for name in ("directory/file", "directory/below/file", "directory-beside/file", "file")
    )
    for path in inside, below, beside, outside:
        path.touch()
    into, out_of = tmp_path / "into", directory / "out-of"
    into.symlink_to(inside)
    out_of.symlink_to(outside)
    (tmp_path / "link").symlink_to(directory)
    expected = {
        inside: -EIO,
        below: -EIO,
        beside: 0,
        outside: 0,
        into: -EIO,
        out_of: 0,
        tmp_path / "link" / "file": -EIO,
    }
    for name in "directory", "link":
        way = ["--mode", "fail", "--simulate", f"EIO:{tmp_path / name}"]
        words = [word for index, path in enumerate(expected) for word in (path, flock(3 + index, 1))]
        assert calls(way, *words) == list(expected.values())
        command = [*FLOCKSHIM, "--via", "preload", *way, sys.executable, "-c", LOCK_ALL, *map(str, expected)]
        done = subprocess.run(command, env=BASE, capture_output=True, text=True, check=True)
        assert [int(line) for line in done.stdout.split()] == list(expected.values())


def test_directories_are_not_simulated(tmp_path: Path) -> None:
    words = ["--mode", "fail", "--simulate", f"EIO:{tmp_path}", "--via", "seccomp"]
    command = [*FLOCKSHIM, *words, "flock", str(tmp_path), "true"]
    assert subprocess.run(command, env=BASE, check=False).returncode == 0


def test_simulation_of_a_directory_is_emulated(tmp_path: Path, session_rendezvous: Path) -> None:
    world = World("native", tmp_path, {**os.environ, "FLOCKSHIM_DIR": str(session_rendezvous)})
    (tmp_path / "directory").mkdir()
    command = [*FLOCKSHIM, "--mode", "host", "--simulate", f"ENOSYS:{tmp_path}/directory"]
    command += [str(static_program("rawcalls")), str(tmp_path / "directory" / "file"), flock(3, 6), "-"]
    with subprocess.Popen(
        command, env=settings(world), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "0\n"
        (file,) = locks(world, tmp_path / "directory" / "file")
        assert len(file["holders"]) == 1
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait() == 7
    world.end()
