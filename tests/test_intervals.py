"""The checker of what many hosts have done: it accepts what is right, and finds every kind of wrong."""

from __future__ import annotations

import random

import pytest
from support.intervals import Hold, overlaps, parse, with_breaks, wrong_values


def writer(who: str, begin: int, end: int, value: int) -> Hold:
    """A whole exclusive visit that has read VALUE."""
    return Hold(who, True, begin - 1, begin, end, value, value + 1, value + 1)


def reader(who: str, begin: int, end: int, value: int) -> Hold:
    """A whole shared visit."""
    return Hold(who, False, begin - 1, begin, end, value, None, value)


RIGHT = [
    writer("a.1", 10, 20, 0),
    reader("b.1", 30, 50, 1),
    reader("a.2", 40, 60, 1),
    writer("b.2", 70, 80, 1),
    reader("a.1", 90, 95, 2),
]


def is_right(holds: list[Hold]) -> bool:
    return not overlaps(holds) and not wrong_values(holds)


def test_a_right_history() -> None:
    shuffled = random.Random(1).sample(RIGHT, len(RIGHT))
    assert is_right(RIGHT) and is_right(shuffled)


def test_one_may_begin_where_another_ends() -> None:
    assert is_right([writer("a.1", 10, 20, 0), writer("b.1", 20, 30, 1)])


@pytest.mark.parametrize(
    "intruder",
    [
        writer("c.1", 15, 25, 1),
        writer("c.1", 5, 11, 0),
        writer("c.1", 12, 13, 0),
        writer("c.1", 45, 46, 1),
        writer("c.1", 55, 65, 1),
        reader("c.1", 19, 25, 1),
        reader("c.1", 75, 76, 1),
        writer("c.1", 1, 1000, 0),
    ],
    ids=str,
)
def test_an_intruder_is_found_by_its_interval_alone(intruder: Hold) -> None:
    pairs = overlaps([*RIGHT, intruder])
    assert pairs and all(intruder in pair for pair in pairs)


def test_one_behind_a_long_one_is_found() -> None:
    """Though the one that began last before it had ended by then."""
    assert len(overlaps([reader("a.1", 10, 100, 0), reader("a.2", 20, 30, 0), writer("b.1", 50, 60, 0)])) == 1
    assert len(overlaps([writer("a.1", 10, 100, 0), reader("a.2", 20, 30, 0), reader("b.1", 50, 60, 0)])) == 2
    assert len(overlaps([writer("a.1", 10, 100, 0), writer("a.2", 20, 30, 0), writer("b.1", 50, 60, 0)])) == 2


def test_a_lost_update() -> None:
    assert wrong_values([writer("a.1", 10, 20, 0), writer("b.1", 30, 40, 0)])


def test_a_value_that_changes_inside() -> None:
    assert wrong_values([reader("a.1", 10, 20, 0)._replace(seen=1)])
    assert wrong_values([writer("a.1", 10, 20, 0)._replace(seen=5)])


def test_a_value_from_nowhere() -> None:
    assert wrong_values([writer("a.1", 10, 20, 7)])


KILLED = writer("a.1", 10, 15, 0)._replace(seen=None)


@pytest.mark.parametrize("found", [0, 1])
def test_a_killed_writer_may_have_written_or_not(found: int) -> None:
    assert is_right([KILLED, writer("b.1", 20, 30, found)])


def test_a_killed_writer_excuses_only_the_next() -> None:
    assert wrong_values([KILLED, writer("b.1", 20, 30, 1), writer("b.1", 40, 50, 1)])
    assert wrong_values([KILLED, writer("b.1", 20, 30, 2)])


def test_a_killed_holder_was_inside_until_its_last_line() -> None:
    assert overlaps([KILLED, writer("b.1", 14, 30, 0)])


FROZEN = writer("a.1", 10, 90, 0)
MEANWHILE = [writer("b.1", 30, 40, 0), writer("b.2", 50, 60, 1)]


