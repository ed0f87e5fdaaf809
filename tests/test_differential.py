"""Histories over several processes and descriptions, natively, under the shim and supervised: equal call by call.

A soak of thousands of fresh histories:

    pytest tests/test_differential.py --hypothesis-profile=soak --timeout=0
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies
from support.histories import KINDS, Observed, Raw, Runner, history
from support.worlds import World

# Two thirds of the steps are lock calls, for which all the others only make the occasion.
kinds = strategies.sampled_from(["lock"] * 2 * len(KINDS) + KINDS)
numbers = strategies.integers(0, 29)
histories = strategies.lists(strategies.tuples(kinds, numbers, numbers, numbers), min_size=20, max_size=40)


@pytest.fixture
def runners(world: World) -> Iterator[tuple[Runner, Runner]]:
    with tempfile.TemporaryDirectory(prefix="native-", dir="/dev/shm") as directory:
        native = World("native", Path(directory), os.environ)
        yield Runner(native), Runner(world)
        assert native.end() == ""


def _compare(runners: tuple[Runner, Runner], raws: list[Raw]) -> None:
    steps = history(raws)
    hypothesis.note("\n".join(str(step) for step in steps))
    native, other = (runner.run(steps) for runner in runners)
    assert other == native
    # The model has told the runners what to wait for, so it must be right as well.
    assert native == [Observed(*step.expected, step.probes) for step in steps]


@pytest.mark.parametrize("world", ["emulated"], indirect=True)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None)
@hypothesis.given(raws=histories)
def test_equal_call_by_call(runners: tuple[Runner, Runner], raws: list[Raw]) -> None:
    _compare(runners, raws)


@pytest.mark.parametrize("world", ["supervised", "supervised, kernel"], indirect=True)
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    deadline=None,
    max_examples=hypothesis.settings.default.max_examples // 5,
)
@hypothesis.given(raws=histories)
def test_supervised_programs(runners: tuple[Runner, Runner], raws: list[Raw]) -> None:
    """Fewer, since they take longer."""
    _compare(runners, raws)
