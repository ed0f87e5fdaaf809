"""tests/test_cluster_uv.py with a static uv, under a supervisor for each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import test_cluster_uv
from support.hosts import RENDEZVOUS
from support.uv import NoRegistryError, Uv, fetched, index_settings, newest
from test_cluster_uv import LEASE
from test_cluster_uv import test_tools_are_installed_and_a_project_is_set_up_by_all_hosts_at_once as test_all  # noqa: F401

from flockshim.pytest_plugin import require

pytestmark = pytest.mark.skipif(not os.environ.get("FLOCKSHIM_SOAK"), reason="in soak runs only")

site = test_cluster_uv.site


@pytest.fixture
def uv(nolock_dir: Path) -> Uv:
    try:
        uv = Uv(fetched(newest(), static=True), nolock_dir, index_settings())
    except NoRegistryError as error:
        require(False, "no package index", f"connect pip with one that has uv for musl: {error}")
        raise
    uv.environment.update(FLOCKSHIM_DIR=RENDEZVOUS, FLOCKSHIM_LEASE=str(LEASE), FLOCKSHIM_MODE="cluster")
    return uv
