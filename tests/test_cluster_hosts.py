"""Eight hosts, ten processes each, one counter, while processes, keepers, hosts and the file system fail."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from support.hosts import Host, Site, is_stopped, recorded, require_hosts, undocumented
from support.intervals import Hold, overlaps, parse, with_breaks, wrong_values
from support.proc import await_end, await_true
from support.programs import program

import flockshim
from flockshim import nolockfs
from flockshim.cluster_names import keeper_of
from flockshim.lease_directories import MOST_WATCHED
from flockshim.pytest_plugin import Mounts

LEASE = 3.0
HOSTS = 8
PROCESSES = 10
READERS = 30
PAUSE = 2000000
DEADLINE = 60.0
SOAK = os.environ.get("FLOCKSHIM_SOAK") == "1"
TIMEOUT = 3600 if SOAK else 120
BYTES_OF_A_VISIT = 150
STEP = 10 * BYTES_OF_A_VISIT
"""Bytes that the logs must have grown by, all hosts together, between two failures."""
LOG = 2
"""The place of its log among the arguments of a program."""
MORE_THAN_A_REST = 120
"""Bytes in a log that are more than the rest of a visit and the next one's asking."""

START = (
    "worker=$1 file=$2 stop=$3 readers=$4 pause=$5 errors=$6; shift 6\n"
    'for log; do "$worker" "$file" "$log" "$stop" "$readers" "$pause" </dev/null >/dev/null 2>>"$errors" & done'
)


