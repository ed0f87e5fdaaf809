"""The ``flockshim`` command: reads its options, sets the environment and becomes COMMAND.

Every start of a program under flockshim passes here, so the way to COMMAND imports nothing that it
does not need; ``tests/test_cli.py`` holds the list.
"""

# The signal module would import enum to give these functions' results names.
import _signal  # type: ignore[import-not-found]
import os
import sys

from flockshim import FlockshimError, __version__, launch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from flockshim.parent import Begin

HELP = """\
usage: flockshim [OPTION...] [--] COMMAND [ARG...]
       flockshim [OPTION...] --env
       flockshim --locks [PATH...] [--json]
       flockshim --check [DIR] [--json] [--timeout SECONDS]
       flockshim --break PATH [--yes]
       flockshim --clean DIR [--wait]

Run COMMAND, unmodified, so that its locks, flock() and fcntl(), work on file
systems where they fail.

  --mode MODE        what a failing lock call becomes:
                       host     a lock between your programs on this host
                       cluster  that, and a lease recorded beside the file:
                                between all hosts that share it
                       auto     cluster on network and FUSE file systems,
                                host on others (default)
                       success  success, without any protection
                       fail     the error, as without flockshim
  --via WAY          how COMMAND is reached:
                       preload  by a library: dynamically linked programs
                       seccomp  by a supervisor: any program, and all that it
                                starts
                       auto     seccomp for static and Go programs, preload
                                for others (default)
  --errno LIST       errnos that mean "cannot lock", names or numbers
                     (default ENOSYS,EOPNOTSUPP,ENOLCK,524)
  --force            never ask the kernel: for mounts whose lock call hangs,
                     or locks this host only
  --simulate ERRNO[:DIR]
                     the kernel's lock calls (on files under DIR) fail with
                     ERRNO: shows anywhere what such a mount does
  --lock PATH        hold the lock on PATH, a file (made if missing) or a
                     directory, while COMMAND runs; wait for it if need be
    --shared         a shared one
    --no-wait        don't wait: exit with status 75
    --inherit        what COMMAND has left running keeps the lock
  --timeout SECONDS  wait no longer for --lock (then exit with status 75), nor
                     for a lock inside COMMAND (whose call then fails)
  --on-lost kill|warn
                     what a lost cluster lease does to its holder (default kill)
  --locks [PATH...]  show who holds and who waits for locks on this host; with
                     PATH, on other hosts too
  --check [DIR]      try what DIR's file system can lock, and say what to do
  --json             --locks and --check for programs
  --break PATH       show who holds the lock on PATH between hosts, ask, and
                     take it away
    --yes            don't ask
  --clean DIR        remove what crashes have left of cluster mode below DIR
    --wait           judge other hosts too, which takes a lease time
  --env              print the environment for a whole shell:
                     eval "$(flockshim --env)"
  --quiet            print no warnings
  --verbose          say what is being waited for, on no terminal too
  --version, --help

The variables FLOCKSHIM_MODE, FLOCKSHIM_VIA, FLOCKSHIM_ERRNO, FLOCKSHIM_FORCE=1,
FLOCKSHIM_SIMULATE, FLOCKSHIM_TIMEOUT, FLOCKSHIM_ON_LOST, FLOCKSHIM_QUIET=1 and
FLOCKSHIM_VERBOSE=1 say the same; an option wins over its variable.
FLOCKSHIM_LEASE is the lease time in seconds (default 90), alike on all hosts.

The exit status is COMMAND's own, or 125 if flockshim fails (also when it cannot
protect COMMAND), 126 if COMMAND cannot be executed, 127 if it is not found, 75
if the lock of --lock was not had in time. That of --check is 0 if the kernel's
locks work, 1 if they fail (use flockshim COMMAND), 2 if lock calls hang or
exclude nobody (use --force), 3 if they work on this host only.
"""

FAILED = 125
CANNOT_EXECUTE = 126
NOT_FOUND = 127

CHECK_SECONDS = 5.0

WITH_VALUE = ("mode", "via", "errno", "simulate", "timeout", "on-lost", "lock")
FLAGS = (
    "force",
    "quiet",
    "verbose",
    "shared",
    "no-wait",
    "inherit",
    "locks",
    "check",
    "json",
    "break",
    "yes",
    "clean",
    "wait",
    "env",
    "help",
    "version",
)

