"""Ways through the model: all of them, or many at random; and what must be so at the end."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from cluster_directory import NAMES, Violation, state_of
from cluster_model import (
    Choice,
    Faults,
    Host,
    World,
    choices,
    follow,
    tell,
)
from cluster_program import Script

from flockshim.cluster_names import FREE, StateName, claim_text, keeper_of

PATIENCE = 4000
"""Steps within which a run without further faults must end."""


class Found(NamedTuple):
    """What an exploration has seen."""

    worlds: int
    ends: int


def begin(
    scripts: Iterable[Script],
    faults: Faults,
    one_domain: bool = False,
    hard_links: bool = True,
    born: bool = False,
) -> World:
    """Return the world in which hosts with these scripts have not begun; the directory is empty, or has a free lock."""
    hosts = tuple(
        tell(Host(f"{number + 10:x}", "d" if one_domain else f"d{number}", script), ("result", None))
        for number, script in enumerate(scripts)
    )
    files = {NAMES.claim: claim_text("1"), NAMES.state(StateName("1", 0, FREE)): claim_text("1")} if born else {}
    return World(tuple(sorted(files.items())), hosts, faults, hard_links, check_refusals=not faults.stale_look)


def is_over(world: World) -> bool:
    """Whether nobody will do anything any more."""
    return all(host.end for host in world.hosts)


def check_end(world: World, without_faults: bool) -> None:
    """Check what is left, and what is left when one more host has come, locked, and cleaned. Raises Violation."""
    done = [host.keeper for host in world.hosts if host.end == "done"]
    state = state_of(world.files)
    left = [entry.ticket for entry in state[1].entries() if keeper_of(entry.ticket) in done] if state else []
    if left:
        raise Violation(f"{left} have gone, and still hold or wait")
    if without_faults:
        _check_files(world)
    finished = tuple(host._replace(end="crashed") for host in world.hosts)
    last = tell(Host("ffff", "elsewhere", ((True, True),), cleans=True), ("result", None))
    world = world._replace(hosts=(*finished, last), faults=Faults())
    for _ in range(PATIENCE):
        if world.hosts[-1].end:
            _check_files(world)
            return
        world = follow(world, ("step", len(finished)))
    raise Violation(f"who comes last is not served: {world.files}")


def _check_files(world: World) -> None:
    state = state_of(world.files)
    names = sorted(name for name, _ in world.files)
    if state is None or state[1].holders or names != sorted([NAMES.claim, NAMES.state(StateName(*state[0]))]):
        raise Violation(f"left over: {names}")


def explore(start: World, limit: int = 10**7, switches: int | None = None) -> Found:
    """Try all that can happen, worlds that are alike once. Raises Violation, which tells the way to it.

    From every world that can be reached an end must be reachable: whoever lives will be served. With `switches`, only
    as many times may a host be made to stand still when it could go on (while it holds or waits it may always).
    """
    start = start._replace(switches=switches)
    first = start.key()
    ways: dict[bytes, tuple[bytes, Choice] | None] = {first: None}
    into: dict[bytes, list[bytes]] = {first: []}
    ends: list[bytes] = []
    todo = [(first, start)]
    while todo:
        key, world = todo.pop()
        if is_over(world):
            ends.append(key)
            _attempt(lambda world=world: check_end(world, world.faults == start.faults), ways, key)
        for choice in choices(world):
            after = _attempt(lambda world=world, choice=choice: follow(world, choice), ways, key, choice)
            found = after.key()
            if found not in ways:
                if len(ways) >= limit:
                    raise AssertionError(f"more than {limit} worlds")
                ways[found] = (key, choice)
                into[found] = []
                todo.append((found, after))
            into[found].append(key)
    _check_all_end(into, ends, ways)
    return Found(len(ways), len(ends))


def _check_all_end(
    into: dict[bytes, list[bytes]], ends: list[bytes], ways: dict[bytes, tuple[bytes, Choice] | None]
) -> None:
    good, todo = set(ends), list(ends)
    while todo:
        for before in into[todo.pop()]:
            if before not in good:
                good.add(before)
                todo.append(before)
    for key in ways:
        if key not in good:
            raise Violation(f"somebody waits for ever after {_way(ways, key)}")


def _attempt(action, ways, key, *more):  # type: ignore[no-untyped-def]
    try:
        return action()
    except (Violation, OSError) as error:
        raise Violation(f"{error}, after {[*_way(ways, key), *more]}") from error


def _way(ways: dict[bytes, tuple[bytes, Choice] | None], key: bytes) -> list[Choice]:
    way = []
    step = ways[key]
    while step is not None:
        way.append(step[1])
        step = ways[step[0]]
    return way[::-1]


def walk(start: World, seed: int, fault_share: float = 0.1) -> int:
    """Go one way at random, then on without faults to the end. Returns the number of steps; raises Violation."""
    chance = random.Random(seed)
    # Hosts that go on for long while others stand still find more than fair ones.
    steadiness = chance.choice((0.0, 0.5, 0.9))
    world, way, last = start, [], -1
    for steps in range(PATIENCE):
        if is_over(world):
            _finish(world, start, seed, way)
            return steps
        possible = choices(world)
        faults = [choice for choice in possible if choice[0] != "step"]
        normal = [choice for choice in possible if choice[0] == "step"]
        choice = chance.choice(faults if faults and (chance.random() < fault_share or not normal) else normal)
        if choice in normal and ("step", last) in normal and chance.random() < steadiness:
            choice = ("step", last)
        way.append(choice)
        last = choice[1]
        try:
            world = follow(world, choice)
        except (Violation, OSError) as error:
            raise Violation(f"{error}, with seed {seed} after {way}") from error
    raise Violation(f"somebody waits for ever with seed {seed}: {world.files}")


def _finish(world: World, start: World, seed: int, way: list[Choice]) -> None:
    try:
        check_end(world, world.faults == start.faults)
    except (Violation, OSError) as error:
        raise Violation(f"{error}, with seed {seed} after {way}") from error
