"""The program sees nothing but the lock: no descriptor, child, thread, signal or output more.

Every first lock here is the one that starts the keeper, unless the test says otherwise.
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN, Driver
from support.keepers import keeper_processes, keepers
from support.proc import Snapshot, await_true, snapshot
from support.worlds import World

SA_RESTART = 0x10000000


def _unchanged(driver: Driver, before: Snapshot) -> None:
    assert snapshot(driver.pid) == before
    # __WALL, so a child that sends no SIGCHLD would be seen too.
    with pytest.raises(ChildProcessError):
        driver.ask("wait")


def test_the_first_lock(fresh_world: World, rendezvous: Path) -> None:
    driver, fd = fresh_world.opened()
    before = snapshot(driver.pid)
    assert keepers(rendezvous) == []
    assert driver.flock(fd, EX) == OK
    assert len(keepers(rendezvous)) == 1
    _unchanged(driver, before)
    assert driver.flock(fd, SH) == OK
    assert driver.flock(fd, UN) == OK
    _unchanged(driver, before)


def test_while_waiting(fresh_world: World) -> None:
    """A waiting call may use a descriptor; it is gone when the call returns."""
    holder, held_fd = fresh_world.opened()
    driver, fd = fresh_world.opened()
    before = snapshot(driver.pid)
    assert holder.flock(held_fd, EX) == OK
    call = driver.start("flock", fd, EX)
    fresh_world.await_blocked(call)
    waiting = snapshot(driver.pid)
    assert (waiting.threads, waiting.children) == (before.threads, before.children)
    assert waiting.signals == before.signals
    assert holder.flock(held_fd, UN) == OK
    assert call.result() == OK
    _unchanged(driver, before)


def test_many_locks_leak_nothing(emulated: World) -> None:
    driver, fd = emulated.opened()
    before = snapshot(driver.pid)
    for _ in range(200):
        assert driver.flock(fd, EX) == OK
        assert driver.flock(fd, SH | NB) == OK
        assert driver.flock(fd, UN) == OK
    _unchanged(driver, before)


@pytest.mark.parametrize("disposition", ["counted", "ignored", "no child wait"])
def test_no_sigchld_comes(fresh_world: World, disposition: str) -> None:
    driver, fd = fresh_world.opened()
    if disposition == "ignored":
        driver.ask("sigignore", signal.SIGCHLD)
    elif disposition == "counted":
        driver.ask("sigaction", signal.SIGCHLD, SA_RESTART)
    else:
        driver.ask("sigaction", signal.SIGCHLD, 2)  # SA_NOCLDWAIT
    before = snapshot(driver.pid)
    assert driver.flock(fd, EX) == OK
    _unchanged(driver, before)
    assert driver.ask("sigcount", signal.SIGCHLD) == 0


def test_from_a_thread_among_others(fresh_world: World) -> None:
    driver = fresh_world.start()
    threads = [driver.thread() for _ in range(4)]
    fd = driver.open(fresh_world.file())
    before = snapshot(driver.pid)
    assert threads[1].flock(fd, EX) == OK
    _unchanged(driver, before)
    assert threads[2].flock(fd, UN) == OK
    _unchanged(driver, before)


def test_several_threads_at_once(fresh_world: World, rendezvous: Path) -> None:
    driver = fresh_world.start()
    threads = [driver.thread() for _ in range(8)]
    fds = [driver.open(fresh_world.file(f"file-{index}")) for index in range(8)]
    before = snapshot(driver.pid)
    calls = [thread.start("flock", fd, EX) for thread, fd in zip(threads, fds)]
    assert [call.result() for call in calls] == [OK] * 8
    _unchanged(driver, before)
    await_true(lambda: len(keeper_processes(rendezvous)) == 2, "one keeper to be left")


def test_from_a_vfork_child(fresh_world: World) -> None:
    driver, fd = fresh_world.opened()
    before = snapshot(driver.pid)
    assert driver.start("vforkflock", fd, EX).result() == OK
    _unchanged(driver, before)
    assert not fresh_world.free(fresh_world.file())


def test_from_a_forked_child_that_ends(fresh_world: World) -> None:
    """The keeper that it started lives on, and is nobody's child."""
    driver, fd = fresh_world.opened()
    before = snapshot(driver.pid)
    child = driver.fork()
    assert child.flock(fd, EX) == OK
    child.exit()
    assert driver.ask("wait") == child.pid
    _unchanged(driver, before)
    assert not fresh_world.free(fresh_world.file())


