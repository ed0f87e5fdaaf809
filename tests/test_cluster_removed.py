"""Directories that are removed while a file in them is locked, as uv does with its cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import shim_environment
from support.driver import EX, OK, UN
from support.worlds import World


@pytest.fixture
def cluster(nolock_dir: Path, rendezvous: Path) -> Iterator[World]:
    environment = shim_environment(rendezvous, FLOCKSHIM_LEASE="3")
    world = World("emulated", nolock_dir, {**environment, "FLOCKSHIM_MODE": "cluster"})
    yield world
    world.end()


def test_a_directory_removed_under_the_lock(cluster: World) -> None:
    below = cluster.directory / "below"
    below.mkdir()
    driver = cluster.start()
    fd = driver.open(below / "file")
    assert driver.flock(fd, EX) == OK
    shutil.rmtree(below)
    assert driver.flock(fd, UN) == OK
    below.mkdir()
    other = cluster.start()
    other_fd = other.open(below / "file")
    assert other.flock(other_fd, EX) == OK
    assert other.flock(other_fd, UN) == OK
    assert not list(below.glob(".flockshim.*"))


def test_a_file_removed_under_the_lock(cluster: World) -> None:
    driver, fd = cluster.opened()
    assert driver.flock(fd, EX) == OK
    cluster.file().unlink()
    assert driver.flock(fd, UN) == OK
    assert cluster.free(cluster.file())