class Storm:
    """The hosts, and what is done to them."""

    def __init__(self, site: Site, server: int, logs: Path, seed: int, processes: int = PROCESSES) -> None:
        """SERVER is the process behind the file system."""
        self.site = site
        self.server = server
        self.logs = logs
        self.chance = random.Random(seed)
        self.processes = processes
        self.pause = PAUSE
        self.target = site.directory / "counter"
        self.target.write_bytes(bytes(8))
        self.stop = logs / "stop"
        self.hosts: dict[str, Host] = {}
        self.breaks: dict[str, list[int]] = {}
        self.killed: set[str] = set()
        self.workers = 0
        self.takeovers: list[float] = []

    def add_host(self, name: str, processes: int | None = None, slow: bool = True) -> None:
        """A host of this name, new among those that have or had it, and its processes."""
        key = f"h{len(self.site.hosts)}"
        self.hosts[key] = self.site.host(name, slow=slow)
        self.start(key, self.processes if processes is None else processes)

    def start(self, key: str, count: int) -> None:
        names = [str(self.logs / f"{key}.{self.workers + number}") for number in range(count)]
        self.workers += count
        arguments = (program("hostworker"), self.target, self.stop, READERS, self.pause, self.logs / f"errors-{key}")
        self.hosts[key].run_in_background(START, *map(str, arguments), *names, env=self.site.environment)

    def written(self) -> int:
        return sum(entry.stat().st_size for entry in os.scandir(self.logs) if entry.name.startswith("h"))

    def await_progress(self) -> None:
        """Return when there has been some more work: nobody hangs for ever."""
        goal = self.written() + STEP
        await_true(lambda: self.written() >= goal, "progress", DEADLINE)

    def await_every_host(self) -> None:
        """Return when a program of each has been let in once more: none is passed over for ever."""
        goals = {log: log.stat().st_size + MORE_THAN_A_REST for log in self._logs_in_use()}
        limit = time.monotonic() + DEADLINE
        while left := _hosts(self._logs_in_use()) - _hosts(log for log in goals if log.stat().st_size >= goals[log]):
            assert time.monotonic() < limit, f"no turn came to {sorted(left)}"
            self.await_progress()

    def _logs_in_use(self) -> set[Path]:
        commands = [command for host in self.hosts.values() for command in host.commands() if len(command) > LOG]
        return {Path(command[LOG]) for command in commands if command[LOG].startswith(str(self.logs))}

    def any_host(self) -> str:
        return self.chance.choice(sorted(self.hosts))

    def refill(self) -> None:
        """Start others for those programs that were ended with their host's lease."""
        for key, host in self.hosts.items():
            self.start(key, self.processes - len(host.running(str(self.logs))))

    # What fails

    def kill_process(self) -> None:
        """kill -9 of some program, and another in its place."""
        key = self.any_host()
        workers = self.hosts[key].running(str(self.logs))
        if workers:
            os.kill(self.chance.choice(workers), signal.SIGKILL)
            self.start(key, 1)

    def kill_half_a_keeper(self) -> None:
        """kill -9 of one of its two processes."""
        host = self.hosts[self.any_host()]
        try:
            await_true(lambda: len(host.keepers()) == 1, "the keeper to be whole", DEADLINE)
        except AssertionError as error:
            there = host.running("flockshim/keeper.py"), host.running(str(self.logs))
            raise AssertionError(f"{error}: {there}, {self.said()}\n{self.site.logs()}") from None
        victim = self.chance.choice(host.keepers()[0])
        os.kill(victim, signal.SIGKILL)
        await_end(victim)

    def kill_lease_worker(self) -> None:
        """kill -9 of the process that does a keeper's file operations."""
        for victim in self.hosts[self.any_host()].running("lease_worker.py"):
            os.kill(victim, signal.SIGKILL)

    def kill_whole_keeper(self) -> None:
        """kill -9 of all of it: what its programs hold is lost."""
        key = self.any_host()
        self.breaks.setdefault(key, []).append(time.monotonic_ns())
        for victim in self.hosts[key].running("flockshim/keeper.py"):
            os.kill(victim, signal.SIGKILL)

    def crash_host(self) -> None:
        """A host is gone while it holds, and comes back with nothing."""
        key = self._freeze_holder()
        host = self.hosts.pop(key)
        self._note_takeover(host)
        self.add_host(host.name)

    def freeze_host(self) -> None:
        """A host is frozen while it holds, past its lease, and goes on when another has had the lock."""
        key = self._freeze_holder()
        self._note_takeover(None)
        self.hosts[key].thaw()

    def stall(self) -> None:
        """The file system stands still for a good part of the lease time."""
        os.kill(self.server, signal.SIGSTOP)
        try:
            time.sleep(0.5 * self.site.lease)
        finally:
            os.kill(self.server, signal.SIGCONT)

    def _freeze_holder(self) -> str:
        """Freeze a host such that it is found to hold the lock."""
        limit = time.monotonic() + DEADLINE
        while time.monotonic() < limit:
            key = self.any_host()
            before = time.monotonic_ns()
            self.hosts[key].freeze()
            if self._holders() & self._keepers(key):
                self.breaks.setdefault(key, []).append(before)
                return key
            self.hosts[key].thaw()
            time.sleep(0.01 * self.chance.random())
        raise AssertionError("none of the hosts holds the lock")

    def _holders(self) -> set[str]:
        state = recorded(self.target)
        return {keeper_of(entry.ticket) for entry in state.holders} if state else set()

    def _keepers(self, key: str) -> set[str]:
        return {path.name[2:] for path in self.hosts[key].rendezvous.glob("a-*")}

    def _note_takeover(self, crashing: Host | None) -> None:
        begun = time.monotonic()
        before = self._holders()
        if crashing:
            crashing.end()
        await_true(lambda: not before & self._holders(), "the lock to be taken over", DEADLINE)
        self.takeovers.append(time.monotonic() - begun)

    # What came of it

    def finish(self) -> list[Hold]:
        """Let all end, and return what they have done."""
        self.stop.touch()
        for key, host in self.hosts.items():
            self._await_end(key, host)
        return self.holds()

    def _await_end(self, key: str, host: Host) -> None:
        try:
            await_true(lambda: not host.running(str(self.logs)), f"the programs of {key} to end", DEADLINE)
        except AssertionError as error:
            left = [(pid, is_stopped(pid)) for pid in host.running(str(self.logs))]
            text = f"(pid, stopped): {left}; {recorded(self.target)}; {self._keepers(key)}"
            raise AssertionError(f"{error}: {text}; {self.said()}\n{self.site.logs()}") from None

    def holds(self) -> list[Hold]:
        """What all have done until now; none of their calls may have failed."""
        logs = [parse(path.name, path.read_text()) for path in sorted(self.logs.glob("h*"))]
        assert [failure for log in logs for failure in log.failures] == [], self.unexpected()
        return with_breaks([hold for log in logs for hold in log.holds], self.breaks)

    def unexpected(self) -> str:
        """What a program has said that is not the line of one whose lease was lost by rights."""
        return "\n".join(line for line in self.said() if " was lost: " not in line)

    def said(self) -> list[str]:
        """Every line that a program has said on standard error."""
        return [line for path in self.logs.glob("errors-*") for line in path.read_text().splitlines()]


def _hosts(logs: Iterable[Path]) -> set[str]:
    return {log.name.partition(".")[0] for log in logs}


@pytest.fixture
def storm(nolock_dir: Path, _nolock_mounts: Mounts, tmp_path: Path) -> Iterator[Storm]:
    require_hosts()
    site = Site(nolock_dir, LEASE)
    try:
        yield Storm(site, _nolock_mounts.get("ENOSYS", "ENOSYS").server_pid, tmp_path, 1)
    finally:
        site.end()


