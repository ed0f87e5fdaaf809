"""Hosts that run the cluster protocol on a model file system, one operation at a time, with all that can go wrong.

A `World` is a value: what the directory holds, and of each host what it has been told. The host's generators are made
again from that when it moves. So all that can follow from a world can be tried, and worlds that are alike only once.
"""

from __future__ import annotations

import errno
import hashlib
import os
from typing import Any, NamedTuple

from cluster_directory import REPEATED, TARGET, Violation, half, perform, state_of
from cluster_program import Hold, Observe, Refused, Script, Surroundings, program

from flockshim import cluster_ops as ops
from flockshim.cluster import Lease
from flockshim.cluster_names import keeper_of
from flockshim.cluster_state import State


class Faults(NamedTuple):
    """How often each may still happen in a run."""

    crash: int = 0
    restart: int = 0  # of a host that has crashed: another keeper in the same domain
    lapse: int = 0  # a host cannot vouch for so long that others may think it dead, whenever they like
    lost: int = 0  # an operation is done, and the answer is that of its repetition
    eio: int = 0  # an operation fails with EIO, done or not
    stale_look: int = 0  # a lookup is answered with what the host saw before
    stale_list: int = 0  # a scan likewise


class Host(NamedTuple):
    """A host: `told` is all that its generators were told, from which they follow."""

    keeper: str
    domain: str
    script: Script
    cleans: bool = False
    told: tuple[Any, ...] = ()
    op: Any = None
    scanned: tuple[str, ...] | None = None  # the first half of a scan that is under way
    seen: tuple[tuple[str, str | None], ...] = ()
    listed: tuple[str, ...] | None = None
    lapsed: int = 0  # tickets with a serial below may be thought dead
    stopped: bool = False  # there was a lapse since `op` was yielded, or since a conversion began
    converts: bool = False
    met_holder: bool = False
    digest: str = ""
    end: str = ""


class World(NamedTuple):
    """Everything, at one moment."""

    files: tuple[tuple[str, str], ...]
    hosts: tuple[Host, ...]
    faults: Faults
    hard_links: bool = True
    switches: int | None = None  # how often a host that could go on may still be made to stand still; None: always
    last: int = -1  # who moved last, if that is limited
    check_refusals: bool = True
    last_exclusive: int = 0
    last_token: int = 0
    last_holder: str = ""

    def key(self) -> bytes:
        """What tells this world from others: all but the way to it, and what no longer matters."""
        parts = [host._replace(told=(), script=()) for host in self.hosts]
        if not self.faults.stale_look:
            parts = [host._replace(seen=()) for host in parts]
        if not self.faults.stale_list:
            parts = [host._replace(listed=None) for host in parts]
        return hashlib.blake2b(repr(self._replace(hosts=tuple(parts))).encode(), digest_size=12).digest()


class Machine:
    """A host's generators, brought to where they are by all that they were told."""

    def __init__(self, host: Host) -> None:
        self.around = Surroundings(host.keeper)
        around: Any = self.around
        self.lease = Lease(TARGET, around.new_ticket, around.new_lineage, around, around)
        self.run = program(self.lease, self.around, host.script, host.cleans)
        self.ended = False
        for told in host.told:
            self.tell(told)

    def tell(self, told: Any) -> Any:
        """Pass on a result, an error, or what happens around; return what is yielded then."""
        kind, value = told
        if kind == "lapse":
            self.around.lapses += 1
        elif kind == "dead":
            self.around.dead_keepers.add(value)
        else:
            try:
                if kind == "error":
                    return self.run.throw(OSError(value, os.strerror(value)))
                return self.run.send(value)
            except StopIteration:
                self.ended = True
        return None

    def digest(self) -> str:
        """All that decides how the host goes on."""
        frames, run = [], self.run
        while run is not None and run.gi_frame is not None:
            local = {k: _plain(v) for k, v in run.gi_frame.f_locals.items() if k not in ("self", "lease", "around")}
            frames.append((run.gi_frame.f_code.co_name, run.gi_frame.f_lasti, sorted(local.items())))
            run = run.gi_yieldfrom
        lease = [(k, _plain(v)) for k, v in vars(self.lease).items() if not callable(v) and v is not self.around]
        around = [_plain(v) for v in vars(self.around).values()]
        lease = [item for item in lease if item[0] not in ("_names", "_target")]
        return repr((frames, lease, around))


def _plain(value: Any) -> Any:
    return sorted(value, key=repr) if isinstance(value, set) else value


# What may happen next.

Choice = tuple[str, int]


def choices(world: World) -> list[Choice]:
    """All that may happen next: (what, to which host)."""
    found = _all_choices(world)
    if world.switches == 0 and _is_switch(world, -1):
        return [choice for choice in found if not _is_switch(world, choice[1])]
    return found


def _is_switch(world: World, number: int) -> bool:
    if world.last in (-1, number):
        return False
    host = world.hosts[world.last]
    return not host.end and not isinstance(host.op, (Hold, ops.Wait, ops.Pause))


