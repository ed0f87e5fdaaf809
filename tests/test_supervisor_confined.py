"""``--via seccomp`` in containers, of ordinary users, within small limits: it works, or says what is refused and left.

Filters of seccomp(2) stand in for containers and old kernels, see tests/programs/confine.c.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from support.confine import OLD_KERNEL, ORDINARY, as_ordinary_user, confined, ordinary_interpreter
from support.keepers import keeper_processes
from support.lockcommand import one_line
from support.proc import await_true
from support.programs import static_program
from support.worlds import FLOCK_SYSCALL
from test_ordinary_user import _processes_of, installation  # noqa: F401

from flockshim.pytest_plugin import require

EX_NB = f"native:{FLOCK_SYSCALL}:3:6"
PRCTL = {"x86_64": 157, "aarch64": 167}.get(platform.machine(), -1)
NOT_DUMPABLE = f"native:{PRCTL}:4:0"
EWOULDBLOCK, ENOSYS = 11, 38

DYNAMIC = "use --via preload, which covers dynamically linked programs"
STATIC = "use a dynamically linked build (for uv: gnu instead of musl)"

EMULATED = ["--mode", "host", "--simulate", "ENOSYS"]


class Done(NamedTuple):
    status: int
    output: str
    errors: str


class Place:
    """A directory, and whose flockshim is run in it."""

    def __init__(self, directory: Path, launcher: Sequence[str], probe: Path, **variables: str) -> None:
        self.directory = directory
        self.launcher = launcher
        self.probe = str(probe)
        kept = {
            name: value
            for name, value in os.environ.items()
            if name != "LD_PRELOAD" and not name.startswith("FLOCKSHIM_")
        }
        self.environment = {**kept, **variables}

    def run(self, *words: str, prefix: Sequence[str] = (), behind: Sequence[str] = ()) -> Done:
        """Run ``PREFIX BEHIND flockshim WORDS``: PREFIX as who runs the tests, the rest as whom the place is for."""
        done = subprocess.run(
            [*prefix, *self.launcher[:-3], *behind, *self.launcher[-3:], *words],
            cwd=self.directory,
            env=self.environment,
            input="\n",
            capture_output=True,
            text=True,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def probe_file(self, *words: str, **more: Sequence[str]) -> Done:
        """The same of a static COMMAND that opens a file, as descriptor 3, and does CALLS: the last of WORDS."""
        return self.run(*words[:-1], self.probe, str(self.directory / "file"), *words[-1].split(), **more)


@pytest.fixture
def place(rendezvous: Path, tmp_path: Path) -> Place:
    launcher = [sys.executable, "-m", "flockshim"]
    return Place(tmp_path, launcher, static_program("rawcalls"), FLOCKSHIM_DIR=str(rendezvous))


@pytest.fixture
def user_place(installation: tuple[Path, dict[str, str]], rendezvous: Path) -> Iterator[Place]:  # noqa: F811
    """A place of an ordinary user, who may look only into his own processes."""
    directory, _ = installation
    shutil.copy(static_program("rawcalls"), directory / "rawcalls")
    work = directory / "work"
    work.mkdir()
    for each in work, rendezvous:
        os.chown(each, ORDINARY, ORDINARY)
    launcher = [*as_ordinary_user(), str(ordinary_interpreter()), "-m", "flockshim"]
    variables = {"FLOCKSHIM_DIR": str(rendezvous), "PYTHONPATH": str(directory)}
    yield Place(work, launcher, directory / "rawcalls", **variables)
    # Those of tests to come are counted beside them.
    await_true(lambda: set(_processes_of(ORDINARY)) <= set(map(str, keeper_processes(rendezvous))), "all to end")


# What is refused


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("EPERM:pidfd_getfd", "pidfd_getfd(2) is refused here: Operation not permitted"),
        ("ENOSYS:pidfd_getfd", "pidfd_getfd(2) is missing"),
        ("EPERM:pidfd_open", "pidfd_open(2) is refused here: Operation not permitted"),
        ("ENOSYS:pidfd_open", "pidfd_open(2) is missing"),
        (OLD_KERNEL, "pidfd_open(2) is missing"),
        ("EPERM:seccomp", "seccomp(2) is refused here: Operation not permitted"),
        ("ENOSYS:seccomp", "this kernel has no seccomp user notification"),
    ],
    ids=lambda text: "old kernel" if text == OLD_KERNEL else text,
)
def test_what_is_refused_and_what_is_left(place: Place, rule: str, reason: str) -> None:
    done = place.probe_file("--via", "seccomp", EX_NB, prefix=confined(rule))
    assert done[:2] == (125, "")
    assert reason in done.errors and one_line(done.errors).endswith(DYNAMIC)
    done = place.probe_file(EX_NB, prefix=confined(rule))
    assert done[:2] == (125, "")
    assert reason in done.errors and "statically linked" in done.errors and one_line(done.errors).endswith(STATIC)
    done = place.probe_file("--lock", "lock", EX_NB, prefix=confined(rule))
    assert done[:2] == (125, "")
    # COMMAND was never started.
    assert not (place.directory / "file").exists()
    # A filter alone, for what the library does not reach, is older than seccomp(2): prctl(2).
    done = place.probe_file("--mode", "success", "--quiet", EX_NB, prefix=confined(rule))
    assert done[:2] == ((125, "") if rule == "EPERM:seccomp" else (7, "0\n"))
    assert place.run("--via", "preload", "true", prefix=confined(rule)) == (0, "", "")


@pytest.mark.parametrize("rule", ["EPERM:kcmp", "ENOSYS:kcmp"])
def test_without_kcmp_it_works(place: Place, rule: str) -> None:
    """As the keeper does without: tests/test_confined.py."""
    command = [*confined(rule), *place.launcher, *EMULATED, place.probe, str(place.directory / "file"), EX_NB, "-"]
    with subprocess.Popen(
        command, env=place.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin and holder.stdout
        assert holder.stdout.readline() == "0\n"
        assert place.probe_file(*EMULATED, EX_NB, prefix=confined(rule)) == (7, f"{-EWOULDBLOCK}\n", "")
        holder.stdin.write("\n")
        holder.stdin.close()
        assert holder.wait() == 7
    assert place.probe_file(*EMULATED, EX_NB, prefix=confined(rule)) == (7, "0\n", "")


# An ordinary user


def test_an_ordinary_user(user_place: Place, rendezvous: Path) -> None:
    assert user_place.probe_file(EX_NB) == (7, "0\n", "")
    assert user_place.probe_file(*EMULATED, f"{EX_NB} {EX_NB}") == (7, "0\n0\n", "")
    assert {os.stat(f"/proc/{pid}").st_uid for pid in keeper_processes(rendezvous)} == {ORDINARY}
    status = user_place.run("--via", "seccomp", "grep", "NoNewPrivs", "/proc/self/status")
    assert status == (0, "NoNewPrivs:\t1\n", "")


def _namespaces(*options: str) -> list[str]:
    words = ["unshare", *options]
    done = subprocess.run([*as_ordinary_user(), *words, "true"], capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"an ordinary user may not: {done.stderr}", "see sysctl user.max_user_namespaces")
    return words


@pytest.mark.parametrize("options", ["-Ur", "-Urpf --mount-proc --kill-child"], ids=["user", "pid"])
def test_in_namespaces(user_place: Place, options: str) -> None:
    """Of the launcher, or of COMMAND alone."""
    words = _namespaces(*options.split())
    for via in [], ["--via", "seccomp"]:
        assert user_place.probe_file(*via, *EMULATED, EX_NB, behind=words) == (7, "0\n", "")
    inside = [user_place.probe, str(user_place.directory / "file"), EX_NB]
    assert user_place.run("--via", "seccomp", *EMULATED, *words, *inside) == (7, "0\n", "")
    assert user_place.run("--via", "seccomp", *words, *inside) == (7, "0\n", "")


def test_in_a_pid_namespace_with_proc_of_another(user_place: Place) -> None:
    """The keeper needs its own: tests/test_confined.py. The kernel's locks do not."""
    words = _namespaces("-Urpf", "--kill-child")
    assert user_place.probe_file(EX_NB, behind=words) == (7, "0\n", "")
    done = user_place.probe_file(*EMULATED, EX_NB, behind=words)
    assert done[:2] == (7, f"{-ENOSYS}\n")
    assert one_line(done.errors).startswith("cannot lock ")


