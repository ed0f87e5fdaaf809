"""All else that fcntl(2) does is as without flockshim; and a record lock is the same by whichever way it is taken."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Union

import pytest
from conftest import shim_environment
from support.driver import OK, Died, Driver, Fleet
from support.keepers import keepers
from support.proc import await_true
from support.programs import program
from support.records import (
    AGAIN,
    GETLK,
    OFD,
    RD,
    SETLK,
    SETLKW,
    UN,
    WR,
    Lock,
    Stranger,
    ask,
    await_waiting,
    conflict,
    driver_32,
    got,
    lock,
    lock_later,
)
from support.worlds import ALL, ON_KERNEL, World

from flockshim.pytest_plugin import require

WORLDS = ALL

RECORDS = {command + more for command in (GETLK, SETLK, SETLKW) for more in (0, OFD)}
NUMBERS = [number for number in [*range(-2, 64), *range(1020, 1048)] if number not in RECORDS]
"""All commands that there are, and as many that there aren't."""

# Of linux/fcntl.h, where Python has no names for them.
GET_RW_HINT, SET_RW_HINT, GET_FILE_RW_HINT, SET_FILE_RW_HINT = range(1035, 1039)
SETPIPE_SZ, GETPIPE_SZ = 1031, 1032
SETOWN_EX, GETOWN_EX, GETOWNER_UIDS = 15, 16, 17
OWNER_THREAD, OWNER_PROCESS = 0, 1
SELF = "the process itself"

Answer = tuple[Union[int, str], int, str]


class Pair(NamedTuple):
    """The same program without and with the library."""

    plain: Driver
    shim: Driver


@pytest.fixture(params=["cc", "musl-gcc"])
def pair(request: pytest.FixtureRequest, session_rendezvous: Path) -> Iterator[Pair]:
    require(shutil.which(request.param), f"no {request.param}", "apt install gcc libc6-dev musl-tools")
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    fleets = [Fleet(environment) for environment in (plain, shim_environment(session_rendezvous))]
    yield Pair(*(fleet.start(executable=program("lockdriver", request.param)) for fleet in fleets))
    for fleet in fleets:
        assert fleet.errors() == ""
        fleet.end()


@pytest.fixture(params=["fcntl", "fcntl64"])
def how(request: pytest.FixtureRequest) -> str:
    """The function that is called; musl has one only."""
    if request.param == "fcntl64" and "musl" in request.node.callspec.params["pair"]:
        pytest.skip("musl has no fcntl64")
    return str(request.param)


def _call(driver: Driver, how: str, fd: int, command: int, argument: int | bytes = 0) -> Answer:
    """Value, errno, and what the argument points to, if it does; with one word for the process's own id."""
    if isinstance(argument, bytes):
        call = driver.start("fcntlbytes", how, fd, command, argument.hex())
    else:
        call = driver.start("fcntl", how, fd, command, argument)
    value, err = call.value()
    own = struct.pack("i", driver.pid).hex()
    return SELF if value == driver.pid else value, err, call.more().replace(own, SELF)


def _descriptors(driver: Driver, directory: Path) -> list[int]:
    """One of each kind."""
    memory = os.memfd_create("passthrough", os.MFD_ALLOW_SEALING)
    try:
        return [
            driver.open(directory / "file"),
            driver.open(directory / "file", os.O_RDONLY),
            driver.open(directory, os.O_RDONLY | os.O_DIRECTORY),
            driver.open(directory / "file", os.O_PATH),
            *divmod(driver.ask("pipe"), 1000),
            driver.adopt(memory),
            driver.open("/dev/null"),
            50,
            -1,
        ]
    finally:
        os.close(memory)


def _of_each(pair: Pair, directory: Path) -> tuple[list[int], list[int]]:
    (directory / "file").write_bytes(bytes(100))
    descriptors = [_descriptors(driver, directory) for driver in pair]
    assert descriptors[0] == descriptors[1]
    return descriptors[0], descriptors[1]


def _arguments(driver: Driver, command: int) -> list[int]:
    if command == fcntl.F_SETOWN:
        return [0, driver.pid, -driver.pid - (1 << 20)]
    if command == fcntl.F_SETFL:
        return [0, os.O_APPEND, os.O_APPEND | os.O_NONBLOCK, 1 << 40]
    if command == fcntl.F_SETSIG:
        return [signal.SIGUSR1, 100, 0]
    return [0, 1, 7, 4096, 1 << 20, 1 << 40, -1]


