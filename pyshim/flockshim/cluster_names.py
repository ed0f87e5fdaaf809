"""The names of the files that cluster mode keeps beside a target NAME, and which of them nobody will use again.

    .NAME.flockshim                                  claim: which lineage is in force; made once, stays for good
    .NAME.flockshim.LINEAGE.VERSION.STATE            state: its name is what it says
    .NAME.flockshim.LINEAGE.VERSION+WRITER           data: the text of state `dWRITER` of that version
    .flockshim.KEEPER                                vouching file: that keeper is alive

Record locks on NAME have files of their own: their target is called NAME~records.

STATE is `free`, `xTICKET` (one exclusive holder), `sTICKET` (one reader), both granted at this very version, or
`dWRITER`. A TICKET is `KEEPER-SERIAL`; a WRITER is formed alike. No ticket and no writer is ever used twice.
"""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

LINEAGE_DIGITS = 16
MAX_KEEPER = 24
MAX_SERIAL_DIGITS = 10
MAX_VERSION_DIGITS = 15
NAME_MAX = 255

FREE = "free"
RECORDS = "~records"
"""What follows a file's name in that of the target of its record locks."""
_TICKET = rf"[0-9a-f]{{1,{MAX_KEEPER}}}-[0-9]+"
_STATE = re.compile(rf"([0-9a-f]+)\.([0-9]+)\.({FREE}|[xsd]{_TICKET})")
_DATA = re.compile(rf"([0-9a-f]+)\.([0-9]+)\+({_TICKET})")
_CLAIM = re.compile(r"(?:.*\n)?lineage ([0-9a-f]+)\n?", re.DOTALL)
_VOUCHING = ".flockshim."
_NOTICE = "flockshim records here who holds the lock on the file of this name. Leave it while programs run.\n"


def new_lineage() -> str:
    """Return a lineage that nobody has."""
    return os.urandom(LINEAGE_DIGITS // 2).hex()


class StateName(NamedTuple):
    """A state file's name, taken apart; `token` is the STATE."""

    lineage: str
    version: int
    token: str


class DataName(NamedTuple):
    """A data file's name, taken apart."""

    lineage: str
    version: int
    writer: str


class Names:
    """The names beside one target."""

    def __init__(self, target: str) -> None:
        """`target` is a name in the directory, as of os.fsdecode.

        Raises OSError ENAMETOOLONG unless every name that may ever be needed fits in NAME_MAX bytes: a version that
        has grown must not be what makes a lock fail.
        """
        self.claim = f".{target}.flockshim"
        longest = LINEAGE_DIGITS + MAX_VERSION_DIGITS + MAX_KEEPER + MAX_SERIAL_DIGITS + len("..x-.")
        if len(os.fsencode(self.claim)) + longest > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), target)

    def state(self, name: StateName) -> str:
        """Return the state file's name."""
        return f"{self.claim}.{name.lineage}.{name.version}.{name.token}"

    def data(self, name: DataName) -> str:
        """Return the data file's name."""
        return f"{self.claim}.{name.lineage}.{name.version}+{name.writer}"

    def parse(self, name: str) -> StateName | DataName | None:
        """Return what a name in the directory is to this target, or None. Raises nothing."""
        prefix = self.claim + "."
        if not name.startswith(prefix):
            return None
        rest = name[len(prefix) :]
        match = _STATE.fullmatch(rest)
        if match:
            return StateName(match[1], int(match[2]), match[3])
        match = _DATA.fullmatch(rest)
        return DataName(match[1], int(match[2]), match[3]) if match else None


def data_of(name: StateName) -> DataName | None:
    """Return the data file that belongs to a state, or None if its name says everything."""
    return DataName(name.lineage, name.version, name.token[1:]) if name.token[0] == "d" else None


def is_litter(name: StateName | DataName, seen: StateName) -> bool:
    """Return whether nobody will ever use this file, given that the state `seen`, of the claimed lineage, existed.

    The claim never changes, so a state file of another lineage is that of a lost birth. The version only grows: a
    data file was made for one version, and once that has been seen under another name, or passed, none can get it.
    """
    if name.lineage != seen.lineage:
        return True
    if isinstance(name, StateName):
        return False
    return name.version < seen.version or (name.version == seen.version and name != data_of(seen))


def claim_text(lineage: str) -> str:
    """Return the text of a state file, and so of the claim that is linked to it."""
    return f"{_NOTICE}lineage {lineage}\n"


def claim_target(lineage: str) -> str:
    """Return the target of a claim that is a symbolic link."""
    return f"lineage {lineage}"


def lineage_of_claim(text: str) -> str | None:
    """Return the lineage that a claim's text or target names, or None if it is none."""
    match = _CLAIM.fullmatch(text)
    return match[1] if match else None


def vouching_name(keeper: str) -> str:
    """Return the name of the keeper's vouching file."""
    return _VOUCHING + keeper


def keeper_of_vouching(name: str) -> str | None:
    """Return whose vouching file this is, or None if it is none."""
    match = re.fullmatch(rf"{re.escape(_VOUCHING)}([0-9a-f]{{1,{MAX_KEEPER}}})", name)
    return match[1] if match else None


def keeper_of(ticket: str) -> str:
    """Return the keeper of a ticket."""
    return ticket.rpartition("-")[0]
