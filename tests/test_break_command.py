"""``flockshim --break``: a dead holder's lock is taken away, one of the living never."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.elsewhere import FLOCKSHIM, Elsewhere, files, program, settings
from support.proc import DEADLINE

from flockshim import break_command
from flockshim.aliveness import Aliveness

HINT = "add --yes if you know that the holder is dead"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "lock"
    path.touch()
    return path


@pytest.fixture
def holder(target: Path) -> Elsewhere:
    """A keeper of another host that has the lock, and has told of it."""
    holder = Elsewhere(target)
    assert holder.lock()
    holder.vouch("node7", program(4711, "uv sync"))
    return holder


@pytest.fixture
def aliveness(rendezvous: Path) -> Iterator[Aliveness]:
    """The life of a keeper of this host."""
    aliveness = Aliveness(str(rendezvous))
    yield aliveness
    os.close(aliveness.descriptor)


def break_it(target: Path, rendezvous: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FLOCKSHIM, "--break", str(target), *words],
        env=settings(rendezvous, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )


def test_nobody_holds_it(target: Path, rendezvous: Path) -> None:
    done = break_it(target, rendezvous, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"nobody holds the lock on {target} between hosts\n"
    assert files(target.parent) == ["lock"]
    assert set(files(rendezvous)) <= {"domain"}


def test_it_was_given_back(target: Path, rendezvous: Path, holder: Elsewhere) -> None:
    holder.unlock()
    before = files(target.parent)
    assert break_it(target, rendezvous).returncode == 0
    assert files(target.parent) == before


def test_the_holder_is_shown_and_removed(target: Path, rendezvous: Path, holder: Elsewhere) -> None:
    done = break_it(target, rendezvous, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    shown, did = done.stdout.splitlines()
    assert shown.startswith(f"{target}: held by pid 4711 (uv sync) on node7 since ")
    assert f": exclusive, token {holder.token}, vouched for at " in shown
    assert did.startswith("taken away from pid 4711 (uv sync) on node7 since ") and did.endswith("the version is 2 now")
    assert holder.state().entries() == ()
    assert not holder.vouching_file().exists()


def test_who_waits_gets_it(target: Path, rendezvous: Path, holder: Elsewhere) -> None:
    heir = Elsewhere(target)
    assert not heir.lock()
    assert break_it(target, rendezvous, "--yes").returncode == 0
    state = heir.state()
    assert heir.token == state.version > holder.token
    assert state.queue == ()


def test_all_readers_are_removed(target: Path, rendezvous: Path) -> None:
    readers = [Elsewhere(target), Elsewhere(target)]
    assert [reader.lock(exclusive=False) for reader in readers] == [True, True]
    done = break_it(target, rendezvous, "--yes")
    assert done.returncode == 0
    assert done.stdout.count("held by a program on another host: shared, token ") == 2
    assert done.stdout.count("never vouched for") == 2
    assert readers[0].state().entries() == ()


def test_without_a_terminal_and_without_yes(target: Path, rendezvous: Path, holder: Elsewhere) -> None:
    before = files(target.parent)
    done = break_it(target, rendezvous)
    assert (done.returncode, done.stderr.count("\n")) == (125, 1)
    assert HINT in done.stderr
    assert "pid 4711" in done.stdout
    assert files(target.parent) == before


@pytest.mark.parametrize(
    ("answer", "taken"), [("y", True), ("yes", True), ("n", False), ("", False), ("yesterday", False)]
)
def test_on_a_terminal_it_asks(target: Path, rendezvous: Path, holder: Elsewhere, answer: str, taken: bool) -> None:
    status, _ = _answered(target, rendezvous, answer)
    assert status == (0 if taken else 1)
    assert (holder.state().holders == ()) is taken


def test_the_holder_vouches_while_one_thinks(target: Path, rendezvous: Path, holder: Elsewhere) -> None:
    status, said = _answered(target, rendezvous, "y", lambda: holder.vouch("node7", program(4711, "uv sync")))
    assert status == 1
    assert "alive, it has vouched for its lock just now" in said
    assert holder.state().holders


def _answered(target: Path, rendezvous: Path, answer: str, meanwhile: object = None) -> tuple[int, str]:
    """Give this answer on a terminal; the exit status and what was said there."""
    master, slave = pty.openpty()
    command = [*FLOCKSHIM, "--break", str(target)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=settings(rendezvous), stdin=slave, stdout=quiet, stderr=slave) as process:
        os.close(slave)
        said = b""
        while b"[y/N] " not in said:
            said += os.read(master, 1000)
        if callable(meanwhile):
            meanwhile()
        os.write(master, answer.encode() + b"\n")
        status = process.wait(DEADLINE)
    os.set_blocking(master, False)
    try:
        while data := os.read(master, 1000):
            said += data
    except OSError:  # EIO: the other end is closed
        os.close(master)
    return status, said.decode()


@pytest.mark.parametrize("more", [{}, {"FLOCKSHIM_FORCE": "1"}], ids=["", "force"])
def test_one_that_is_alive_here_stays(
    target: Path, rendezvous: Path, aliveness: Aliveness, more: dict[str, str]
) -> None:
    """In a shell under the shim too, whose environment the command has."""
    holder = Elsewhere(target, aliveness.keeper)
    assert holder.lock()
    done = break_it(target, rendezvous, "--yes", **more)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "alive, so the lock stays: end it instead" in done.stderr
    assert holder.state().holders


def test_one_that_died_here_needs_no_answer(target: Path, rendezvous: Path, aliveness: Aliveness) -> None:
    keeper = aliveness.domain + "0" * 12
    holder = Elsewhere(target, keeper)
    assert holder.lock()
    done = break_it(target, rendezvous)
    assert (done.returncode, done.stderr) == (0, "")
    assert "held by a program of this host that is gone" in done.stdout
    assert holder.state().entries() == ()


def test_the_living_stay_when_others_go(target: Path, rendezvous: Path, aliveness: Aliveness) -> None:
    alive, dead = Elsewhere(target, aliveness.keeper), Elsewhere(target)
    assert [reader.lock(exclusive=False) for reader in (alive, dead)] == [True, True]
    assert break_it(target, rendezvous, "--yes").returncode == 1
    assert [entry.ticket.startswith(alive.keeper) for entry in alive.state().holders] == [True]


def test_a_file_that_is_not_ours(target: Path, rendezvous: Path) -> None:
    claim = target.parent / ".lock.flockshim"
    claim.write_text("something else\n")
    done = break_it(target, rendezvous, "--yes")
    assert (done.returncode, done.stderr.count("\n")) == (125, 1)
    assert ".lock.flockshim" in done.stderr
    assert claim.read_text() == "something else\n"


def test_a_directory_that_is_not_there(target: Path, rendezvous: Path) -> None:
    done = break_it(target.parent / "none" / "lock", rendezvous, "--yes")
    assert (done.returncode, done.stderr.count("\n")) == (125, 1)
    assert "No such file or directory" in done.stderr


def test_by_a_symbolic_link(target: Path, rendezvous: Path, holder: Elsewhere, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(target)
    assert break_it(link, rendezvous, "--yes").returncode == 0
    assert holder.state().holders == ()
    assert files(link.parent) == ["link"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--break"], "--break needs a file or directory"),
        (["--break", "a", "b"], "--break takes one file or directory, but was given 'b' too"),
        (["--break", "a", "--json"], "--break and --json exclude each other"),
        (["--break", "--locks", "a"], "exclude each other"),
        (["--yes", "true"], "--yes needs --break"),
    ],
)
def test_arguments(words: list[str], line: str) -> None:
    done = subprocess.run([*FLOCKSHIM, *words], capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert (done.returncode, done.stderr.count("\n")) == (125, 1)
    assert line in done.stderr


def test_the_holder_leaves_while_one_thinks(
    target: Path, rendezvous: Path, holder: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaves(_: object) -> bool:
        holder.unlock()
        return True

    monkeypatch.setattr(break_command, "_ask", leaves)
    wrote: list[str] = []
    assert break_command.run(str(target), False, settings(rendezvous), wrote.append, wrote.append) == 0
    assert wrote[-1].endswith(" does not hold it any more\n")
