"""With ``--lock`` or a supervisor flockshim stays above COMMAND, and nobody notices: statuses, signals, job control."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.lockcommand import FLOCKSHIM, HOLD, Job, job, run, settings
from support.proc import await_end, await_true, parent, thread_state
from support.terminal import KEYS, Terminal
from support.worlds import World

from flockshim.holders import is_stopped

RECORDER = """
import os, signal, sys
every = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
signal.pthread_sigmask(signal.SIG_BLOCK, every)
print(os.getpid(), flush=True)
exec("".join(sys.argv[1:]))
while True:
    print("signal", int(signal.sigwaitinfo(every).si_signo), flush=True)
"""
RECORD = [sys.executable, "-c", RECORDER]
"""A COMMAND that says who it is, and then which signals it gets: the pending one with the lowest number first."""

FLUSH = signal.SIGRTMAX
"""Whatever the launcher does about other signals that it has, it does before it hands on this one."""

FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}


@pytest.fixture
def place(session_rendezvous: Path, tmp_path: Path) -> Iterator[World]:
    """A directory where the kernel locks: which lock it is makes no difference to the parent."""
    world = World("native", tmp_path, {**os.environ, "FLOCKSHIM_DIR": str(session_rendezvous)})
    yield world
    world.end()


@pytest.fixture(params=[["--lock", "lock"], ["--via", "seccomp"]], ids=["lock", "seccomp"])
def way(request: pytest.FixtureRequest) -> list[str]:
    """The option for whose sake it stays."""
    words: list[str] = request.param
    return words


@pytest.fixture(params=["bash", "dash"])
def terminal(request: pytest.FixtureRequest, place: World, way: list[str]) -> Iterator[Terminal]:
    environment = settings(place, F=" ".join([*FLOCKSHIM, *way]), PYTHON=sys.executable, RECORDER=RECORDER)
    terminal = Terminal(request.param, place.directory, environment)
    yield terminal
    terminal.end()


def _is_free(place: World) -> bool:
    lock = place.directory / "lock"
    return not lock.exists() or place.free(lock)


def _is_held(place: World, way: list[str]) -> bool:
    """Whether COMMAND has the lock that it was to have."""
    return "--lock" not in way or not _is_free(place)


def _received(running: Job) -> list[int]:
    """The signals that COMMAND has got since it was last asked."""
    os.kill(running.pid, FLUSH)
    numbers = []
    while (line := running.line()) != f"signal {int(FLUSH)}":
        numbers.append(int(line.split()[1]))
    return numbers


def test_the_exit_status_is_commands(place: World, way: list[str]) -> None:
    for number in 0, 1, 3, 75, 125, 126, 127, 255:
        assert run(place, *way, "sh", "-c", f"exit {number}").returncode == number


@pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "KILL", "PIPE", "TERM", "USR1", "SEGV", "ABRT", "RTMIN"])
def test_death_by_signal_is_seen(place: World, name: str, way: list[str]) -> None:
    number = int(getattr(signal, f"SIG{name}"))
    done = run(place, *way, "sh", "-c", f"kill -{number} $$")
    assert (done.returncode, done.stderr) == (-number, "")
    assert _is_free(place)


def test_only_command_dumps_core(place: World, way: list[str]) -> None:
    script = 'ulimit -c "$(ulimit -H -c)"; exec "$@"'
    command = [*FLOCKSHIM, *way, "sh", "-c", "kill -SEGV $$"]
    process = subprocess.Popen(["sh", "-c", script, "sh", *command], cwd=place.directory, env=settings(place))
    _, ended = os.waitpid(process.pid, 0)
    process.returncode = -1  # waited for
    assert os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGSEGV
    assert not os.WCOREDUMP(ended)


def test_every_signal_sent_to_the_launcher_arrives_once(place: World, way: list[str]) -> None:
    """But SIGCHLD, which tells of children, SIGCONT, which only acts on the stopped, and what stands for a fault."""
    left_out = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGCONT, FLUSH, *FAULTS}
    with job(place, *way, command=RECORD) as running:
        running.began()
        for number in sorted(signal.valid_signals() - left_out):
            os.kill(running.pid, number)
            assert _received(running) == [number]


def test_queued_signals_arrive_all(place: World, way: list[str]) -> None:
    with job(place, *way, command=RECORD) as running:
        running.began()
        for _ in range(3):
            os.kill(running.pid, signal.SIGRTMIN)
        assert _received(running) == [signal.SIGRTMIN] * 3


def test_what_command_sends_to_its_group_is_not_handed_on(place: World, way: list[str]) -> None:
    command = [*RECORD, "os.kill(0, signal.SIGUSR1)"]
    with job(place, *way, command=command, start_new_session=True) as running:
        running.began()
        assert _received(running) == [signal.SIGUSR1]


def test_a_signal_that_ends_command(place: World, way: list[str]) -> None:
    for number in signal.SIGTERM, signal.SIGHUP, signal.SIGINT:
        with job(place, *way) as running:
            command = running.began()
            running.process.send_signal(number)
            assert running.ended() == (-number, "")
            await_end(command)
            assert _is_free(place)


def test_a_command_that_handles_the_signal(place: World, way: list[str]) -> None:
    command = ["sh", "-c", "trap 'echo handled; exit 4' TERM; echo $$; while :; do read line; done"]
    with job(place, *way, command=command) as running:
        running.began()
        running.process.send_signal(signal.SIGTERM)
        assert running.line() == "handled"
        assert running.ended() == (4, "")


def test_the_process_group_is_the_same(place: World, way: list[str]) -> None:
    with job(place, *way, start_new_session=True) as running:
        command = running.began()
        assert command != running.pid
        assert os.getpgid(command) == os.getpgid(running.pid) == running.pid
        assert running.finish() == (0, "")


@pytest.mark.parametrize("continued", ["launcher", "command"])
def test_a_stopped_command_is_seen_stopped(place: World, continued: str, way: list[str]) -> None:
    """And continued, when somebody continues flockshim, which is what he has started, or COMMAND alone."""
    with job(place, *way, command=["sh", "-c", "echo $$; kill -STOP $$; exit 6"]) as running:
        command = running.began()
        _, status = os.waitpid(running.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
        assert _is_held(place, way)
        os.kill(running.pid if continued == "launcher" else command, signal.SIGCONT)
        assert running.ended() == (6, "")
        assert _is_free(place)


def test_a_stop_that_is_over_stops_nobody(place: World, way: list[str]) -> None:
    """Only how COMMAND is now counts for its parent, however often it was stopped and continued."""
    with job(place, *way) as running:
        command = running.began()
        os.kill(running.pid, signal.SIGSTOP)
        os.waitpid(running.pid, os.WUNTRACED)
        for _ in range(3):
            os.kill(command, signal.SIGSTOP)
            await_true(lambda: is_stopped(command) and _is_asleep(parent(command), running.pid), "COMMAND to stop")
            os.kill(command, signal.SIGCONT)
        running.tell("6")
        await_true(lambda: parent(command) == 0, "COMMAND to end")
        os.kill(running.pid, signal.SIGCONT)
        _, status = os.waitpid(running.pid, os.WUNTRACED)
        assert not os.WIFSTOPPED(status) and os.WEXITSTATUS(status) == 6
        running.process.returncode = 6  # waited for


def _is_asleep(pid: int, launcher: int) -> bool:
    state = thread_state(pid, pid)
    return pid == launcher or (state is not None and state.asleep)


def _state(place: World, *words: str, shell: str = ":", prefix: str = "") -> str:
    """What signals a COMMAND that is started so finds ignored and blocked."""
    grep = ["grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status"]
    blocking = "import os, signal, sys; exec(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"
    command = ["sh", "-c", f'{shell}; exec "$@"', "sh", sys.executable, "-c", blocking, prefix, *words, *grep]
    done = subprocess.run(command, env=settings(place), cwd=place.directory, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("shell", "prefix"),
    [
        (":", ""),
        ("trap '' HUP INT TERM TSTP ALRM", "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"),
        (":", "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM, signal.SIGCHLD])"),
    ],
    ids=["plain", "ignored", "blocked"],
)
def test_signals_are_as_without(place: World, shell: str, prefix: str) -> None:
    plain = _state(place, *FLOCKSHIM, shell=shell, prefix=prefix)
    for words in "--lock lock", "--lock lock --timeout 9", "--lock lock --inherit", "--via seccomp":
        assert _state(place, *FLOCKSHIM, *words.split(), shell=shell, prefix=prefix) == plain


def test_a_caller_that_ignores_its_children(place: World, way: list[str]) -> None:
    """Where SIGCHLD is ignored, the kernel keeps no status: wait(2)."""
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", ignoring, *FLOCKSHIM, *way, "sh", "-c", "exit 7"]
    assert subprocess.run(command, env=settings(place), cwd=place.directory, check=False).returncode == 7


def test_nohup(place: World, way: list[str]) -> None:
    command = ["nohup", *FLOCKSHIM, *way, *HOLD]
    process = subprocess.Popen(
        command,
        env=settings(place),
        cwd=place.directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdin and process.stdout
        command_pid = int(process.stdout.readline())
        for pid in process.pid, command_pid:
            os.kill(pid, signal.SIGHUP)
        process.stdin.write("8\n")
        process.stdin.close()
    assert process.returncode == 8


# In a terminal


def _start(terminal: Terminal, command: str) -> int:
    """Type COMMAND; the launcher's pid, which leads the process group in the foreground."""
    terminal.type(command)
    return terminal.await_job()


