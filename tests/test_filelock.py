"""flockshim.FileLock: the same lock as the programs', in both worlds."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN
from support.proc import await_end, await_true
from support.threads import KnownThread, ThreadCall, descriptors, times_open
from support.worlds import World

from flockshim import FileLock, Timeout
from flockshim.pytest_plugin import require

LONG = 60.0


def python(world: World, program: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python program of its own, in the same world."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "FLOCKSHIM_DIR": world.environment["FLOCKSHIM_DIR"]},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def acquired(lock: FileLock) -> bool:
    """Whether a non-blocking try succeeds; undone."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    lock.release()
    return True


# What the lock is


@pytest.mark.parametrize("theirs", [SH, EX])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "exclusive"])
def test_programs_and_it_exclude_one_another(world: World, shared: bool, theirs: int) -> None:
    driver, fd = world.opened()
    lock = FileLock(world.file(), shared=shared)
    compatible = shared and theirs == SH
    with lock:
        assert driver.flock(fd, theirs | NB) == (OK if compatible else BUSY)
        driver.flock(fd, UN)
    assert driver.flock(fd, theirs | NB) == OK
    assert acquired(lock) is compatible


@pytest.mark.parametrize("name", ["file", "directory"])
def test_flock1_and_pythons_own(world: World, name: str) -> None:
    require(shutil.which("flock"), "no flock(1)", "apt install util-linux")
    path = world.directory / name
    path.mkdir() if name == "directory" else path.touch()
    call = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    programs = [["flock", "-n", path, "true"], [sys.executable, "-c", call, path]]
    held = FileLock(path)
    for expected in (1, 0):
        if expected:
            held.acquire()
        for command in programs:
            done = subprocess.run(command, env=world.environment, stderr=subprocess.DEVNULL, check=False)
            assert done.returncode == expected
        held.release()
    assert list(path.iterdir() if path.is_dir() else []) == []


def test_it_waits_for_a_program(world: World) -> None:
    driver, fd = world.opened()
    driver.flock(fd, EX)
    lock = FileLock(world.file(), thread_local=False)
    waiting = ThreadCall(lock.acquire)
    world.await_blocked(waiting)
    assert not lock.is_locked
    driver.flock(fd, UN)
    waiting.value()
    assert lock.is_locked
    assert driver.flock(fd, EX | NB) == BUSY


def test_a_program_waits_for_it(world: World) -> None:
    driver, fd = world.opened()
    with FileLock(world.file()):
        call = driver.flock_later(fd, EX)
        world.await_blocked(call)
    assert call.result() == OK


INCREMENT = """
import sys
from flockshim import FileLock
lock = FileLock(sys.argv[1])
for _ in range(int(sys.argv[3])):
    with lock:
        with open(sys.argv[2]) as file:
            number = int(file.read() or 0)
        with open(sys.argv[2], "w") as file:
            file.write(str(number + 1))
"""


def test_processes_exclude_one_another(world: World) -> None:
    lock, number = world.file(), world.file("number")
    programs = [python(world, INCREMENT, lock, number, 50) for _ in range(4)]
    for program in programs:
        assert program.communicate() == ("", "")
    assert number.read_text() == "200"


def test_threads_exclude_one_another(world: World) -> None:
    lock = FileLock(world.file())
    inside: list[int] = []

    def work() -> int:
        seen = 0
        for _ in range(10):
            with lock:
                inside.append(1)
                os.sched_yield()
                seen = max(seen, len(inside))
                inside.pop()
        return seen

    calls = [ThreadCall(work) for _ in range(20)]
    assert [call.value() for call in calls] == [1] * 20
    assert world.free(world.file())


def test_the_lock_of_an_object(world: World) -> None:
    """thread_local=False: what one thread has acquired, another may acquire again and release."""
    lock = FileLock(world.file(), thread_local=False)
    lock.acquire()
    ThreadCall(lock.acquire).value()
    assert lock.lock_counter == 2
    ThreadCall(lock.release).value()
    assert lock.is_locked
    ThreadCall(lock.release).value()
    assert not lock.is_locked
    assert world.free(world.file())


