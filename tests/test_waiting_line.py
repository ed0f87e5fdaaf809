"""A program that waits says so in its user's terminal: for whom, since when, and when that is over."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import NATIVE_ROOT, emulated_world
from support.driver import EX, OK, UN
from support.keepers import keepers
from support.lockcommand import FLOCKSHIM, WAITING_LINE, Job, await_waiting, job, settings, waiters
from support.proc import DEADLINE, await_end, await_true
from support.terminal import Terminal
from support.worlds import World

WORTH_MENTIONING = 1.0


class Scene:
    """A terminal, and a file with a lock on it. Each waiting program is one of two: flockshim itself, or flock(1)."""

    def __init__(self, world: World, in_program: bool) -> None:
        self.world = world
        self.path = world.file()
        self.in_program = in_program
        self.terminal = Terminal("bash", world.directory, settings(world, F=" ".join(FLOCKSHIM)))
        self.began = int(time.time())
        self.holder, self.descriptor = world.opened()
        assert self.holder.flock(self.descriptor, EX) == OK
        self.held = int(time.time())

    def release(self) -> None:
        assert self.holder.flock(self.descriptor, UN) == OK

    def words(self, shared: bool = False) -> list[str]:
        """What stands between options of flockshim and the command that needs the lock."""
        if self.in_program:
            return ["flock", *["-s"] * shared, str(self.path)]
        return [*["--shared"] * shared, "--lock", str(self.path)]

    def command(self, *options: str, shared: bool = False) -> str:
        """What a user types, to wait for the lock and then run the script that is added."""
        return " ".join(["$F", *options, *self.words(shared), "sh -c "])

    def start(self, line: str) -> int:
        """Type LINE; the pid of the program that waits, which leads its process group."""
        self.terminal.type(line)
        return self.terminal.await_job()

    def shared_job(self, *options: str) -> Job:
        """The same for a shared lock, without a terminal."""
        return Job(self.world, *options, *self.words(shared=True))

    def await_waiting(self, pid: int) -> None:
        await_waiting(self.world, self.path, pid)

    def await_told(self) -> Job:
        """One who asks later, and has told whom he waits for: all who were to be told have been told before.

        The lock that it asks for is a shared one, since the kernel does not grant in order.
        """
        behind = self.shared_job("--verbose")
        assert behind.process.stderr is not None
        assert WAITING_LINE.fullmatch(behind.process.stderr.readline())
        return behind

    def check(self, line: re.Match[str]) -> None:
        """Compare all that a waiting line says."""
        with open(f"/proc/{self.holder.pid}/cmdline") as file:
            program, *arguments = file.read().rstrip("\0").split("\0")
        assert line["path"] == str(self.path)
        assert int(line["pid"]) == self.holder.pid
        assert line["command"] == " ".join([os.path.basename(program), *arguments])
        assert line["host"] == os.uname().nodename
        assert line["word"] == (" since" if self.world.emulated else ", running since")
        # A process's start is known in hundredths of a second, and the clocks of two system calls differ.
        seconds = range(self.began - 1, self.held + 2)
        forms = "%H:%M:%S", "%Y-%m-%d %H:%M:%S"
        assert line["clock"] in {time.strftime(form, time.localtime(each)) for form in forms for each in seconds}

    def end(self) -> None:
        self.terminal.end()
        assert self.world.end() == ""


@pytest.fixture(params=["kernel", "emulated", "emulated in a program"])
def scene(request: pytest.FixtureRequest, session_rendezvous: Path) -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="native-", dir=NATIVE_ROOT) as directory:
        if request.param == "kernel":
            world = World("native", Path(directory), os.environ)
        else:
            world = emulated_world(request, session_rendezvous)
        scene = Scene(world, in_program=request.param.endswith("program"))
        yield scene
        scene.end()


@contextmanager
def _behind(scene: Scene) -> Iterator[Job]:
    """A job without a terminal, behind those who wait already."""
    with job(scene.world, *scene.words()) as running:
        scene.await_waiting(running.pid)
        yield running


one_of_each = pytest.mark.parametrize("scene", ["kernel", "emulated in a program"], indirect=True)


def _got(path: Path) -> str:
    return f"flockshim: got the lock on {path} after "


@one_of_each
def test_waiting_and_getting(scene: Scene) -> None:
    begin = time.monotonic()
    scene.start(scene.command() + "'echo done'")
    scene.check(scene.terminal.expect("^" + WAITING_LINE.pattern))
    time.sleep(1.1 * WORTH_MENTIONING)
    assert scene.terminal.unread == ""
    scene.release()
    got = scene.terminal.expect(f"^{_got(scene.path)}(\\d+) s\ndone\n")
    assert 1 <= int(got[1]) <= time.monotonic() - begin


def test_a_short_wait(scene: Scene) -> None:
    begin = time.monotonic()
    scene.start(scene.command() + "'echo done'")
    scene.terminal.expect("^" + WAITING_LINE.pattern)
    scene.release()
    text = scene.terminal.expect("(?s)^(.*)done\n")[1]
    if time.monotonic() - begin < WORTH_MENTIONING:
        assert text == ""
    assert text == "" or text.startswith(_got(scene.path))


def test_nothing_is_said_where_nobody_waits(scene: Scene) -> None:
    scene.release()
    assert scene.terminal.output(scene.command() + "'echo done'") == "done\n"


def test_a_try_says_nothing(scene: Scene) -> None:
    if scene.in_program:
        text = scene.terminal.output(f"$F flock -n {scene.path} true")
        assert text == ""
    else:
        text = scene.terminal.output(scene.command("--no-wait") + "'echo done'")
        assert text.startswith(f"flockshim: cannot lock '{scene.path}': held by pid {scene.holder.pid} ")
        assert text.count("\n") == 1


def test_nothing_is_said_without_a_terminal(scene: Scene) -> None:
    silent = scene.shared_job()
    scene.await_waiting(silent.pid)
    behind = scene.await_told()
    try:
        scene.release()
        for each in silent, behind:
            each.began()
            status, text = each.finish()
            assert status == 0
            assert text == "" if each is silent else "waiting" not in text
    finally:
        silent.end()
        behind.end()


@pytest.mark.parametrize(("options", "redirection"), [([], " 2>errors"), (["--quiet"], "")], ids=["file", "quiet"])
def test_nothing_is_said_to_a_file_or_with_quiet(scene: Scene, options: list[str], redirection: str) -> None:
    pid = scene.start(scene.command(*options, shared=True) + "'echo done'" + redirection)
    scene.await_waiting(pid)
    behind = scene.await_told()
    try:
        scene.release()
        scene.terminal.expect("^done\n")
        assert not redirection or (scene.world.directory / "errors").read_text() == ""
    finally:
        behind.end()


def test_verbose_says_it_to_a_file(scene: Scene) -> None:
    with job(scene.world, "--verbose", *scene.words()) as running:
        assert running.process.stderr is not None
        line = WAITING_LINE.fullmatch(running.process.stderr.readline())
        assert line
        scene.check(line)
        scene.release()
        running.began()
        status, text = running.finish()
        assert status == 0
        assert text == "" or text.startswith(_got(scene.path))


def test_never_on_standard_output(scene: Scene) -> None:
    scene.start(scene.command() + "'echo done' | cat >output")
    scene.check(scene.terminal.expect("^" + WAITING_LINE.pattern))
    scene.release()
    scene.terminal.await_shell()
    assert (scene.world.directory / "output").read_text() == "done\n"


def test_ctrl_c_while_waiting(scene: Scene) -> None:
    pid = scene.start(scene.command() + "'echo done'")
    scene.terminal.expect(WAITING_LINE.pattern)
    scene.await_waiting(pid)
    with _behind(scene) as behind:
        scene.terminal.press("Ctrl-C")
        scene.terminal.await_shell()
        assert scene.terminal.status() == 128 + signal.SIGINT
        await_true(lambda: waiters(scene.world, scene.path) == [behind.pid], "the queue to be one shorter")
        scene.release()
        behind.began()
        assert behind.finish() == (0, "")
    assert scene.world.free(scene.path)


def test_it_dies_of_the_interrupt(scene: Scene) -> None:
    """Not just with status 130: a script's shell must see that its user wants to stop everything."""
    for number in signal.SIGINT, signal.SIGTERM:
        with _behind(scene) as waiting:
            waiting.process.send_signal(number)
            assert waiting.ended() == (-number, "")


