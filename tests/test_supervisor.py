"""The processes around a supervised COMMAND: who lives how long, what each of them keeps, and who is killed."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.keepers import keepers
from support.lockcommand import FLOCKSHIM, HOLD, Job, job, locks, one_line, run, settings
from support.proc import DEADLINE, await_end, await_true, children, parent, snapshot
from support.programs import static_program
from support.worlds import FLOCK_SYSCALL, World

from flockshim.supervisor import _Supervisor

ENOSYS = 38
SUPERVISED = ["--via", "seccomp"]
PING = f"native:{FLOCK_SYSCALL}:0x7fffffff:0x464c4b53"
"""A lock call that only a supervisor answers with a number above 0: see shim/notify.h."""

# Leaves a process of another session behind that says on FIFO whether it is covered, each time that it is asked.
DAEMON = """
setsid sh -c 'exec </dev/null >/dev/null 2>&1 3<>"$1"
    while read -r word <&3; do
        test "$word" = end && exit
        "$2" "$3" >"$4.new"; mv "$4.new" "$4"
    done' sh "$1" "$2" "$3" "$4" &
echo $!
"""


@pytest.fixture
def place(session_rendezvous: Path, tmp_path: Path) -> Iterator[World]:
    """A directory where the kernel locks."""
    world = World("native", tmp_path, {**os.environ, "FLOCKSHIM_DIR": str(session_rendezvous)})
    yield world
    world.end()


@pytest.fixture
def probe() -> str:
    """The path of a static program that makes lock calls."""
    return str(static_program("rawcalls"))


def supervisor_of(running: Job) -> int:
    """The process between launcher and COMMAND. Call it when COMMAND runs."""
    (pid,) = children(running.pid)
    return pid


class Daemon:
    """A process that outlives the COMMAND that has started it."""

    def __init__(self, place: World, probe: str) -> None:
        self.place = place
        self.fifo = place.directory / "fifo"
        os.mkfifo(self.fifo)
        self.answer = place.directory / "answer"
        self.command = ["sh", "-c", DAEMON + 'test "$5" = stay && read line; exit 9', "sh", str(self.fifo), probe]
        self.command += [PING, str(self.answer)]

    def is_covered(self) -> bool:
        self.answer.unlink(missing_ok=True)
        self._tell("ask")
        await_true(self.answer.exists, "the daemon's answer")
        value = int(self.answer.read_text())
        assert value > 0 or value in (-9, -ENOSYS)
        return value > 0

    def end(self) -> None:
        self._tell("end")

    def _tell(self, word: str) -> None:
        # Not for writing alone: nobody may read it any more.
        with open(os.open(self.fifo, os.O_RDWR), "w") as fifo:
            fifo.write(word + "\n")
            fifo.flush()
            await_true(lambda: _is_empty(fifo.fileno()), "the daemon to read")


def _is_empty(fifo: int) -> bool:
    return fcntl.ioctl(fifo, termios.FIONREAD, b"\0" * 4) == b"\0" * 4


# Who lives how long


def test_command_is_all_that_the_supervisor_waits_for(place: World) -> None:
    with job(place, *SUPERVISED) as running:
        command = running.began()
        supervisor = supervisor_of(running)
        assert parent(command) == supervisor
        assert running.finish(5) == (5, "")
        # The launcher has waited for it, so that its use of the machine is counted.
        assert not Path(f"/proc/{supervisor}").exists()


def test_a_daemon_stays_covered(place: World, probe: str) -> None:
    daemon = Daemon(place, probe)
    with job(place, *SUPERVISED, command=[*daemon.command, "stay"]) as running:
        pid = running.began()
        supervisor = supervisor_of(running)
        assert running.finish() == (9, "")
        assert daemon.is_covered()
        assert parent(pid) == supervisor
        daemon.end()
        for each in pid, supervisor:
            await_end(each)


def test_a_daemon_with_the_library_too(place: World, probe: str) -> None:
    """As `flockshim --via seccomp` finds itself in a shell that has evaluated `flockshim --env`."""
    daemon = Daemon(place, probe)
    environment = dict(os.environ)
    command = [*FLOCKSHIM, "--mode", "host", *FLOCKSHIM, *SUPERVISED, *daemon.command]
    done = subprocess.run(
        command,
        env={**environment, **settings(place)},
        capture_output=True,
        text=True,
        check=False,
        cwd=place.directory,
    )
    assert (done.returncode, done.stderr) == (9, "")
    supervisor = parent(int(done.stdout))
    assert daemon.is_covered()
    daemon.end()
    await_end(supervisor)


def test_a_daemons_emulated_lock(fresh_world: World, rendezvous: Path, tmp_path: Path, probe: str) -> None:
    """It is granted, and listed, after COMMAND has ended. Then the supervisor ends, and the keeper stays."""
    path = fresh_world.file()
    fifo, answer = tmp_path / "fifo", tmp_path / "answer"
    os.mkfifo(fifo)
    script = f"setsid {probe} {path} - native:{FLOCK_SYSCALL}:3:6 sleep >{answer} 2>&1 <>{fifo} & echo $!; exit 9"
    with job(fresh_world, "--mode", "host", *SUPERVISED, command=["sh", "-c", script]) as running:
        daemon = running.began()
        assert running.ended() == (9, "")
        supervisor = parent(daemon)
        fifo.write_text("go\n")
        await_true(lambda: answer.read_text() != "", "the daemon's call")
        assert answer.read_text() == "0\n"
        (file,) = locks(fresh_world, path)
        assert [holder["pid"] for holder in file["holders"]] == [daemon]
        assert not fresh_world.free(path)
        os.kill(daemon, signal.SIGKILL)
        await_end(supervisor)
        assert len(keepers(rendezvous)) == 1
        assert fresh_world.free(path)


def test_a_keeper_is_no_child_that_is_waited_for(fresh_world: World, rendezvous: Path, probe: str) -> None:
    """Where the supervisor has started it, because of the first emulated lock."""
    command = [*FLOCKSHIM, "--mode", "host", *SUPERVISED, probe]
    command += [str(fresh_world.file()), f"native:{FLOCK_SYSCALL}:3:6", "-"]
    with subprocess.Popen(
        command, env=settings(fresh_world), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "0\n"
        (supervisor,) = children(process.pid)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait() == 7
        assert not Path(f"/proc/{supervisor}").exists()
    assert len(keepers(rendezvous)) == 1


@pytest.mark.parametrize("streams", ["output", "both"])
def test_a_shells_substitution_does_not_wait_for_a_daemon(place: World, probe: str, streams: str) -> None:
    """`$(flockshim ./prog-that-daemonises)` is read to its end, when the last writer has closed it."""
    daemon = Daemon(place, probe)
    done = subprocess.run(
        [*FLOCKSHIM, *SUPERVISED, *daemon.command],
        env=settings(place),
        cwd=place.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if streams == "both" else None,
        text=True,
        check=False,
    )
    assert done.returncode == 9
    assert daemon.is_covered()
    supervisor = parent(int(done.stdout))
    daemon.end()
    await_end(supervisor)


def test_the_supervisor_keeps_nothing_of_the_users(place: World, probe: str) -> None:
    """No pipe, whose other end would wait; no directory, which could not be unmounted."""
    daemon = Daemon(place, probe)
    reading, writing = os.pipe()
    with job(place, *SUPERVISED, command=[*daemon.command, "stay"], pass_fds=[writing]) as running:
        running.began()
        supervisor = supervisor_of(running)
        seen = snapshot(supervisor)
        assert seen.directory == "/"
        assert seen.descriptors[0] == seen.descriptors[1] == "/dev/null"
        kinds = {name.partition(":")[0] for number, name in seen.descriptors.items() if number > 2}
        assert kinds | {"/dev/null"} == {"socket", "anon_inode", "/dev/null"}
        os.close(writing)
        assert running.finish() == (9, "")
        assert daemon.is_covered()
        seen = snapshot(supervisor)
        assert {name.partition(":")[0] for name in seen.descriptors.values()} == {"/dev/null", "anon_inode"}
        daemon.end()
        assert os.read(reading, 1) == b""
        await_end(supervisor)
    os.close(reading)


def test_orphans_leave_no_zombies(place: World) -> None:
    """The supervisor is their parent when their own has ended."""
    script = "for i in 1 2 3; do (sh -c 'echo $$' &); done; echo $$; read status; exit $status"
    with job(place, *SUPERVISED, command=["sh", "-c", script]) as running:
        pids = [running.began() for _ in range(4)]
        supervisor = supervisor_of(running)
        await_true(lambda: len(children(supervisor)) == 1, f"all but one of {pids} to be waited for")
        assert running.finish(3) == (3, "")


def test_an_orphan_that_is_stopped_does_not_stop_the_job(place: World) -> None:
    with job(
        place,
        *SUPERVISED,
        command=["sh", "-c", "(sleep 600 >/dev/null 2>&1 & echo $!); echo $$; read status; exit $status"],
    ) as running:
        orphan = running.began()
        running.began()
        supervisor = supervisor_of(running)
        await_true(lambda: parent(orphan) == supervisor, "the orphan's adoption")
        os.kill(orphan, signal.SIGSTOP)
        assert running.finish(3) == (3, "")
        assert parent(orphan) == supervisor
        os.kill(orphan, signal.SIGKILL)
        await_end(supervisor)


def test_time_that_command_has_used_is_counted(place: World) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    process = subprocess.Popen([*FLOCKSHIM, *SUPERVISED, sys.executable, "-c", burn], env=settings(place))
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0 and used.ru_utime + used.ru_stime > 0.3


# Who is killed


@pytest.mark.parametrize("more", [[], ["--lock", "lock"]], ids=["", "lock"])
def test_a_killed_launcher_leaves_command_covered(place: World, probe: str, more: list[str]) -> None:
    script = f"echo $$; while read line; do {probe} {PING}; done; exit 4"
    with job(place, *more, *SUPERVISED, command=["sh", "-c", script]) as running:
        command = running.began()
        supervisor = supervisor_of(running)
        running.process.kill()
        running.process.wait()
        running.tell("")
        assert int(running.line()) > 0
        if more:
            assert not place.free(place.directory / "lock")
        running.close_input()
        for pid in command, supervisor:
            await_end(pid)
        assert running.process.stderr and running.process.stderr.read() == ""
        if more:
            assert place.free(place.directory / "lock")


def test_a_killed_supervisor_leaves_command_running(place: World, probe: str) -> None:
    script = f"echo $$; while read word; do test $word = end && exit 4; {probe} {PING}; done"
    with job(place, *SUPERVISED, command=["sh", "-c", script]) as running:
        command = running.began()
        os.kill(supervisor_of(running), signal.SIGKILL)
        running.tell("ask")
        assert int(running.line()) == -ENOSYS
        await_true(lambda: parent(command) == running.pid, "the launcher to be COMMAND's parent")
        os.kill(command, signal.SIGSTOP)
        _, status = os.waitpid(running.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
        os.kill(running.pid, signal.SIGCONT)
        running.tell("end")
        status, errors = running.ended()
        assert status == 4
        assert one_line(errors) == "the supervisor was killed: the lock calls of COMMAND fail from now on"


def test_signals_go_on_to_a_command_whose_supervisor_was_killed(place: World) -> None:
    with job(place, *SUPERVISED) as running:
        command = running.began()
        os.kill(supervisor_of(running), signal.SIGKILL)
        await_true(lambda: parent(command) == running.pid, "the launcher to be COMMAND's parent")
        running.process.send_signal(signal.SIGTERM)
        status, errors = running.ended()
        assert status == -signal.SIGTERM
        one_line(errors)


@pytest.mark.parametrize("last", ["exit", "kill"])
def test_a_supervisor_that_is_killed_before_it_can_tell(place: World, last: str) -> None:
    """COMMAND's status is not lost."""
    with job(place, *SUPERVISED) as running:
        command = running.began()
        supervisor = supervisor_of(running)
        os.kill(supervisor, signal.SIGSTOP)
        if last == "exit":
            running.tell("5")
        else:
            os.kill(command, signal.SIGKILL)
        await_true(lambda: parent(command) == 0, "COMMAND to end")
        os.kill(supervisor, signal.SIGKILL)
        status, errors = running.ended()
        assert status == (5 if last == "exit" else -signal.SIGKILL)
        one_line(errors)