def test_the_lock_of_an_object_in_many_threads(world: World) -> None:
    lock = FileLock(world.file(), thread_local=False)

    def work() -> None:
        for _ in range(20):
            with lock:
                assert lock.is_locked

    for call in [ThreadCall(work) for _ in range(8)]:
        call.value()
    assert lock.lock_counter == 0
    assert times_open(world.file()) == 0
    assert world.free(world.file())


def test_threads_of_an_object_wait_no_longer_than_told(world: World) -> None:
    driver, fd = world.opened()
    driver.flock(fd, EX)
    lock = FileLock(world.file(), thread_local=False)
    first = ThreadCall(lock.acquire)
    world.await_blocked(first)
    for timeout in (0, 0.01):
        with pytest.raises(Timeout):
            lock.acquire(timeout=timeout)
    lock.release()  # nothing, and at once
    driver.flock(fd, UN)
    first.value()


def test_a_lock_that_is_dropped_is_released(world: World) -> None:
    lock = FileLock(world.file())
    lock.acquire()
    ThreadCall(FileLock(world.file("other"), timeout=0).acquire).value()
    del lock
    assert world.free(world.file())
    assert world.free(world.file("other"))


def test_a_lock_outlives_the_thread_that_took_it(world: World) -> None:
    lock = FileLock(world.file())
    ThreadCall(lock.acquire).value()
    assert not lock.is_locked
    assert not world.free(world.file())
    del lock
    assert world.free(world.file())


# Waiting


@pytest.mark.parametrize(
    "how", [{"timeout": 0}, {"blocking": False}, {"timeout": 0.05}, {"timeout": 0.05, "poll_interval": 9999}]
)
def test_timeout(world: World, how: dict[str, float]) -> None:
    driver, fd = world.opened()
    driver.flock(fd, EX)
    before = descriptors()
    begin = time.monotonic()
    lock = FileLock(world.file())
    with pytest.raises(Timeout) as raised:
        lock.acquire(**how)  # type: ignore[arg-type]
    assert time.monotonic() - begin >= how.get("timeout", 0)
    assert (lock.is_locked, lock.lock_counter) == (False, 0)
    assert descriptors() == before
    error = raised.value
    assert isinstance(error, TimeoutError)
    assert error.lock_file == str(world.file())
    for word in (repr(str(world.file())), f"held by pid {driver.pid} (lockdriver", "since"):
        assert word in str(error)
    assert "--timeout" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    # Nothing of it is left in the queue.
    driver.flock(fd, UN)
    assert driver.flock(fd, EX | NB) == OK


def test_a_try_does_not_queue(world: World) -> None:
    """As with LOCK_NB in Linux, a reader is let in with the others while a writer waits."""
    reader, its_fd = world.opened()
    writer, fd = world.opened()
    reader.flock(its_fd, SH)
    call = writer.flock_later(fd, EX)
    world.await_blocked(call)
    with FileLock(world.file(), 0, shared=True):
        reader.flock(its_fd, UN)
        world.await_blocked(call)
    assert call.result() == OK


def test_the_default_timeout(world: World) -> None:
    driver, fd = world.opened()
    driver.flock(fd, EX)
    lock = FileLock(world.file(), timeout=0)
    with pytest.raises(Timeout), lock:
        pass
    lock.timeout = 0.01
    with pytest.raises(Timeout):
        lock.acquire()
    lock.timeout = -1
    lock.blocking = False
    with pytest.raises(Timeout):
        lock.acquire()
    driver.flock(fd, UN)
    assert lock.acquire().lock is lock


def test_a_lock_that_is_freed_in_time(world: World) -> None:
    driver, fd = world.opened()
    driver.flock(fd, EX)
    lock = FileLock(world.file(), LONG, thread_local=False)
    waiting = ThreadCall(lambda: lock.acquire(poll_interval=0.001))
    await_true(lambda: times_open(world.file()) == 1, "the file to be opened")
    assert not waiting.returned()
    driver.flock(fd, UN)
    waiting.value()
    assert lock.is_locked


def test_the_order_is_kept(emulated: World) -> None:
    driver, fd = emulated.opened()
    driver.flock(fd, EX)
    order: list[int] = []
    lock = FileLock(emulated.file(), LONG)

    def work(number: int) -> None:
        with lock:
            order.append(number)

    calls = []
    for number in range(5):
        calls.append(ThreadCall(lambda number=number: work(number)))  # type: ignore[misc]
        emulated.await_blocked(calls[-1])
    driver.flock(fd, UN)
    for call in calls:
        call.value()
    assert order == [0, 1, 2, 3, 4]


