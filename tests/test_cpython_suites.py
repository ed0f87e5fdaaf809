"""CPython's own tests of what locks by fcntl(2), with their files where the kernel cannot: they end as where it can."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import NATIVE_ROOT
from support import lockcommand
from support.worlds import World

from flockshim.pytest_plugin import require

# Ends with a line of JSON that says what has become of each test; before it the tests write what they like.
RUNNER = """
import json, sys, unittest

outcomes = {}


def outcome(word):
    return lambda result, test, *more: outcomes.setdefault(test.id(), word) and None


class Result(unittest.TestResult):
    addSuccess = outcome("ok")
    addSkip = outcome("skipped")
    addExpectedFailure = outcome("failed as expected")
    addFailure = addError = addUnexpectedSuccess = outcome("failed")

    def addSubTest(self, test, subtest, error):
        if error:
            self.addFailure(test)


unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:]).run(Result())
print()
print(json.dumps(outcomes))
"""
SUITES = {
    "test.test_fcntl": "this",
    "test.test_mailbox": "this",
    "test.test_sqlite3": "this",
    "test.test_dbm_sqlite3": "3.13",
}
"""With which Python each is run."""
HANGS = {"test.test_mailbox": "test.test_mailbox.TestMbox.test_lock_unlock"}
"""One test of a suite that hangs as a whole where nothing can be locked."""
LISTS = {"test.test_mailbox.TestMH.test_lock_unlock_no_dot_mh_sequences_file"}
"""Tests that find the record which mode cluster leaves beside what was locked."""


@functools.cache
def newer_python(suite: str) -> str | None:
    """A Python of 3.13 or later, with its tests."""
    names = [f"python3.{minor}" for minor in range(13, 20)]
    installed = [str(path) for name in names for path in Path.home().glob(f".pyenv/versions/*/bin/{name}")]
    for found in [*map(shutil.which, names), *installed]:
        if found and _has(found, suite):
            return found
    return None


@functools.cache
def _has(python: str, suite: str) -> bool:
    return subprocess.run([python, "-c", f"import {suite}"], capture_output=True, check=False).returncode == 0


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    """The name of a module of tests."""
    suite: str = request.param
    return suite


@pytest.fixture
def python(suite: str) -> str:
    """The Python that is tested."""
    if SUITES[suite] != "this":
        found = newer_python(suite)
        if not found:  # not in the distributions yet that the project is tested on
            pytest.skip("no Python 3.13 with its tests (to get it: pyenv install 3.13)")
        return found
    require(_has(sys.executable, "test.test_fcntl"), "Python has no tests", "apt install libpython3.11-testsuite")
    if not _has(sys.executable, suite):
        pytest.skip(f"this Python has no {suite} (to get it: pyenv install 3.13)")
    return sys.executable


def outcomes(python: str, suite: str, directory: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What becomes of each test with its files in DIRECTORY."""
    done = subprocess.run(
        [python, "-c", RUNNER, suite],
        cwd=directory,
        env={**environment, "TMPDIR": str(directory)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return result


@functools.cache
def native(python: str, suite: str) -> dict[str, str]:
    """The same where the kernel locks."""
    with tempfile.TemporaryDirectory(dir=NATIVE_ROOT) as directory:
        result = outcomes(python, suite, Path(directory), os.environ)
    assert "ok" in result.values()
    return result


def test_without_flockshim(emulated: World, python: str, suite: str) -> None:
    tests = HANGS.get(suite, suite)
    found = outcomes(python, tests, emulated.directory, lockcommand.settings(emulated))
    expected = native(python, tests)
    assert {name: outcome for name, outcome in expected.items() if found[name] != outcome} != {}


@pytest.mark.parametrize("mode", ["host", "cluster"])
def test_with_flockshim(request: pytest.FixtureRequest, mode: str, python: str, suite: str) -> None:
    world: World = request.getfixturevalue({"host": "emulated", "cluster": "here"}[mode])
    found = outcomes(python, suite, world.directory, world.environment)
    expected = native(python, suite)
    different = {name for name, outcome in expected.items() if found[name] != outcome}
    assert different - (LISTS if mode == "cluster" else set()) == set()
