"""What goes wrong in a keeper, on a disk, with a name: nobody gets what is another's, and nobody waits for ever."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest
from support.driver import BUSY, EX, NB, OK, SH, UN
from support.hosts import await_waiting, recorded
from support.keepers import keepers
from support.leaserunner import Running
from support.proc import await_true
from support.worlds import World
from test_cluster import Site

from flockshim import holding_programs, nolockfs
from flockshim.cluster_names import Names, StateName, data_of
from flockshim.cluster_ops import Create, List, Wait
from flockshim.host import proxy_path


def test_a_lock_that_another_keeper_of_the_host_has_left_is_recorded(here: World, rendezvous: Path) -> None:
    """LOCK_NB was undecided while that keeper, which is played by the test, did not answer."""
    path = here.file()
    status = path.stat()
    proxy = os.open(proxy_path(str(rendezvous), (status.st_dev, status.st_ino)), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(proxy, fcntl.LOCK_EX)
    driver, fd = here.opened()
    call = driver.flock_later(fd, EX | NB)
    here.await_blocked(call)
    assert recorded(path) is None
    os.close(proxy)
    assert call.result() == OK
    state = recorded(path)
    assert state and state.holders


def test_an_entry_is_taken_back_after_errors(here: World, there: World) -> None:
    """Of a wait that has failed, and then could not be taken back at once."""
    path = here.file()
    holder, held = there.opened()
    assert holder.flock(held, EX) == OK
    waiter, wanted = here.opened()
    call = waiter.flock_later(wanted, EX)
    await_waiting(path, 1)
    text = damage(path)
    assert call.result() == errno.ENOSYS
    assert "--mode host" in here.fleet.errors()
    text.rename(text.with_suffix(""))

    def alone() -> bool:
        state = recorded(path)
        return state is not None and not state.queue

    await_true(alone, "the entry to go")
    assert holder.flock(held, UN) == OK
    assert there.free(path)


def damage(path: Path) -> Path:
    """Make the state of a lock unreadable. The result is to be renamed, without suffix, to mend it."""
    names = Names(path.name)
    (state,) = [name for name in map(names.parse, os.listdir(path.parent)) if isinstance(name, StateName)]
    data = data_of(state)
    assert data
    kept = path.parent / f"{names.data(data._replace(version=data.version + 1))}.kept"
    (path.parent / names.data(data)).rename(kept)
    kept.with_suffix("").write_text("nothing that is understood")
    (path.parent / names.state(state)).rename(path.parent / names.state(state._replace(version=state.version + 1)))
    return kept


# Files without a name


def test_a_file_that_was_unlinked_while_it_is_locked(here: World, there: World) -> None:
    """Another host has had it open before."""
    path = here.file()
    holder, held = here.opened()
    other, wanted = there.opened()
    assert holder.flock(held, EX) == OK
    path.unlink()
    for operation in EX | NB, SH | NB:
        assert other.flock(wanted, operation) == BUSY
    call = other.flock_later(wanted, EX)
    await_waiting(path, 1)
    assert holder.flock(held, UN) == OK
    assert call.result() == OK
    assert holder.flock(held, SH | NB) == BUSY


def test_a_keeper_that_succeeds_keeps_all_locks(here: World, there: World, rendezvous: Path) -> None:
    """Also that on a file whose name was so long that ` (deleted)` made it too long."""
    long = here.file("n" * 170)
    other, unlinked = here.opened(long.name)
    holder, held = here.opened()
    assert other.flock(unlinked, EX) == OK
    assert holder.flock(held, EX) == OK
    long.unlink()
    ((_, worker),) = keepers(rendezvous)
    os.kill(worker, signal.SIGKILL)
    await_true(lambda: any(keeper.worker != worker for keeper in keepers(rendezvous)), "the next one")
    for world in here, there:
        assert world.probe(here.file(), SH) == BUSY
    assert holder.flock(held, UN) == OK
    assert there.free(here.file())
    assert other.flock(unlinked, UN) == OK
    assert len(keepers(rendezvous)) == 1


# One part alone


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_lock_is_given_back_on_a_full_disk(tmp_path: Path, number: int) -> None:
    """To the first who waits; the others, whose place would take a file, ask anew."""
    holder, first, second = (Site(tmp_path, name) for name in "abc")
    holder.lock()
    waiting = []
    for site in first, second:
        steps = site.lease.acquire(True, True)
        site.while_it_waits = lambda: None
        operation = next(steps)
        while not isinstance(operation, Wait):
            try:
                result = site.perform(operation)
            except OSError as error:
                operation = steps.throw(error)
            else:
                operation = steps.send(result)
        waiting.append(steps)
    holder.fails = {Create: number}
    holder.unlock()
    first.fails = second.fails = {Create: number}
    assert first.run(waiting[0]) is True
    assert [name for name in os.listdir(tmp_path) if "+" in name] == []
    first.unlock()
    assert second.run(waiting[1]) is True


@pytest.mark.usefixtures("nolock_dir")  # or it is skipped
def test_an_error_of_a_listing_is_told() -> None:
    """That of listdir(3) names no file: it was given a descriptor."""
    gone = nolockfs.mount()
    with gone as path:
        running = Running(path)
        try:
            assert running.do(List("")) == []
            os.kill(gone.server_pid, signal.SIGKILL)
            with pytest.raises(OSError) as caught:
                running.do(List(""))
        finally:
            running.close()
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert caught.value.filename == str(path)


def test_whoever_is_forked_while_holders_are_stopped_is_stopped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, last = (2**22 + number for number in range(3))  # no process has such an id
    looks = iter([[one], [one, other], [other, last], [one, other, last]])
    stopped = []

    def send(pids: object, number: int) -> None:
        stopped.append((pids, number))

    monkeypatch.setattr(holding_programs, "find", lambda _: next(looks))
    monkeypatch.setattr(holding_programs, "send", send)
    assert holding_programs.stop([]) == {one, other, last}
    assert stopped == [({pid}, signal.SIGSTOP) for pid in (one, other, last)]