def test_keyboard_interrupt_ends_the_wait(world: World) -> None:
    driver, fd = world.opened()
    driver.flock(fd, EX)
    next_one, its_fd = world.opened()
    lock = FileLock(world.file())

    def interrupt() -> None:
        main = threading.main_thread()
        world.await_blocked(KnownThread(main))
        call = next_one.flock_later(its_fd, EX)
        world.await_blocked(call)
        calls.append(call)
        signal.pthread_kill(main.ident or 0, signal.SIGINT)

    calls: list[object] = []
    world.round_trip()
    before = descriptors()
    helper = ThreadCall(interrupt)
    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    helper.value()
    assert (lock.is_locked, lock.lock_counter) == (False, 0)
    assert descriptors() == before
    driver.flock(fd, UN)
    assert calls[0].result() == OK  # type: ignore[attr-defined]


@pytest.fixture
def heard() -> Iterator[threading.Event]:
    """Set by SIGUSR1."""
    event = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: event.set())
    yield event
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_that_is_handled_does_not(world: World, heard: threading.Event) -> None:
    driver, fd = world.opened()
    driver.flock(fd, EX)

    def interrupt() -> None:
        main = KnownThread(threading.main_thread())
        world.await_blocked(main)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        assert heard.wait(LONG)
        world.await_blocked(main)
        driver.flock(fd, UN)

    helper = ThreadCall(interrupt)
    with FileLock(world.file()):
        assert heard.is_set()
        helper.value()


# Processes


FORK = """
import os, signal, sys
from flockshim import FileLock, Timeout
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
lock = FileLock(sys.argv[1], timeout=0)
lock.acquire()
lock.acquire()
child = os.fork()
if child == 0:
    say(lock.is_locked, lock.lock_counter)
    lock.release()
    lock.release(force=True)
    try:
        lock.acquire()
    except Timeout:
        say("held by the parent")
    del lock
    say("child", os.getpid())
    signal.pause()
say(lock.is_locked, lock.lock_counter, "parent")
if sys.stdin.readline() == "release\\n":
    lock.release(force=True)
    say("released")
    signal.pause()
"""


@pytest.mark.parametrize("end", ["release", "kill"])
def test_a_forked_child_holds_nothing(world: World, end: str) -> None:
    path = world.file()
    program = python(world, FORK, path)
    assert program.stdin and program.stdout
    lines = {program.stdout.readline() for _ in range(4)}
    (child,) = [int(line.split()[1]) for line in lines if line.startswith("child")]
    try:
        assert lines == {"False 0\n", "held by the parent\n", f"child {child}\n", "True 2 parent\n"}
        assert not world.free(path)
        if end == "release":
            program.stdin.write("release\n")
            program.stdin.flush()
            assert program.stdout.readline() == "released\n"
        else:
            program.kill()
            program.wait()
        assert world.free(path)
    finally:
        os.kill(child, signal.SIGKILL)
        program.kill()
        program.communicate()
        await_end(child)


def test_a_child_takes_a_lock_of_its_own(world: World) -> None:
    program = """
import os, sys
from flockshim import FileLock
lock = FileLock(sys.argv[1], thread_local=sys.argv[2] == "True")
with lock:
    pass
child = os.fork()
if child == 0:
    with lock:
        os._exit(0 if lock.lock_counter == 1 else 1)
sys.exit(os.waitpid(child, 0)[1])
"""
    for thread_local in (True, False):
        done = python(world, program, world.file(), thread_local)
        assert (*done.communicate(), done.returncode) == ("", "", 0)
        assert world.free(world.file())


def test_a_program_that_ends_with_the_lock(world: World) -> None:
    program = "import sys, flockshim; lock = flockshim.FileLock(sys.argv[1]); lock.acquire()"
    done = python(world, program, world.file())
    assert (*done.communicate(), done.returncode) == ("", "", 0)
    assert world.free(world.file())


def test_a_started_program_inherits_nothing(world: World) -> None:
    with FileLock(world.file()):
        number = next(number for number, path in descriptors().items() if path == str(world.file()))
        assert os.get_inheritable(number) is False
