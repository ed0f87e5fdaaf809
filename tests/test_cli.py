"""The ``flockshim`` command: its options, its errors, and how it becomes COMMAND."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flockshim

MODULE = [sys.executable, "-m", "flockshim"]
BASE = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and not name.startswith("FLOCKSHIM_")}

# All that stands between the start of flockshim and that of COMMAND. One module more is some
# tenths of a millisecond more for every program started.
LAUNCH_MODULES = {
    "errno",
    "flockshim",
    "flockshim.cli",
    "flockshim.elf",
    "flockshim.executable",
    "flockshim.launch",
}


def run(*arguments: str | bytes, env: dict[str, str] | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MODULE, *arguments],
        env=BASE if env is None else env,
        capture_output=True,
        text=True,
        check=False,
        **more,
    )


def refused(result: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert result.returncode == status
    assert result.stdout == ""
    assert result.stderr.startswith("flockshim: ")
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no COMMAND given"]),
        (["--quiet"], ["no COMMAND given"]),
        (["--"], ["no COMMAND given"]),
        (["--frobnicate", "true"], ["unknown option '--frobnicate'"]),
        (["-x", "true"], ["unknown option '-x'"]),
        (["--mod", "host", "true"], ["unknown option '--mod'"]),
        (["--via"], ["--via needs a value"]),
        (["--via", "ptrace", "true"], ["--via", "'ptrace'", "auto, preload, seccomp"]),
        (["--via=", "true"], ["--via", "''"]),
        (["--via", "seccomp", "--env"], ["a supervisor is for one COMMAND", "--env"]),
        (["--via", "seccomp", "--locks"], ["--locks and --via exclude each other"]),
        (["--line\nbreak", "true"], ["unknown option '--line\\nbreak'"]),
        (["--mode"], ["--mode needs a value"]),
        (["--force=1", "true"], ["--force takes no value"]),
        (["--mode", "fast", "true"], ["--mode", "'fast'", "auto, host, cluster, success, fail"]),
        (["--mode=", "true"], ["--mode", "''"]),
        (["--errno", "ENOSUCH", "true"], ["--errno", "'ENOSUCH'"]),
        (["--errno", "enosys", "true"], ["--errno", "'enosys'"]),
        (["--errno", "ENOSYS,", "true"], ["--errno", "''"]),
        (["--errno", "0", "true"], ["--errno", "'0'"]),
        (["--errno", "4096", "true"], ["--errno", "'4096'"]),
        (["--errno", "-38", "true"], ["--errno", "'-38'"]),
        (["--errno", "²", "true"], ["--errno", "'²'"]),
        (["--errno", "ENOSYS,EWOULDBLOCK", "true"], ["--errno", "EWOULDBLOCK"]),
        (["--errno", "11", "true"], ["--errno", "11"]),
        (["--simulate", "ENOSUCH", "true"], ["--simulate", "'ENOSUCH'"]),
        (["--simulate", "ENOSYS:", "true"], ["--simulate", "''", "directory"]),
        (["--simulate", "ENOSYS:/no/such", "true"], ["--simulate", "'/no/such'"]),
        (["--simulate", "ENOSYS:/etc/passwd", "true"], ["--simulate", "'/etc/passwd'"]),
        (["--quiet", "--verbose", "true"], ["--quiet and --verbose"]),
        (["--force", "--simulate", "ENOSYS", "true"], ["--force and --simulate"]),
        (["--force", "--mode", "fail", "true"], ["--force and --mode fail"]),
        (["--env", "true"], ["--env", "'true'"]),
        (["--lock"], ["--lock needs a value"]),
        (["--lock", "file"], ["no COMMAND given"]),
        (["--lock=", "true"], ["''"]),
        (["--lock", "file", "--env"], ["--lock", "--env"]),
        (["--lock", "file", "--locks"], ["--locks and --lock exclude each other"]),
        (["--lock", "file", "--check"], ["--check and --lock exclude each other"]),
        (["--lock", "file", "--json", "true"], ["--json needs --locks or --check"]),
        (["--shared", "true"], ["--shared needs --lock PATH"]),
        (["--no-wait", "true"], ["--no-wait needs --lock PATH"]),
        (["--inherit", "true"], ["--inherit needs --lock PATH"]),
        (["--shared", "--env"], ["--shared needs --lock PATH"]),
        (["--lock", "file", "--no-wait", "--timeout", "5", "true"], ["--no-wait and --timeout exclude each other"]),
        (["--lock", "file", "--shared=yes", "true"], ["--shared takes no value"]),
        (["--timeout"], ["--timeout needs a value"]),
        (["--timeout", "soon", "true"], ["--timeout", "'soon'"]),
        (["--timeout=", "true"], ["--timeout", "''"]),
        (["--timeout", "-1", "true"], ["--timeout", "'-1'"]),
        (["--timeout", "nan", "true"], ["--timeout", "'nan'"]),
        (["--timeout", "inf", "true"], ["--timeout", "'inf'"]),
        (["--timeout", "1000000", "true"], ["--timeout", "'1000000'"]),
        (["--locks", "--timeout", "5"], ["--locks and --timeout exclude each other"]),
        (["--locks", "--mode", "host"], ["--locks and --mode exclude each other"]),
        (["--locks", "--check"], ["exclude each other"]),
        (["--json", "true"], ["--json needs --locks or --check"]),
    ],
)
def test_bad_command_line(arguments: list[str], words: list[str]) -> None:
    refused(run(*arguments), 125, *words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLOCKSHIM_MODE", "fast"),
        ("FLOCKSHIM_VIA", "ptrace"),
        ("FLOCKSHIM_ERRNO", "ENOSUCH"),
        ("FLOCKSHIM_SIMULATE", "ENOSYS:/no/such"),
        ("FLOCKSHIM_FORCE", "yes"),
        ("FLOCKSHIM_QUIET", "2"),
        ("FLOCKSHIM_VERBOSE", "no"),
        ("FLOCKSHIM_DIR", "relative/directory"),
        ("FLOCKSHIM_TIMEOUT", "soon"),
        ("FLOCKSHIM_TIMEOUT", "-1"),
        ("FLOCKSHIM_TIMEOUT", "5s"),
        ("FLOCKSHIM_TIMEOUT", "inf"),
        ("FLOCKSHIM_IDLE", "soon"),
        ("FLOCKSHIM_IDLE", "-1"),
        ("FLOCKSHIM_IDLE", "inf"),
    ],
)
def test_bad_variable_is_named(name: str, value: str) -> None:
    result = run("true", env={**BASE, name: value})
    refused(result, 125, name)
    assert "--" not in result.stderr.replace("(--mode host)", "")


def test_variables_that_contradict_an_option() -> None:
    refused(run("--mode", "fail", "true", env={**BASE, "FLOCKSHIM_FORCE": "1"}), 125, "FLOCKSHIM_FORCE")


def test_command_not_found(tmp_path: Path) -> None:
    text = os.strerror(2)
    refused(run("no-such-command"), 127, f"'no-such-command': {text}")
    refused(run("./no-such-command"), 127, f"'./no-such-command': {text}")
    refused(run(""), 127, f"'': {text}")
    refused(run("-"), 127, f"'-': {text}")
    refused(run("true", env={**BASE, "PATH": str(tmp_path)}), 127, f"'true': {text}")


def test_command_cannot_be_executed(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("echo no\n")
    refused(run(str(plain)), 126, repr(str(plain)), "Permission denied")
    refused(run(str(tmp_path)), 126, "Is a directory")
    refused(run(str(plain / "below")), 126, "Not a directory")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o700)
    refused(run(str(fifo)), 126, "Permission denied")


def test_path_is_searched_as_execvp_does(tmp_path: Path) -> None:
    for directory, mode in (("a", 0o644), ("b", 0o755), ("c", 0o755)):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "prog").write_text(f"#!/bin/sh\necho {directory}\n")
        (tmp_path / directory / "prog").chmod(mode)
    (tmp_path / "d" / "prog").mkdir(parents=True)

    def path(*names: str) -> dict[str, str]:
        return {**BASE, "PATH": ":".join(n and f"{tmp_path}/{n}" for n in names)}

    assert run("prog", env=path("none", "a", "d", "b", "c")).stdout == "b\n"
    assert run("prog", env=path("c/prog", "c", "b")).stdout == "c\n"
    assert run("prog", env=path("none", ""), cwd=tmp_path / "b").stdout == "b\n"
    refused(run("prog", env=path("a", "none")), 126, "Permission denied")
    without = {name: value for name, value in BASE.items() if name != "PATH"}
    assert run("true", env=without).returncode == 0


def test_script_without_interpreter_is_run_by_the_shell(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$0" "$@"\n')
    script.chmod(0o755)
    assert run(str(script), "a b", "c").stdout == f"{script} a b c\n"
    script.write_text("")
    assert run(str(script)).returncode == 0


def test_first_word_that_is_no_option_is_the_command() -> None:
    assert run("echo", "--mode", "x", "--").stdout == "--mode x --\n"
    assert run("--", "echo", "--quiet").stdout == "--quiet\n"
    assert run("--mode=host", "--errno", "ENOSYS", "echo", "done").stdout == "done\n"


def test_arguments_are_passed_byte_for_byte() -> None:
    words = [b"\xff\xfe", b"a b", b"", b"new\nline", "é".encode()]
    command: list[str | bytes] = [*MODULE, "printf", "%s\\0", *words]
    done = subprocess.run(command, env=BASE, capture_output=True, check=True)
    assert done.stdout == b"".join(word + b"\0" for word in words)


def test_command_takes_the_place_of_the_launcher() -> None:
    with subprocess.Popen([*MODULE, "sh", "-c", "echo $$"], env=BASE, stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate()
    assert int(output) == process.pid


@pytest.mark.parametrize("status", [0, 1, 3, 125, 126, 127, 255])
def test_exit_status_is_the_commands(status: int) -> None:
    assert run("sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGPIPE, signal.SIGINT])
def test_death_by_signal_is_seen(number: signal.Signals) -> None:
    assert run("sh", "-c", f"kill -{int(number)} $$").returncode == -number


def state(*prefix: str, shell: str = ":") -> str:
    """What signals a program that is started so finds ignored and blocked."""
    # Through a shell each time: posix_spawn(3), which subprocess uses for some commands and not for
    # others, ignores glibc's own two signals in the child.
    program = ["grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status"]
    command = ["sh", "-c", f'{shell}; exec "$@"', "sh", *prefix, *program]
    return subprocess.run(command, env=BASE, capture_output=True, text=True, check=True).stdout


def test_signals_are_as_without() -> None:
    assert state(*MODULE) == state()
    ignoring = "trap '' INT HUP TERM"
    assert state(*MODULE, shell=ignoring) == state(shell=ignoring) != state()


def test_descriptors_are_as_without() -> None:
    # ls opens the directory itself, by the same number each time.
    def seen(*prefix: str) -> str:
        shell = ["sh", "-c", 'exec 7</dev/null; exec "$@"', "sh", *prefix, "ls", "/proc/self/fd"]
        return subprocess.run(shell, env=BASE, capture_output=True, text=True, check=True).stdout

    assert seen(*MODULE) == seen()


def test_no_standard_descriptors() -> None:
    shell = 'exec 0<&- 1<&- 2<&-; exec "$@"'
    command = ["sh", "-c", shell, "sh", *MODULE]
    assert subprocess.run([*command, "sh", "-c", "exit 5"], env=BASE, check=False).returncode == 5
    assert subprocess.run([*command, "--bad"], env=BASE, check=False).returncode == 125


def test_locale_is_as_without() -> None:
    # PEP 538: in the C locale, Python sets LC_CTYPE for itself and all its children.
    plain: dict[str, str] = {name: BASE[name] for name in ("PATH", "PYTHONPATH") if name in BASE}
    bare = run("env", env=plain).stdout.splitlines()
    assert bare and not [line for line in bare if line.startswith("LC_")]
    chosen = run("env", env={**plain, "LC_CTYPE": "C.UTF-8"}).stdout.splitlines()
    assert "LC_CTYPE=C.UTF-8" in chosen


def test_environment_is_the_commands_but_for_the_shims_variables() -> None:
    env = {**BASE, "A": "1", "B": "new\nline", "C": "\udcff"}
    done = subprocess.run([*MODULE, "env", "-0"], env=env, capture_output=True, check=True)
    seen = {os.fsdecode(entry) for entry in done.stdout.split(b"\0") if entry}
    ours = {entry for entry in seen if entry.startswith(("FLOCKSHIM_", "LD_PRELOAD="))}
    assert seen - ours == {f"{name}={value}" for name, value in env.items()}
    assert {entry.partition("=")[0] for entry in ours} == {
        "LD_PRELOAD",
        "FLOCKSHIM_MODE",
        "FLOCKSHIM_ERRNO",
        "FLOCKSHIM_PYTHON",
        "FLOCKSHIM_HOME",
        "FLOCKSHIM_RUN",
    }


def test_library_is_loaded() -> None:
    assert f"{flockshim.__path__[0]}/libflockshim.so" in run("cat", "/proc/self/maps").stdout


def test_help_and_version() -> None:
    shown = run("--help")
    assert shown.returncode == 0 and shown.stderr == ""
    assert shown.stdout.startswith("usage: flockshim ")
    assert max(len(line) for line in shown.stdout.splitlines()) <= 80
    assert run("--version").stdout == f"flockshim {flockshim.__version__}\n"


def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        command = [*MODULE, "--env"]
        done = subprocess.run(command, env=BASE, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 125
    assert done.stderr == f"flockshim: cannot write to standard output: {os.strerror(28)}\n"


def test_launch_imports_next_to_nothing() -> None:
    program = """
import os, sys
before = set(sys.modules)
os.execve = lambda *_: print(*sorted(set(sys.modules) - before))
from flockshim import cli
sys.argv = ["flockshim", "--mode", "host", "true"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], env=BASE, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == LAUNCH_MODULES


def test_success_says_that_nothing_is_safe() -> None:
    done = run("--mode", "success", "true")
    assert done.returncode == 0
    assert done.stderr.startswith("flockshim: warning: in mode success")
    assert done.stderr.count("\n") == 1
    assert run("--mode", "success", "--quiet", "true").stderr == ""
    assert run("--mode", "host", "true").stderr == ""
