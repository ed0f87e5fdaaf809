"""Makes unmodified programs work on file systems where ``flock()`` fails.

``flockshim.run`` and ``flockshim.environ`` are what the ``flockshim`` command does, for Python
programs that start others. They are imported when first used: the launcher passes through this file
too and must cost next to nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flockshim.api import environ, run

__version__ = "0.1.0"

__all__ = ["FlockshimError", "__version__", "environ", "run"]


class FlockshimError(RuntimeError):
    """What was asked for cannot be done; ``str()`` of it says why and what to do, in one line."""


def __getattr__(name: str) -> object:
    if name in ("environ", "run"):
        from flockshim import api

        return getattr(api, name)
    raise AttributeError(f"module 'flockshim' has no attribute {name!r}")
