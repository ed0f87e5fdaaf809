"""``flockshim --check`` where something hangs, where nothing can be tried, and when it is interrupted."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.checking import (
    ALL_OK,
    FLOCK_NUMBER,
    NAME_PROBES,
    SHORT,
    SHORTEST,
    SLOW,
    Answer,
    as_root,
    checked,
    command,
    flock_under,
    refused,
)
from support.confine import ORDINARY, as_ordinary_user, install, mounted, ordinary_interpreter
from support.proc import await_end, await_true

from flockshim import nolockfs, probes
from flockshim.pytest_plugin import require

# What hangs


@pytest.mark.nolock(flock="hang", posix="local")
def test_flock_hangs(nolock_dir: Path, rendezvous: Path) -> None:
    answer = checked("--json", nolock_dir, seconds=SHORT)
    assert (answer.status, answer.report["scope"]) == (2, "none")
    assert answer.kind("flock") == ["hangs", "skipped", "skipped", "skipped"]
    assert answer.kind("fcntl") == answer.kind("ofd") == ["ok"] * 4
    assert f"within {SHORT} s" in answer.report["summary"]
    assert os.listdir(nolock_dir) == []
    assert answer.report["command"] == "flockshim --force COMMAND"
    assert flock_under(answer.report["command"], nolock_dir / "file", rendezvous) == (0, "held\n", "")


@pytest.mark.nolock(flock="local", posix="hang")
def test_record_locks_hang(nolock_dir: Path) -> None:
    answer = checked("--json", nolock_dir, seconds=SHORT)
    assert (answer.status, answer.report["command"]) == (2, "flockshim --force COMMAND")
    assert answer.kind("fcntl") == answer.kind("ofd") == ["hangs", "skipped", "skipped", "skipped"]
    assert os.listdir(nolock_dir) == []


class Stopped(NamedTuple):
    """A mount whose server does not answer while it is stopped."""

    path: Path
    stop: Callable[[], None]


@pytest.fixture
def stoppable(nolock_dir: Path) -> Iterator[Stopped]:
    """Another mount than that of other tests, which need theirs; NOLOCK_DIR skips where FUSE is missing."""
    mount = nolockfs.mount(flock="local", posix="local")
    with mount as path:
        yield Stopped(path, lambda: os.kill(mount.server_pid, signal.SIGSTOP))
        os.kill(mount.server_pid, signal.SIGCONT)


def test_nothing_answers(stoppable: Stopped) -> None:
    stoppable.stop()
    answer = checked("--json", stoppable.path / "below", seconds=SHORTEST)
    refused(answer, str(stoppable.path), f"does not answer within {SHORTEST} s")
    report = answer.report
    assert set(report["probes"].values()) == {"skipped"}
    assert (report["scope"], report["command"]) == ("unknown", None)
    assert report["filesystem"]["mount_point"] == str(stoppable.path)


def test_what_cannot_be_removed_is_told(stoppable: Stopped) -> None:
    with probes.Trial(str(stoppable.path), float(SHORT)) as trial:
        assert trial.names() == dict.fromkeys(NAME_PROBES, "ok")
        left = {str(stoppable.path / name) for name in os.listdir(stoppable.path)}
        assert left
        stoppable.stop()
    assert left <= set(trial.left_behind)


def await_hanging(pid: int) -> int:
    """Return the child of process PID that is in flock(2), as soon as there is one."""
    found: list[int] = []

    def hanging() -> bool:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{child}/syscall").read_text().startswith(f"{FLOCK_NUMBER} "):
                    found.append(int(child))
        return bool(found)

    await_true(hanging, "a call of flock(2)")
    return found[0]


@pytest.mark.nolock(flock="hang", posix="local")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_is_left_behind(nolock_dir: Path, number: signal.Signals) -> None:
    running = subprocess.Popen(command(nolock_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    await_hanging(running.pid)
    assert os.listdir(nolock_dir)
    running.send_signal(number)
    assert running.communicate() == ("", "")
    assert running.returncode == -number
    assert os.listdir(nolock_dir) == []


@pytest.mark.nolock(flock="hang", posix="local")
def test_a_signal_does_not_keep_it_from_removing_its_files(nolock_dir: Path) -> None:
    class Interrupted(probes.Trial):
        def _remove(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            super()._remove()

    def stop(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(InterruptedError), Interrupted(str(nolock_dir), float(SLOW)) as trial:
            trial.names()
            assert os.listdir(nolock_dir)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert os.listdir(nolock_dir) == []


@pytest.mark.nolock(flock="hang", posix="local")
def test_its_processes_hold_nothing_and_die_with_it(nolock_dir: Path) -> None:
    running = subprocess.Popen(command(nolock_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    hung = await_hanging(running.pid)
    assert os.getsid(hung) == hung  # not stopped and interrupted with it by a terminal
    assert [os.readlink(f"/proc/{hung}/fd/{descriptor}") for descriptor in (0, 1, 2)] == ["/dev/null"] * 3
    running.kill()
    running.communicate()
    await_end(hung)


# What cannot be checked


@pytest.mark.parametrize("seconds", ["0", "1e300"])
def test_a_time_that_is_none(seconds: str, tmp_path: Path) -> None:
    refused(checked(tmp_path, seconds=seconds), "--timeout")


def test_a_missing_directory(tmp_path: Path) -> None:
    answer = checked(tmp_path / "missing")
    refused(answer, "missing", "No such file or directory")
    assert answer.output == ""


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = checked(tmp_path / "file")
    refused(answer, "file", "Not a directory")
    assert answer.output == ""


def test_a_read_only_mount(tmp_path: Path) -> None:
    as_root()
    prefix = mounted(f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path}")
    answer = checked("--json", tmp_path, prefix=prefix)
    refused(answer, str(tmp_path), "Read-only file system", "in which you may write")
    assert "ro" in answer.report["filesystem"]["options"]
    assert answer.report["filesystem"]["mount_point"] == str(tmp_path)
    assert (answer.report["scope"], answer.report["command"]) == ("unknown", None)
    text = checked(tmp_path, prefix=prefix).output
    assert text.startswith(f"What '{tmp_path}' can lock could not be tried.\n")
    assert "flock         was not tried" in text


def test_a_file_system_without_room_for_files(tmp_path: Path) -> None:
    as_root()
    answer = checked("--json", tmp_path, prefix=mounted(f"mount -t tmpfs -o nr_inodes=1 tmpfs {tmp_path}"))
    refused(answer, str(tmp_path), "No space left on device", "make room")
    assert answer.report["filesystem"]["type"] == "tmpfs"


def test_a_file_system_full_of_data(tmp_path: Path) -> None:
    """Locks need no data."""
    as_root()
    file = tmp_path / "full"
    fill = f"printf %4096d 0 > {file} && ! echo 0 2>/dev/null >> {file}"
    answer = checked("--json", tmp_path, prefix=mounted(f"mount -t tmpfs -o size=4k tmpfs {tmp_path} && {fill}"))
    assert (answer.status, answer.report["probes"]) == (0, ALL_OK)


@pytest.fixture
def ordinary(tmp_path: Path) -> Iterator[Callable[[Path], Answer]]:
    """``--check`` by an ordinary user, who has a copy of the package that all may read."""
    as_root()
    require(shutil.which("setpriv"), "no setpriv", "apt install util-linux")
    python = ordinary_interpreter()
    require(python, "no Python that everybody may execute", "apt install python3")
    home = Path("/dev/shm") / f"flockshim-public-{os.getpid()}"
    home.mkdir(mode=0o755)
    install(home)

    def run(directory: Path) -> Answer:
        done = subprocess.run(
            [*as_ordinary_user(), *command("--json", directory, python=str(python))],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(home)},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    yield run
    shutil.rmtree(home)


def test_an_ordinary_user(ordinary: Callable[[Path], Answer], nolock_dir: Path) -> None:
    os.chown(nolock_dir, ORDINARY, ORDINARY)
    answer = ordinary(nolock_dir)
    assert (answer.status, answer.report["command"]) == (1, "flockshim COMMAND")
    assert answer.errors == ""
    assert os.listdir(nolock_dir) == []


def test_a_directory_without_permissions(ordinary: Callable[[Path], Answer], nolock_dir: Path) -> None:
    answer = ordinary(nolock_dir)
    refused(answer, str(nolock_dir), "Permission denied", "in which you may write")
    assert answer.report["filesystem"]["type"] == "fuse.nolockfs"
    (nolock_dir / "below").mkdir()
    nolock_dir.chmod(0o700)
    answer = ordinary(nolock_dir / "below")
    refused(answer, "Permission denied")
    assert answer.output == ""


def test_a_directory_that_may_not_be_listed(ordinary: Callable[[Path], Answer], nolock_dir: Path) -> None:
    os.chown(nolock_dir, ORDINARY, ORDINARY)
    nolock_dir.chmod(0o300)
    assert ordinary(nolock_dir).status == 1


def test_nobody_listens(tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(command(tmp_path), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 125
    assert "standard output" in done.stderr
    assert os.listdir(tmp_path) == []
