"""The ``flockshim`` command: reads its options, sets the environment and becomes COMMAND.

Every start of a program under flockshim passes here, so the way to COMMAND imports nothing that it
does not need; ``tests/test_cli.py`` holds the list.
"""

# The signal module would import enum to give these functions' results names.
import _signal  # type: ignore[import-not-found]
import os
import sys

from flockshim import FlockshimError, __version__, launch

HELP = """\
usage: flockshim [OPTION...] [--] COMMAND [ARG...]
       flockshim [OPTION...] --env

Run COMMAND, unmodified, so that its flock() calls work on file systems where
they fail.

  --mode MODE        what a failing lock call becomes:
                       host     a lock between your programs on this host
                       auto     the safest there is, now host (default)
                       success  success, without any protection
                       fail     the error, as without flockshim
  --errno LIST       errnos that mean "cannot lock", names or numbers
                     (default ENOSYS,EOPNOTSUPP,ENOLCK,524)
  --force            never ask the kernel: for mounts whose lock call hangs,
                     or locks this host only
  --simulate ERRNO[:DIR]
                     the kernel's lock calls (on files under DIR) fail with
                     ERRNO: shows anywhere what such a mount does
  --env              print the environment for a whole shell:
                     eval "$(flockshim --env)"
  --quiet            print no warnings
  --verbose          say more, such as what is being waited for
  --version, --help

The variables FLOCKSHIM_MODE, FLOCKSHIM_ERRNO, FLOCKSHIM_FORCE=1,
FLOCKSHIM_SIMULATE, FLOCKSHIM_QUIET=1 and FLOCKSHIM_VERBOSE=1 say the same; an
option wins over its variable.

The exit status is COMMAND's own, or 125 if flockshim fails (also when it cannot
protect COMMAND), 126 if COMMAND cannot be executed, 127 if it is not found.
"""

FAILED = 125
CANNOT_EXECUTE = 126
NOT_FOUND = 127

WITH_VALUE = ("mode", "errno", "simulate")
FLAGS = ("force", "quiet", "verbose", "env", "help", "version")


def main() -> int:
    """Run the ``flockshim`` command; return its exit status if it did not become COMMAND."""
    _restore_signals()
    try:
        options, command = _parse(sys.argv[1:])
        if "help" in options or "version" in options:
            _print(HELP if "help" in options else f"flockshim {__version__}\n")
            return 0
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
    index = 0
    while index < len(words):
        word = words[index]
        if word == "-" or not word.startswith("-"):
            break
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
    return options, words[index:]


def _run(options: "dict[str, str | bool]", command: "list[str]") -> int:
    printing = bool(options.pop("env", False))
    if printing and command:
        raise FlockshimError(
            f"--env only prints the environment, so it takes no COMMAND such as {command[0]!r}: leave one out"
        )
    if not printing and not command:
        raise FlockshimError("no COMMAND given: see flockshim --help")
    environ = launch.environment(_own_environment(), **options)  # type: ignore[arg-type]
    if printing:
        _warn(environ)
        _print(_exports(environ))
        return 0
    return _become(command, environ)


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


def _become(command: "list[str]", environ: "dict[str, str]") -> int:
    from flockshim import executable

    try:
        if launch.needs_shim(environ):
            path, arguments = executable.protected(command, environ)
        else:
            path, arguments = executable.find(command[0], environ), command
        _warn(environ)
        os.execve(path, arguments, environ)
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else command[0]
        whose = f" (the interpreter of {error.filename2!r})" if error.filename2 else ""
        missing = isinstance(error, FileNotFoundError)
        status = NOT_FOUND if missing else CANNOT_EXECUTE
        return _fail(f"{name!r}{whose}: {error.strerror}", status)


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


def _print(text: str) -> None:
    try:
        data = os.fsencode(text)
        while data:
            data = data[os.write(1, data) :]
    except OSError as error:
        raise FlockshimError(f"cannot write to standard output: {error.strerror}") from None


def _fail(message: str, status: int) -> int:
    import contextlib

    with contextlib.suppress(OSError):  # nobody may listen; the status still tells
        os.write(2, os.fsencode(f"flockshim: {message}\n"))
    return status