@pytest.mark.parametrize("place", ["native_directory", "nolock_dir"])
def test_every_command(request: pytest.FixtureRequest, pair: Pair, how: str, place: str) -> None:
    descriptors, _ = _of_each(pair, request.getfixturevalue(place))
    for fd in descriptors:
        for command in NUMBERS:
            for arguments in zip(*(_arguments(driver, command) for driver in pair)):
                plain, shim = (_call(driver, how, fd, command, each) for driver, each in zip(pair, arguments))
                assert shim == plain, (fd, command, arguments)
                if command in (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC) and plain[0] != -1:
                    for driver in pair:
                        driver.close(int(plain[0]))


def test_what_they_do(pair: Pair, how: str, nolock_dir: Path) -> None:
    """Not only are the answers alike: they are what the manual page says."""
    (file, *_, reading, _, memory, _, _, _), _ = _of_each(pair, nolock_dir)
    for driver in pair:

        def call(fd: int, command: int, argument: int | bytes = 0) -> Answer:
            return _call(driver, how, fd, command, argument)  # noqa: B023

        done, nothing = (0, 1234, ""), ""
        assert call(file, fcntl.F_SETFD, fcntl.FD_CLOEXEC) == done
        assert call(file, fcntl.F_GETFD) == (fcntl.FD_CLOEXEC, 1234, nothing)
        assert call(file, fcntl.F_DUPFD, 60) == (60, 1234, nothing)
        assert call(60, fcntl.F_GETFD) == done
        assert call(file, fcntl.F_DUPFD_CLOEXEC, 60) == (61, 1234, nothing)
        assert call(61, fcntl.F_GETFD) == (fcntl.FD_CLOEXEC, 1234, nothing)
        assert call(file, fcntl.F_SETFL, os.O_APPEND) == done
        flags = call(60, fcntl.F_GETFL)[0]
        assert isinstance(flags, int)
        assert flags & (os.O_ACCMODE | os.O_APPEND) == os.O_RDWR | os.O_APPEND
        assert call(reading, fcntl.F_SETOWN, driver.pid) == done
        assert call(reading, fcntl.F_GETOWN) == (SELF, 1234, nothing)
        assert call(reading, GETOWN_EX, bytes(8)) == (0, 1234, f"{OWNER_PROCESS:02x}000000{SELF}")
        assert call(reading, SETOWN_EX, struct.pack("ii", OWNER_THREAD, driver.pid))[:2] == done[:2]
        assert call(reading, GETOWN_EX, b"\xff" * 8) == (0, 1234, f"{OWNER_THREAD:02x}000000{SELF}")
        assert call(reading, GETOWNER_UIDS, b"\xff" * 8) == (
            0,
            1234,
            struct.pack("II", os.getuid(), os.geteuid()).hex(),
        )
        assert call(reading, fcntl.F_SETSIG, signal.SIGUSR2) == done
        assert call(reading, fcntl.F_GETSIG) == (signal.SIGUSR2, 1234, nothing)
        assert call(reading, SETPIPE_SZ, 8192) == (8192, 1234, nothing)
        assert call(reading, GETPIPE_SZ) == (8192, 1234, nothing)
        assert call(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW) == done
        assert call(memory, fcntl.F_GET_SEALS) == (fcntl.F_SEAL_GROW, 1234, nothing)
        assert call(memory, GETLK + 99) == (-1, errno.EINVAL, nothing)


def test_hints(pair: Pair, how: str, native_directory: Path) -> None:
    """Commands whose argument is written to, or read."""
    descriptors, _ = _of_each(pair, native_directory)
    for fd in descriptors:
        for command in GET_RW_HINT, SET_RW_HINT, GET_RW_HINT, GET_FILE_RW_HINT, SET_FILE_RW_HINT, GET_FILE_RW_HINT:
            plain, shim = (_call(driver, how, fd, command, struct.pack("Q", 3)) for driver in pair)
            assert shim == plain, (fd, command)


def test_leases(pair: Pair, how: str, native_directory: Path) -> None:
    paths = [native_directory / "plain", native_directory / "shim"]
    for driver, path in zip(pair, paths):
        path.touch()
        driver.ask("sigaction", signal.SIGIO, 0)
        fd = driver.open(path)
        assert _call(driver, how, fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)[:2] == (0, 1234)
        assert _call(driver, how, fd, fcntl.F_GETLEASE)[:2] == (fcntl.F_WRLCK, 1234)
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        assert driver.ask("sigcount", signal.SIGIO) == 1
        assert _call(driver, how, fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)[:2] == (0, 1234)
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