def _all_choices(world: World) -> list[Choice]:
    found: list[Choice] = []
    files = dict(world.files)
    for number, host in enumerate(world.hosts):
        if host.end == "crashed":
            found += [("restart", number)] if world.faults.restart else []
            found += [("late", number)] if host.op is not None else []
        if host.end:
            continue
        found.append(("step", number))
        op, faults = host.op, world.faults
        found += [(what, number) for what in ("crash", "lapse") if getattr(faults, what)]
        if type(op) in REPEATED:
            found += [("lost", number)] if faults.lost else []
            found += [("eio-done", number)] if faults.eio else []
        if faults.eio and isinstance(op, (*REPEATED, ops.Look, ops.Read, ops.List)):
            found.append(("eio", number))
        seen = dict(host.seen)
        if faults.stale_look and isinstance(op, (ops.Look, ops.Read)) and op.name in seen:
            found += [("stale_look", number)] if seen[op.name] != files.get(op.name) else []
        if faults.stale_list and isinstance(op, ops.List) and host.scanned is None and host.listed is not None:
            found += [("stale_list", number)] if host.listed != tuple(sorted(files)) else []
    return found


def follow(world: World, choice: Choice) -> World:
    """Return the world after this; raises Violation."""
    what, number = choice
    if world.switches is not None:
        world = world._replace(switches=world.switches - _is_switch(world, number), last=number)
    host = world.hosts[number]
    fault = what.partition("-")[0]
    if what == "late":
        # The server does it at last, for a client that is gone.
        told, files = host._replace(op=None), dict(world.files)
        _answer(files, host.op, what, {}, world.hard_links)
        after = _put(world._replace(files=tuple(sorted(files.items()))), number, told)
        return check(world, after, host.keeper)
    if fault != "step":
        world = world._replace(faults=world.faults._replace(**{fault: getattr(world.faults, fault) - 1}))
    if what == "crash":
        return _crash(world, number)
    if what == "restart":
        # Another keeper of the same domain, which knows of the kernel's locks who died.
        new = Host(f"{int(host.keeper, 16) + 16:x}", host.domain, host.script)
        dead = [old.keeper for old in world.hosts if old.end == "crashed" and old.domain == host.domain]
        return _put(world, number, tell(new, *(("dead", keeper) for keeper in dead), ("result", None)))
    if what == "lapse":
        return _put(world, number, tell(host, ("lapse", None)))
    return check(world, _step(world, number, what), host.keeper)


def _crash(world: World, number: int) -> World:
    host = world.hosts[number]
    under_way = host.op if type(host.op) in REPEATED else None
    world = _put(world, number, _at_rest(host, "crashed")._replace(op=under_way))
    for other, neighbour in enumerate(world.hosts):
        if neighbour.domain == host.domain and not neighbour.end:
            world = _put(world, other, tell(neighbour, ("dead", host.keeper)))
    return world


def _put(world: World, number: int, host: Host) -> World:
    hosts = list(world.hosts)
    hosts[number] = host
    return world._replace(hosts=tuple(hosts))


def tell(host: Host, *told: Any) -> Host:
    """Return the host after it was told this."""
    machine = Machine(host)
    for item in told:
        op = machine.tell(item)
        if item[0] == "lapse":
            # What was ticketed before may be thought dead by others, from now on and for ever.
            host = host._replace(stopped=True, lapsed=machine.around.serial + 1)
        elif item[0] != "dead":
            converts = machine.around.converts
            host = host._replace(op=op, stopped=host.stopped and converts, converts=converts, scanned=None)
    if machine.ended:
        return _at_rest(host, "done")
    return host._replace(told=host.told + told, digest=machine.digest())


def _at_rest(host: Host, end: str) -> Host:
    return host._replace(end=end, op=None, converts=False, told=(), digest="", seen=(), listed=None, scanned=None)


def _step(world: World, number: int, what: str) -> World:
    host, files = world.hosts[number], dict(world.files)
    op = host.op
    if isinstance(op, Observe):
        dead = tuple(ticket for ticket in op.tickets if is_thought_dead(world, ticket))
        return _put(world, number, tell(host, ("result", dead)))
    if isinstance(op, ops.List) and what != "eio":
        return _put(world, number, _scan(host, files, what))
    if not isinstance(op, tuple) or isinstance(op, (Hold, Refused, ops.Pause, ops.Wait)):
        return _put(world, number, tell(host, ("result", None)))
    seen = dict(host.seen)
    told = _answer(files, op, what, seen, world.hard_links)
    host = tell(host._replace(seen=tuple(sorted(seen.items(), key=lambda item: item[0]))), told)
    return _put(world._replace(files=tuple(sorted(files.items()))), number, host)