@pytest.mark.parametrize("key", KEYS)
def test_a_key_reaches_command_once(terminal: Terminal, key: str) -> None:
    number = {"Ctrl-C": signal.SIGINT, "Ctrl-\\": signal.SIGQUIT, "Ctrl-Z": signal.SIGTSTP}[key]
    launcher = _start(terminal, '$F $PYTHON -c "$RECORDER"')
    terminal.expect(r"\d+\n")
    terminal.press(key)
    terminal.expect(f"^signal {int(number)}\n")
    os.kill(launcher, FLUSH)
    terminal.expect(f"^signal {int(FLUSH)}\n")


def test_a_change_of_the_windows_size_reaches_command_once(terminal: Terminal) -> None:
    launcher = _start(terminal, '$F $PYTHON -c "$RECORDER"')
    terminal.expect(r"\d+\n")
    terminal.resize(20, 70)
    terminal.expect(f"^signal {int(signal.SIGWINCH)}\n")
    os.kill(launcher, FLUSH)
    terminal.expect(f"^signal {int(FLUSH)}\n")


def test_ctrl_c_ends_command(terminal: Terminal) -> None:
    _start(terminal, "$F sh -c 'echo begun; read line'")
    terminal.expect("begun\n")
    terminal.press("Ctrl-C")
    terminal.await_shell()
    assert terminal.status() == 128 + signal.SIGINT


