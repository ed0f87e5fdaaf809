"""Two versions of flockshim meet: a keeper and a program that don't speak the same protocol."""

from __future__ import annotations

import array
import os
import socket
import struct
from pathlib import Path

import pytest
from support.driver import BUSY, EX, OK, SH
from support.worlds import World

# shim/protocol.h: magic, version and kind, which never change; the rest may.
HEAD = struct.Struct("=IHH")
MAGIC = 0x4B434C46
KIND_LOCK, KIND_REFUSAL = 1, 4
ANSWER_HEAD = 12
REST_OF_OURS = 32


@pytest.mark.parametrize("version", [0, 1, 65535])
@pytest.mark.parametrize("rest", [16, REST_OF_OURS, 200], ids=["short", "same", "long"])
@pytest.mark.parametrize("descriptors", [0, 1])
def test_a_program_of_another_version_is_refused_with_a_clear_line(
    fresh_world: World, rendezvous: Path, version: int, rest: int, descriptors: int
) -> None:
    driver, fd = fresh_world.opened()
    assert driver.flock(fd, EX) == OK
    (path,) = [entry for entry in rendezvous.iterdir() if entry.is_socket()]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(str(path))
        file = os.open(fresh_world.file(), os.O_RDONLY)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
        request = HEAD.pack(MAGIC, version, KIND_LOCK) + bytes(rest)
        stranger.sendmsg([request], rights if descriptors else [])
        os.close(file)
        answer = stranger.recv(4096)
    magic, _, kind = HEAD.unpack_from(answer)
    assert (magic, kind) == (MAGIC, KIND_REFUSAL)
    text = answer[ANSWER_HEAD:].rstrip(b"\0").decode()
    assert "version" in text and "\n" not in text
    assert fresh_world.probe(fresh_world.file(), SH) == BUSY
