"""Builds the C programs of tests/programs, each at most once a session."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from flockshim.pytest_plugin import require

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


@functools.cache
def static_program(name: str) -> Path:
    """The same without any library that could be preloaded into: of musl, or of whatever else links statically."""
    compiler = shutil.which("musl-gcc") or "cc"
    target = Path(_build_directory().name) / f"{name}-static"
    command = [compiler, *WARNINGS, "-O1", "-static", "-pthread", str(SOURCES / f"{name}.c"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"nothing can be linked statically: {done.stderr}", "install musl-tools")
    return target
