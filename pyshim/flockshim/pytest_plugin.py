"""pytest fixtures for programs that lock files: a directory where locking fails, or seems to.

pytest finds this plugin by itself once flockshim is installed. Nothing heavy is imported until a
fixture is used.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Union

import pytest

if TYPE_CHECKING:
    from _typeshed import HasFileno

    from flockshim.nolockfs import Mount

Errno = Union[str, int]

_REQUIRE_VARIABLE = "FLOCKSHIM_REQUIRE_OPTIONAL"


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "nolock(flock='ENOSYS', posix='ENOSYS'): what lock calls on files in the nolock_dir "
        "fixture answer: an errno's name or number, 'local' (they work) or 'hang'.",
    )


def require(condition: object, reason: str, how: str) -> None:
    """Skip the test unless *condition* holds; fail it if FLOCKSHIM_REQUIRE_OPTIONAL=1 is set.

    :param reason: what is missing.
    :param how: how to get it.
    """
    __tracebackhide__ = True
    if condition:
        return
    text = f"{reason} (to get it: {how})"
    if os.environ.get(_REQUIRE_VARIABLE) == "1":
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


class Mounts:
    """The mounts of one test session: one for each combination of answers."""

    def __init__(self) -> None:
        """Begin with none."""
        self._stack = ExitStack()
        self._mounted: dict[tuple[str, str], Mount] = {}

    def get(self, flock: Errno, posix: Errno) -> Mount:
        """Return the mount on which locks are answered so, mounted now if need be."""
        from flockshim import nolockfs

        key = str(flock), str(posix)
        if key not in self._mounted:
            mounted = nolockfs.mount(flock=flock, posix=posix)
            try:
                self._stack.enter_context(mounted)
            except nolockfs.MountError as error:
                require(False, "no FUSE mount", str(error))
            self._mounted[key] = mounted
        return self._mounted[key]

    def close(self) -> None:
        """Unmount all."""
        self._stack.close()


@pytest.fixture(scope="session")
def _nolock_mounts() -> Iterator[Mounts]:
    mounts = Mounts()
    yield mounts
    mounts.close()


@pytest.fixture
def nolock_dir(request: pytest.FixtureRequest, _nolock_mounts: Mounts) -> Iterator[Path]:
    """An empty directory (pathlib.Path) on a real file system on which locking fails in the kernel.

    flock(2) and record locks on its regular files fail with ENOSYS, for every program. Choose
    otherwise with ``@pytest.mark.nolock(flock="ENOLCK", posix="local")``: an errno (name, number),
    "local" (they work) or "hang" (they wait until a signal comes). Or by indirect parametrisation,
    with one errno for both or a dict:
    ``@pytest.mark.parametrize("nolock_dir", ["EIO", {"flock": 95}], indirect=True)``.
    The test is skipped if FUSE is missing, and fails if FLOCKSHIM_REQUIRE_OPTIONAL=1 is set.
    """
    answers: dict[str, Errno] = {"flock": "ENOSYS", "posix": "ENOSYS"}
    marker = request.node.get_closest_marker("nolock")
    if marker:
        answers.update(marker.kwargs)
    param = getattr(request, "param", None)
    if param is not None:
        answers.update(param if isinstance(param, dict) else {"flock": param, "posix": param})
    mount = _nolock_mounts.get(**answers)
    name = re.sub(r"\W", "_", request.node.name)[:30]
    path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=mount.path))
    path.chmod(0o755)
    yield path
    # Through the mount, so that the kernel forgets the files and the server their descriptors.
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def simulate_flock() -> Callable[..., dict[str, str]]:
    """A function that makes flock(2) fail in subprocesses, anywhere and without FUSE.

    ``simulate_flock(errno="ENOSYS", directory=None)`` returns an environment in which flock fails
    with that errno (name or number), on all regular files or those below *directory*, for every
    program that a preload reaches: ``subprocess.run([...], env=simulate_flock("ENOLCK"))``.
    """

    def environment(errno: Errno = "ENOSYS", directory: str | os.PathLike[str] | None = None) -> dict[str, str]:
        import flockshim

        where = "" if directory is None else f":{os.path.realpath(directory)}"
        return flockshim.environ(mode="fail", simulate=f"{errno}{where}")

    return environment


@pytest.fixture
def simulate_fcntl_flock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes Python's own ``fcntl.flock`` fail in this process until the test ends.

    ``simulate_fcntl_flock(errno="ENOSYS", directory=None, lockf=False)``: it then raises OSError
    with that errno (name or number) on regular files, all or those below *directory*; with
    ``lockf=True`` ``fcntl.lockf`` does so too. Wrong operations and descriptors are answered as
    ever, as the kernel looks at them first. Code that has done ``from fcntl import flock`` before
    keeps the real one.
    """

    def simulate(
        errno: Errno = "ENOSYS",
        directory: str | os.PathLike[str] | None = None,
        lockf: bool = False,
    ) -> None:
        from flockshim import errnos

        number = errnos.number(str(errno), "errno")
        below = None if directory is None else os.path.realpath(directory)
        monkeypatch.setattr(fcntl, "flock", _failing(fcntl.flock, number, below, _needs_nothing))
        if lockf:
            monkeypatch.setattr(fcntl, "lockf", _failing(fcntl.lockf, number, below, _needs_access))

    return simulate


def _failing(
    real: Callable[..., None], number: int, below: str | None, permits: Callable[[int, int], bool]
) -> Callable[..., None]:
    """Wrap *real* so that calls which the kernel would hand to the file system fail.

    Everything else goes to *real*, so that wrong arguments are answered by Python and the kernel.
    """

    def call(fd: int | HasFileno, operation: int, *arguments: int) -> None:
        file = fd if isinstance(fd, int) else fd.fileno() if hasattr(fd, "fileno") else -1
        asked = operation & ~fcntl.LOCK_NB
        if (
            asked in (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN)
            and _on_the_file_system(file, below)
            and permits(file, asked)
        ):
            raise OSError(number, os.strerror(number))
        real(fd, operation, *arguments)

    return call


def _on_the_file_system(fd: int, below: str | None) -> bool:
    """Is it a regular file under *below*? Only their locks are the file system's business."""
    try:
        is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
        is_path_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
    except OSError:
        return False
    if not is_regular or is_path_only:
        return False
    return below is None or os.readlink(f"/proc/self/fd/{fd}").startswith(os.path.join(below, ""))


def _needs_nothing(fd: int, operation: int) -> bool:
    """flock(2) takes any descriptor, however it was opened."""
    return True


def _needs_access(fd: int, operation: int) -> bool:
    """A shared record lock needs a readable, an exclusive one a writable descriptor (fcntl(2))."""
    forbidden = {fcntl.LOCK_SH: os.O_WRONLY, fcntl.LOCK_EX: os.O_RDONLY}.get(operation)
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != forbidden