def check(storm: Storm, holds: list[Hold]) -> None:
    """Nobody was inside with another, or lost an update, unless broken by rights; and everybody says why."""
    assert overlaps(holds) == []
    assert wrong_values(holds) == []
    assert storm.unexpected() == ""


def check_files(storm: Storm) -> None:
    """When all is over, those who come remove what the dead have left: each of them so many files, at least."""
    while left := undocumented(storm.target):
        world = storm.site.world(storm.site.host("last"))
        assert world.free(storm.target)
        most = max(0, len(left) - MOST_WATCHED)
        try:
            await_true(lambda most=most: len(undocumented(storm.target)) <= most, "the files of the dead to go")  # type: ignore[misc]
        except AssertionError as error:
            raise AssertionError(f"{error}: of {left} {undocumented(storm.target)} are left") from None


@pytest.mark.timeout(TIMEOUT)
def test_nobody_is_inside_with_another_whatever_fails(storm: Storm) -> None:
    rounds = 20 if SOAK else 1
    for number in range(HOSTS):
        storm.add_host(f"node{number}")
    storm.await_progress()
    for _ in range(rounds):
        storm.refill()
        failures = [storm.kill_process] * 8 + [storm.kill_half_a_keeper] * 2 + [storm.kill_lease_worker] * 2
        failures += [storm.kill_whole_keeper, storm.crash_host, storm.freeze_host, storm.stall]
        storm.chance.shuffle(failures)
        for fail in failures:
            fail()
            storm.await_progress()
    storm.await_every_host()
    holds = storm.finish()
    check(storm, holds)
    broken = sum(hold.broken for hold in holds)
    seconds = ", ".join(f"{seconds:.1f} s" for seconds in storm.takeovers)
    print(
        f"\n{len(holds)} visits of {storm.workers} processes, {broken} broken; taken over after {seconds} ({LEASE} s)"
    )
    assert len(storm.takeovers) == 2 * rounds
    check_files(storm)


def test_the_check_sees_what_happens_without_the_lease(storm: Storm) -> None:
    """With locks of each host alone, the same programs are found out; else all this would prove nothing."""
    storm.site.environment = flockshim.environ(mode="host", base=storm.site.environment)
    for number in range(2):
        storm.add_host(f"node{number}", 4)
    await_true(lambda: bool(overlaps(storm.holds()) and wrong_values(storm.holds())), "a violation to be found")


@pytest.mark.timeout(TIMEOUT)
def test_thousands_of_locks_leave_two_files(storm: Storm) -> None:
    storm.pause = 0
    for name, visits in ("alone", 1000), ("second", 1200), ("third", 1400):
        storm.add_host(name, 3, slow=False)
        goal = (30 if SOAK else 1) * visits * BYTES_OF_A_VISIT
        await_true(lambda goal=goal: storm.written() >= goal, "so many visits", TIMEOUT)  # type: ignore[misc]
    holds = storm.finish()
    state = recorded(storm.target)
    assert state
    print(f"\n{len(holds)} visits, {state.version} versions")
    check(storm, holds)
    assert storm.said() == []
    await_true(lambda: undocumented(storm.target) == [], "only the documented files to be there")


def test_each_host_has_a_mount_of_its_own(storm: Storm, tmp_path: Path) -> None:
    """Names that another host has changed are still seen for a second. So is the counter, so intervals alone count."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / storm.target.name).write_bytes(bytes(8))
    with nolockfs.mount(backing=shared) as one, nolockfs.mount(backing=shared) as other:
        for directory in one, other:
            storm.target = directory / storm.target.name
            storm.add_host("node", 2)
        goal = (500 if SOAK else 1) * BYTES_OF_A_VISIT
        await_true(lambda: sum(log.stat().st_size >= goal for log in tmp_path.glob("h*")) == 4, "turns", TIMEOUT)
        holds = storm.finish()
        for host in storm.site.hosts:
            host.end()
    assert overlaps(holds) == []
    assert storm.said() == []


RENAME_WITH_FLAGS = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.renameat2(-100, b".a.flockshim", -100, b".b.flockshim", 1) == -1
sys.exit(ctypes.get_errno())
"""


def test_renames_with_flags_fail_where_operations_are_slow(storm: Storm) -> None:
    """As on Lustre: what passes there does not need them."""
    host = storm.site.host("node", slow=True)
    done = subprocess.run([*host.prefix, sys.executable, "-I", "-S", "-c", RENAME_WITH_FLAGS], check=False)
    assert done.returncode == errno.EINVAL