# What else may be said with an option that runs no COMMAND, or that only makes sense with another.
WITH = {
    "locks": ("json",),
    "check": ("json", "timeout"),
    "break": ("yes",),
    "clean": ("wait",),
}
NEEDS = {"json": "--locks or --check", "yes": "--break", "wait": "--clean"}
OPERAND = {"check": "directory", "break": "file or directory", "clean": "directory"}
OF_LOCK = ("shared", "no-wait", "inherit")


def main() -> int:
    """Run the ``flockshim`` command; return its exit status if it did not become COMMAND."""
    _restore_signals()
    try:
        options, command = _parse(sys.argv[1:])
        if "help" in options or "version" in options:
            _print(HELP if "help" in options else f"flockshim {__version__}\n")
            return 0
        if not WITH.keys().isdisjoint(options):
            return _inspect(options, command)
        return _run(options, command)
    except FlockshimError as error:
        return _fail(str(error), FAILED)


def _restore_signals() -> None:
    # The interpreter ignores these two at its start, and COMMAND would inherit that (bpo-1652).
    # Whether they were ignored before cannot be told from inside; the default is the usual case.
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)
    # Ctrl-C before COMMAND has started ends flockshim as it would end COMMAND: without a traceback.
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def _parse(words: "list[str]") -> "tuple[dict[str, str | bool], list[str]]":
    options: dict[str, str | bool] = {}
    operands: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        if word == "-" or not word.startswith("-"):
            if WITH.keys().isdisjoint(options):
                break
            operands.append(word)
            index += 1
            continue
        index += 1
        if word == "--":
            break
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--") or name not in WITH_VALUE + FLAGS:
            raise FlockshimError(f"unknown option {word!r}: see flockshim --help")
        if name in FLAGS:
            if equals:
                raise FlockshimError(f"--{name} takes no value, but was given {value!r}")
            options[name] = True
            continue
        if not equals:
            if index == len(words):
                raise FlockshimError(f"--{name} needs a value: see flockshim --help")
            value = words[index]
            index += 1
        options[name] = value
    return options, operands + words[index:]


def _inspect(options: "dict[str, str | bool]", paths: "list[str]") -> int:
    what = next(name for name in WITH if name in options)
    for name in options:
        if name != what and name not in WITH[what]:
            raise FlockshimError(f"--{what} and --{name} exclude each other: leave one out")
    if what != "locks" and len(paths) > 1:
        raise FlockshimError(f"--{what} takes one {OPERAND[what]}, but was given {paths[1]!r} too")
    if what in ("break", "clean") and not paths:
        raise FlockshimError(f"--{what} needs a {OPERAND[what]}: see flockshim --help")
    # How long programs wait for locks is no measure of how long a file system may take.
    base = {**_own_environment(), "FLOCKSHIM_TIMEOUT": ""}
    environ = launch.environment(base, timeout=options.get("timeout"))  # type: ignore[arg-type]
    if what == "locks":
        from flockshim import locks_command

        return locks_command.run(paths, "json" in options, environ, _print, _say)
    if what == "break":
        from flockshim import break_command

        return break_command.run(paths[0], "yes" in options, environ, _print, _say)
    if what == "clean":
        from flockshim import clean_command

        return clean_command.run(paths[0], "wait" in options, environ, _print, _say)
    from flockshim import check

    seconds = float(environ.get("FLOCKSHIM_TIMEOUT", CHECK_SECONDS))
    return check.main(paths[0] if paths else None, "json" in options, seconds, _print, _say)


def _run(options: "dict[str, str | bool]", command: "list[str]") -> int:
    printing = bool(options.pop("env", False))
    if printing and command:
        raise FlockshimError(
            f"--env only prints the environment, so it takes no COMMAND such as {command[0]!r}: leave one out"
        )
    if not printing and not command:
        raise FlockshimError("no COMMAND given: see flockshim --help")
    lock = _take_lock_options(options, printing)
    settings: dict[str, Any] = {name.replace("-", "_"): value for name, value in options.items()}
    environ = launch.environment(_own_environment(), **settings)
    if printing and settings.get("via") == "seccomp":
        raise FlockshimError("a supervisor is for one COMMAND, so --via seccomp cannot be in what --env prints")
    if printing:
        _warn(environ)
        _print(_exports(environ))
        return 0
    return _start(command, environ, lock)


def _take_lock_options(options: "dict[str, str | bool]", printing: bool) -> "dict[str, str | bool]":
    lock = {name: options.pop(name) for name in ("lock", *OF_LOCK) if name in options}
    for name, needed in NEEDS.items():
        if name in options:
            raise FlockshimError(f"--{name} needs {needed}")
    for name in lock:
        if "lock" not in lock:
            raise FlockshimError(f"--{name} needs --lock PATH")
        if printing:
            raise FlockshimError(f"--{name} is for one COMMAND, so it cannot be in what --env prints")
    if "no-wait" in lock and "timeout" in options:
        raise FlockshimError("--no-wait and --timeout exclude each other: leave one out")
    return lock