# Where the kernel locks, with the library


@pytest.fixture
def on_kernel(native_directory: Path, rendezvous: Path) -> Iterator[World]:
    """Programs under the shim, on a file system that locks."""
    world = World("native", native_directory, shim_environment(rendezvous))
    yield world
    assert world.end() == ""
    assert keepers(rendezvous) == [], "nobody needed one"


def test_the_kernel_s_locks(on_kernel: World) -> None:
    holder, held_fd = on_kernel.opened()
    other, other_fd = on_kernel.opened()
    for ofd in False, True:
        for ways in ("fcntl", "fcntl"), ("fcntl64", "fcntl"), ("raw", "fcntl64"), ("fcntl64", "raw"):
            commands = [command + OFD * ofd for command in (SETLK, GETLK)]
            assert ask(holder, held_fd, commands[0], Lock(WR, 5, 5), ways[0]).result() == OK
            assert ask(other, other_fd, commands[0], Lock(RD, 9, 1), ways[1]).result() == AGAIN
            expected = Lock(WR, 5, 5, pid=-1 if ofd else holder.pid)
            assert got(ask(other, other_fd, commands[1], Lock(RD, 9, 1), ways[1])) == expected
            assert ask(holder, held_fd, commands[0], Lock(UN, 5, 5), ways[0]).result() == OK
    assert holder.start("lockf", held_fd, os.F_TLOCK, 5).result() == OK
    assert other.start("lockf", other_fd, os.F_TEST, 5).result() == errno.EACCES
    assert Stranger(on_kernel).locks() == [(WR, 0, 5)]


def test_waiting_in_the_kernel(on_kernel: World) -> None:
    holder, held_fd = on_kernel.opened()
    other, other_fd = on_kernel.opened()
    other.ask("sigaction", signal.SIGUSR1, 0)
    assert lock(holder, held_fd, WR, 0, 5) == OK
    assert lock(other, other_fd, WR, 5, 5) == OK
    call = lock_later(other, other_fd, WR)
    await_waiting(on_kernel, call)
    assert ask(holder, held_fd, SETLKW, Lock(WR)).result() == errno.EDEADLK
    other.ask("sigthread", call.tid, signal.SIGUSR1)
    assert call.result() == errno.EINTR
    call = lock_later(other, other_fd, WR)
    await_waiting(on_kernel, call)
    other.ask("cancel")
    await_true(lambda: not os.path.exists(f"/proc/{other.pid}/task/{call.tid}"), "the thread to be cancelled")
    call = lock_later(other, other_fd, WR)
    await_waiting(on_kernel, call)
    assert lock(holder, held_fd, UN) == OK
    assert call.result() == OK


# Each way to a record lock

OLDER_32 = ["i386:55:32", "i386:221:32"]
NEWER_32 = ["i386:55:64", "i386:221:64"]
WAYS_32 = OLDER_32 + NEWER_32
WAYS = {
    "native": ["fcntl", "fcntl64", "raw", *WAYS_32],
    "emulated": ["fcntl", "fcntl64"],
    "supervised": ["fcntl", "raw", *WAYS_32],
    ON_KERNEL: ["fcntl", "raw", *WAYS_32],
}
I386 = 0x7FFFFFFF
"""The greatest offset that a 32-bit program can name with the older structure."""


@pytest.fixture
def ways(world: World) -> list[str]:
    """Those that this machine has."""
    have_32 = platform.machine() == "x86_64" and _runs_i386()
    return [way for way in WAYS[world.name] if have_32 or not way.startswith("i386")]


def _runs_i386() -> bool:
    fleet = Fleet(os.environ)
    try:
        driver = fleet.start()
        return ask(driver, driver.open("/dev/null"), GETLK, Lock(RD), WAYS_32[0]).result() == OK
    except Died:
        return False
    finally:
        fleet.end()