def test_ctrl_z_and_fg(terminal: Terminal) -> None:
    _start(terminal, "$F sh -c 'echo begun; read line; echo \"read $line\"; exit 5'")
    terminal.expect("begun\n")
    for _ in range(2):
        terminal.press("Ctrl-Z")
        terminal.expect("Stopped")
        terminal.await_shell()
        terminal.type("fg")
        terminal.await_continued()
    terminal.type("a word")
    terminal.expect("read a word\n")
    terminal.await_shell()
    assert terminal.status() == 5


@pytest.mark.parametrize("name", ["STOP", "TSTP"])
def test_a_command_that_stops_itself(terminal: Terminal, name: str) -> None:
    _start(terminal, f"$F sh -c 'kill -{name} $$; echo continued; exit 6'")
    terminal.expect("Stopped")
    terminal.await_shell()
    terminal.type("fg")
    terminal.expect("continued\n")
    terminal.await_shell()
    assert terminal.status() == 6


def test_a_stop_signal_sent_to_the_launcher_stops_command(terminal: Terminal) -> None:
    """As `kill -TSTP` of a program does that flockshim has become."""
    launcher = _start(terminal, "$F sh -c 'echo begun; read line; exit 9'")
    terminal.expect("begun\n")
    os.kill(launcher, signal.SIGTSTP)
    terminal.expect("Stopped")
    terminal.await_shell()
    terminal.type("fg")
    terminal.await_job()
    terminal.type("")
    terminal.await_shell()
    assert terminal.status() == 9


