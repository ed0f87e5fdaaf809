"""Which keepers of a domain are alive, and which domain this is."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import shim_environment
from support.driver import EX, OK
from support.worlds import World

from flockshim import aliveness
from flockshim.aliveness import Aliveness, keeper_of_path


def kept(directory: Path) -> list[str]:
    """The files of keepers that are there."""
    return sorted(name for name in os.listdir(directory) if name.startswith("a-"))


def killed(directory: Path) -> str:
    """A keeper that was killed: its lock is gone, its file is not."""
    dead = Aliveness(str(directory))
    os.close(dead.descriptor)
    return dead.keeper


def test_the_living_and_the_dead(tmp_path: Path) -> None:
    one, other = Aliveness(str(tmp_path)), Aliveness(str(tmp_path))
    assert one.domain == other.domain
    assert (one.is_dead(other.keeper), one.is_dead(one.keeper)) == (False, False)
    dead = killed(tmp_path)
    assert one.is_dead(dead) is True
    assert kept(tmp_path) == sorted(f"a-{alive.keeper}" for alive in (one, other))
    other.end()
    assert one.is_dead(other.keeper) is True
    os.close(one.descriptor)
    os.close(other.descriptor)


def test_another_directory_is_another_domain(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, there = Aliveness(str(tmp_path / "here")), Aliveness(str(tmp_path / "there"))
    assert here.is_dead(there.keeper) is None
    os.close(here.descriptor)
    os.close(there.descriptor)


def test_two_judge_the_same_dead_keeper_at_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has opened the file when the other removes it."""
    judge = Aliveness(str(tmp_path))
    dead = killed(tmp_path)
    flock = aliveness._kernel_flock

    def after_another(descriptor: int, operation: int) -> int:
        (tmp_path / f"a-{dead}").unlink()
        return flock(descriptor, operation)

    monkeypatch.setattr(aliveness, "_kernel_flock", after_another)
    assert judge.is_dead(dead) is True
    os.close(judge.descriptor)


def test_whose_file_it_is() -> None:
    assert keeper_of_path("/dev/shm/x/a-0a1b", "/dev/shm/x") == "0a1b"
    for path in ("/dev/shm/x/k-0a1b", "/dev/shm/x/a-0a/1b", "/dev/shm/y/a-0a1b"):
        assert keeper_of_path(path, "/dev/shm/x") is None


# The domain


@contextmanager
def full_disk() -> Iterator[None]:
    """Files can be made, but nothing can be written to them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_domain_is_whole_or_not_there(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError):
        Aliveness(str(tmp_path))
    assert os.listdir(tmp_path) == []
    alive = Aliveness(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [f"a-{alive.keeper}", "domain"]
    os.close(alive.descriptor)


def test_whoever_makes_a_domain_second_takes_the_first(tmp_path: Path) -> None:
    path = tmp_path / "domain"
    aliveness._make_domain(str(path))
    text = path.read_text()
    aliveness._make_domain(str(path))
    assert path.read_text() == text
    assert os.listdir(tmp_path) == ["domain"]


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_damaged_domain_is_none(tmp_path: Path, length: int) -> None:
    """Two machines with the same one would take each other's living keepers for dead."""
    (tmp_path / "domain").write_text("0" * length)
    with pytest.raises(OSError, match="damaged"):
        Aliveness(str(tmp_path))
    assert os.listdir(tmp_path) == ["domain"]


def test_with_a_damaged_domain_nothing_is_locked(nolock_dir: Path, rendezvous: Path) -> None:
    environment = shim_environment(rendezvous)
    world = World("emulated", nolock_dir, {**environment, "FLOCKSHIM_MODE": "cluster"})
    (rendezvous / "domain").touch(0o600)
    driver, fd = world.opened()
    assert driver.flock(fd, EX) != OK
    errors = world.end()
    assert f"{rendezvous}/domain" in errors and "damaged" in errors and errors.count("\n") == 1