def test_all_are_killed_with_their_group(place: World) -> None:
    """As timeout(1) and batch systems do."""
    with job(place, *SUPERVISED, start_new_session=True) as running:
        command = running.began()
        supervisor = supervisor_of(running)
        os.killpg(running.pid, signal.SIGKILL)
        for pid in command, supervisor:
            await_end(pid)
        assert running.ended() == (-signal.SIGKILL, "")


def test_a_group_that_is_ended_kindly(place: World, probe: str) -> None:
    """The supervisor stays as long as COMMAND wants to go on."""
    script = f"trap '{probe} {PING}' TERM; echo $$; while :; do read word; test \"$word\" = end && exit 4; done"
    with job(place, *SUPERVISED, command=["sh", "-c", script], start_new_session=True) as running:
        running.began()
        os.killpg(running.pid, signal.SIGTERM)
        assert int(running.line()) > 0
        running.tell("end")
        assert running.ended() == (4, "")


def _look_after(command: int, launcher: socket.socket, environ: dict[str, str]) -> None:
    """Do the supervisor's work for a COMMAND that is killed between two looks at it."""
    looks = iter([True])
    real = os.waitid

    def waitid(kind: int, number: int, options: int) -> os.waitid_result | None:
        info = real(kind, number, options)
        if next(looks, False):
            assert info and info.si_code == os.CLD_STOPPED
            os.kill(command, signal.SIGKILL)
            real(os.P_PID, command, os.WEXITED | os.WNOWAIT)
        return info

    os.waitid = waitid
    supervisor = _Supervisor(launcher, environ)
    supervisor._command = command
    supervisor._look_after_children()