@pytest.mark.parametrize("free", [{0, 1, 2}, {0}, {1}, {2}, {0, 2}], ids=str)
def test_standard_descriptors_are_closed(fresh_world: World, free: set[int]) -> None:
    """The shim's own descriptors may fall on 0 to 2, and the keeper must still be right."""
    driver, fd = fresh_world.opened()
    for each in free:
        driver.close(each)
    before = snapshot(driver.pid)
    assert driver.flock(fd, EX) == OK
    _unchanged(driver, before)
    assert fresh_world.probe(fresh_world.file(), SH) == BUSY
    driver.close(fd)
    assert fresh_world.free(fresh_world.file())


def test_the_file_is_standard_output(fresh_world: World) -> None:
    driver, fd = fresh_world.opened()
    driver.ask("dup2", fd, 1)
    driver.close(fd)
    before = snapshot(driver.pid)
    assert driver.flock(1, EX) == OK
    _unchanged(driver, before)
    driver.kill()
    assert fresh_world.free(fresh_world.file())


def test_the_current_directory_does_not_matter(fresh_world: World, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    driver, fd = fresh_world.opened()
    driver.ask("chdir", gone)
    gone.rmdir()
    assert driver.flock(fd, EX) == OK


def test_an_environment_cleared_after_the_start(fresh_world: World, rendezvous: Path) -> None:
    """What was set when the program began goes on to hold."""
    driver, fd = fresh_world.opened()
    driver.ask("clearenv")
    assert driver.flock(fd, EX) == OK
    assert len(keepers(rendezvous)) == 1
    assert not fresh_world.free(fresh_world.file())


def test_the_keeper_does_not_keep_the_program_s_descriptors(fresh_world: World, rendezvous: Path) -> None:
    """Else a reader of the program's pipe would wait for the keeper's end."""
    driver, fd = fresh_world.opened()
    ends = driver.ask("pipe")
    pipe = os.readlink(f"/proc/{driver.pid}/fd/{ends % 1000}")
    assert driver.flock(fd, EX) == OK
    processes = keeper_processes(rendezvous)
    assert processes
    for pid in processes:
        seen = snapshot(pid)
        assert pipe not in seen.descriptors.values()
        assert seen.directory == "/"
        assert seen.descriptors[0] == "/dev/null"


def test_the_keeper_leaves_the_program_s_session(fresh_world: World, rendezvous: Path) -> None:
    """A terminal's interrupt or hang-up is for the program, not for the keeper of its locks."""
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    for pid in keeper_processes(rendezvous):
        assert os.getsid(pid) != os.getsid(driver.pid)
        assert os.getpgid(pid) != os.getpgid(driver.pid)


def test_where_the_kernel_locks_there_is_no_keeper(
    fresh_world: World, rendezvous: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("kernel") / "file"
    rendezvous.rmdir()
    driver = fresh_world.start()
    fd = driver.open(path)
    for operation in (EX, SH, UN, SH | NB):
        assert driver.flock(fd, operation) == OK
    assert driver.flock(fd, 0) == errno.EINVAL
    assert driver.flock(99, EX) == errno.EBADF
    assert not rendezvous.exists()
    assert keeper_processes(rendezvous) == []


def test_the_descriptor_limit_is_reached(fresh_world: World, rendezvous: Path) -> None:
    """The call fails as the kernel let it fail, and says why in one line."""
    driver, fd = fresh_world.opened()
    used = len([each for each in snapshot(driver.pid).descriptors if each < 90])
    driver.ask("maxfiles", used)
    before = snapshot(driver.pid)
    assert driver.flock(fd, EX) == errno.ENOSYS
    _unchanged(driver, before)
    errors = fresh_world.fleet.errors()
    assert len(errors.splitlines()) == 1
    assert errors.startswith("flockshim: ")
    fresh_world.fleet.forget_errors()
    assert driver.flock(99, EX) == errno.EBADF


def test_an_empty_preload_list_of_a_child(fresh_world: World) -> None:
    """A program that is started without the shim fails as ever, which is said: nothing is global."""
    driver = fresh_world.start()
    plain = driver.spawn(without_preload=True)
    assert "is started without LD_PRELOAD and not covered" in fresh_world.fleet.errors()
    fresh_world.fleet.forget_errors()
    fd = plain.open(fresh_world.file())
    assert plain.flock(fd, EX) == errno.ENOSYS
