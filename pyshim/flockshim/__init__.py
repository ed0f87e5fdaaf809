"""Makes unmodified programs work on file systems where ``flock()`` fails.

``flockshim.run`` and ``flockshim.environ`` are what the ``flockshim`` command does, for Python
programs that start others. ``flockshim.FileLock`` and ``flockshim.AsyncFileLock`` are the same locks
for Python code. All are imported when first used: the launcher passes through this file too and must
cost next to nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flockshim.api import environ, run
    from flockshim.asyncfilelock import AsyncFileLock
    from flockshim.filelock import FileLock, Timeout

__version__ = "0.1.0"

__all__ = ["AsyncFileLock", "FileLock", "FlockshimError", "Timeout", "__version__", "environ", "run"]

_MODULES = {
    "AsyncFileLock": "flockshim.asyncfilelock",
    "FileLock": "flockshim.filelock",
    "Timeout": "flockshim.filelock",
    "environ": "flockshim.api",
    "run": "flockshim.api",
}


class FlockshimError(RuntimeError):
    """What was asked for cannot be done; ``str()`` of it says why and what to do, in one line."""


def __getattr__(name: str) -> object:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'flockshim' has no attribute {name!r}")