def test_a_command_that_is_killed_as_soon_as_it_was_stopped(place: World) -> None:
    """Its end is not taken for another stop."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    supervisor = os.fork()
    if supervisor == 0:
        try:
            ours.close()
            command = os.fork()
            if command == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
                os._exit(0)
            _look_after(command, theirs, place.environment)
        finally:
            os._exit(1)
    theirs.close()
    with ours:
        ours.settimeout(DEADLINE)
        told = [ours.recv(100)]
        while told[-1] and not told[-1].startswith(b"ended"):
            told.append(ours.recv(100))
    os.waitpid(supervisor, 0)
    assert told[-1] == b"ended 9"


# With --lock


def test_with_lock(place: World) -> None:
    lock = place.directory / "lock"
    with job(place, "--lock", "lock", *SUPERVISED) as running:
        running.began()
        assert not place.free(lock)
        assert run(place, "--lock", "lock", "--no-wait", *SUPERVISED, "true").returncode == 75
        assert running.finish(6) == (6, "")
    assert place.free(lock)


@pytest.mark.parametrize("option", ["--lock", "--inherit"])
def test_what_outlives_command_keeps_the_lock_if_it_inherits(place: World, option: str) -> None:
    lock = place.directory / "lock"
    command = ["sh", "-c", "exec 3<&0; cat <&3 >/dev/null 2>&1 & echo $!; exit 2"]
    words = ["--lock", "lock", *(["--inherit"] if option == "--inherit" else []), *SUPERVISED]
    with job(place, *words, command=command) as running:
        outliving = running.began()
        assert running.ended() == (2, "")
        supervisor = parent(outliving)
        assert place.free(lock) is (option == "--lock")
        running.close_input()
        await_end(supervisor)
    assert place.free(lock)


# COMMAND is started as without


def test_commands_that_cannot_be_executed(place: World) -> None:
    (place.directory / "directory").mkdir()
    plain = place.directory / "plain"
    plain.write_text("exit 3\n")
    text = place.directory / "text"
    text.write_text('echo "$0" "$@"; exit 3\n')
    text.chmod(0o755)
    binary = place.directory / "binary"
    binary.write_bytes(b"\x7fELF\2\1\1\0\0")
    binary.chmod(0o755)
    for name, status, reason in [
        ("./missing", 127, os.strerror(2)),
        ("no-such-command", 127, os.strerror(2)),
        ("./plain", 126, os.strerror(13)),
        ("./directory", 126, "Is a directory"),
        ("./binary", 126, os.strerror(8)),
    ]:
        done = run(place, *SUPERVISED, name)
        assert (done.returncode, done.stdout) == (status, "")
        assert one_line(done.stderr) == f"{name!r}: {reason}"
    done = run(place, *SUPERVISED, "./text", "a b", "c")
    assert (done.returncode, done.stdout, done.stderr) == (3, "./text a b c\n", "")


PREPARE = """
exec 5</dev/null 7</dev/null 9>&2
umask 027
ulimit -S -n 200
ulimit -f 5000000
exec nice -n 3 "$@"
"""
LOOK = """
umask; ulimit -aS; ulimit -aH; pwd; cat /proc/self/oom_score_adj
env | grep -v -e ^FLOCKSHIM -e ^LD_PRELOAD -e ^_=
for number in 0 1 2 3 4 5 6 7 8 9 10 11 12; do readlink /proc/$$/fd/$number; done
grep -E '^(Umask|[UG]id|Groups|Sig(Blk|Ign|Cgt)|Cap|NoNewPrivs|Cpus_allowed)' /proc/self/status
ps -o nice=,sid=,tty=,cls= $$
"""


def test_command_finds_itself_as_without(place: World) -> None:
    """Its limits, mask, descriptors, group: whatever is inherited."""

    def seen(*words: str) -> str:
        command = ["sh", "-c", PREPARE, "sh", *words, "sh", "-c", LOOK]
        with open(place.directory / "seen", "w+") as output:
            subprocess.run(
                command,
                env=settings(place),
                cwd=place.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=True,
            )
            output.seek(0)
            return output.read()

    plain = seen("env")
    assert seen(*FLOCKSHIM, *SUPERVISED) == plain
    assert plain.startswith("0027\n")


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_descriptors(place: World, probe: str, closed: str) -> None:
    answer = place.directory / "answer"
    inner = f"{probe} {PING} >{answer}; ls /proc/self/fd >>{answer}; exit 5"

    def seen(*words: str) -> list[str]:
        command = ["sh", "-c", f'exec {closed}; exec "$@"', "sh", *words, "sh", "-c", inner]
        done = subprocess.run(command, env=settings(place), check=False)
        assert done.returncode == 5
        return answer.read_text().split()

    value, *descriptors = seen(*FLOCKSHIM, *SUPERVISED)
    assert int(value) > 0
    assert descriptors == seen("env")[1:]


def test_standard_streams_are_commands_own(place: World) -> None:
    """In a pipeline, and as a job in the background."""
    words = " ".join([*FLOCKSHIM, *SUPERVISED])
    script = f"""
    printf 'one\\ntwo\\n' | {words} sed s/o/0/ | {words} sort -r | {words} sh -c 'read line; echo "$line"; cat >&2'
    {words} sh -c 'exit 3' & wait $!; echo $?
    """
    done = subprocess.run(
        ["sh", "-c", script], env=settings(place), cwd=place.directory, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("tw0\n3\n", "0ne\n")


def test_who_writes_into_a_pipe_that_command_has_closed_is_told(place: World) -> None:
    """SIGPIPE ends `yes` when the launcher has ended, although others are left who were started with the pipe."""
    script = (
        f'yes | {" ".join([*FLOCKSHIM, *SUPERVISED])} sh -c "exec </dev/null; sleep 600 >/dev/null 2>&1 & echo \\$!"'
    )
    done = subprocess.run(["sh", "-c", script], env=settings(place), stdout=subprocess.PIPE, text=True, check=True)
    left = int(done.stdout)
    supervisor = parent(left)
    os.kill(left, signal.SIGKILL)
    await_end(supervisor)


def test_many_starts(place: World) -> None:
    """COMMAND may have ended before the launcher knows that it was started."""
    commands = [[*FLOCKSHIM, *SUPERVISED, "sh", "-c", f"exit {status}"] for status in range(20)]
    started = [subprocess.Popen(command, env=settings(place)) for command in commands]
    assert [process.wait() for process in started] == list(range(20))


def test_hold_is_no_zombie(place: World) -> None:
    """COMMAND's pid is its own until the launcher knows of its end, and nobody's afterwards."""
    with job(place, *SUPERVISED, command=HOLD) as running:
        command = running.began()
        supervisor = supervisor_of(running)
        assert running.finish() == (0, "")
        for pid in command, supervisor:
            assert not Path(f"/proc/{pid}").exists()
