"""``flockshim --check``: tries what a directory's file system can lock, and says so in plain words."""

import errno
import json
import os
import signal
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, Optional

from flockshim import FlockshimError, errnos, filesystems, launch, probes
from flockshim.filesystems import FileSystem, Reach
from flockshim.probe_child import Hangs

WORKS = 0
FAILS = 1
NEEDS_FORCE = 2
ONE_HOST = 3
NOT_CHECKED = 125

_WIDTH = 79
_LONGEST_OPTION = 60

_LOCKS = (
    "A lock is how programs wait for one another, so that no two of them change the same files at once. "
    "uv, cargo and many others take theirs with flock(), SQLite and conda with fcntl()."
)
_CALLS = ("flock", "fcntl")


class Verdict(NamedTuple):
    """What the outcome means."""

    scope: str
    """``local``, ``hosts``, ``host``, ``none`` or ``unknown``."""
    status: int
    command: Optional[str]
    summary: str
    advice: str


class Report(NamedTuple):
    """All that is said of a directory."""

    directory: str
    system: FileSystem
    reach: Reach
    outcomes: dict[str, str]
    verdict: Verdict


def main(
    directory: Optional[str], as_json: bool, seconds: float, write: Callable[[str], None], say: Callable[[str], None]
) -> int:
    """Try what *directory* can lock and print the report on standard output.

    :param directory: the current one if None.
    :param as_json: print it for programs, see :func:`as_object`.
    :param seconds: how long each call may take before it is said to hang.
    :param write: writes to standard output, *say* a line to standard error.
    :returns: the exit status: 0 locks work, 1 they fail, 2 they hang or exclude nobody, 3 they work on this host
        only, as far as can be told.
    :raises FlockshimError: when *directory* is missing or nothing can be tried in it (what is known is printed before),
        or *seconds* is not positive.
    """
    if seconds <= 0:
        raise FlockshimError("--check needs some time for each call: give a --timeout of more than 0 seconds")
    directory = directory or "."
    with _removing_before_death():
        path, device, trouble = _place(directory, seconds)
        outcomes, left_behind = dict(_SKIPPED), list[str]()
        if not trouble:
            outcomes, left_behind, trouble = _try(path, seconds)
    system = _file_system(path, device)
    reach = filesystems.reach(system, os.uname().release)
    verdict = _not_checked(path) if trouble else judge(path, outcomes, reach, seconds)
    report = Report(path, system, reach, outcomes, verdict)
    write((json.dumps(as_object(report), indent=2) if as_json else as_text(report)).rstrip("\n") + "\n")
    for file in left_behind:
        say(f"warning: {file!r} could not be removed: remove it when the file system answers again")
    if trouble:
        raise FlockshimError(trouble)
    return verdict.status


def as_object(report: Report) -> dict[str, object]:
    """Return the report as ``--json`` prints it.

    ``version``: 1, raised when a key changes its meaning; ``directory``: its real path; ``filesystem``: ``type``,
    ``source``, ``mount_point`` and ``options`` (a list) as in /proc/self/mountinfo, of type ``unknown`` if it is not
    there; ``probes``: an outcome for each of flock_, fcntl_ and ofd_ (record locks of open file descriptions) with
    shared, exclusive, nonblocking and conflict, and for exclusive_create, link, rename and symlink, which is ``ok``,
    the name of an errno, ``hangs``, ``excludes nobody`` or ``skipped``; ``scope``: between whom locks work: ``local``
    (there are no other hosts), ``hosts``, ``host`` (this one), ``none``, ``unknown``; ``status``: the exit status;
    ``command``: how to run COMMAND here, null where that could not be tried; ``summary``: one sentence.
    """
    return {
        "version": 1,
        "directory": report.directory,
        "filesystem": {
            "type": report.system.type,
            "source": report.system.source,
            "mount_point": report.system.mount_point,
            "options": list(report.system.options),
        },
        "probes": report.outcomes,
        "scope": report.verdict.scope,
        "status": report.verdict.status,
        "command": report.verdict.command,
        "summary": report.verdict.summary,
    }


def as_text(report: Report) -> str:
    """Return the report for people; its first line says it all."""
    system = report.system
    options = [
        option if len(option) <= _LONGEST_OPTION else option[:_LONGEST_OPTION] + "..." for option in system.options
    ]
    where = f"{system.type}, {system.source} on {system.mount_point}" if system.mount_point else system.type
    rows = {
        "file system": where,
        "options": ", ".join(options),
        # How far its locks reach is of no interest where it gives none.
        "known": "" if report.verdict.scope == "none" else report.reach.why,
        "flock": _kind_in_words(report.outcomes, "flock"),
        "fcntl": _kind_in_words(report.outcomes, "fcntl"),
        "fcntl (OFD)": _kind_in_words(report.outcomes, "ofd"),
        "file names": _names_in_words(report.outcomes),
    }
    table = "\n".join(
        textwrap.fill(
            f"{label:14}{text}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 16, break_on_hyphens=False
        )
        for label, text in rows.items()
        if text
    )
    advice = textwrap.fill(report.verdict.advice, _WIDTH)
    return f"{report.verdict.summary}\n\n{advice}\n\n{table}\n"


