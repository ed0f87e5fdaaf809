"""Control groups and pid namespaces: the borders within which a keeper serves."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

from support.driver import Fleet
from support.proc import await_end, await_true


class NoControlGroups(Exception):
    """Why no control group can be made here."""


def _hierarchies() -> list[Path]:
    """This process's own group in every mounted hierarchy, unified ones first."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    found: list[Path] = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mountpoint, kind, options = line.split()[:4]
        if kind == "cgroup2":
            found.insert(0, Path(mountpoint + own.get("", "/")))
        elif kind == "cgroup":
            for controllers, path in own.items():
                if controllers and set(controllers.split(",")) <= set(options.split(",")):
                    found.append(Path(mountpoint + path))
    return found


class ControlGroup:
    """A new control group below this process's own."""

    def __init__(self) -> None:
        reasons = []
        for parent in _hierarchies():
            try:
                self.path = Path(tempfile.mkdtemp(prefix="flockshim-test-", dir=parent))
                return
            except OSError as error:
                reasons.append(str(error))
        raise NoControlGroups("; ".join(reasons) or "no hierarchy is mounted")

    @property
    def prefix(self) -> list[str]:
        """A command that runs the one behind it, in place, in this group."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.path)]

    def processes(self) -> list[int]:
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def kill(self) -> None:
        """Kill everything in the group, as a batch system does at the end of a job."""
        while processes := self.processes():
            for pid in processes:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            for pid in processes:
                await_end(pid)

    def remove(self) -> None:
        self.kill()
        # The group counts a process until its parent has waited for it.
        await_true(self._try_to_remove, f"{self.path} to be empty")

    def _try_to_remove(self) -> bool:
        try:
            self.path.rmdir()
        except OSError:
            return False
        return True


class PidNamespace:
    """A new pid namespace; whose first process ends, all of whose processes end."""

    def __init__(self) -> None:
        self.fleet = Fleet(os.environ)
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.first = self.fleet.start(None, *command)

    @property
    def prefix(self) -> list[str]:
        """A command that runs the one behind it, as its child, in this namespace."""
        return ["nsenter", "--target", str(self.first.pid), "--pid", "--mount"]

    def kill(self) -> None:
        self.first.kill()

    def remove(self) -> None:
        self.fleet.end()