def test_ctrl_z_and_fg_while_waiting(scene: Scene) -> None:
    pid = scene.start(scene.command() + "'echo done'")
    scene.terminal.expect(WAITING_LINE.pattern)
    scene.await_waiting(pid)
    for _ in range(2):
        scene.terminal.press("Ctrl-Z")
        scene.terminal.expect("Stopped")
        scene.terminal.await_shell()
        scene.terminal.type("fg")
        assert scene.terminal.await_job() == pid
        scene.await_waiting(pid)
    scene.release()
    text = scene.terminal.expect("(?s)^(.*)\ndone\n")[1]
    assert "waiting" not in text
    scene.terminal.await_shell()
    assert scene.terminal.status() == 0


@one_of_each
def test_others_go_on_while_a_waiter_is_stopped(scene: Scene) -> None:
    pid = scene.start(scene.command() + "'echo done'")
    scene.await_waiting(pid)
    scene.terminal.press("Ctrl-Z")
    scene.terminal.expect("Stopped")
    with _behind(scene) as behind:
        scene.release()
        behind.began()
        scene.terminal.type("fg")
        assert scene.terminal.await_job() == pid
        scene.await_waiting(pid)
        assert behind.finish() == (0, "")
        scene.terminal.expect("\ndone\n")


def test_the_terminal_does_not_stop_a_waiter_in_the_background(scene: Scene) -> None:
    """`stty tostop`: whoever writes from the background is stopped, termios(3)."""
    scene.terminal.type("stty tostop")
    scene.terminal.type(scene.command() + "'echo done >output' & echo $! >pid")
    scene.terminal.expect(WAITING_LINE.pattern)
    scene.terminal.output(":")
    pid = int((scene.world.directory / "pid").read_text())
    scene.await_waiting(pid)
    scene.release()
    await_end(pid, DEADLINE)
    assert (scene.world.directory / "output").read_text() == "done\n"
    assert "Stopped" not in scene.terminal.output("jobs")


def test_it_is_said_once_though_the_keeper_is_killed(fresh_world: World, rendezvous: Path) -> None:
    path = fresh_world.file()
    holder, fd = fresh_world.opened()
    assert holder.flock(fd, EX) == OK
    with job(fresh_world, "--verbose", "--lock", path) as running:
        assert running.process.stderr is not None
        assert WAITING_LINE.fullmatch(running.process.stderr.readline())
        ((_, worker),) = keepers(rendezvous)
        os.kill(worker, signal.SIGKILL)
        await_end(worker)
        await_waiting(fresh_world, path, running.pid)
        # Whoever asks later has told, so the first would have by now.
        with job(fresh_world, "--verbose", "--lock", path) as behind:
            assert behind.process.stderr is not None
            assert WAITING_LINE.fullmatch(behind.process.stderr.readline())
        assert holder.flock(fd, UN) == OK
        running.began()
        status, text = running.finish()
        assert status == 0
        assert "waiting" not in text