def judge(path: str, outcomes: dict[str, str], reach: Reach, seconds: float) -> Verdict:
    """Return what the *outcomes* of trying, all probes by name, mean for programs that use *path*."""
    calls = [kind for kind in _CALLS if any(map(_is_bad, _of_kind(outcomes, kind)))]
    if not calls:
        return _working(path, reach, _ofd_in_words(outcomes))
    none = f"Locks do not work in {path!r}"
    for call in calls:
        found = _of_kind(outcomes, call)
        if probes.HANGS in found:
            return _forced(f"{none}: {call}() does not return within {seconds:g} s.", reach)
        if probes.EXCLUDES_NOBODY in found:
            return _forced(f"{none}: {call}() gives one lock to two programs at once.", reach)
        numbers = {errnos.number(name, call) for name in filter(_is_bad, found)}
        if probes.OK in found or numbers & set(errnos.ANSWERS):
            # With a kernel lock for one call and an emulated one for another, nobody would be excluded.
            words = _kind_in_words(outcomes, call)
            return _forced(f"Locks work only in part in {path!r}: {call}() {words}.", reach)
    bad = {call: tuple(dict.fromkeys(filter(_is_bad, _of_kind(outcomes, call)))) for call in calls}
    names = ",".join(dict.fromkeys(name for of_call in bad.values() for name in of_call))
    usual = {errnos.number(name, "errno") for name in names.split(",")} <= set(
        map(int, launch.DEFAULT_ERRNOS.split(","))
    )
    command = "flockshim COMMAND" if usual else f"flockshim --errno {names} COMMAND"
    advice = f"{_LOCKS} Under flockshim they get locks here, {_emulated_reach(reach)}"
    return Verdict("none", FAILS, command, f"{none}: {_failures_in_words(bad)}. Run: {command}", advice)


def _failures_in_words(bad: dict[str, tuple[str, ...]]) -> str:
    if len(bad) > 1 and len(set(bad.values())) == 1:
        return f"{'() and '.join(bad)}() fail with {','.join(next(iter(bad.values())))}"
    return ", ".join(f"{call}() fails with {','.join(names)}" for call, names in bad.items())


def _working(path: str, reach: Reach, records: str) -> Verdict:
    nothing = "Nothing is needed: run COMMAND without flockshim."
    if reach.scope == filesystems.LOCAL:
        return Verdict(reach.scope, WORKS, "COMMAND", f"Locks work in {path!r}. {nothing}", _LOCKS + records)
    if reach.scope == filesystems.HOSTS:
        summary = f"Locks work in {path!r}, as far as can be told between hosts too. {nothing}"
        return Verdict(reach.scope, WORKS, "COMMAND", summary, _LOCKS + records)
    between = (
        "but as far as can be told not between hosts"
        if reach.scope == filesystems.HOST
        else "and whether they do between hosts is not known"
    )
    summary = f"Locks work in {path!r} on this host, {between}. On one host run COMMAND without flockshim."
    advice = f"{_LOCKS} If other hosts use this directory too, let only one host at a time write there.{records}"
    return Verdict(reach.scope, ONE_HOST, "COMMAND", summary, advice)


def _forced(finding: str, reach: Reach) -> Verdict:
    command = "flockshim --force COMMAND"
    advice = (
        f"{_LOCKS} With --force flockshim never asks the file system and gives locks of its own, "
        f"{_emulated_reach(reach)} Start all programs that use this directory so."
    )
    return Verdict("none", NEEDS_FORCE, command, f"{finding} Run: {command}", advice)


def _not_checked(path: str) -> Verdict:
    return Verdict("unknown", NOT_CHECKED, None, f"What {path!r} can lock could not be tried.", _LOCKS)


def _emulated_reach(reach: Reach) -> str:
    if reach.scope == filesystems.LOCAL:
        return "between your programs."
    return (
        "between your programs, on this host and, by files beside those that are locked (docs/cluster.md), on others."
    )


