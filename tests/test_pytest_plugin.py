"""The pytest plugin, as another project's tests use it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = "pytester"

HELD = """
    import errno, fcntl, os, pytest

    def answer(path, call=fcntl.flock):
        with open(path / "file", "w") as file:
            try:
                call(file, fcntl.LOCK_EX)
            except OSError as error:
                return errno.errorcode[error.errno]
            return "held"
"""


def passed(pytester: pytest.Pytester, tests: str, count: int) -> None:
    pytester.makeconftest("")
    pytester.makepyfile(HELD + tests)
    pytester.runpytest_subprocess("-W", "error", "--strict-markers").assert_outcomes(passed=count)


# nolock_dir


def test_nolock_dir_is_a_fresh_directory_on_one_mount(nolock_dir: Path, pytester: pytest.Pytester) -> None:
    tests = """
    mounts = set()

    @pytest.mark.parametrize("turn", [1, 2])
    def test_fresh(nolock_dir, turn):
        assert os.listdir(nolock_dir) == []
        assert answer(nolock_dir) == "ENOSYS"
        assert answer(nolock_dir, fcntl.lockf) == "ENOSYS"
        mounts.add(nolock_dir.parent)

    @pytest.mark.nolock(flock="ENOSYS")
    def test_same_mount(nolock_dir):
        assert mounts == {nolock_dir.parent}
        assert os.listdir(nolock_dir.parent) == [nolock_dir.name]
    """
    passed(pytester, tests, 3)


def test_nolock_dir_takes_a_marker_and_parameters(nolock_dir: Path, pytester: pytest.Pytester) -> None:
    tests = """
    @pytest.mark.nolock(flock="ENOLCK", posix="local")
    class TestMarker:
        def test_class(self, nolock_dir):
            assert answer(nolock_dir) == "ENOLCK"
            assert answer(nolock_dir, fcntl.lockf) == "held"

        @pytest.mark.nolock(flock=errno.EIO)
        def test_nearest(self, nolock_dir):
            assert answer(nolock_dir) == "EIO"
            assert answer(nolock_dir, fcntl.lockf) == "ENOSYS"

    @pytest.mark.parametrize("nolock_dir", ["EIO", 5, {"posix": "EIO", "flock": 5}], indirect=True)
    def test_parameters(nolock_dir):
        assert answer(nolock_dir) == answer(nolock_dir, fcntl.lockf) == "EIO"
    """
    passed(pytester, tests, 5)


def test_nolock_dir_explains_a_wrong_errno(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.nolock(flock='EWHAT')\ndef test_it(nolock_dir): pass\n")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*flock: 'EWHAT' is no errno*"])


@pytest.mark.parametrize(("required", "outcome"), [("0", "skipped"), ("1", "errors")])
def test_nolock_dir_without_fuse(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, required: str, outcome: str
) -> None:
    monkeypatch.setenv("FLOCKSHIM_REQUIRE_OPTIONAL", required)
    pytester.makeconftest("""
        from flockshim import nolockfs

        def missing(self):
            raise nolockfs.MountError("fusermount3 is missing: install the package fuse3")

        nolockfs.Mount.__enter__ = missing
    """)
    pytester.makepyfile("def test_it(nolock_dir): pass")
    result = pytester.runpytest_subprocess("-rsE")
    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines(["*no FUSE mount*fusermount3 is missing: install*fuse3*"])


@pytest.mark.parametrize(("required", "outcome"), [("0", "skipped"), ("1", "failed")])
def test_require(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, required: str, outcome: str) -> None:
    monkeypatch.setenv("FLOCKSHIM_REQUIRE_OPTIONAL", required)
    pytester.makepyfile("""
        from flockshim.pytest_plugin import require

        def test_missing(): require(False, "no musl-gcc", "install musl-tools")
        def test_there(): require("/usr/bin/musl-gcc", "no musl-gcc", "install musl-tools")
    """)
    result = pytester.runpytest_subprocess("-rsf")
    result.assert_outcomes(**{outcome: 1}, passed=1)
    result.stdout.fnmatch_lines(["*no musl-gcc (to get it: install musl-tools)*"])


# simulate_flock


def flock_status(path: Path, environment: dict[str, str]) -> str:
    """What flock(2) of another program answers."""
    code = """if True:
        import errno, fcntl, sys
        try:
            fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX)
            print("held")
        except OSError as error:
            print(error.errno)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(("name", "number"), [("ENOSYS", 38), ("ENOLCK", 37), (524, 524)])
def test_simulate_flock(
    simulate_flock: Callable[..., dict[str, str]], tmp_path: Path, name: str | int, number: int
) -> None:
    (tmp_path / "file").touch()
    assert flock_status(tmp_path / "file", simulate_flock(name)) == str(number)
    assert flock_status(tmp_path / "file", dict(os.environ)) == "held"