@pytest.mark.parametrize("way", [[], EMULATED], ids=["kernel", "emulated"])
def test_a_program_that_may_not_be_looked_into(user_place: Place, way: list[str]) -> None:
    """Its calls are the kernel's; where there is none to ask, they fail. The user is told once."""
    done = user_place.probe_file(*way, f"{NOT_DUMPABLE} {EX_NB} {EX_NB}")
    answer = -ENOSYS if way else 0
    assert done[:2] == (7, f"0\n{answer}\n{answer}\n")
    line = one_line(done.errors)
    assert line.startswith("cannot look into process ") and line.endswith("its lock calls are not covered")
    done = user_place.probe_file(*way, "--quiet", f"{NOT_DUMPABLE} {EX_NB}")
    assert done == (7, f"0\n{answer}\n", "")


@pytest.fixture
def privileged(user_place: Place) -> str:
    """A set-uid program of root, which says as whom it runs."""
    path = user_place.directory.parent / "id"
    shutil.copy("/usr/bin/id", path)
    path.chmod(0o4755)
    require(not os.statvfs(path).f_flag & os.ST_NOSUID, f"{path.parent} is mounted nosuid", "TMPDIR=/var/tmp")
    return str(path)


@pytest.mark.parametrize("way", [["--via", "seccomp"], ["--via", "seccomp", "--mode", "fail", "--simulate", "EIO"]])
def test_a_set_uid_command_loses_its_privilege(user_place: Place, privileged: str, way: list[str]) -> None:
    done = user_place.run(*way, privileged, "-u")
    assert done[:2] == (0, f"{ORDINARY}\n")
    line = one_line(done.errors)
    assert line.startswith(f"warning: {privileged!r} is set-uid") and "start flockshim behind it" in line
    assert user_place.run(*way, "--quiet", privileged, "-u") == (0, f"{ORDINARY}\n", "")


