"""Programs confined as in containers and on old systems: system calls refused, an ordinary user, other mounts."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from support.driver import Driver
from support.programs import program
from support.worlds import World

ORDINARY = 54321
"""A user and group of nobody's."""

OLD_KERNEL = (
    "ENOSYS:pidfd_open,pidfd_getfd,pidfd_send_signal,close_range,statx,openat2,clone3,faccessat2,membarrier,"
    "getrandom,memfd_create,epoll_pwait2,copy_file_range,execveat,renameat2,preadv2,pwritev2,rseq,mlock2,bpf"
)
"""A rule for what Linux 3.10 has not got."""


def confined(*rules: str) -> list[str]:
    """A command that runs the one behind it, in place, with system calls refused: ``EPERM:kcmp``."""
    return [str(program("confine")), *rules, "--"]


def mounted(script: str) -> list[str]:
    """A command that runs the one behind it, in place, with mounts of its own as a shell SCRIPT changes them."""
    return ["unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh"]


def as_ordinary_user() -> list[str]:
    """A command that runs the one behind it, in place, as ORDINARY."""
    return ["setpriv", f"--reuid={ORDINARY}", f"--regid={ORDINARY}", "--clear-groups"]


def ordinary_interpreter() -> str | None:
    """A Python of this version that ORDINARY may execute, or None."""
    version = ".".join(map(str, sys.version_info[:2]))
    for path in (os.path.realpath(sys.executable), f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        parents = [*Path(path).parents, Path(path)]
        if Path(path).exists() and all(each.stat().st_mode & stat.S_IXOTH for each in parents):
            return path
    return None


def install(directory: Path) -> dict[str, str]:
    """Copy the package and what its keeper needs into DIRECTORY; the variables with which programs use the copy."""
    import _cffi_backend  # noqa: PLC0415  (only the keeper has it otherwise)

    import flockshim  # noqa: PLC0415

    home = directory / "flockshim"
    shutil.copytree(Path(flockshim.__file__).parent, home, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(_cffi_backend.__file__, directory)
    variables = {"LD_PRELOAD": str(home / "libflockshim.so"), "FLOCKSHIM_HOME": str(home)}
    interpreter = ordinary_interpreter()
    return {**variables, "FLOCKSHIM_PYTHON": interpreter} if interpreter else variables


class UserWorld(World):
    """A world of ORDINARY, who gets an executable of his own."""

    def __init__(self, directory: Path, environment: Mapping[str, str], executable: Path, *prefix: str) -> None:
        super().__init__("emulated", directory, environment, *prefix, *as_ordinary_user())
        self.executable = executable

    def start(self) -> Driver:
        return self.fleet.start(None, *self.prefix, executable=self.executable)
