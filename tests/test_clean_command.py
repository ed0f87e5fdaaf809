"""``flockshim --clean``: what crashes have left goes, what somebody may use stays."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.elsewhere import FLOCKSHIM, Elsewhere, files, settings
from support.proc import DEADLINE

from flockshim.aliveness import Aliveness

LEASE = "3"
HEARTBEAT = 0.3


def clean(directory: Path, rendezvous: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FLOCKSHIM, "--clean", str(directory), *words],
        env=settings(rendezvous, FLOCKSHIM_LEASE=LEASE),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )


def make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def dead_here(rendezvous: Path) -> str:
    """The id of a keeper of this host that is dead."""
    aliveness = Aliveness(str(rendezvous))
    aliveness.end()
    return aliveness.keeper


def test_nothing_to_clean(tmp_path: Path, rendezvous: Path) -> None:
    make(tmp_path / "file")
    done = clean(tmp_path, rendezvous)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("removed 0 files, and the dead from 0 locks\nleft 0 locks ")
    assert files(tmp_path) == ["file"]


def test_litter_goes_and_the_lock_stays(tmp_path: Path, rendezvous: Path) -> None:
    target = make(tmp_path / "lock")
    user = Elsewhere(target)
    assert user.lock()
    user.unlock()
    clean_files = files(tmp_path)
    lineage = next(name for name in clean_files if name.endswith(".free")).split(".")[3]
    other = "0" * len(lineage)
    for litter in (f"{lineage}.1+abc-1", f"{other}.0.free", f"{other}.5+abc-1"):
        make(tmp_path / f".lock.flockshim.{litter}")
    # One that a slow keeper may be about to use: the version is not reached yet.
    mine = [
        make(tmp_path / name) for name in (f".lock.flockshim.{lineage}.3+abc-2", ".lock.flockshim.notes", ".hidden")
    ]
    done = clean(tmp_path, rendezvous)
    assert (done.returncode, done.stderr) == (0, "")
    assert "removed 3 files, and the dead from 0 locks\nleft 1 locks with two files each" in done.stdout
    assert files(tmp_path) == sorted([*clean_files, *(path.name for path in mine)])
    assert user.lock()


def test_the_dead_of_this_host_go_at_once(tmp_path: Path, rendezvous: Path, dead_here: str) -> None:
    target = make(tmp_path / "a" / "b" / "lock")
    dead, heir = Elsewhere(target, dead_here), Elsewhere(target)
    assert dead.lock()
    assert not heir.lock()
    dead.vouch("here")
    done = clean(tmp_path, rendezvous)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the dead from 1 locks" in done.stdout
    assert "left 1 entries and vouching files of other hosts, which may be alive: --wait watches" in done.stdout
    state = heir.state()
    assert (heir.token, state.queue, len(state.holders)) == (state.version, (), 1)
    assert not dead.vouching_file().exists()


def test_other_hosts_are_not_judged_at_once(tmp_path: Path, rendezvous: Path) -> None:
    holder = Elsewhere(make(tmp_path / "lock"))
    assert holder.lock()
    holder.vouch("node7")
    before = files(tmp_path)
    done = clean(tmp_path, rendezvous)
    assert done.returncode == 0
    assert "left 2 entries and vouching files of other hosts" in done.stdout
    assert files(tmp_path) == before


@contextmanager
def vouching(keeper: Elsewhere) -> Iterator[None]:
    """The keeper lives meanwhile."""
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(HEARTBEAT):
            keeper.vouch("node8")

    keeper.vouch("node8")
    thread = threading.Thread(target=live)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_other_hosts_are_watched_for_a_lease_time(tmp_path: Path, rendezvous: Path) -> None:
    silent, absent, alive = (Elsewhere(make(tmp_path / name / "lock")) for name in ("silent", "absent", "alive"))
    assert [keeper.lock() for keeper in (silent, absent, alive)] == [True, True, True]
    silent.vouch("node7")
    with vouching(alive):
        done = clean(tmp_path, rendezvous, "--wait")
    assert (done.returncode, done.stderr) == (0, "")
    assert "the dead from 2 locks\nleft 3 locks" in done.stdout
    assert "left 2 entries and vouching files of other hosts, which seem alive\n" in done.stdout
    for dead in silent, absent:
        assert dead.state().holders == ()
        assert len(files(dead.directory)) == len(["claim", "state", "lock"])
    assert alive.state().holders


def test_symbolic_links_to_directories_are_not_followed(tmp_path: Path, rendezvous: Path, dead_here: str) -> None:
    dead = Elsewhere(make(tmp_path / "away" / "lock"), dead_here)
    assert dead.lock()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "link").symlink_to(dead.directory)
    assert clean(tmp_path / "below", rendezvous).returncode == 0
    assert dead.state().holders


def test_a_lock_that_cannot_be_read_hinders_no_other(tmp_path: Path, rendezvous: Path, dead_here: str) -> None:
    make(tmp_path / "a" / ".strange.flockshim").write_text("not ours\n")
    dead = Elsewhere(make(tmp_path / "b" / "lock"), dead_here)
    assert dead.lock()
    done = clean(tmp_path, rendezvous)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "a/strange" in done.stderr
    assert (tmp_path / "a" / ".strange.flockshim").read_text() == "not ours\n"
    assert dead.state().holders == ()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--clean"], "--clean needs a directory"),
        (["--clean", "/none"], "'/none' is not an existing directory"),
        (["--clean", "/none", "b"], "--clean takes one directory, but was given 'b' too"),
        (["--clean", "/none", "--yes"], "--clean and --yes exclude each other"),
        (["--wait", "true"], "--wait needs --clean"),
    ],
)
def test_arguments(words: list[str], line: str) -> None:
    done = subprocess.run([*FLOCKSHIM, *words], capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert (done.returncode, done.stderr.count("\n")) == (125, 1)
    assert line in done.stderr
