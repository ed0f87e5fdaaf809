"""The environment that loads the shim, for the launcher, ``--env`` and the Python API alike."""

import os
import sys

from flockshim import FlockshimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

HOME = os.path.dirname(os.path.abspath(__file__))
LIBRARY = "libflockshim.so"

MODES = ("auto", "host", "cluster", "success", "fail")
VIAS = ("auto", "preload", "seccomp")

# ENOSYS, EOPNOTSUPP, ENOLCK and the kernel's ENOTSUPP, as numbers because the launcher must not pay
# for looking up names that nobody gave.
DEFAULT_ERRNOS = "38,95,37,524"

# told.h
MAX_RUN = 32

# Some eleven days; who wants to wait longer waits for ever.
MAX_TIMEOUT = 999999

# The keeper looks at the clock once a second, and vouches six times in a lease time.
MIN_LEASE = 3

VARIABLES = (
    "LD_PRELOAD",
    "FLOCKSHIM_MODE",
    "FLOCKSHIM_VIA",
    "FLOCKSHIM_ERRNO",
    "FLOCKSHIM_FORCE",
    "FLOCKSHIM_SIMULATE",
    "FLOCKSHIM_TIMEOUT",
    "FLOCKSHIM_LEASE",
    "FLOCKSHIM_ON_LOST",
    "FLOCKSHIM_QUIET",
    "FLOCKSHIM_VERBOSE",
    "FLOCKSHIM_DIR",
    "FLOCKSHIM_IDLE",
    "FLOCKSHIM_PYTHON",
    "FLOCKSHIM_HOME",
    "FLOCKSHIM_RUN",
)

# Where LD_PRELOAD is split: at spaces and colons by glibc, at any white space by musl, and "$"
# begins a token such as $LIB that is replaced. None of it can be quoted (ld.so(8)).
UNQUOTABLE = " \t\n\v\f\r:$"


def environment(
    base: "Mapping[str, str]",
    *,
    mode: "str | None" = None,
    via: "str | None" = None,
    errno: "str | None" = None,
    force: "bool | None" = None,
    simulate: "str | None" = None,
    timeout: "str | None" = None,
    on_lost: "str | None" = None,
    quiet: "bool | None" = None,
    verbose: "bool | None" = None,
) -> "dict[str, str]":
    """Return *base* with all that a program needs to be started under the shim.

    What is ``None`` comes from its variable in *base* (``FLOCKSHIM_MODE``, …), else is the default.

    :raises FlockshimError: for a setting that is wrong, or contradicts another.
    """
    # How much is said, the option decides alone; contradictions about the locks are refused below.
    if quiet and verbose is None:
        verbose = False
    elif verbose and quiet is None:
        quiet = False
    sources = {
        "mode": _source(base, "mode", mode),
        "via": _source(base, "via", via),
        "errno": _source(base, "errno", errno),
        "force": _source(base, "force", force),
        "simulate": _source(base, "simulate", simulate),
        "timeout": _source(base, "timeout", timeout),
        "on_lost": _source(base, "on_lost", on_lost),
        "lease": _source(base, "lease", None),
        "quiet": _source(base, "quiet", quiet),
        "verbose": _source(base, "verbose", verbose),
        "dir": _source(base, "dir", None),
        "idle": _source(base, "idle", None),
    }
    settings = {name: READERS[name](*source) for name, source in sources.items()}
    _refuse_contradictions(settings, {name: label for name, (label, _) in sources.items()})
    settings["python"] = _python()
    settings["home"] = HOME
    environ = dict(base)
    for name, value in settings.items():
        if value:
            environ[_variable(name)] = value
        else:
            environ.pop(_variable(name), None)
    environ["FLOCKSHIM_RUN"] = _run(base)
    environ["LD_PRELOAD"] = _preload(base)
    return environ


def needs_shim(environ: "Mapping[str, str]") -> bool:
    """Tell whether a program started with *environ* would behave otherwise without the shim."""
    return environ["FLOCKSHIM_MODE"] != "fail" or "FLOCKSHIM_SIMULATE" in environ


def without_shim(environ: "Mapping[str, str]") -> "dict[str, str]":
    """Return *environ* for a program that a supervisor covers: what was preloaded besides the shim stays."""
    rest = {name: value for name, value in environ.items() if name != "LD_PRELOAD"}
    others = _other_preloads(environ)
    return {**rest, "LD_PRELOAD": ":".join(others)} if others else rest


def _variable(name: str) -> str:
    return "FLOCKSHIM_" + name.upper()


def _source(base: "Mapping[str, str]", name: str, given: "str | bool | None") -> "tuple[str, str | bool | None]":
    """Return what an error calls the setting, and its value."""
    if given is None:
        # An empty variable is an unset one, as for most programs: job scripts cannot always unset.
        return _variable(name), base.get(_variable(name)) or None
    return "--" + name.replace("_", "-"), given


def _flag(label: str, value: "str | bool | None") -> str:
    if isinstance(value, str) and value not in ("0", "1"):
        raise FlockshimError(f"{label}: {value!r} is neither 1 nor 0")
    return "1" if value in (True, "1") else ""