def test_a_broken_holder_is_judged_up_to_the_break() -> None:
    holds = [FROZEN, *MEANWHILE]
    assert overlaps(holds)
    assert is_right(with_breaks(holds, {"a": [20]}))
    assert is_right(with_breaks(holds, {"a": [20, 85]}))
    assert overlaps(with_breaks(holds, {"a": [35]})), "the other one came before the break"


@pytest.mark.parametrize("breaks", [{"b": [20]}, {"a": [5]}, {"a": [95]}, {}], ids=str)
def test_a_break_elsewhere_excuses_nobody(breaks: dict[str, list[int]]) -> None:
    assert overlaps(with_breaks([FROZEN, *MEANWHILE], breaks))


@pytest.mark.parametrize("breaks", [{"a": [5]}, {"a": [25]}, {"a": [95]}], ids=str)
def test_a_break_at_another_time_excuses_no_lost_update(breaks: dict[str, list[int]]) -> None:
    assert wrong_values(with_breaks([writer("a.1", 10, 20, 0), writer("b.1", 30, 40, 0)], breaks))


def test_a_break_of_a_grant_that_was_on_its_way() -> None:
    late = FROZEN._replace(asked=5, begin=55, last=90)
    assert is_right(with_breaks([late, *MEANWHILE], {"a": [20]}))


def test_a_broken_writer_may_write_at_any_time_after() -> None:
    holds = with_breaks([FROZEN, *MEANWHILE, writer("b.1", 100, 110, 1)], {"a": [20]})
    assert is_right(holds)
    assert wrong_values([*holds, writer("b.1", 120, 130, 0)])


def test_a_broken_writer_that_is_killed_may_have_written_at_any_time_before() -> None:
    later = [*MEANWHILE, writer("b.1", 100, 110, 1)]
    assert is_right(with_breaks([KILLED, *later], {"a": [20]}))
    assert wrong_values([KILLED, *later])


def test_a_log_is_read() -> None:
    text = (
        "ask 1 0\nexclusive 2 0\nread 3 7\nwrite 4 8\nend 5 8\n"
        "ask 6 0\nshared 7 0\nread 8 8\nend 9 8\n"
        "ask 10 0\nflock 11 38\n"
        "ask 12 0\nexclusive 13 0\nread 14 8\nwri"
    )
    log = parse("a.1", text)
    assert log.holds == [
        Hold("a.1", True, 1, 2, 5, 7, 8, 8),
        Hold("a.1", False, 6, 7, 9, 8, None, 8),
        Hold("a.1", True, 12, 13, 14, 8, None, None),
    ]
    assert log.failures == ["a.1: flock 11 38"]
    assert not log.done
    assert parse("a.1", "done 3 0\n").done
    killed = parse("a.1", "ask 1 0\nexclusive 2 0\nread 3 7\nwrite 4 8\n")
    assert killed.holds == [Hold("a.1", True, 1, 2, 4, 7, 8, None)]


def test_every_wrong_exchange_in_long_histories_is_found() -> None:
    """Of two writers in a row, one is made to begin before the other's end, or to miss its value."""
    chance = random.Random(4)
    for _ in range(200):
        holds, now, value = [], 0, 0
        for number in range(30):
            length = chance.randrange(2, 9)
            make = chance.choice([writer, writer, reader])
            holds.append(make(f"{number % 3}.1", now, now + length, value))
            value += make is writer
            now += length + chance.randrange(1, 5)
        assert is_right(holds)
        index = chance.randrange(1, 30)
        early, late = holds[index - 1 : index + 1]
        if not early.exclusive:
            continue
        assert overlaps([*holds[:index], late._replace(begin=early.last - 1), *holds[index + 1 :]])
        read = early.read
        assert read is not None
        stale = make_stale(late, read)
        assert wrong_values([*holds[:index], stale, *holds[index + 1 :]])


def make_stale(hold: Hold, value: int) -> Hold:
    """HOLD, had it read VALUE."""
    return (writer if hold.exclusive else reader)(hold.who, hold.begin, hold.last, value)