def _ofd_in_words(outcomes: dict[str, str]) -> str:
    """Return a sentence about locks of open file descriptions, with a space before it, where they fail alone."""
    if any(map(_is_bad, _of_kind(outcomes, "ofd"))):
        return (
            f" fcntl() with F_OFD_SETLK, which few programs use, {_kind_in_words(outcomes, 'ofd')}; "
            "for those use flockshim COMMAND."
        )
    return ""


def _kind_in_words(outcomes: dict[str, str], kind: str) -> str:
    """Return what the locks of *kind* do, as a verb after their name."""
    found = {probe: outcomes[f"{kind}_{probe}"] for probe in probes.LOCK_PROBES}
    bad = {probe: outcome for probe, outcome in found.items() if _is_bad(outcome)}
    if probes.HANGS in bad.values():
        return "hangs"
    if probes.EXCLUDES_NOBODY in bad.values():
        return "gives one lock to two programs at once"
    if probes.OK in found.values() and bad:
        return "fails in part: " + ", ".join(f"{probe} with {outcome}" for probe, outcome in bad.items())
    if bad:
        return "fails with " + ", ".join(dict.fromkeys(_with_meaning(outcome) for outcome in bad.values()))
    return "works" if probes.OK in found.values() else "was not tried"


def _names_in_words(outcomes: dict[str, str]) -> str:
    by_outcome: dict[str, list[str]] = {}
    for name in probes.NAME_PROBES:
        by_outcome.setdefault(outcomes[name], []).append(name.replace("_", " "))
    return "; ".join(f"{', '.join(names)}: {outcome}" for outcome, names in by_outcome.items())


def _with_meaning(name: str) -> str:
    number = errnos.number(name, "errno")
    return name if number == errnos.ENOTSUPP else f"{name} ({os.strerror(number)})"


def _of_kind(outcomes: dict[str, str], kind: str) -> list[str]:
    return [outcomes[f"{kind}_{probe}"] for probe in probes.LOCK_PROBES]


def _is_bad(outcome: str) -> bool:
    return outcome not in (probes.OK, probes.SKIPPED)


def _place(directory: str, seconds: float) -> tuple[str, Optional[int], str]:
    """Return the real path of *directory*, its device, and what is the trouble if it does not answer."""
    try:
        path, device = probes.place(directory, seconds)
    except Hangs:
        path = os.path.abspath(directory)
        return path, None, _no_answer(path, seconds)
    except OSError as error:
        raise FlockshimError(f"--check: {directory!r}: {error.strerror}: give a directory that you may use") from None
    return path, device, ""


def _try(path: str, seconds: float) -> tuple[dict[str, str], list[str], str]:
    """Return the outcome of all probes, the files that could not be removed, and what is the trouble."""
    outcomes, trouble = dict(_SKIPPED), ""
    with probes.Trial(path, seconds) as trial:
        try:
            trial.writable()
        except Hangs:
            trouble = _no_answer(path, seconds)
        except OSError as error:
            reason = f"no file can be made in {path!r} ({error.strerror}), so nothing was tried"
            trouble = f"--check: {reason}: {_remedy(error.errno)}"
        else:
            for kind in probes.KINDS:
                outcomes.update((f"{kind}_{probe}", outcome) for probe, outcome in trial.locks(kind).items())
            outcomes.update(trial.names())
    return outcomes, trial.left_behind, trouble


def _no_answer(path: str, seconds: float) -> str:
    return (
        f"--check: {path!r} does not answer within {seconds:g} s, so nothing was tried: "
        "wait until its file server is back, or ask the administrator"
    )


def _remedy(number: Optional[int]) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "make room there first"
    return "give a directory of the same file system in which you may write"


def _file_system(path: str, device: Optional[int]) -> FileSystem:
    try:
        return filesystems.containing(path, device, filesystems.mounted())
    except OSError:  # no /proc
        return filesystems.NOT_FOUND


@contextmanager
def _removing_before_death() -> Iterator[None]:
    """Let a signal that ends this process do so after the block has been left, with its files removed."""
    caught: list[int] = []

    def stop(number: int, _: Optional[FrameType]) -> None:
        for ours in before:
            signal.signal(ours, signal.SIG_IGN)
        caught.append(number)
        raise _StoppedError

    # What is ignored, by nohup(1) for one, stays so.
    before = {number: signal.getsignal(number) for number in probes.ENDING_SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except _StoppedError:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.signal(caught[0], signal.SIG_DFL)
        os.kill(os.getpid(), caught[0])


class _StoppedError(BaseException):
    """A signal came that ends the process."""


_SKIPPED = {
    **{f"{kind}_{probe}": probes.SKIPPED for kind in probes.KINDS for probe in probes.LOCK_PROBES},
    **dict.fromkeys(probes.NAME_PROBES, probes.SKIPPED),
}
