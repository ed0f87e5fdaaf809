"""A real file system on which locking fails in the kernel, for tests.

``mount()`` mirrors a directory through FUSE. Everything works as on the mirrored directory, but
flock(2) and record locks (fcntl(2), lockf(3)) on regular files are answered with an errno of your
choice, by the kernel, for every program, static ones too. Extended attributes are answered with
EOPNOTSUPP. Needs ``/dev/fuse``, and root or fusermount3 (package fuse3).

From a shell: ``python -m flockshim.nolockfs BACKING MOUNTPOINT --flock ENOSYS``; Ctrl-C unmounts.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Optional, Union

from flockshim import FlockshimError, errnos, fuse_guard, fuse_mount
from flockshim.fuse_mount import MountError
from flockshim.fuse_server import LockAnswer

__all__ = ["Mount", "MountError", "mount"]

_EXIT_FAILED = 125
_PROTOCOL_ERRNOS = 511


def mount(
    *,
    flock: Union[str, int] = "ENOSYS",
    posix: Union[str, int] = "ENOSYS",
    backing: Union[str, "os.PathLike[str]", None] = None,
) -> "Mount":
    """Return a context manager that mounts the file system and gives its path (``pathlib.Path``).

    ::

        with flockshim.nolockfs.mount(flock="ENOLCK", posix="local") as path:
            ...

    It is unmounted at the end, and also when the calling process is killed. Names and attributes
    are cached for a second, as network file systems do: what is changed in *backing* behind the
    mount's back may be seen that much later.

    :param flock: what flock(2) on a regular file answers: an errno's name or number, ``"local"``
        (it works, as on a local file system) or ``"hang"`` (it waits until a signal comes).
    :param posix: the same for record locks, those of processes and of open file descriptions.
    :param backing: the directory to mirror; an empty temporary one if not given. One descriptor
        is used for each file that the kernel remembers (RLIMIT_NOFILE).
    :raises FlockshimError: for something that is no errno, or above 511: FUSE cannot answer that.
    """
    return Mount(answer(flock, "flock"), answer(posix, "posix"), backing)


def answer(value: Union[str, int], label: str) -> LockAnswer:
    """Return what a lock call is to be answered: an errno's number, ``"local"`` or ``"hang"``.

    :param label: what the value was given as; begins the error's line.
    :raises FlockshimError: as :func:`mount` does.
    """
    if value == "local":
        return "local"
    if value == "hang":
        return "hang"
    number = errnos.number(str(value), label)
    if number > _PROTOCOL_ERRNOS:
        raise FlockshimError(
            f"{label}: the kernel takes no errno above {_PROTOCOL_ERRNOS} from a FUSE server: "
            f"for {number} use `flockshim --mode fail --simulate {number}`"
        )
    return number


class Mount:
    """A mounted file system; made by :func:`mount`, alive inside ``with``."""

    def __init__(
        self,
        flock: LockAnswer,
        posix: LockAnswer,
        backing: Union[str, "os.PathLike[str]", None] = None,
    ) -> None:
        """Prepare; nothing is mounted yet. The arguments are those of :func:`mount`."""
        self._answers = [f"--flock={flock}", f"--posix={posix}"]
        self._given = backing
        self.backing: Path
        """The mirrored directory."""
        self.path: Path
        """Where it is mounted."""
        self.server_pid: int
        """The process that answers; the file system stands still while it is stopped (SIGSTOP)."""

    def __enter__(self) -> Path:
        """Mount and return the directory.

        :raises MountError: when something that is needed is missing.
        """
        self._scratch = Path(tempfile.mkdtemp(prefix="nolockfs-"))
        self.path = self._scratch / "mount"
        self.backing = Path(self._given) if self._given else self._scratch / "backing"
        self.path.mkdir()
        if not self._given:
            self.backing.mkdir()
            self.backing.chmod(0o755)
        self._scratch.chmod(0o755)
        try:
            self._start()
        except BaseException:
            _remove(self._scratch)
            raise
        return self.path

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        """Unmount, also if files are still open there, and remove what is temporary."""
        self._guard.terminate()
        if self._guard.wait() != 0:
            self._unmount_abandoned()
        _remove(self._scratch)
        self._log.seek(0)
        sys.stderr.write(os.fsdecode(self._log.read()))
        self._log.close()

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the mount)
        package = Path(__file__).parent.parent
        search = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        self._guard = subprocess.Popen(
            [*(sys.executable, "-S", "-m", __name__), *self._arguments()],
            env={**os.environ, "PYTHONPATH": search},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C must not unmount before the tests have ended
        )
        assert self._guard.stdout
        with self._guard.stdout:
            line = os.fsdecode(self._guard.stdout.readline())
        if not line.startswith("ready "):
            self._guard.wait()
            self._log.seek(0)
            with self._log:
                raise MountError(os.fsdecode(self._log.read()).strip() or "the server died")
        self.server_pid = int(line.split()[1])

    def _arguments(self) -> list[str]:
        places = [str(self.backing.resolve()), str(self.path)]
        return [*places, *self._answers, f"--owner={os.getpid()}", f"--remove={self._scratch}"]

    def _unmount_abandoned(self) -> None:
        try:
            fuse_mount.unmount(str(self.path), lazy=True)
        except OSError:
            return  # nothing is mounted any more


def _remove(scratch: Path) -> None:
    """Remove what a Mount made, but never through the mount: that would empty the backing directory.

    A directory that is still mounted on cannot be removed (EBUSY), and then nothing is.
    """
    try:
        (scratch / "mount").rmdir()
    except OSError:
        return
    shutil.rmtree(scratch, ignore_errors=True)


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flockshim.nolockfs",
        description="Mirror BACKING at MOUNTPOINT with locks that fail, until SIGTERM or Ctrl-C.",
    )
    parser.add_argument("backing", metavar="BACKING")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    for call in ("flock", "posix"):
        help_text = f"what {call} locks answer: an errno, 'local' (they work) or 'hang'"
        parser.add_argument(f"--{call}", metavar="ERRNO", default="ENOSYS", help=help_text)
    parser.add_argument("--owner", metavar="PID", type=int, help="unmount when this process ends")
    parser.add_argument("--remove", metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        _serve(options)
    except (FlockshimError, OSError) as error:
        print(f"flockshim: {error}", file=sys.stderr)
        return _EXIT_FAILED
    if options.remove:
        _remove(Path(options.remove))
    return 0


def _serve(options: argparse.Namespace) -> None:
    flock = answer(options.flock, "--flock")
    posix = answer(options.posix, "--posix")
    backing, mountpoint = os.path.realpath(options.backing), os.path.realpath(options.mountpoint)
    for directory in (backing, mountpoint):
        if not os.path.isdir(directory):
            raise MountError(f"{directory} is no directory: make it first")
    if os.path.commonpath([backing, mountpoint]) == backing:
        raise MountError(f"{mountpoint} is inside {backing}: choose one outside")
    _allow_many_descriptors()
    fuse_guard.run(backing, mountpoint, flock, posix, options.owner)


def _allow_many_descriptors() -> None:
    """Every inode that the kernel remembers takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):  # not root, or root without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(_main())
