"""Processes that write to one SQLite database: ``transactions.py PROCESSES REST SYNCHRONOUS URI``.

For each line with a number on standard input: they all make transactions, each of which raises one number in the
database, for that many milliseconds; after each they rest for REST milliseconds. What is printed is how many
transactions had ended by then; and of the nanoseconds that each of them all took, waiting included: the median, the
99th percentile and the longest.
"""

from __future__ import annotations

import os
import sqlite3
import struct
import sys
import time
from array import array
from typing import NoReturn

from table import median, quantile

PATIENCE = 120.0
NUMBER = struct.Struct("=q")
READY = b"r"


def connect(uri: str, synchronous: str) -> sqlite3.Connection:
    """Return a connection that tries again for long where the database is locked."""
    connection = sqlite3.connect(uri, timeout=PATIENCE, isolation_level=None, uri=True)
    connection.execute(f"pragma synchronous = {synchronous}")
    return connection


def create(uri: str) -> None:
    """Make the database."""
    connection = connect(uri, "off")
    connection.execute("create table counter (number integer)")
    connection.execute("insert into counter values (0)")
    connection.close()


def check(uri: str, transactions: int) -> None:
    """End the process unless all transactions are in the database."""
    connection = connect(uri, "off")
    (number,) = connection.execute("select number from counter").fetchone()
    (state,) = connection.execute("pragma integrity_check").fetchone()
    connection.close()
    if number != transactions or state != "ok":
        raise SystemExit(f"{uri}: {number} transactions of {transactions}, integrity check: {state}")


def write(connection: sqlite3.Connection, rest: float, deadline: int) -> tuple[int, array[int]]:
    """Return how many transactions ended before the deadline, and the nanoseconds of all."""
    taken = array("q")
    in_time = 0
    begin = time.monotonic_ns()
    while begin < deadline:
        connection.execute("update counter set number = number + 1")
        end = time.monotonic_ns()
        taken.append(end - begin)
        in_time += end <= deadline
        if rest:
            time.sleep(rest)
        begin = time.monotonic_ns()
    return in_time, taken


def be_writer(uri: str, synchronous: str, rest: float, go: int, out: int) -> NoReturn:
    """Make transactions in a process of its own."""
    try:
        with os.fdopen(out, "wb", buffering=0) as answers:
            connection = connect(uri, synchronous)
            connection.execute("select number from counter").fetchone()
            answers.write(READY)
            (deadline,) = NUMBER.unpack(os.read(go, NUMBER.size))
            in_time, taken = write(connection, rest, deadline)
            connection.close()
            answers.write(NUMBER.pack(in_time))
            taken.tofile(answers)
        os._exit(0)
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def compete(uri: str, synchronous: str, processes: int, rest: float, milliseconds: int) -> tuple[int, list[int]]:
    """Return how many transactions ended in time, and the nanoseconds of all."""
    go, tell_go = os.pipe()
    writers = []
    for _ in range(processes):
        out, write_out = os.pipe()
        pid = os.fork()
        if pid == 0:
            # Should we fail, it must not wait for ever.
            os.close(tell_go)
            be_writer(uri, synchronous, rest, go, write_out)
        os.close(write_out)
        writers.append((pid, os.fdopen(out, "rb")))
    if any(answers.read(len(READY)) != READY for _, answers in writers):
        raise SystemExit("a writer cannot begin")
    os.write(tell_go, NUMBER.pack(time.monotonic_ns() + milliseconds * 1_000_000) * processes)
    os.close(tell_go)
    in_time = 0
    taken = array("q")
    for pid, answers in writers:
        with answers:
            answer = answers.read()
        if os.waitpid(pid, 0)[1]:
            raise SystemExit("a writer has failed")
        in_time += NUMBER.unpack(answer[: NUMBER.size])[0]
        taken.frombytes(answer[NUMBER.size :])
    os.close(go)
    return in_time, list(taken)


def main() -> None:
    processes, rest, synchronous, uri = sys.argv[1:]
    create(uri)
    done = 0
    for line in sys.stdin:
        in_time, taken = compete(uri, synchronous, int(processes), float(rest) / 1000, int(line))
        done += len(taken)
        check(uri, done)
        print(in_time, int(median(taken)), quantile(taken, 0.99), max(taken), flush=True)


if __name__ == "__main__":
    main()
