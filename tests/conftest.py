"""Fixtures of the whole suite: a rendezvous directory of its own, and the two worlds."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from support.groups import ControlGroup, NoControlGroups
from support.keepers import end_keepers
from support.worlds import ON_FUSE, ON_KERNEL, SupervisedWorld, World

from flockshim.pytest_plugin import require

if TYPE_CHECKING:
    from support.supervision import Supervision

NATIVE_ROOT = "/dev/shm"
DIRECTORIES = {"supervised": "nolock_dir", ON_KERNEL: "native_directory", ON_FUSE: "fuse_directory"}
"""Where each supervised world has its files."""

LEASE = 3.0
"""Seconds: short, and long enough for a machine that is busy."""

# In the first the same histories each time, unshrunk: a failure must not take the suite's time.
hypothesis.settings.register_profile(
    "suite",
    max_examples=60,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.register_profile("soak", max_examples=5000)
hypothesis.settings.load_profile("suite")


def _rendezvous_directory() -> Iterator[Path]:
    # Short, because a socket's path has at most 107 bytes (unix(7)).
    path = Path(tempfile.mkdtemp(prefix="fs-", dir=NATIVE_ROOT))
    yield path
    end_keepers(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def session_rendezvous() -> Iterator[Path]:
    """The rendezvous directory that tests share when they don't touch the keeper."""
    yield from _rendezvous_directory()


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_users_keeper(session_rendezvous: Path) -> Iterator[None]:
    """Whatever a test starts, it must not meet the keeper that the user runs for real work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOCKSHIM_DIR", str(session_rendezvous))
        yield


@pytest.fixture
def rendezvous() -> Iterator[Path]:
    """An empty rendezvous directory for this test alone."""
    yield from _rendezvous_directory()


@pytest.fixture
def other_rendezvous() -> Iterator[Path]:
    """A second one, for what must not meet the first one's keeper."""
    yield from _rendezvous_directory()


def shim_environment(rendezvous: Path, **more: str) -> dict[str, str]:
    """An environment under the shim with RENDEZVOUS, and with the variables MORE."""
    import flockshim  # noqa: PLC0415  (the native world is tested without the product)

    base = {key: value for key, value in os.environ.items() if not key.startswith("FLOCKSHIM_")}
    return flockshim.environ(mode="host", base={**base, "FLOCKSHIM_DIR": str(rendezvous), **more})


def emulated_world(request: pytest.FixtureRequest, rendezvous: Path) -> World:
    """A directory whose flock fails in the kernel, and the shim."""
    directory = request.getfixturevalue("nolock_dir")
    return World("emulated", directory, shim_environment(rendezvous))


def cluster_world(directory: Path, rendezvous: Path, *prefix: str, **more: str) -> World:
    """Programs in cluster mode. As far as locks are concerned, one rendezvous directory is one host."""
    environment = shim_environment(rendezvous, FLOCKSHIM_LEASE=str(LEASE), **more)
    return World("emulated", directory, {**environment, "FLOCKSHIM_MODE": "cluster"}, *prefix)


@pytest.fixture
def here(nolock_dir: Path, rendezvous: Path) -> Iterator[World]:
    """A host in cluster mode, whose keeper leaves soon."""
    world = cluster_world(nolock_dir, rendezvous, FLOCKSHIM_IDLE="0.1")
    yield world
    world.end()


@pytest.fixture
def there(nolock_dir: Path, other_rendezvous: Path) -> Iterator[World]:
    """Another host."""
    world = cluster_world(nolock_dir, other_rendezvous, FLOCKSHIM_IDLE="0.1")
    yield world
    world.end()


def _ended_quietly(world: World) -> None:
    errors = world.end()
    assert errors == "", f"standard error of the programs: {errors}"


@pytest.fixture
def fuse_directory(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory whose kernel locks, as far as can be seen only by trying."""
    mount = request.getfixturevalue("_nolock_mounts").get("local", "local")
    with tempfile.TemporaryDirectory(prefix="locks-", dir=mount.path) as directory:
        yield Path(directory)


@pytest.fixture
def native_directory() -> Iterator[Path]:
    """A directory whose kernel locks."""
    with tempfile.TemporaryDirectory(prefix="native-", dir=NATIVE_ROOT) as directory:
        yield Path(directory)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test in each of its module's WORLDS, or in those that its own mark names."""
    marked = any(mark.args[0] == "world" for mark in metafunc.definition.iter_markers("parametrize"))
    if "world" in metafunc.fixturenames and not marked and not hasattr(metafunc.module, "world"):
        metafunc.parametrize("world", getattr(metafunc.module, "WORLDS", ["native", "emulated"]), indirect=True)


@pytest.fixture
def world(request: pytest.FixtureRequest, session_rendezvous: Path) -> Iterator[World]:
    """Each of several worlds in turn: whatever is expected here, is expected of all."""
    if request.param == "native":
        world = World("native", request.getfixturevalue("native_directory"), os.environ)
    elif request.param == "emulated":
        world = emulated_world(request, session_rendezvous)
    else:
        world = _supervised_world(request, request.param, request.getfixturevalue(DIRECTORIES[request.param]))
    yield world
    _ended_quietly(world)


def _supervised_world(request: pytest.FixtureRequest, name: str, directory: Path) -> World:
    supervision = request.getfixturevalue("supervision")
    return SupervisedWorld(name, directory, supervision, supervision.fleet.environment)


@pytest.fixture(scope="session")
def supervision(session_rendezvous: Path) -> Iterator[Supervision]:
    """The supervisor that tests share when they don't harm it. Afterwards it must have as much open as before."""
    from support import supervision  # noqa: PLC0415

    shared = supervision.Supervision(supervision.settings(session_rendezvous))
    descriptors = shared.descriptors()
    yield shared
    shared.await_idle(descriptors)
    shared.end()


@pytest.fixture
def supervised(request: pytest.FixtureRequest, nolock_dir: Path) -> Iterator[World]:
    """Static programs under a supervisor, on a file system that cannot lock."""
    world = _supervised_world(request, "supervised", nolock_dir)
    yield world
    _ended_quietly(world)


@pytest.fixture
def supervised_kernel(request: pytest.FixtureRequest, native_directory: Path) -> Iterator[World]:
    """Static programs under a supervisor, on a file system that locks."""
    world = _supervised_world(request, ON_KERNEL, native_directory)
    yield world
    _ended_quietly(world)


@pytest.fixture
def emulated(request: pytest.FixtureRequest, session_rendezvous: Path) -> Iterator[World]:
    """The emulated world alone, for what only it promises."""
    emulated = emulated_world(request, session_rendezvous)
    yield emulated
    _ended_quietly(emulated)


@pytest.fixture
def fresh_world(request: pytest.FixtureRequest, rendezvous: Path) -> Iterator[World]:
    """The emulated world with a rendezvous directory, and so a keeper, for this test alone."""
    emulated = emulated_world(request, rendezvous)
    yield emulated
    _ended_quietly(emulated)


@pytest.fixture
def group() -> Iterator[ControlGroup]:
    """A control group for this test alone."""
    try:
        group = ControlGroup()
    except NoControlGroups as error:
        require(False, f"no control group can be made: {error}", "run as root on cgroup v2 or v1")
        raise
    yield group
    group.remove()
