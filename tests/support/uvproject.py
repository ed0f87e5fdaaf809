"""A project with real dependencies, and many uv that set it up at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from support.countingindex import CountingIndex
from support.uv import Done, NoRegistryError, Uv, index_settings, kill_with_descendants

PYPI = "https://pypi.org/simple"
DEPENDENCIES = ["markupsafe", "pyyaml", "requests", "rich"]
"""Two of them, and one that requests needs, are compiled."""
CHECK = """
import importlib.metadata
import markupsafe, requests, rich, yaml
import markupsafe._speedups
for distribution in importlib.metadata.distributions():
    for file in distribution.files:
        if not file.locate().exists():
            raise SystemExit(f"{file} is missing")
    print(distribution.metadata["Name"])
"""
"""Names what is installed; fails unless every file of it is there."""

PLACES = """
import sys, sysconfig
print(*map(sysconfig.get_path, ("purelib", "platlib", "scripts", "data")), *sys.path, sep="\\n")
"""
"""Names every directory that an interpreter imports from or that is installed into."""


def counting_index() -> CountingIndex:
    """A counting index in front of the one that pip is configured with.

    :raises NoRegistryError: when that is none that is asked over HTTP.
    """
    settings = index_settings()
    upstream = settings.get("UV_DEFAULT_INDEX", PYPI)
    if not upstream.startswith(("http:", "https:")):
        raise NoRegistryError(f"pip's index is not on the network: {upstream}")
    return CountingIndex(upstream, settings.get("SSL_CERT_FILE"))


class PrivatePython(NamedTuple):
    """An interpreter that nobody else uses."""

    executable: Path
    packages: Path
    """Its site-packages directory, empty when it is made."""


def private_python(directory: Path) -> PrivatePython:
    """An interpreter, made in the absolute path DIRECTORY, with the standard library of this one and no packages.

    uv without a common lock may take this interpreter's prefix for the environment that another is
    just making: they uninstall the packages there and install the project's. So many uv at once
    must never be given a Python that anybody uses.
    """
    original = Path(sys._base_executable)  # type: ignore[attr-defined]
    library = Path(sysconfig.get_path("stdlib"))
    copied = directory / library.relative_to(sys.base_prefix)
    copied.mkdir(parents=True)
    for entry in library.iterdir():
        if entry.name not in ("site-packages", "dist-packages"):
            (copied / entry.name).symlink_to(entry.resolve())
    executable = directory / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    executable.parent.mkdir()
    shutil.copy(original.resolve(), executable)  # a link would lead back to the original's prefix
    for shared in library.parent.glob("libpython*.so*"):  # some are found by $ORIGIN/../lib
        (copied.parent / shared.name).symlink_to(shared.resolve())
    asked = [str(executable), "-I", "-c", PLACES]
    places = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    for place in places:
        assert directory in (Path(place), *Path(place).parents), f"{place} is not below {directory}"
    packages = Path(places[0])
    packages.mkdir(parents=True, exist_ok=True)
    return PrivatePython(executable, packages)


def write_project(directory: Path) -> None:
    """Write the project into DIRECTORY; nothing is resolved or installed yet."""
    major, minor = sys.version_info[:2]
    (directory / "pyproject.toml").write_text(
        f'[project]\nname = "demo"\nversion = "1"\nrequires-python = "=={major}.{minor}.*"\n'
        f"dependencies = {DEPENDENCIES!r}\n"
    )


def installed(uv: Uv) -> set[str]:
    """The packages in the project's environment, all of whose files must be there.

    :raises AssertionError: when one is missing or cannot be imported.
    """
    python = uv.project / ".venv" / "bin" / "python"
    done = subprocess.run([python, "-c", CHECK], env=uv.environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"the environment is not complete: {done.stdout}{done.stderr}")
    return {name.lower() for name in done.stdout.split()}


def ends(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[Done]:
    """Wait for all; after SECONDS those that have not ended are killed and it is an error."""
    deadline = time.monotonic() + seconds
    ended = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
            ended.append(Done(process.returncode, out, err))
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{len(processes) - len(ended)} of {len(processes)} hang: {error}") from None
    finally:
        for process in processes:
            kill_with_descendants(process)
            process.wait()
    return ended
