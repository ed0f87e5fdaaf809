"""Unmodified uv on several hosts at once, with home, cache, tools and project on one file system that cannot lock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hosts import RENDEZVOUS, Host, Site, require_hosts
from support.uv import NoRegistryError, Uv, end, fetched, index_settings, newest, succeeded
from support.uvpackages import write_wheel

from flockshim.pytest_plugin import require

LEASE = 6.0
HOSTS = 3
EACH = 2
PYTHON = ("--python", sys.executable)


@pytest.fixture
def site(nolock_dir: Path) -> Iterator[Site]:
    require_hosts()
    site = Site(nolock_dir, LEASE)
    try:
        for number in range(HOSTS):
            site.host(f"node{number}", slow=True)
        yield site
    finally:
        site.end()


@pytest.fixture
def uv(nolock_dir: Path) -> Uv:
    try:
        uv = Uv(fetched(newest()), nolock_dir, index_settings())
    except NoRegistryError as error:
        require(False, "no package index", f"connect pip with one: {error}")
        raise
    uv.environment.update(FLOCKSHIM_DIR=RENDEZVOUS, FLOCKSHIM_LEASE=str(LEASE), FLOCKSHIM_MODE="cluster")
    return uv


def start(uv: Uv, host: Host, *arguments: str) -> subprocess.Popen[str]:
    """Start uv under flockshim on HOST."""
    there = (*host.prefix, "env", f"--chdir={uv.project}")  # nsenter(1) goes to the root
    return uv.start_program(*there, sys.executable, "-m", "flockshim", uv.executable, *arguments, shim=None)


def local(uv: Uv, packages: list[str]) -> list[str]:
    """The options with which uv finds PACKAGES, that are made here, and asks nobody else."""
    wheels = uv.base / "wheels"
    wheels.mkdir()
    for name in packages:
        write_wheel(wheels, name)
    return ["--no-index", f"--find-links={wheels}"]


def test_tools_are_installed_and_a_project_is_set_up_by_all_hosts_at_once(site: Site, uv: Uv) -> None:
    names = [f"package{number}" for number in range(HOSTS * EACH)]
    index = local(uv, names)
    (uv.project / "pyproject.toml").write_text(
        f'[project]\nname = "demo"\nversion = "1"\nrequires-python = ">=3.9"\ndependencies = {names!r}\n'
    )
    started = []
    for number, name in enumerate(names):
        host = site.hosts[number % HOSTS]
        started.append(start(uv, host, "tool", "install", *PYTHON, *index, name))
        started.append(start(uv, host, "sync", *PYTHON, *index))
    for done in [end(process) for process in started]:
        assert done.status == 0, done.err
    for host in site.hosts:
        listed = succeeded(start(uv, host, "tool", "list"))
        assert listed.out == "".join(f"{name} v1\n- {name}\n" for name in names)
        assert listed.err == ""
    imports = "; ".join(f"import {name}" for name in names)
    succeeded(uv.start_program(str(uv.project / ".venv" / "bin" / "python"), "-c", imports, shim=None))
    # It was cluster mode that kept them apart.
    assert (uv.base / "tools" / "..lock.flockshim").exists()
