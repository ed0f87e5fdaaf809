"""Many jobs set up one project at once, each with ``flockshim --lock . uv sync``."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.countingindex import CountingIndex
from support.uv import NoRegistryError, Uv, fetched, index_settings, newest, succeeded
from support.uvproject import PrivatePython, counting_index, ends, installed, private_python, write_project

from flockshim.pytest_plugin import require

JOBS = 100
SECONDS = 280.0
"""For all jobs together; a machine that needs longer is too slow for this test."""
LOCK = ("--lock", ".")
BUSY = 75
IMPORT = "import markupsafe, requests, rich, sys, yaml"

ENTERED = """#!/bin/sh
# mkdir fails for whoever comes while another is inside.
mkdir "$INSIDE" || exit 99
"$REAL_UV" "$@"
status=$?
rmdir "$INSIDE"
exit $status
"""
"""A uv that refuses to be two at once."""


class Jobs:
    """The jobs of one user: a project, a cache, and a Python for all."""

    def __init__(self, uv: Uv, python: PrivatePython, index: CountingIndex) -> None:
        self.uv = uv
        self.index = index
        self.python = python
        self.sync = ("sync", "--python", str(python.executable))
        self._wrapper = uv.base / "uv-alone"
        self._wrapper.write_text(ENTERED)
        self._wrapper.chmod(0o755)
        uv.environment.update(REAL_UV=uv.executable, INSIDE=str(uv.base / "inside"))

    def start(self, *arguments: str, lock: tuple[str, ...] = LOCK) -> subprocess.Popen[str]:
        """Start a job that may not be in uv while another is.

        Its TMPDIR is its own, as batch systems do it: uv's lock on the project is there and
        excludes nobody, so that it is flockshim's on which everything depends.
        """
        self.uv.environment["TMPDIR"] = tempfile.mkdtemp(dir=self.uv.base / "tmp")
        return self.uv.start_program(str(self._wrapper), *arguments, shim=lock)


@pytest.fixture(scope="session")
def index() -> Iterator[CountingIndex]:
    try:
        served = counting_index()
    except NoRegistryError as error:
        require(False, "no package index", f"connect pip with one: {error}")
        raise
    with served:
        yield served


PLACES = [("newest", "mount")]
if os.environ.get("FLOCKSHIM_SOAK"):
    # They take as long each: an old uv, and what is the kernel's work.
    PLACES += [("0.7.0", "mount"), ("newest", "memory")]


@pytest.fixture(params=PLACES, ids="-".join)
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """A uv, and a directory: where the kernel locks, or where it refuses to."""
    version, where = request.param
    try:
        executable = fetched(newest() if version == "newest" else version)
    except NoRegistryError as error:
        require(False, f"no uv {version}", f"connect pip with an index: {error}")
        raise
    if where == "mount":
        yield executable, request.getfixturevalue("nolock_dir")
    else:
        with tempfile.TemporaryDirectory(prefix="native-", dir="/dev/shm") as native:
            yield executable, Path(native)


@pytest.fixture
def jobs(place: tuple[Path, Path], index: CountingIndex, tmp_path: Path) -> Jobs:
    index.forget_counts()
    uv = Uv(*place, {**index_settings(), "UV_DEFAULT_INDEX": index.url})
    write_project(uv.project)
    return Jobs(uv, private_python(tmp_path / "python"), index)


def state(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file below DIRECTORY with its size and the time of its last change."""
    found = {}
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.mark.timeout(300)
def test_a_hundred_jobs_set_up_one_project(jobs: Jobs) -> None:
    for done in ends([jobs.start(*jobs.sync) for _ in range(JOBS)], SECONDS):
        assert done.status == 0, done
    packages = installed(jobs.uv)
    assert {"markupsafe", "pyyaml", "requests", "rich"} < packages
    assert sorted(jobs.index.downloads.values()) == [1] * len(packages), jobs.index.downloads
    assert list(jobs.python.packages.iterdir()) == []
    assert {path.name for path in jobs.uv.project.iterdir()} == {".venv", "pyproject.toml", "uv.lock"}
    run_in_the_finished_environment(jobs)


def run_in_the_finished_environment(jobs: Jobs) -> None:
    """What jobs do after the sync: no download, no change, many at a time, and no sync meanwhile."""
    jobs.index.forget_counts()
    before = state(jobs.uv.project)
    run = ("run", "--no-sync", "python", "-c")
    plain = jobs.uv.succeed(*run, f"{IMPORT}; print(sys.prefix)")
    assert plain.out == f"{jobs.uv.project}/.venv\n"
    first = jobs.uv.start(*run, f"{IMPORT}; print('inside', flush=True); sys.stdin.read()", shim=(*LOCK, "--shared"))
    assert first.stdout
    assert first.stdout.readline() == "inside\n"
    second = jobs.uv.succeed(*run, f"{IMPORT}; print(sys.prefix)", shim=(*LOCK, "--shared"))
    assert second.out == plain.out
    refused = jobs.uv.run(*jobs.sync, shim=(*LOCK, "--no-wait"))
    assert refused.status == BUSY, refused
    assert first.poll() is None
    succeeded(first)
    assert not jobs.index.downloads and not jobs.index.ranges
    assert state(jobs.uv.project) == before


def test_the_index_counts(index: CountingIndex) -> None:
    index.forget_counts()
    name = "cowsay-6.1-py3-none-any.whl"
    unknown = urllib.parse.urljoin(index.url, "/files/unlisted.whl")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(unknown)
    page = fetch(f"{index.url}/cowsay/").decode()
    (link,) = re.findall(rf'href="(/files/{name})#sha256=(\w+)"', page)
    url = urllib.parse.urljoin(index.url, link[0])
    whole = fetch(url)
    assert hashlib.sha256(whole).hexdigest() == link[1]
    assert fetch(url) == whole
    assert fetch(url, "bytes=-10") == whole[-10:]
    assert fetch(url, "bytes=5-9") == whole[5:10]
    assert fetch(url, "bytes=5-") == whole[5:]
    assert index.downloads == {"unlisted.whl": 1, name: 2}
    assert index.ranges == {name: 3}


def fetch(url: str, part: str | None = None) -> bytes:
    request = urllib.request.Request(url, headers={"Range": part} if part else {})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == (206 if part else 200)
        body: bytes = answer.read()
        return body
