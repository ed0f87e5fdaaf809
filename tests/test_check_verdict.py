"""``flockshim --check``: the verdict on outcomes, file systems and kernels that are not at hand."""

from __future__ import annotations

import contextlib
import errno
from typing import NamedTuple

import pytest
from support.checking import (
    ALL_OK,
    LOCK_PROBES,
)

from flockshim import check, probes
from flockshim.filesystems import HOST, HOSTS, LOCAL, UNKNOWN, Reach


class Table:
    """A kernel that grants one lock too many."""

    def __init__(self, held: str, granted: str) -> None:
        self.held: dict[object, str] = {}
        self.wrong = (held, granted)

    def ask(self, owner: object, mode: str) -> None:
        self.held.pop(owner, None)
        if mode == "unlock":
            return
        for other in self.held.values():
            if "exclusive" in (mode, other) and (other, mode) != self.wrong:
                raise BlockingIOError(errno.EAGAIN, "held")
        self.held[owner] = mode


class Owner(NamedTuple):
    """In place of a probes.Child."""

    name: str
    table: Table

    def ask(self, _: str, descriptor: int, kind: str, mode: str, wait: bool) -> None:
        self.table.ask(self.name, mode)


@pytest.mark.parametrize(
    "wrong",
    [("shared", "exclusive"), ("exclusive", "shared"), ("exclusive", "exclusive"), None],
)
def test_every_conflict_is_tried(wrong: tuple[str, str] | None) -> None:
    table = Table(*(wrong or ("", "")))
    one, other = (probes.Contender(Owner(name, table), 0, "flock") for name in "ab")  # type: ignore[arg-type]
    with pytest.raises(probes.ExcludesNobody) if wrong else contextlib.nullcontext():
        probes.try_conflict(one, other)
    assert wrong or not table.held


# The verdict, of outcomes and file systems that are not at hand


def outcomes(**kinds: str) -> dict[str, str]:
    """ALL_OK, but for the locks of a kind that fail as given."""
    found = dict(ALL_OK)
    for kind, outcome in kinds.items():
        found.update({f"{kind}_{probe}": outcome for probe in LOCK_PROBES})
    return found


@pytest.mark.parametrize(
    ("scope", "status", "said"),
    [
        (LOCAL, 0, "Nothing is needed"),
        (HOSTS, 0, "as far as can be told between hosts too"),
        (HOST, 3, "not between hosts"),
        (UNKNOWN, 3, "not known"),
    ],
)
def test_where_locks_work(scope: str, status: int, said: str) -> None:
    verdict = check.judge("/d", outcomes(), Reach(scope, ""), 5)
    assert (verdict.scope, verdict.status, verdict.command) == (scope, status, "COMMAND")
    assert said in verdict.summary
    assert ("let only one host" in verdict.advice) == (status == 3)


@pytest.mark.parametrize(
    ("outcome", "status", "command"),
    [
        ("ENOLCK", 1, "flockshim COMMAND"),
        ("EACCES", 1, "flockshim --errno EACCES COMMAND"),
        ("EINTR", 2, "flockshim --force COMMAND"),
        ("hangs", 2, "flockshim --force COMMAND"),
        ("excludes nobody", 2, "flockshim --force COMMAND"),
    ],
)
@pytest.mark.parametrize("calls", [("flock",), ("fcntl",), ("flock", "fcntl")])
@pytest.mark.parametrize("scope", [LOCAL, HOSTS, UNKNOWN])
def test_where_locks_do_not_work(scope: str, calls: tuple[str, ...], outcome: str, status: int, command: str) -> None:
    verdict = check.judge("/d", outcomes(**dict.fromkeys(calls, outcome)), Reach(scope, ""), 5)
    assert (verdict.scope, verdict.status, verdict.command) == ("none", status, command)
    assert verdict.summary.endswith(f"Run: {command}")
    assert f"{calls[0]}()" in verdict.summary
    assert (" on others." in verdict.advice) == (scope != LOCAL)


def test_one_call_that_hangs_is_enough() -> None:
    """Whatever the other does."""
    verdict = check.judge("/d", outcomes(flock="ENOSYS", fcntl="hangs"), Reach(HOST, ""), 5)
    assert (verdict.status, verdict.command) == (2, "flockshim --force COMMAND")
    assert verdict.summary.startswith("Locks do not work in '/d': fcntl() does not return within 5 s.")


def test_several_errnos_are_all_named() -> None:
    found = {**outcomes(flock="ENOSYS"), "flock_exclusive": "EIO"}
    assert check.judge("/d", found, Reach(HOST, ""), 5).command == "flockshim --errno ENOSYS,EIO COMMAND"


@pytest.mark.parametrize(
    ("found", "summary", "command"),
    [
        ({"flock": "ENOSYS", "fcntl": "ENOSYS"}, "flock() and fcntl() fail with ENOSYS", "flockshim COMMAND"),
        (
            {"flock": "ENOSYS", "fcntl": "ENOLCK"},
            "flock() fails with ENOSYS, fcntl() fails with ENOLCK",
            "flockshim COMMAND",
        ),
        (
            {"flock": "EIO", "fcntl": "ENOLCK"},
            "flock() fails with EIO, fcntl() fails with ENOLCK",
            "flockshim --errno EIO,ENOLCK COMMAND",
        ),
    ],
)
def test_both_calls_are_told_of(found: dict[str, str], summary: str, command: str) -> None:
    verdict = check.judge("/d", outcomes(**found), Reach(LOCAL, ""), 5)
    assert verdict.summary == f"Locks do not work in '/d': {summary}. Run: {command}"
    assert (verdict.status, verdict.command) == (1, command)


def test_record_locks_of_open_files_alone_may_fail() -> None:
    verdict = check.judge("/d", outcomes(ofd="EINVAL"), Reach(LOCAL, ""), 5)
    assert verdict.status == 0
    assert "F_OFD_SETLK" in verdict.advice
    assert "F_OFD_SETLK" not in check.judge("/d", outcomes(), Reach(LOCAL, ""), 5).advice
