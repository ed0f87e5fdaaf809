"""Histories of record locks over several processes and descriptors, natively, under the shim and supervised: equal.

A soak of thousands of fresh histories:

    pytest tests/test_record_differential.py --hypothesis-profile=soak --timeout=0
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies
from support.recordhistories import KINDS, Observed, Raw, RecordRunner, history
from support.worlds import World

# Most of the steps ask for locks, for which all the others only make the occasion.
kinds = strategies.sampled_from(["lock"] * 24 + ["show", "release", "release", "collide", "collide"] * 2 + KINDS)
numbers = strategies.integers(0, 59)
histories = strategies.lists(strategies.tuples(kinds, *[numbers] * 6), min_size=20, max_size=40)


@pytest.fixture
def runners(world: World) -> Iterator[tuple[RecordRunner, RecordRunner]]:
    with tempfile.TemporaryDirectory(prefix="native-", dir="/dev/shm") as directory:
        native = World("native", Path(directory), os.environ)
        yield RecordRunner(native), RecordRunner(world)
        assert native.end() == ""


def _compare(runners: tuple[RecordRunner, RecordRunner], raws: list[Raw]) -> None:
    steps = history(raws)
    hypothesis.note("\n".join(str(step) for step in steps))
    native, other = (runner.run_all(steps) for runner in runners)
    # The model has told the runners what to wait for, so it must be right as well.
    assert native == [Observed(*step.expected, step.seen, step.views) for step in steps]
    assert other == native


@pytest.mark.parametrize("world", ["emulated"], indirect=True)
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    deadline=None,
    max_examples=hypothesis.settings().max_examples // 2,
)
@hypothesis.given(raws=histories)
def test_equal_call_by_call(runners: tuple[RecordRunner, RecordRunner], raws: list[Raw]) -> None:
    _compare(runners, raws)


@pytest.mark.parametrize("world", ["native", "supervised", "supervised, kernel"], indirect=True)
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    deadline=None,
    max_examples=hypothesis.settings().max_examples // 10,
)
@hypothesis.given(raws=histories)
def test_supervised_programs(runners: tuple[RecordRunner, RecordRunner], raws: list[Raw]) -> None:
    """Fewer, since they take longer; and natively, where two runs must be equal too."""
    _compare(runners, raws)
