"""``flockshim.run`` and ``flockshim.environ``: the launcher's work for Python programs."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional, Union

from flockshim import FlockshimError, elf, executable, launch

Command = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]


def environ(
    *,
    mode: Optional[str] = None,
    errno: Union[str, Iterable[Union[str, int]], None] = None,
    force: Optional[bool] = None,
    simulate: Optional[str] = None,
    lock_timeout: Optional[float] = None,
    quiet: Optional[bool] = None,
    verbose: Optional[bool] = None,
    base: Optional[Mapping[str, str]] = None,
) -> dict[str, str]:
    """Return the environment that runs programs under the shim, as ``flockshim --env`` prints it.

    A setting left at ``None`` comes from its variable in *base* (``FLOCKSHIM_MODE``, …), else is
    the default.

    :param mode: what a failing ``flock(2)`` becomes: ``"auto"`` (default), ``"host"``,
        ``"success"`` or ``"fail"``.
    :param errno: errnos that mean "cannot lock", names or numbers: ``"ENOSYS,524"`` or
        ``["ENOSYS", 524]``.
    :param force: never ask the kernel.
    :param simulate: ``"ENOSYS"`` or ``"ENOSYS:/some/directory"``: the kernel's lock calls (on files
        under the directory) fail with that errno.
    :param lock_timeout: seconds after which a program waits no longer for an emulated lock: its call fails.
    :param quiet: print no warnings.
    :param verbose: say more, such as what is being waited for.
    :param base: the environment to build on; ``os.environ`` if not given. It is not changed.
    :raises FlockshimError: for a setting that is wrong, or contradicts another.
    """
    if errno is not None and not isinstance(errno, str):
        errno = ",".join(str(item) for item in errno)
    return launch.environment(
        os.environ if base is None else base,
        mode=mode,
        errno=errno,
        force=force,
        simulate=simulate,
        timeout=None if lock_timeout is None else str(lock_timeout),
        quiet=quiet,
        verbose=verbose,
    )


def run(
    args: Union[Command, Sequence[Command]],
    *,
    mode: Optional[str] = None,
    via: Optional[str] = None,
    errno: Union[str, Iterable[Union[str, int]], None] = None,
    force: Optional[bool] = None,
    simulate: Optional[str] = None,
    lock_timeout: Optional[float] = None,
    quiet: Optional[bool] = None,
    verbose: Optional[bool] = None,
    env: Optional[Mapping[str, str]] = None,
    **subprocess_kwargs: Any,
) -> "subprocess.CompletedProcess[Any]":
    """Run a program under the shim and wait for it, as ``subprocess.run`` does.

    The settings are those of :func:`environ`, built on *env*; every other argument is that of
    ``subprocess.run``.

    :param via: how the program is reached: ``"preload"``, ``"seccomp"`` (by a supervisor, also what the preload
        library cannot reach: static and Go programs) or ``"auto"`` (default).
    :raises FlockshimError: for a wrong setting, or a program that cannot be protected, which is not started then.
    :raises OSError: when the program is not found or cannot be executed, and as ``subprocess.run``
        does.
    """
    base = os.environ if env is None else env
    environment = environ(
        mode=mode,
        errno=errno,
        force=force,
        simulate=simulate,
        lock_timeout=lock_timeout,
        quiet=quiet,
        verbose=verbose,
        base=base if via is None else {**base, "FLOCKSHIM_VIA": via},
    )
    cwd = os.fsdecode(subprocess_kwargs.get("cwd") or "")
    if launch.needs_shim(environment) and _needs_launcher(_started(args, subprocess_kwargs), environment, cwd):
        args = _launcher_for(args, subprocess_kwargs)
    return subprocess.run(args, env=environment, check=subprocess_kwargs.pop("check", False), **subprocess_kwargs)


def _needs_launcher(command: list[str], environment: Mapping[str, str], cwd: str) -> bool:
    """Return whether the environment alone does not do."""
    via = environment.get("FLOCKSHIM_VIA")
    if via == "seccomp":
        return True
    try:
        executable.protected(command, environment, cwd)
    except elf.UnreachableError:
        if via == "preload":
            raise
        return True
    return False


def _launcher_for(args: Union[Command, Sequence[Command]], subprocess_kwargs: dict[str, Any]) -> list[Command]:
    """Return the words that have the ``flockshim`` command run *args*, whatever the program's environment is."""
    if subprocess_kwargs.get("executable") is not None and not subprocess_kwargs.get("shell"):
        raise FlockshimError("executable= and a supervisor exclude each other: name the program in args")
    words = [args] if isinstance(args, (str, bytes, os.PathLike)) else list(args)
    if subprocess_kwargs.pop("shell", False):
        words = [subprocess_kwargs.pop("executable", None) or "/bin/sh", "-c", *words]
    root = os.path.dirname(launch.HOME)
    start = f"import sys; sys.path.append({root!r}); from flockshim.cli import main; sys.exit(main())"
    return [sys.executable, "-c", start, "--", *words]


def _started(args: Union[Command, Sequence[Command]], subprocess_kwargs: dict[str, Any]) -> list[str]:
    """Return the words of which ``subprocess`` makes the program that it starts."""
    words = [args] if isinstance(args, (str, bytes, os.PathLike)) else list(args)
    command = [os.fsdecode(word) for word in words]
    program = subprocess_kwargs.get("executable")
    if subprocess_kwargs.get("shell"):
        return [os.fsdecode(program or "/bin/sh")]
    if program is not None:
        command[:1] = [os.fsdecode(program)]
    return command
