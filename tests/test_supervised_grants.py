"""What a keeper makes of a supervisor's calls whose programs may be gone by the time when they are granted.

Histories of calls on two descriptions of one file, in which each grant is delivered, or its program gone, at any later
moment: a lock that a program was told of ends only when it is unlocked, and one that nobody was told of is not left
over. The test itself talks to the keeper, so that what comes first is not left to chance.
"""

from __future__ import annotations

import errno
import os
import random
import socket
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import shim_environment
from support.driver import EX, NB, SH, UN

from flockshim._native import ffi, lib
from flockshim.locking import Locker

# shim/protocol.h
MAGIC, LOCK, CANCEL, TAKEN = 0x4B434C46, 1, 2, 8
KIND = slice(6, 8)

KINDS = ["exclusive"] * 3 + ["shared", "downgrade"] + ["deliver"] * 2 + ["gone"] * 2 + ["killed", "unlock"]
SEEDS = 20000 if os.environ.get("FLOCKSHIM_SOAK") == "1" else 150


class Call:
    """A call that a keeper was asked for."""

    def __init__(self, keeper: Path, descriptor: int, operation: int) -> None:
        self.descriptor = descriptor
        self.operation = operation
        self.void = False  # somebody has unlocked since it was granted
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(str(keeper))
        self._send(LOCK, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))])

    def _send(self, kind: int, rights: list[tuple[int, int, array[int]]]) -> None:
        status = os.fstat(self.descriptor)
        request = ffi.new("struct protocol_request *")
        request.magic, request.version, request.kind = MAGIC, lib.PROTOCOL_VERSION, kind
        request.operation, request.descriptor = self.operation, self.descriptor
        request.device, request.inode = status.st_dev, status.st_ino
        request.timeout, request.pid = -1, os.getpid()
        self._connection.sendmsg([bytes(ffi.buffer(request))], rights)

    def is_granted(self, flags: int = 0) -> bool:
        """Whether that is what the keeper says; with MSG_DONTWAIT, whether it says so already."""
        try:
            answer = self._connection.recv(500, flags)
        except BlockingIOError:
            return False
        return int.from_bytes(answer[KIND], "little") == int(lib.KIND_GRANT)

    def deliver(self) -> None:
        self._send(TAKEN, [])
        self._connection.close()

    def hang_up(self) -> None:
        self._connection.close()

    def give_up(self) -> None:
        self._send(CANCEL, [])
        while self.is_granted():
            continue
        self._connection.close()


class Keeper:
    """A keeper, asked as a supervisor asks."""

    def __init__(self, rendezvous: Path, directory: Path) -> None:
        self.path, self._beside = directory / "file", directory / "beside"
        self.path.touch()
        self._beside.touch()
        # A lock call starts it.
        locker = Locker(shim_environment(rendezvous))
        with open(self._beside) as file:
            for operation in EX, UN:
                assert locker.by_mode(file.fileno(), operation, errno.ENOSYS) == 0
        (self._socket,) = rendezvous.glob("k-*.sock")

    def ask(self, descriptor: int, operation: int) -> Call:
        return Call(self._socket, descriptor, operation)

    def is_free(self, path: Path | None = None) -> bool:
        """Whether the lock can be had alone. It is given back."""
        with open(path or self.path) as file:
            call = self.ask(file.fileno(), EX | NB)
            granted = call.is_granted()
            if granted:
                call.deliver()
                self.ask(file.fileno(), UN).is_granted()
        return granted

    def catch_up(self) -> None:
        """Return when it has heeded what was said before: see `World.await_blocked`."""
        for _ in range(2):
            assert self.is_free(self._beside)


class History:
    """Calls on two descriptions, and of which a program was told that it holds."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.descriptors = [os.open(keeper.path, os.O_RDWR) for _ in range(2)]
        self.waiting: list[Call] = []
        self.granted: list[Call] = []
        self.told: dict[int, int] = {}

    def step(self, kind: str, number: int) -> None:
        descriptor = self.descriptors[number % 4 == 0]
        calls = self.granted if kind == "deliver" else self.waiting + self.granted
        if kind in ("exclusive", "shared"):
            self._ask(descriptor, EX if kind == "exclusive" else SH)
        elif kind == "unlock":
            self.keeper.ask(descriptor, UN).is_granted()
            self.told.pop(descriptor, None)
            for call in self.granted:
                call.void |= call.descriptor == descriptor
        elif kind == "downgrade":
            self._downgrade(descriptor)
        elif calls:
            call = calls[number % len(calls)]
            self._end(call, kind)
            (self.granted if call in self.granted else self.waiting).remove(call)
        self.keeper.catch_up()
        self._collect()
        if not self.waiting and not self.granted:
            assert self.keeper.is_free() == (not self.told)

    def _ask(self, descriptor: int, operation: int, converts: bool = False) -> None:
        """Only calls for one mode are under way at a time on a description: else which comes first is open."""
        others = [call for call in self.waiting + self.granted if call.descriptor == descriptor]
        same = self.told.get(descriptor, operation) == operation
        if all(call.operation == operation for call in others) and (same or converts):
            self.waiting.append(self.keeper.ask(descriptor, operation))

    def _downgrade(self, descriptor: int) -> None:
        """Whoever makes an exclusive lock shared has a lock before and after, so that it is never taken back."""
        if self.told.get(descriptor) == EX and not any(call.descriptor == descriptor for call in self.granted):
            self._ask(descriptor, SH, converts=True)
            self.told[descriptor] = SH

    def _end(self, call: Call, kind: str) -> None:
        """A supervisor that is killed may have told the program before."""
        if kind == "gone":
            call.give_up()
            return
        was_granted = call in self.granted
        if kind == "deliver":
            call.deliver()
        else:
            call.hang_up()
        if was_granted and not call.void:
            self.told[call.descriptor] = call.operation
            self._check(call)

    def _collect(self) -> None:
        for call in [call for call in self.waiting if call.is_granted(socket.MSG_DONTWAIT)]:
            self.waiting.remove(call)
            self.granted.append(call)
            self._check(call)

    def _check(self, call: Call) -> None:
        others = [operation for descriptor, operation in self.told.items() if descriptor != call.descriptor]
        assert not others or (call.operation == SH and EX not in others), "two holders"

    def end(self) -> None:
        """Nobody is told of anything any more, and then nothing is held but what somebody was told of."""
        while self.waiting or self.granted:
            self.step("gone", 0)
        for descriptor in self.descriptors:
            self.keeper.ask(descriptor, UN).is_granted()
            os.close(descriptor)
        assert self.keeper.is_free()


@pytest.fixture(scope="module")
def keeper(session_rendezvous: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    return Keeper(session_rendezvous, tmp_path_factory.mktemp("grants"))


def _history(keeper: Keeper, seed: int) -> None:
    chance = random.Random(seed)
    history = History(keeper)
    for _ in range(25):
        history.step(chance.choice(KINDS), chance.randrange(12))
    history.end()


def test_what_was_told_is_held_and_nothing_else(keeper: Keeper) -> None:
    for seed in range(SEEDS):
        _history(keeper, seed)