def _mode(label: str, text: "str | None") -> str:
    if text is None:
        return "auto"
    if text not in MODES:
        raise FlockshimError(f"{label}: unknown mode {text!r}: choose {', '.join(MODES)}")
    return text


def _via(label: str, text: "str | None") -> str:
    if text is not None and text not in VIAS:
        raise FlockshimError(f"{label}: unknown way {text!r}: choose {', '.join(VIAS)}")
    return "" if text in (None, "auto") else text


def _errno(label: str, text: "str | None") -> str:
    if text is None or text == DEFAULT_ERRNOS:
        return DEFAULT_ERRNOS
    from flockshim import errnos

    return errnos.numbers(text, label)


def _simulate(label: str, text: "str | None") -> str:
    if text is None:
        return ""
    from flockshim import errnos

    name, colon, directory = text.partition(":")
    number = str(errnos.number(name, label))
    if not colon:
        return number
    if not os.path.isdir(directory):
        raise FlockshimError(f"{label}: {directory!r} is not an existing directory")
    # The shim compares with what /proc/self/fd shows, which is absolute and free of symbolic links.
    return f"{number}:{os.path.realpath(directory)}"


def _timeout(label: str, text: "str | None") -> str:
    if text is None:
        return ""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_TIMEOUT:
        raise FlockshimError(f"{label}: {text!r} is not a number of seconds from 0 to {MAX_TIMEOUT}")
    # The shim reads thousandths of a second, no exponents, and no sign, not even that of -0.
    return f"{abs(seconds):.3f}".rstrip("0").rstrip(".")


def _on_lost(label: str, text: "str | None") -> str:
    if text not in (None, "kill", "warn"):
        raise FlockshimError(f"{label}: {text!r} is neither kill nor warn")
    return text or ""


def _lease(label: str, text: "str | None") -> str:
    if text is None:
        return ""
    try:
        good = MIN_LEASE <= float(text) <= MAX_TIMEOUT
    except ValueError:
        good = False
    if not good:
        raise FlockshimError(f"{label}: {text!r} is not a number of seconds from {MIN_LEASE} to {MAX_TIMEOUT}")
    return text


def _dir(label: str, text: "str | None") -> str:
    # The program may change its working directory before its first lock.
    if text and not os.path.isabs(text):
        raise FlockshimError(f"{label}: {text!r} is not an absolute path")
    return text or ""


def _idle(label: str, text: "str | None") -> str:
    try:
        good = not text or 0 <= float(text) < float("inf")
    except ValueError:
        good = False
    if not good:
        raise FlockshimError(f"{label}: {text!r} is not a number of seconds")
    return text or ""


READERS: "dict[str, Callable[[str, Any], str]]" = {
    "mode": _mode,
    "via": _via,
    "errno": _errno,
    "force": _flag,
    "simulate": _simulate,
    "timeout": _timeout,
    "on_lost": _on_lost,
    "lease": _lease,
    "quiet": _flag,
    "verbose": _flag,
    "dir": _dir,
    "idle": _idle,
}


def _python() -> str:
    if not sys.executable:
        raise FlockshimError("this Python does not know its own path (sys.executable is empty)")
    return os.path.abspath(sys.executable)


def _refuse_contradictions(settings: "dict[str, str]", labels: "dict[str, str]") -> None:
    if settings["quiet"] and settings["verbose"]:
        raise FlockshimError(f"{labels['quiet']} and {labels['verbose']} exclude each other: leave one out")
    if settings["force"] and settings["simulate"]:
        raise FlockshimError(
            f"{labels['force']} and {labels['simulate']} exclude each other: the former never asks "
            "the kernel, whose answer the latter replaces"
        )
    if settings["force"] and settings["mode"] == "fail":
        raise FlockshimError(
            f"{labels['force']} and {labels['mode']} fail exclude each other: the former never "
            "asks the kernel, whose error the latter hands on"
        )


def _run(base: "Mapping[str, str]") -> str:
    """Return what tells the runs of flockshim apart, because some things are said once in each; one inside is part."""
    run = base.get("FLOCKSHIM_RUN", "")
    if 0 < len(run) <= MAX_RUN and not run.strip("0123456789abcdef"):
        return run
    return os.urandom(8).hex()


def _preload(base: "Mapping[str, str]") -> str:
    library = os.path.join(HOME, LIBRARY)
    # ld.so(8) only warns of a library that it cannot preload and runs the program without.
    if not os.path.exists(library):
        raise FlockshimError(f"{library!r} is missing: install flockshim again")
    if any(character in UNQUOTABLE for character in library):
        from flockshim import preload_link

        library = os.path.join(preload_link.to(HOME, base.get("FLOCKSHIM_DIR", "")), LIBRARY)
    return ":".join([library, *_other_preloads(base)])


def _other_preloads(environ: "Mapping[str, str]") -> "list[str]":
    entries = environ.get("LD_PRELOAD", "").replace(" ", ":").split(":")
    return [entry for entry in entries if entry and os.path.basename(entry) != LIBRARY]
