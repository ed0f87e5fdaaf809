"""``flockshim --check``: what it says of real file systems, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.checking import (
    ALL_OK,
    F_OFD_SETLK,
    F_OFD_SETLKW,
    FCNTL_NUMBER,
    NAME_PROBES,
    answering,
    as_root,
    checked,
    flock_under,
)

from flockshim.pytest_plugin import require

# File systems that lock


def test_a_directory_on_tmpfs() -> None:
    answer = checked("--json", "/dev/shm")
    assert answer.status == 0
    assert answer.errors == ""
    report = answer.report
    assert report["probes"] == ALL_OK
    assert (report["version"], report["directory"], report["scope"]) == (1, "/dev/shm", "local")
    assert report["command"] == "COMMAND"
    assert (report["filesystem"]["type"], report["filesystem"]["mount_point"]) == ("tmpfs", "/dev/shm")
    assert "rw" in report["filesystem"]["options"]


def test_the_words(tmp_path: Path) -> None:
    answer = checked("/dev/shm")
    assert answer.status == 0
    first, _, rest = answer.output.partition("\n")
    assert first == "Locks work in '/dev/shm'. Nothing is needed: run COMMAND without flockshim."
    assert "tmpfs, " in rest
    assert "flock         works\n" in rest


def test_ext4(tmp_path: Path) -> None:
    as_root()
    require(shutil.which("mkfs.ext4"), "no mkfs.ext4", "apt install e2fsprogs")
    image, directory = tmp_path / "image", tmp_path / "ext4"
    image.write_bytes(b"")
    os.truncate(image, 4 << 20)
    directory.mkdir()
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mount = subprocess.run(["mount", "-o", "loop", image, directory], capture_output=True, text=True, check=False)
    require(mount.returncode == 0, f"no loop device: {mount.stderr.strip()}", "allow the container loop devices")
    try:
        answer = checked("--json", directory)
        assert os.listdir(directory) == ["lost+found"]
    finally:
        subprocess.run(["umount", directory], check=True)
    assert (answer.status, answer.report["scope"]) == (0, "local")
    assert answer.report["probes"] == ALL_OK
    assert answer.report["filesystem"]["type"] == "ext4"
    assert answer.report["filesystem"]["mount_point"] == str(directory)


def test_the_current_directory_is_the_default(tmp_path: Path) -> None:
    assert checked("--json", cwd=tmp_path).report["directory"] == str(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "link").symlink_to("below")
    assert checked("--json", "link", cwd=tmp_path).report["directory"] == str(tmp_path / "below")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    assert checked(tmp_path).status == 0
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    directory = os.path.join(os.fsencode(tmp_path), b"a b\n\xff")
    os.mkdir(directory)
    answer = checked("--json", os.fsdecode(directory))
    assert answer.status == 0
    assert os.fsencode(answer.report["directory"]) == directory
    assert checked(os.fsdecode(directory)).output.startswith("Locks work in ")
    assert os.listdir(directory) == []


# File systems that do not


@pytest.mark.parametrize(
    ("nolock_dir", "name", "command"),
    [
        ("ENOSYS", "ENOSYS", "flockshim COMMAND"),
        ("ENOLCK", "ENOLCK", "flockshim COMMAND"),
        ("EOPNOTSUPP", "EOPNOTSUPP", "flockshim COMMAND"),
        ("EIO", "EIO", "flockshim --errno EIO COMMAND"),
        (511, "511", "flockshim --errno 511 COMMAND"),
        ("EAGAIN", "EAGAIN", "flockshim --force COMMAND"),
    ],
    indirect=["nolock_dir"],
)
def test_every_lock_fails(nolock_dir: Path, name: str, command: str) -> None:
    answer = checked("--json", nolock_dir)
    assert answer.errors == ""
    report = answer.report
    assert answer.status == (2 if "--force" in command else 1)
    for kind in ("flock", "fcntl", "ofd"):
        assert answer.kind(kind) == [name, name, name, "skipped"]
    assert {report["probes"][probe] for probe in NAME_PROBES} == {"ok"}
    assert report["filesystem"]["type"] == "fuse.nolockfs"
    assert (report["scope"], report["command"]) == ("none", command)
    text = checked(nolock_dir).output
    assert text.partition("\n")[0] == report["summary"]
    assert text.partition("\n")[0].endswith(f"Run: {command}")
    assert "SQLite" in text
    assert os.listdir(nolock_dir) == []


@pytest.mark.nolock(flock="local", posix="local")
def test_a_fuse_file_system_without_locks_of_its_own(nolock_dir: Path) -> None:
    answer = checked("--json", nolock_dir)
    assert (answer.status, answer.report["scope"], answer.report["command"]) == (3, "host", "COMMAND")
    assert answer.report["probes"] == ALL_OK
    assert "let only one host" in " ".join(checked(nolock_dir).output.split())


@pytest.mark.nolock(flock="ENOSYS", posix="local")
def test_only_flock_fails(nolock_dir: Path) -> None:
    answer = checked("--json", nolock_dir)
    assert (answer.status, answer.report["command"]) == (1, "flockshim COMMAND")
    assert answer.kind("flock") == ["ENOSYS", "ENOSYS", "ENOSYS", "skipped"]
    assert answer.kind("fcntl") == answer.kind("ofd") == ["ok"] * 4
    assert ": flock() fails with ENOSYS. Run: " in answer.report["summary"]


@pytest.mark.nolock(flock="local", posix="ENOLCK")
def test_only_record_locks_fail(nolock_dir: Path) -> None:
    answer = checked("--json", nolock_dir)
    assert (answer.status, answer.report["command"]) == (1, "flockshim COMMAND")
    assert answer.kind("flock") == ["ok"] * 4
    assert answer.kind("fcntl") == answer.kind("ofd") == ["ENOLCK", "ENOLCK", "ENOLCK", "skipped"]
    assert ": fcntl() fails with ENOLCK. Run: " in answer.report["summary"]
    assert "  fcntl         fails with ENOLCK (No locks available)\n" in checked(nolock_dir).output


@pytest.mark.nolock(flock="ENOSYS", posix="EIO")
def test_both_fail_in_ways_of_their_own(nolock_dir: Path, rendezvous: Path) -> None:
    report = checked("--json", nolock_dir).report
    assert (report["status"], report["command"]) == (1, "flockshim --errno ENOSYS,EIO COMMAND")
    assert ": flock() fails with ENOSYS, fcntl() fails with EIO. Run: " in report["summary"]
    assert flock_under(report["command"], nolock_dir / "file", rendezvous) == (0, "held\n", "")


@pytest.mark.nolock(flock="local", posix="ENOLCK")
def test_the_printed_command_is_what_record_locks_need(nolock_dir: Path, rendezvous: Path) -> None:
    printed = checked("--json", nolock_dir).report["command"]
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB); print('held')"
    program = [sys.executable, "-c", code, str(nolock_dir / "file")]
    words = [sys.executable, "-m", *printed.removesuffix("COMMAND").split(), *program]
    environment = {**os.environ, "FLOCKSHIM_DIR": str(rendezvous)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "held\n", "")


@pytest.mark.parametrize("nolock_dir", ["ENOSYS", "EIO"], indirect=True)
def test_the_printed_command_is_what_is_needed(nolock_dir: Path, rendezvous: Path) -> None:
    printed = checked("--json", nolock_dir).report["command"]
    assert flock_under(printed, nolock_dir / "file", rendezvous) == (0, "held\n", "")


# What the kernel says is asked, and believed only if it is true

NEEDED = {"COMMAND": 0, "flockshim --errno EINVAL COMMAND": 1, "flockshim --force COMMAND": 2}
"""The exit status that goes with a command."""


@pytest.mark.parametrize(
    "variables", [{"FLOCKSHIM_SIMULATE": "38"}, {"FLOCKSHIM_FORCE": "1"}, {"FLOCKSHIM_MODE": "success"}]
)
def test_a_preloaded_shim_changes_nothing(
    nolock_dir: Path, rendezvous: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    from conftest import shim_environment  # noqa: PLC0415

    environment = {**shim_environment(rendezvous), **variables}
    answer = checked("--json", tmp_path, env=environment)
    assert (answer.status, answer.report["probes"]) == (0, ALL_OK)
    answer = checked("--json", nolock_dir, env=environment)
    assert (answer.status, answer.kind("flock")[0]) == (1, "ENOSYS")


def test_a_kernel_that_grants_every_lock(tmp_path: Path) -> None:
    answer = checked("--json", tmp_path, preexec_fn=answering(0))
    assert (answer.status, answer.report["scope"]) == (2, "none")
    assert answer.kind("flock") == ["ok", "ok", "ok", "excludes nobody"]
    assert answer.kind("fcntl") == ["ok"] * 4
    assert answer.report["command"] == "flockshim --force COMMAND"
    assert "one lock to two programs at once" in answer.report["summary"]


def test_the_errno_without_a_name(tmp_path: Path) -> None:
    answer = checked("--json", tmp_path, preexec_fn=answering(524))
    assert (answer.status, answer.report["command"]) == (1, "flockshim COMMAND")
    assert answer.kind("flock") == ["ENOTSUPP", "ENOTSUPP", "ENOTSUPP", "skipped"]


@pytest.mark.parametrize(
    ("operation", "outcome"),
    [
        (fcntl.LOCK_EX, ["ok", "EOPNOTSUPP", "ok", "skipped"]),
        (fcntl.LOCK_EX | fcntl.LOCK_NB, ["ok", "ok", "EOPNOTSUPP", "skipped"]),
        (fcntl.LOCK_SH, ["EOPNOTSUPP", "ok", "ok", "ok"]),
        (fcntl.LOCK_SH | fcntl.LOCK_NB, ["EOPNOTSUPP", "ok", "ok", "EOPNOTSUPP"]),
    ],
)
def test_locks_that_fail_in_part_need_force(tmp_path: Path, operation: int, outcome: list[str]) -> None:
    """Else a program that got the kernel's lock and one that got an emulated one would both go on."""
    answer = checked("--json", tmp_path, preexec_fn=answering(errno.EOPNOTSUPP, operation))
    assert answer.kind("flock") == outcome
    assert (answer.status, answer.report["command"]) == (2, "flockshim --force COMMAND")
    assert "in part" in answer.report["summary"]


@pytest.mark.parametrize(
    ("operation", "kind", "outcome", "command"),
    [
        (fcntl.F_SETLK, "fcntl", ["EINVAL", "EINVAL", "EINVAL", "skipped"], "flockshim --errno EINVAL COMMAND"),
        (fcntl.F_SETLKW, "fcntl", ["EINVAL", "EINVAL", "ok", "skipped"], "flockshim --force COMMAND"),
        # Few programs use these, and a kernel before 3.15 does not know them.
        (F_OFD_SETLK, "ofd", ["EINVAL", "EINVAL", "EINVAL", "skipped"], "COMMAND"),
        (F_OFD_SETLKW, "ofd", ["EINVAL", "EINVAL", "ok", "skipped"], "COMMAND"),
    ],
)
def test_record_locks_that_fail_in_part(
    tmp_path: Path, operation: int, kind: str, outcome: list[str], command: str
) -> None:
    answer = checked("--json", tmp_path, preexec_fn=answering(errno.EINVAL, operation, FCNTL_NUMBER))
    assert answer.kind(kind) == outcome
    assert (answer.status, answer.report["command"]) == (NEEDED[command], command)
    assert list(answer.report["probes"].values()).count("EINVAL") == outcome.count("EINVAL")