def _warn(environ: "dict[str, str]") -> None:
    if environ["FLOCKSHIM_MODE"] == "success" and "FLOCKSHIM_QUIET" not in environ:
        sys.stderr.write("flockshim: warning: in mode success locks that fail are reported as taken: nothing is safe\n")


def _own_environment() -> "dict[str, str]":
    environ = dict(os.environ)
    # Started in the C locale, the interpreter sets LC_CTYPE (PEP 538); COMMAND must not see that.
    # What was there at the start is in /proc/self/environ.
    if environ.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8"):
        with open("/proc/self/environ", "rb") as file:
            if b"LC_CTYPE" not in [entry.partition(b"=")[0] for entry in file.read().split(b"\0")]:
                del environ["LC_CTYPE"]
    return environ


def _start(command: "list[str]", environ: "dict[str, str]", lock: "dict[str, str | bool]") -> int:
    try:
        start, begin = _way_to_start(command, environ)
    except OSError as error:
        return _fail_to_execute(command[0], error)
    _warn(environ)
    if lock:
        from flockshim import lock_command

        request = lock_command.Request(
            path=str(lock["lock"]),
            shared="shared" in lock,
            no_wait="no-wait" in lock,
            inherit="inherit" in lock,
        )
        return lock_command.run(request, environ, start, begin, _say)
    if begin:
        from flockshim import parent

        return parent.end_as(parent.run(start, begin))
    return start()


def _way_to_start(command: "list[str]", environ: "dict[str, str]") -> "tuple[Callable[[], int], Begin | None]":
    """Return what turns a process into COMMAND, and what makes that process where it cannot be this one."""
    from flockshim import elf, executable

    via = environ.get("FLOCKSHIM_VIA")
    unreachable = None
    if not launch.needs_shim(environ):
        path = executable.find(command[0], environ)
        return lambda: _become(path, command, environ), None
    if via != "seccomp":
        try:
            path, arguments = executable.protected(command, environ)
            if "FLOCKSHIM_SUPERVISED" in environ:
                from flockshim import seccomp_launch

                seccomp_launch.refuse_other_supervisor(environ)
            return lambda: _become(path, arguments, environ), None
        except elf.UnreachableError as error:
            if via == "preload":
                raise
            unreachable = error
    from flockshim import seccomp_launch

    found = executable.find(command[0], environ), command
    way = seccomp_launch.Way(found, environ, _become, _say, unreachable)
    return way.start, way.begin


def _become(path: str, arguments: "list[str]", environ: "Mapping[str, str]") -> int:
    from flockshim import executable

    try:
        try:
            os.execve(path, arguments, environ)
        except OSError as error:
            if not executable.is_for_shell(path, error):
                raise
            os.execve(executable.SHELL, [executable.SHELL, path, *arguments[1:]], environ)
    except OSError as error:
        return _fail_to_execute(path, error)


def _fail_to_execute(name: str, error: OSError) -> int:
    if isinstance(error.filename, str):
        name = error.filename
    whose = f" (the interpreter of {error.filename2!r})" if error.filename2 else ""
    missing = isinstance(error, FileNotFoundError)
    return _fail(f"{name!r}{whose}: {error.strerror}", NOT_FOUND if missing else CANNOT_EXECUTE)


def _exports(environ: "dict[str, str]") -> str:
    lines = []
    for name in launch.VARIABLES:
        if name in environ:
            quoted = environ[name].replace("'", "'\\''")
            lines.append(f"export {name}='{quoted}'\n")
        else:
            # The lines say everything, because they may be evaluated in another environment.
            lines.append(f"unset {name}\n")
    return "".join(lines)


def _encoded(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:  # letters of another program that the locale has not
        return text.encode(sys.getfilesystemencoding(), "replace")


def _print(text: str) -> None:
    try:
        data = _encoded(text)
        while data:
            data = data[os.write(1, data) :]
    except OSError as error:
        raise FlockshimError(f"cannot write to standard output: {error.strerror}") from None


def _fail(message: str, status: int) -> int:
    _say(message)
    return status


def _say(line: str) -> None:
    import contextlib

    # A terminal with TOSTOP would stop us in the background: termios(3).
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGTTOU])
    with contextlib.suppress(OSError):  # nobody may listen; the status still tells
        os.write(2, _encoded(f"flockshim: {line}\n"))
    _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