def test_a_set_uid_command_without_a_filter(user_place: Place, privileged: str) -> None:
    done = user_place.run(privileged, "-u")
    assert done[:2] == (125, "")
    assert "set-uid" in one_line(done.errors)


def test_an_unreadable_command(user_place: Place) -> None:
    """What cannot be read may be anything. The user may know better."""
    os.chmod(user_place.probe, 0o711)
    done = user_place.probe_file(EX_NB)
    assert done[:2] == (125, "")
    assert "cannot be read" in one_line(done.errors)
    done = user_place.probe_file("--via", "seccomp", EX_NB)
    assert done[:2] == (7, "0\n")
    # Such a program may not be looked into either: ptrace(2), "dumpable".
    assert one_line(done.errors).startswith("cannot look into process ")


def test_root_keeps_set_uid_commands_as_they_are(place: Place) -> None:
    """No_new_privs is set only where it must be."""
    if os.geteuid() != 0:
        pytest.skip("run the tests as root")
    for way in ["--via", "seccomp"], ["--via", "seccomp", "--mode", "fail", "--simulate", "EIO"]:
        status = place.run(*way, "grep", "NoNewPrivs", "/proc/self/status")
        assert status == (0, "NoNewPrivs:\t0\n", "")


# Limits


def _works_or_says_why(done: Done, word: str) -> bool:
    """Either all is well, or one line names the limit."""
    if done == (7, "0\n", ""):
        return True
    assert done[:2] == (125, ""), done
    assert word in one_line(done.errors)
    return False


def test_no_more_processes_are_allowed(user_place: Place, rendezvous: Path) -> None:
    await_true(lambda: not _processes_of(ORDINARY), "the user's other processes to be gone")
    worked = []
    for limit in 1, 2, 4, 9:
        for way in ["--via", "seccomp"], ["--lock", "lock"]:
            done = user_place.probe_file(*way, EX_NB, prefix=["prlimit", f"--nproc={limit}:{limit}"])
            worked.append(_works_or_says_why(done, "ulimit -u"))
            await_true(lambda: not _processes_of(ORDINARY), "all to end")
    assert not any(worked[:4]) and all(worked[-2:])
    assert keeper_processes(rendezvous) == []


def test_few_descriptors_are_allowed(place: Place) -> None:
    worked = []
    for limit in range(5, 20):
        done = place.probe_file(EX_NB, prefix=["prlimit", f"--nofile={limit}:{limit}"])
        worked.append(_works_or_says_why(done, "ulimit -n"))
    assert not worked[0] and worked[-1]


def test_the_soft_limit_of_descriptors_is_commands_alone(place: Place) -> None:
    """The supervisor goes up to the hard one, since it needs some for every call that waits."""
    soft = place.run("--via", "seccomp", "sh", "-c", "ulimit -n; ulimit -Hn", prefix=["prlimit", "--nofile=64:300"])
    assert soft == (0, "64\n300\n", "")
