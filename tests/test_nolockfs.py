"""The FUSE mount: what its lock calls answer, and that it comes and goes cleanly."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flockshim
from flockshim import nolockfs
from flockshim.pytest_plugin import require

PACKAGE = Path(flockshim.__file__).parent
F_OFD_SETLK = 37  # Python has the name from 3.13 only
WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


@pytest.fixture
def fuse(nolock_dir: Path) -> None:
    """Skips where nolock_dir does."""


@pytest.fixture
def file(nolock_dir: Path) -> Iterator[int]:
    fd = os.open(nolock_dir / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def errno_of(call: object, *arguments: object) -> int | None:
    assert callable(call)
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


def await_end(pid: int) -> None:
    """Wait until a process, which need not be a child, has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([pidfd], [], [])
    os.close(pidfd)


def is_mounted(path: Path | str) -> bool:
    return f" {path} " in Path("/proc/self/mountinfo").read_text()


def guard_of(server: int) -> int:
    return int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1])


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )


# What lock calls answer


@pytest.mark.parametrize("nolock_dir", ["ENOSYS", "EOPNOTSUPP", "ENOLCK", "EIO", 511], indirect=True)
def test_every_lock_call_fails_with_the_errno(file: int, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["nolock_dir"]
    number = name if isinstance(name, int) else getattr(errno, name)
    for operation in (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN):
        assert errno_of(fcntl.flock, file, operation) == number
        assert errno_of(fcntl.lockf, file, operation) == number
    assert errno_of(fcntl.fcntl, file, fcntl.F_GETLK, WHOLE_FILE) == number
    assert errno_of(fcntl.fcntl, file, F_OFD_SETLK, WHOLE_FILE) == number


@pytest.mark.nolock(flock="ENOLCK", posix="local")
def test_only_flock_fails(file: int, nolock_dir: Path) -> None:
    assert errno_of(fcntl.flock, file, fcntl.LOCK_EX) == errno.ENOLCK
    fcntl.lockf(file, fcntl.LOCK_EX)
    other = os.open(nolock_dir / "file", os.O_RDWR)
    assert errno_of(fcntl.fcntl, other, F_OFD_SETLK, WHOLE_FILE) == errno.EAGAIN
    os.close(other)


@pytest.mark.nolock(flock="local", posix="EIO")
def test_only_record_locks_fail(file: int, nolock_dir: Path) -> None:
    assert errno_of(fcntl.lockf, file, fcntl.LOCK_EX) == errno.EIO
    fcntl.flock(file, fcntl.LOCK_EX)
    other = os.open(nolock_dir / "file", os.O_RDONLY)
    assert errno_of(fcntl.flock, other, fcntl.LOCK_SH | fcntl.LOCK_NB) == errno.EWOULDBLOCK
    os.close(other)


@pytest.mark.nolock(flock="hang", posix="local")
@pytest.mark.parametrize("operation", ["LOCK_EX", "LOCK_EX | fcntl.LOCK_NB"])
def test_a_hanging_lock_ends_with_a_signal(nolock_dir: Path, operation: str) -> None:
    (nolock_dir / "file").touch()
    child = python(
        "import fcntl, signal, sys\n"
        "def alarm(*_): raise TimeoutError\n"
        "signal.signal(signal.SIGALRM, alarm)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.3)\n"
        "try:\n"
        f"    fcntl.flock(open(sys.argv[1]), fcntl.{operation})\n"
        "except TimeoutError:\n"
        "    print('hung')\n",
        nolock_dir / "file",
    )
    assert child.communicate()[0] == "hung\n"
    assert (nolock_dir / "file").exists()  # the server is still there


@pytest.mark.nolock(flock="hang", posix="local")
def test_a_hanging_program_can_be_killed(nolock_dir: Path) -> None:
    (nolock_dir / "file").touch()
    child = python(
        "import fcntl, sys; f = open(sys.argv[1]); print(flush=True); fcntl.flock(f, 2); print('got')",
        nolock_dir / "file",
    )
    assert child.stdout
    child.stdout.readline()
    child.kill()
    assert child.communicate()[0] == ""
    assert child.returncode == -signal.SIGKILL


def test_directories_and_fifos_are_locked_by_the_kernel(nolock_dir: Path) -> None:
    os.mkfifo(nolock_dir / "fifo")
    for path, flags in ((nolock_dir, os.O_RDONLY), (nolock_dir / "fifo", os.O_RDWR)):
        fds = [os.open(path, flags) for _ in range(2)]
        fcntl.flock(fds[0], fcntl.LOCK_EX)
        assert errno_of(fcntl.flock, fds[1], fcntl.LOCK_EX | fcntl.LOCK_NB) == errno.EWOULDBLOCK
        fcntl.flock(fds[0], fcntl.LOCK_UN)
        fcntl.flock(fds[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        for fd in fds:
            os.close(fd)


def test_pipes_and_sockets_are_locked_by_the_kernel(nolock_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(nolock_dir / "s"))  # short: unix(7)
        fcntl.flock(listener, fcntl.LOCK_EX)
    reader, writer = os.pipe()
    fcntl.flock(reader, fcntl.LOCK_EX)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("value", ["EWHAT", "", "0", "-1", 5000])
def test_what_is_no_errno_is_refused(value: str | int) -> None:
    with pytest.raises(flockshim.FlockshimError, match="is no errno"):
        nolockfs.mount(flock=value)


@pytest.mark.parametrize("value", [524, "ENOTSUPP", 512])
def test_an_errno_that_the_kernel_refuses_from_fuse_is_refused(value: str | int) -> None:
    with pytest.raises(flockshim.FlockshimError, match="--simulate 5"):
        nolockfs.mount(posix=value)


# Coming and going


def test_nothing_is_left_behind(fuse: None) -> None:
    mount = nolockfs.mount()
    with mount as path:
        (path / "file").write_text("x")
        assert (mount.backing / "file").read_text() == "x"
        assert is_mounted(path)
        server = mount.server_pid
    assert not is_mounted(path)
    assert not path.parent.exists()
    assert not Path(f"/proc/{server}").exists()


def test_a_given_directory_is_mirrored_and_kept(fuse: None, tmp_path: Path) -> None:
    (tmp_path / "before").write_text("1")
    with nolockfs.mount(backing=tmp_path) as path:
        assert (path / "before").read_text() == "1"
        (path / "after").write_text("2")
    assert (tmp_path / "after").read_text() == "2"


def test_nothing_is_removed_through_the_mount(fuse: None, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with nolockfs.mount(backing=tmp_path) as path:
        nolockfs._remove(path.parent)
        assert (path / "precious").exists()
    assert (tmp_path / "precious").exists()
    assert not path.parent.exists()


def test_it_is_unmounted_though_files_are_open(fuse: None) -> None:
    with nolockfs.mount() as path:
        fd = os.open(path / "file", os.O_RDWR | os.O_CREAT)
    assert not is_mounted(path)
    assert errno_of(os.pwrite, fd, b"x", 0) == errno.ENOTCONN
    with contextlib.suppress(OSError):  # the close fails likewise if it is the mount's first
        os.close(fd)


def test_it_is_unmounted_after_an_error(fuse: None) -> None:
    mount = nolockfs.mount()
    with pytest.raises(ZeroDivisionError), mount:
        1 / 0  # noqa: B018
    assert not is_mounted(mount.path)


def test_another_mount_namespace_cannot_keep_it_alive(fuse: None) -> None:
    require(os.geteuid() == 0, "needs a mount namespace", "run as root")
    mount = nolockfs.mount()
    with mount as path:
        other = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", "echo; read x"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert other.stdout
        other.stdout.readline()
    assert not is_mounted(path)
    assert not Path(f"/proc/{mount.server_pid}").exists()
    other.communicate()


OWNER = """
from flockshim import nolockfs
mount = nolockfs.mount()
with mount as path:
    (path / "closed").touch()
    file = open(path / "open", "w")
    print(path, mount.server_pid, flush=True)
    input()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_it_is_unmounted_when_its_owner_is_killed(fuse: None, stopped: bool) -> None:
    owner = python(OWNER)
    assert owner.stdout
    path, server = owner.stdout.readline().split()
    guard = guard_of(int(server))
    if stopped:
        os.kill(int(server), signal.SIGSTOP)
    assert is_mounted(path)
    owner.kill()
    owner.communicate()
    await_end(guard)
    assert not is_mounted(path)
    assert not Path(path).parent.exists()
    assert not Path(f"/proc/{server}").exists()


def test_ctrl_c_in_a_terminal_reaches_only_the_owner(fuse: None) -> None:
    mount = nolockfs.mount()
    with mount as path:
        assert os.getpgid(mount.server_pid) != os.getpgid(0)
        assert path.is_dir()


def test_it_is_unmounted_when_the_server_is_killed(fuse: None) -> None:
    mount = nolockfs.mount()
    with mount as path:
        guard = guard_of(mount.server_pid)
        os.kill(mount.server_pid, signal.SIGKILL)
        os.waitid(os.P_PID, guard, os.WEXITED | os.WNOWAIT)
        assert not is_mounted(path)


def test_it_is_unmounted_when_the_guard_is_killed(fuse: None) -> None:
    mount = nolockfs.mount()
    with mount as path:
        os.kill(guard_of(mount.server_pid), signal.SIGKILL)
        await_end(mount.server_pid)
    assert not is_mounted(path)
    assert not path.parent.exists()


def test_a_stopped_server_stalls_the_mount_until_it_goes_on(fuse: None) -> None:
    mount = nolockfs.mount()
    with mount as path:
        os.kill(mount.server_pid, signal.SIGSTOP)
        child = python("import os, sys; os.mkdir(sys.argv[1]); print('made')", path / "new")
        assert child.stdout
        assert select.select([child.stdout], [], [], 0.3)[0] == []
        os.kill(mount.server_pid, signal.SIGCONT)
        assert child.communicate()[0] == "made\n"


# The command


def command(*arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-m", "flockshim.nolockfs", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )


def test_the_command_serves_until_sigterm(fuse: None, tmp_path: Path) -> None:
    backing, mountpoint = tmp_path / "backing", tmp_path / "mount"
    backing.mkdir()
    mountpoint.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", "flockshim.nolockfs", backing, mountpoint, "--flock=EIO"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert server.stdout
    assert server.stdout.readline().startswith("ready ")
    with open(mountpoint / "file", "w") as file:
        assert errno_of(fcntl.flock, file, fcntl.LOCK_EX) == errno.EIO
    server.terminate()
    assert server.communicate()[0] == ""
    assert server.returncode == 0
    assert not is_mounted(mountpoint)
    assert (backing / "file").exists()


def test_mistakes_are_one_clear_line(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    for arguments, expected in (
        ((tmp_path, inside), f"flockshim: {inside} is inside {tmp_path}"),
        ((inside, tmp_path, "--flock=EWHAT"), "flockshim: --flock: 'EWHAT' is no errno"),
        ((tmp_path / "missing", inside), f"flockshim: {tmp_path}/missing is no directory"),
    ):
        done = command(*arguments)
        assert done.returncode == 125
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_backing_directory_that_is_missing_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(flockshim.FlockshimError, match="missing is no directory"):
        nolockfs.mount(backing=tmp_path / "missing").__enter__()


def test_a_missing_device_is_explained() -> None:
    require(os.geteuid() == 0, "needs a mount namespace", "run as root")
    hide = 'mount -t tmpfs none /dev && exec "$@"'
    done = command("/usr", "/mnt", prefix=("unshare", "-m", "sh", "-c", hide, "sh"))
    assert done.returncode == 125
    assert done.stderr.startswith("flockshim: /dev/fuse is missing: load the kernel module")
    assert done.stderr.count("\n") == 1


ORDINARY_USER = """
import fcntl, os, sys
from flockshim import nolockfs
with nolockfs.mount(flock="ENOLCK") as path:
    with open(path / "file", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(os.geteuid(), error.errno)
print(path.exists())
"""


def test_an_ordinary_user_mounts_by_fusermount3(fuse: None, tmp_path: Path) -> None:
    require(os.geteuid() == 0, "needs a mount namespace", "run as root")
    interpreter = "/usr/bin/python3"
    require(os.access(interpreter, os.X_OK), f"no {interpreter}", "install python3")
    require(os.access("/usr/bin/fusermount3", os.X_OK), "no fusermount3", "install fuse3")
    # Not every /dev/fuse is open to everybody, so this namespace gets one that is. The package
    # may lie where the user cannot read it, so there is a copy.
    script = f"""
        umask 022
        mount -t tmpfs none /mnt
        mknod -m 666 /mnt/fuse c 10 229
        mount --bind /mnt/fuse /dev/fuse
        mkdir /mnt/package && cp -r {PACKAGE} /mnt/package/flockshim
        cd /
        exec setpriv --reuid 65534 --regid 65534 --clear-groups \
            env TMPDIR=/tmp PYTHONPATH=/mnt/package {interpreter} -c '{ORDINARY_USER}'
    """
    done = subprocess.run(["unshare", "-m", "sh", "-ec", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("65534 37\nFalse\n", "")