def test_simulate_flock_below_a_directory(simulate_flock: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    for name in ("below", "beside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "link").symlink_to("below")
    environment = simulate_flock(directory=tmp_path / "link")
    assert flock_status(tmp_path / "below" / "file", environment) == "38"
    assert flock_status(tmp_path / "beside" / "file", environment) == "held"


RECORD_LOCKS = """if True:
    import errno, fcntl, os, struct, sys
    file = open(sys.argv[1], "r+")
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
    calls = {
        "lockf": lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
        "waiting": lambda: fcntl.lockf(file, fcntl.LOCK_SH),
        "libc's": lambda: os.lockf(file.fileno(), os.F_TLOCK, 0),
        "asking": lambda: fcntl.fcntl(file, fcntl.F_GETLK, lock),
        "description's": lambda: fcntl.fcntl(file, 37, lock),
    }
    for name, call in calls.items():
        try:
            call()
            fcntl.lockf(file, fcntl.LOCK_UN)
            print(name, 0)
        except OSError as error:
            print(name, error.errno)
"""


def record_locks(path: Path, environment: dict[str, str]) -> set[int]:
    """What the record locks of another program answer: 0, or an errno."""
    done = subprocess.run(
        [sys.executable, "-c", RECORD_LOCKS, path], env=environment, capture_output=True, text=True, check=True
    )
    answers = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(answers) == 5
    return set(answers)


@pytest.mark.parametrize(("name", "number"), [("ENOSYS", 38), ("ENOLCK", 37)])
def test_simulate_flock_has_record_locks_fail_too(
    simulate_flock: Callable[..., dict[str, str]], tmp_path: Path, name: str, number: int
) -> None:
    for place in ("below", "beside"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "file").touch()
    environment = simulate_flock(name, tmp_path / "below")
    assert record_locks(tmp_path / "below" / "file", environment) == {number}
    assert record_locks(tmp_path / "beside" / "file", environment) == {0}
    assert record_locks(tmp_path / "below" / "file", dict(os.environ)) == {0}


@pytest.mark.nolock(flock="local", posix="ENOLCK")
def test_a_directory_where_only_record_locks_fail(nolock_dir: Path) -> None:
    (nolock_dir / "file").touch()
    assert record_locks(nolock_dir / "file", dict(os.environ)) == {errno.ENOLCK}
    assert flock_status(nolock_dir / "file", dict(os.environ)) == "held"


# simulate_fcntl_flock


def errno_of(call: Callable[..., None], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


@pytest.fixture
def file(tmp_path: Path) -> int:
    return os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)


def test_simulate_fcntl_flock(simulate_fcntl_flock: Callable[..., None], file: int) -> None:
    simulate_fcntl_flock("ENOLCK")
    for operation in (fcntl.LOCK_SH, fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN):
        assert errno_of(fcntl.flock, file, operation) == errno.ENOLCK
    with os.fdopen(file) as stream:
        assert errno_of(fcntl.flock, stream, fcntl.LOCK_EX) == errno.ENOLCK
        fcntl.lockf(stream, fcntl.LOCK_SH)


def test_simulate_fcntl_flock_answers_mistakes_as_the_kernel_does(
    simulate_fcntl_flock: Callable[..., None], file: int, tmp_path: Path
) -> None:
    path_only = os.open(tmp_path / "file", os.O_PATH)
    calls = [(file, 0), (9999, 3), (9999, fcntl.LOCK_EX), (path_only, fcntl.LOCK_EX)]
    real = [errno_of(fcntl.flock, *call) for call in calls]
    assert real == [errno.EINVAL, errno.EINVAL, errno.EBADF, errno.EBADF]
    simulate_fcntl_flock()
    assert [errno_of(fcntl.flock, *call) for call in calls] == real
    with pytest.raises(TypeError):
        fcntl.flock("file", fcntl.LOCK_EX)  # type: ignore[arg-type]
    directory = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)


def test_simulate_fcntl_flock_below_a_directory(
    simulate_fcntl_flock: Callable[..., None], file: int, tmp_path: Path
) -> None:
    (tmp_path / "fil").mkdir()
    simulate_fcntl_flock("EIO", tmp_path / "fil")
    fcntl.flock(file, fcntl.LOCK_EX)
    simulate_fcntl_flock("EIO", tmp_path)
    assert errno_of(fcntl.flock, file, fcntl.LOCK_UN) == errno.EIO


def test_simulate_fcntl_flock_does_lockf_too(
    simulate_fcntl_flock: Callable[..., None], file: int, tmp_path: Path
) -> None:
    read_only = os.open(tmp_path / "file", os.O_RDONLY)
    assert errno_of(fcntl.lockf, read_only, fcntl.LOCK_EX) == errno.EBADF
    simulate_fcntl_flock(lockf=True)
    assert errno_of(fcntl.lockf, read_only, fcntl.LOCK_EX) == errno.EBADF
    assert errno_of(fcntl.lockf, read_only, fcntl.LOCK_SH) == errno.ENOSYS
    assert errno_of(fcntl.lockf, file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2, os.SEEK_SET) == 38
    with pytest.raises(ValueError, match="unrecognized lockf argument"):
        fcntl.lockf(file, 64)


def test_simulate_fcntl_flock_ends_with_the_test(pytester: pytest.Pytester) -> None:
    tests = """
    def test_first(simulate_fcntl_flock, tmp_path):
        simulate_fcntl_flock()
        assert answer(tmp_path) == "held"  # the default argument is the real one
        assert answer(tmp_path, fcntl.flock) == "ENOSYS"

    def test_second(tmp_path):
        assert answer(tmp_path, fcntl.flock) == "held"
    """
    passed(pytester, tests, 2)


# What it costs, what it says


def test_the_plugin_imports_nothing_of_flockshim_before_it_is_used() -> None:
    code = (
        "import sys, flockshim.pytest_plugin\n"
        "print(sorted(name for name in sys.modules if name.startswith(('flockshim', 'cffi'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['flockshim', 'flockshim.pytest_plugin']\n"


def test_the_fixtures_are_documented(pytester: pytest.Pytester) -> None:
    fixtures = pytester.runpytest_subprocess("--fixtures").stdout
    fixtures.fnmatch_lines(["nolock_dir -- *", "*An empty directory*"])
    fixtures.fnmatch_lines(["simulate_flock -- *", "*makes flock(2) fail in subprocesses*"])
    fixtures.fnmatch_lines(["simulate_fcntl_flock -- *", "*``fcntl.flock`` fail in this process*"])
    markers = pytester.runpytest_subprocess("--markers").stdout
    markers.fnmatch_lines(["@pytest.mark.nolock(flock='ENOSYS', posix='ENOSYS'): *"])
