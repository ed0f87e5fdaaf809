"""Programs that a keeper has stopped because it cannot vouch for their lock."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.driver import EX, OK
from support.hosts import is_stopped
from support.keepers import end_keepers, keepers
from support.proc import await_true
from support.worlds import World

from flockshim.pytest_plugin import Mounts


@pytest.fixture
def server(_nolock_mounts: Mounts) -> Iterator[int]:
    """The process behind the mount, which goes on in the end."""
    pid = _nolock_mounts.get("ENOSYS", "ENOSYS").server_pid
    yield pid
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("successor", [True, False])
def test_nobody_stays_stopped_when_the_keeper_dies(here: World, rendezvous: Path, server: int, successor: bool) -> None:
    driver, fd = here.opened()
    assert driver.flock(fd, EX) == OK
    os.kill(server, signal.SIGSTOP)
    await_true(lambda: is_stopped(driver.pid), "the holder to be stopped")
    if successor:
        before = keepers(rendezvous)
        os.kill(before[0].worker, signal.SIGKILL)
        await_true(lambda: keepers(rendezvous) not in ([], before), "the next keeper")
        os.kill(server, signal.SIGCONT)
    else:
        end_keepers(rendezvous)
    await_true(lambda: not is_stopped(driver.pid), "the holder to go on")