def _scan(host: Host, files: dict[str, str], what: str) -> Host:
    if what == "stale_list":
        assert host.listed is not None
        names = host.listed
    elif host.scanned is None:
        return host._replace(scanned=half(files, 0))
    else:
        names = host.scanned + half(files, 1)
    seen = dict(host.seen)
    # A scan fills the client's cache of lookups too.
    seen.update({name: files.get(name, seen.get(name)) for name in names})
    found = [name for name in names if name.startswith(host.op.prefix)]
    host = host._replace(seen=tuple(sorted(seen.items(), key=lambda item: item[0])), listed=tuple(sorted(names)))
    return tell(host, ("result", found))


def _answer(files: dict[str, str], op: Any, what: str, seen: dict[str, str | None], hard_links: bool) -> Any:
    if what == "stale_look":
        text = seen[op.name]
        if text is None:
            return "error", errno.ENOENT
        return "result", text if isinstance(op, ops.Read) else None
    if what == "eio":
        return "error", errno.EIO
    told: Any
    try:
        told = "result", perform(files, op, hard_links)
        if what == "lost":
            told = "error", REPEATED[type(op)]
    except OSError as error:
        told = "error", error.errno
    if what == "eio-done":
        return "error", errno.EIO
    # That the host itself has renamed or removed the file does not make it forget: a client may be several.
    for name in (op.name, getattr(op, "new", op.name)):
        if name in files or isinstance(op, (ops.Look, ops.Read)):
            seen[name] = files.get(name)
    return told


def is_thought_dead(world: World, ticket: str) -> bool:
    """Whether somebody may think so: its keeper has ended, or has lapsed since it took the ticket."""
    for host in world.hosts:
        if host.keeper == keeper_of(ticket):
            return host.end == "crashed" or int(ticket.rpartition("-")[2]) < host.lapsed
    return True


# What must hold.


def holds(host: Host) -> bool:
    """Whether the host's program runs on with the lock, not having been stopped by a lapse."""
    return (isinstance(host.op, Hold) or host.converts) and not host.stopped


def check(before: World, after: World, mover: str) -> World:
    """Check a step of a host, and return the world after it with what was learnt. Raises Violation."""
    was, now = state_of(before.files), state_of(after.files)
    if was is not None:
        if now is None or was[0].lineage != now[0].lineage:
            raise Violation("the claim changed")
        if was[0] != now[0]:
            if now[0].version != was[0].version + 1:
                raise Violation(f"version {was[0].version} became {now[0].version}")
            _check_entries(after, was[1], now[1], mover)
    _check_holders(after)
    after = _check_tokens(before, after)
    hosts = []
    for host, earlier in zip(after.hosts, before.hosts):
        if isinstance(host.op, Refused) and not host.met_holder and after.check_refusals:
            raise Violation(f"{host.keeper} was refused, though nobody held the lock since it asked")
        held = now is not None and any(keeper_of(entry.ticket) != host.keeper for entry in now[1].holders)
        asks_anew = isinstance(earlier.op, (Hold, Refused)) and earlier.op != host.op
        hosts.append(host._replace(met_holder=held or (host.met_holder and not asks_anew)))
    return after._replace(hosts=tuple(hosts))


def _check_entries(world: World, was: State, now: State, mover: str) -> None:
    """Nobody alive is put out by another, nobody passes those who wait, and nobody is there twice."""
    keepers = [keeper_of(entry.ticket) for entry in now.entries()]
    if len(set(keepers)) < len(keepers):
        raise Violation(f"one keeper has two entries: {now}")
    kept = [e.ticket for e in was.entries() if keeper_of(e.ticket) != mover and not is_thought_dead(world, e.ticket)]
    holders, queue = ([entry.ticket for entry in entries] for entries in (now.holders, now.queue))
    for ticket in kept:
        if ticket not in holders + queue:
            raise Violation(f"{ticket} was put out by {mover}")
        if ticket in queue and ticket in [entry.ticket for entry in was.holders]:
            raise Violation(f"{ticket} held, and waits now")
    waited = [entry.ticket for entry in was.queue]
    if [ticket for ticket in waited if ticket in queue] != queue[: len([t for t in queue if t in waited])]:
        raise Violation(f"the queue {waited} became {queue}")
    if queue and not holders:
        raise Violation(f"nobody holds, and {queue} wait")


def _check_holders(world: World) -> None:
    holding = [host for host in world.hosts if holds(host)]
    if len(holding) > 1 and any(isinstance(host.op, Hold) and host.op.exclusive for host in holding):
        raise Violation(f"at once: {[(host.keeper, host.op) for host in holding]}")


def _check_tokens(before: World, after: World) -> World:
    for host, earlier in zip(after.hosts, before.hosts):
        if isinstance(host.op, Hold) and host.op != earlier.op:
            exclusive, token = host.op
            last = after.last_token if exclusive else after.last_exclusive
            if token < last or (token == last and host.keeper != after.last_holder):
                raise Violation(f"fencing token {token} after {last}")
            after = after._replace(
                last_token=max(token, after.last_token),
                last_exclusive=token if exclusive else after.last_exclusive,
                last_holder=host.keeper,
            )
    return after