def test_every_way(world: World, ways: list[str]) -> None:
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    stranger = Stranger(world)
    for way in ways:
        for ofd in (False, True) if way not in OLDER_32 else (False,):
            owner = -1 if ofd else holder.pid
            get, set_, wait = (command + OFD * ofd for command in (GETLK, SETLK, SETLKW))
            assert ask(holder, held_fd, set_, Lock(WR, 10, 10), way).result() == OK, way
            assert ask(holder, held_fd, wait, Lock(RD, -5, 2, os.SEEK_END), way).result() == errno.EINVAL, way
            assert ask(holder, held_fd, wait, Lock(RD, 0, 5, os.SEEK_END), way).result() == OK, way
            assert stranger.locks() == [(RD, 0, 5), (WR, 10, 10)], way
            assert ask(other, other_fd, set_, Lock(RD, 15, 1), way).result() == AGAIN, way
            assert got(ask(other, other_fd, get, Lock(RD), way)) == Lock(WR, 10, 10, pid=owner), way
            assert got(ask(other, other_fd, get, Lock(WR, 20, 1), way)) == Lock(UN, 20, 1), way
            if not ofd:
                assert lock(other, other_fd, WR, 30, 1) == OK
                call = other.later("record", way, wait, other_fd, *Lock(WR, 19, 5).words())
                await_waiting(world, call)
                if way in (ways[0], ways[-2]):
                    assert ask(holder, held_fd, wait, Lock(WR, 30, 1), way).result() == errno.EDEADLK, way
                assert ask(holder, held_fd, set_, Lock(UN, 19, 1), way).result() == OK, way
                assert call.result() == OK
                assert lock(other, other_fd, UN) == OK
            assert ask(holder, held_fd, set_, Lock(UN), way).result() == OK, way
            assert stranger.free(), way


@pytest.mark.parametrize("world", ["native", "supervised", ON_KERNEL], indirect=True)
def test_the_older_structure_of_32_bit_programs(world: World, ways: list[str]) -> None:
    """It cannot tell of what lies behind its greatest number, nor name it."""
    if OLDER_32[0] not in ways:
        pytest.skip("no 32-bit calls on this machine")
    holder, held_fd = world.opened()
    other, other_fd = world.opened()
    for held, result, expected in [
        (Lock(WR, 100, 0), OK, Lock(WR, 100, 0, pid=holder.pid)),
        (Lock(WR, 100, 1 << 40), OK, Lock(WR, 100, I386, pid=holder.pid)),
        (Lock(WR, I386, 1), OK, Lock(WR, I386, 1, pid=holder.pid)),
        (Lock(WR, I386 + 1, 1), errno.EOVERFLOW, None),
        (Lock(WR, 1 << 40, 0), errno.EOVERFLOW, None),
    ]:
        assert ask(holder, held_fd, SETLK, held).result() == OK
        for older, newer in zip(OLDER_32, NEWER_32):
            call = ask(other, other_fd, GETLK, Lock(WR), older)
            assert call.result() == result
            if expected:
                assert got(ask(other, other_fd, GETLK, Lock(WR), older)) == expected
            assert got(ask(other, other_fd, GETLK, Lock(WR), newer)) == held._replace(pid=holder.pid)
        assert lock(holder, held_fd, UN) == OK
    for start, length in (0, I386), (I386, 1), (I386, 0), (I386, I386):
        for older in OLDER_32:
            assert ask(holder, held_fd, SETLK, Lock(WR, start, length), older).result() == OK
            assert conflict(other, other_fd, WR) == Lock(WR, start, length, pid=holder.pid)
            assert ask(holder, held_fd, SETLK, Lock(UN, start, length), older).result() == OK
    assert Stranger(world).free()


@pytest.mark.parametrize("world", ["native", "supervised", ON_KERNEL], indirect=True)
def test_a_32_bit_program(world: World) -> None:
    executable = driver_32()
    if executable is None:
        pytest.skip("gcc -m32 makes no static program that runs here")
    driver, fd = world.opened()
    fleet = Fleet(world.environment)
    try:
        small = fleet.start(None, *world.prefix, executable=executable)
        small_fd = small.open(world.file())
        for ofd in False, True:
            assert lock(driver, fd, WR, 1 << 40, 10, ofd) == OK
            assert lock(small, small_fd, WR, 1 << 40, 1, ofd) == AGAIN
            expected = Lock(WR, 1 << 40, 10, pid=-1 if ofd else driver.pid)
            assert conflict(small, small_fd, WR, ofd=ofd) == expected
            assert lock(small, small_fd, WR, 0, 1 << 40, ofd) == OK
            assert conflict(driver, fd, WR, ofd=ofd) == Lock(WR, 0, 1 << 40, pid=-1 if ofd else small.pid)
            for each, each_fd in (driver, fd), (small, small_fd):
                assert lock(each, each_fd, UN, ofd=ofd) == OK
    finally:
        fleet.end()