def test_bg(terminal: Terminal, place: World) -> None:
    fifo = place.directory / "fifo"
    os.mkfifo(fifo)
    _start(terminal, "$F sh -c 'echo begun; read line <fifo; echo \"read $line\"'")
    terminal.expect("begun\n")
    terminal.press("Ctrl-Z")
    terminal.expect("Stopped")
    terminal.type("bg")
    fifo.write_text("a word\n")
    terminal.expect("read a word\n")
    terminal.type("wait; echo done")
    terminal.expect("done\n")
    await_true(lambda: _is_free(place), "the job to end")


def test_a_background_job_that_may_not_write(terminal: Terminal) -> None:
    """`stty tostop`: the terminal stops it, and the shell must be told."""
    terminal.type("stty tostop; $F sh -c 'echo written; exit 3' &")
    # dash speaks of its jobs only with a prompt.
    await_true(lambda: "Stopped (tty output)" in terminal.output("jobs -l"), "the job to be stopped")
    terminal.type("fg")
    terminal.expect("written\n")
    terminal.await_shell()
    assert terminal.status() == 3


def test_the_terminal_goes_away(terminal: Terminal, place: World) -> None:
    launcher = _start(terminal, "$F sh -c 'echo $$; read line; read line'")
    command = int(terminal.expect(r"(\d+)\n")[1])
    terminal.close()
    for pid in command, launcher:
        await_end(pid)
    assert _is_free(place)


def test_a_shell_as_command(terminal: Terminal, place: World, way: list[str]) -> None:
    """It puts itself, and its jobs, into process groups of their own."""
    launcher = _start(terminal, "$F bash --norc --noprofile --noediting -i")
    terminal.type("echo inner $(($$ != 0))")
    terminal.expect("inner 1\n")
    inner = terminal.foreground()
    assert inner != launcher
    terminal.type("sh -c 'echo begun; read line'")
    terminal.expect("begun\n")
    terminal.press("Ctrl-C")
    await_true(lambda: terminal.foreground() == inner, "the inner shell to go on")
    assert terminal.status() == 128 + signal.SIGINT
    terminal.type("sh -c 'echo begun; read line; exit 3'")
    terminal.expect("begun\n")
    terminal.press("Ctrl-Z")
    terminal.expect("Stopped")
    await_true(lambda: terminal.foreground() == inner, "the inner shell to go on")
    assert _is_held(place, way)
    terminal.type("fg")
    await_true(lambda: terminal.foreground() != inner, "the inner job to go on")
    terminal.type("")
    await_true(lambda: terminal.foreground() == inner, "the inner shell to go on")
    terminal.type("exit 4")
    terminal.await_shell()
    assert terminal.status() == 4
    assert _is_free(place)


def test_a_session_leader_hands_on_that_its_terminal_is_gone(place: World, way: list[str]) -> None:
    """The kernel tells the leader alone, credentials(7): as `ssh -t HOST flockshim --lock …` makes it one."""
    master, slave = os.openpty()
    with job(place, *way, command=RECORD, prefix=["setsid", "--ctty"], stdin=slave) as running:
        os.close(slave)
        running.began()
        os.close(master)
        assert running.line() == f"signal {int(signal.SIGHUP)}"
        assert _received(running) == []
