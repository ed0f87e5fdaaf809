"""``flockshim --locks PATH`` and messages name who holds and who waits on other hosts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.elsewhere import FLOCKSHIM, Elsewhere, files, program, settings
from support.lockcommand import HOLD, WAITING_LINE
from support.proc import DEADLINE, await_true

from flockshim import cluster_notes
from flockshim.aliveness import Aliveness
from flockshim.cluster_notes import Program

SINCE = 1.7e9


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "lock"
    path.touch()
    return path


def run(rendezvous: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FLOCKSHIM, *map(str, words)],
        env=settings(rendezvous, FLOCKSHIM_SIMULATE="ENOSYS", FLOCKSHIM_IDLE="1"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )


def locks(rendezvous: Path, target: Path) -> list[dict[str, Any]]:
    done = run(rendezvous, "--locks", "--json", target)
    assert (done.returncode, done.stderr) == (0, "")
    return [file for file in json.loads(done.stdout)["files"] if file["kind"] == "cluster"]


def test_nobody_ever_locked(target: Path, rendezvous: Path) -> None:
    assert run(rendezvous, "--locks", target).stdout == "no locks\n"
    assert files(target.parent) == ["lock"]


def test_it_is_free(target: Path, rendezvous: Path) -> None:
    keeper = Elsewhere(target)
    assert keeper.lock()
    keeper.unlock()
    assert locks(rendezvous, target) == []


def test_everything_that_json_tells(target: Path, rendezvous: Path) -> None:
    holder, first, second = Elsewhere(target), Elsewhere(target), Elsewhere(target)
    assert [holder.lock(), first.lock(exclusive=False), second.lock()] == [True, False, False]
    mine, queued = program(4711, "uv sync", since=SINCE), program(4712, "uv run", waits=True, since=SINCE)
    holder.vouch("node7", mine, queued)
    first.vouch("node8", program(12, "reader", waits=True, since=SINCE)._replace(exclusive=False))
    (file,) = locks(rendezvous, target)
    status = target.stat()
    assert (file["path"], file["device"], file["inode"]) == (str(target), status.st_dev, status.st_ino)
    (held,), (reader, writer) = file["holders"], file["waiters"]
    assert held.pop("vouched") > SINCE and reader.pop("vouched") > SINCE
    assert held == {
        "mode": "exclusive",
        "keeper": holder.keeper,
        "host": "node7",
        "alive": None,
        "token": 1,
        "programs": [{"mode": "exclusive", "pid": 4711, "command": "uv sync", "since": SINCE}],
    }
    assert reader == {
        "mode": "shared",
        "keeper": first.keeper,
        "host": "node8",
        "alive": None,
        "token": None,
        "programs": [{"mode": "shared", "pid": 12, "command": "reader", "since": SINCE}],
    }
    assert writer == {
        "mode": "exclusive",
        "keeper": second.keeper,
        "host": None,
        "alive": None,
        "token": None,
        "vouched": None,
        "programs": [],
    }


def test_the_table(target: Path, rendezvous: Path) -> None:
    holder, heir = Elsewhere(target), Elsewhere(target)
    assert [holder.lock(), heir.lock()] == [True, False]
    holder.vouch("node7", program(4711, "uv sync", since=SINCE))
    first, held, waits = run(rendezvous, "--locks", target).stdout.splitlines()
    assert first == f"{target}  (between hosts)"
    assert held.startswith("  held by   exclusive  pid 4711     since ")
    assert "  uv sync on node7  (token 1, vouched for at " in held
    assert waits == "  waits   1 exclusive  a program on another host, which has not told its name"


def test_who_is_alive_on_this_host_is_known(target: Path, rendezvous: Path) -> None:
    aliveness = Aliveness(str(rendezvous))
    keeper = Elsewhere(target, aliveness.keeper)
    assert keeper.lock()
    assert locks(rendezvous, target)[0]["holders"][0]["alive"] is True
    assert "a program on this host  (token 1)" in run(rendezvous, "--locks", target).stdout
    os.close(aliveness.descriptor)
    assert locks(rendezvous, target)[0]["holders"][0]["alive"] is False


@pytest.mark.parametrize(
    "text", ["", "0123456789abcdef", "thought dead at 12.5\n", "[1]", '{"host": 1}', '{"programs": 7}', "{" * 5000]
)
def test_a_note_of_another_version_is_no_note(target: Path, rendezvous: Path, text: str) -> None:
    holder = Elsewhere(target)
    assert holder.lock()
    holder.vouching_file().write_text(text)
    assert cluster_notes.parse(text) is None
    assert locks(rendezvous, target)[0]["holders"][0]["host"] is None


def test_a_note_moves_no_cursor(target: Path, rendezvous: Path) -> None:
    holder = Elsewhere(target)
    assert holder.lock()
    holder.vouch("\x1b[2Jnode", program(1, "\x1b]0;rm\x07\n"))
    shown = run(rendezvous, "--locks", target).stdout
    assert "?]0;rm?? on ?[2Jnode" in shown
    assert "\x1b" not in shown


def test_what_is_not_ours_is_said(target: Path, rendezvous: Path) -> None:
    (target.parent / ".lock.flockshim").write_text("something else\n")
    done = run(rendezvous, "--locks", target)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "no locks\n", 1)
    assert f"the lock files beside {str(target)!r} cannot be read" in done.stderr


@given(
    st.text(),
    st.lists(
        st.builds(Program, st.integers(0, 9), st.text(), st.booleans(), st.booleans(), st.just(SINCE)), max_size=4
    ),
)
def test_a_note_can_be_read_again(name: str, programs: list[Program]) -> None:
    note = cluster_notes.parse(cluster_notes.text("1", "node", {name: programs}))
    assert note is not None and note.host == "node"
    assert [p.pid for p in note.of(name, waits=True) + note.of(name, waits=False)] == [
        p.pid for p in sorted(programs, key=lambda p: not p.waits)
    ]


def test_a_note_is_never_long() -> None:
    many = [program(pid, "c" * 80) for pid in range(1000)]
    text = cluster_notes.text("1", "node", {f"{number:04}": many for number in range(1000)})
    note = cluster_notes.parse(text)
    assert note and len(text) < 100_000
    assert [p.pid for p in note.of("0000", waits=False)] == list(range(cluster_notes.MOST_PROGRAMS))


def test_programs_on_another_host_are_named(target: Path, rendezvous: Path, other_rendezvous: Path) -> None:
    """Two rendezvous directories are two hosts, as far as locks go."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    simulated = {"FLOCKSHIM_SIMULATE": "ENOSYS", "FLOCKSHIM_IDLE": "1"}
    there, here = (settings(directory, **simulated) for directory in (other_rendezvous, rendezvous))
    command = [*FLOCKSHIM, "--verbose", "--lock", str(target)]
    with subprocess.Popen([*command, *HOLD], env=there, text=True, **pipes) as holding:
        assert holding.stdin and holding.stdout
        holding.stdout.readline()
        await_true(lambda: bool(_programs(rendezvous, target, "holders")), "the note of the holder")
        assert _programs(rendezvous, target, "holders") == [holding.pid]
        refused = run(rendezvous, "--lock", target, "--no-wait", "true")
        assert (refused.returncode, refused.stderr.count("\n")) == (75, 1)
        assert f"held by pid {holding.pid} (" in refused.stderr
        with subprocess.Popen([*command, *HOLD], env=here, text=True, **pipes) as waiting:
            assert waiting.stdin and waiting.stderr
            line = waiting.stderr.readline()
            match = WAITING_LINE.fullmatch(line)
            assert match, line
            assert (int(match["pid"]), match["host"]) == (holding.pid, os.uname().nodename)
            await_true(lambda: bool(_programs(other_rendezvous, target, "waiters")), "the note of who waits")
            assert _programs(other_rendezvous, target, "waiters") == [waiting.pid]
            holding.communicate("0\n", timeout=DEADLINE)
            waiting.communicate("0\n", timeout=DEADLINE)
    assert (holding.returncode, waiting.returncode) == (0, 0)


def _programs(rendezvous: Path, target: Path, kind: str) -> list[int]:
    entries = [entry for file in locks(rendezvous, target) for entry in file[kind]]
    return [one["pid"] for entry in entries for one in entry["programs"]]
