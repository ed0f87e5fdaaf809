"""Builds the C programs of tests/programs, each at most once a session."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "programs"
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Werror"]


@functools.cache
def _build_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="flockshim-programs-")


@functools.cache
def program(name: str, compiler: str = "cc") -> Path:
    """The executable built from tests/programs/NAME.c with COMPILER."""
    found = shutil.which(compiler)
    if found is None:
        raise FileNotFoundError(f"no compiler {compiler}")
    target = Path(_build_directory().name) / f"{name}-{compiler}"
    source = SOURCES / f"{name}.c"
    subprocess.run([found, *WARNINGS, "-O1", "-pthread", str(source), "-o", str(target)], check=True)
    return target
