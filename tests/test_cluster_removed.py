"""Directories that are removed while a file in them is locked, as uv does with its cache."""

from __future__ import annotations

import shutil

from support.driver import EX, OK, UN
from support.worlds import World


def test_a_directory_removed_under_the_lock(here: World) -> None:
    below = here.directory / "below"
    below.mkdir()
    driver = here.start()
    fd = driver.open(below / "file")
    assert driver.flock(fd, EX) == OK
    shutil.rmtree(below)
    assert driver.flock(fd, UN) == OK
    below.mkdir()
    other = here.start()
    other_fd = other.open(below / "file")
    assert other.flock(other_fd, EX) == OK
    assert other.flock(other_fd, UN) == OK
    assert not list(below.glob(".flockshim.*"))


def test_a_file_removed_under_the_lock(here: World) -> None:
    driver, fd = here.opened()
    assert driver.flock(fd, EX) == OK
    here.file().unlink()
    assert driver.flock(fd, UN) == OK
    assert here.free(here.file())
