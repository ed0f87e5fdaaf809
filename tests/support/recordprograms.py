"""Programs of all kinds that lock by fcntl(2), and the calls of those that are not at hand.

All take the words ``hold FILE 0`` (try to lock it, say "locked", read a line, unlock, say "unlocked", read a line) and
``count FILE TURNS`` (so many times: wait for the lock, add 1 to the number in FILE.number, unlock). What they lock of
it has byte 21 in it.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple

from flockshim.pytest_plugin import require
from support.programs import program

PYTHON = """
import errno, fcntl, mailbox, os, sys, time

{acquire}

action, path, turns = sys.argv[1:]
if action == "hold":
    release = acquire(path, False)
    print("locked", flush=True)
    sys.stdin.readline()
    release()
    print("unlocked", flush=True)
    sys.stdin.readline()
else:
    for turn in range(int(turns)):
        release = acquire(path, True)
        with open(path + ".number", "r+") as file:
            number = int(file.read())
            file.seek(0)
            file.write(str(number + 1) + "\\n")
        release()
"""
LOCKF = """
def acquire(path, wait):
    file = open(path, "a")
    fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    return file.close
"""
# conda: one byte of the file that holds the index; ten attempts, here with less patience.
CONDA = """
def acquire(path, wait):
    file = open(path, "a+")
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 21)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if not wait:
                sys.exit("LockError: Failed to acquire lock.")
            time.sleep(0.001)
        else:
            return lambda: fcntl.lockf(file, fcntl.LOCK_UN, 1, 21)
"""
# Spack: a range to read, then to write, never waiting in the kernel.
SPACK = """
def lock(file, operation, wait):
    while True:
        try:
            return fcntl.lockf(file, operation | fcntl.LOCK_NB, 8, 16, os.SEEK_SET)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if not wait:
                sys.exit("LockTimeoutError: Timed out waiting for lock.")
            if operation == fcntl.LOCK_EX:
                fcntl.lockf(file, fcntl.LOCK_UN, 8, 16, os.SEEK_SET)
            time.sleep(0.001)


def acquire(path, wait):
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT), "r+")
    lock(file, fcntl.LOCK_SH, wait)
    lock(file, fcntl.LOCK_EX, wait)
    file.seek(0)
    file.write(f"pid={os.getpid()},host=here")
    file.flush()

    def release():
        lock(file, fcntl.LOCK_SH, False)
        fcntl.lockf(file, fcntl.LOCK_UN, 8, 16, os.SEEK_SET)
        file.close()

    return release
"""
# A mail box is locked by fcntl(2) and by a file beside it.
MAILBOX = """
def acquire(path, wait):
    box = mailbox.mbox(path)
    while True:
        try:
            box.lock()
        except mailbox.ExternalClashError:
            if not wait:
                raise
            time.sleep(0.001)
        else:
            return box.close
"""
PERL = """
use Fcntl qw(:DEFAULT :flock :seek); use IO::Handle; $| = 1;
my ($action, $path, $turns) = @ARGV;
sub range { pack("s s x![q] q q i x![q]", $_[0], SEEK_SET, 0, 0, 0) }
sub acquire {
    open(my $file, "+>>", $path) or die;
    fcntl($file, $_[0], range(F_WRLCK)) or die "fcntl: $!\\n";
    return $file;
}
if ($action eq "hold") {
    my $file = acquire(F_SETLK);
    print "locked\\n"; <STDIN>;
    fcntl($file, F_SETLK, range(F_UNLCK)) or die;
    print "unlocked\\n"; <STDIN>;
} else {
    for (1..$turns) {
        my $file = acquire(F_SETLKW);
        open(my $numbers, "+<", "$path.number") or die;
        my $number = <$numbers>;
        seek($numbers, 0, 0); print $numbers $number + 1, "\\n"; close($numbers);
        fcntl($file, F_SETLK, range(F_UNLCK)) or die;
    }
}
"""
R = """
library(filelock)
words <- commandArgs(trailingOnly = TRUE)
path <- words[2]
if (words[1] == "hold") {
    held <- lock(path, timeout = 0)
    if (is.null(held)) stop("lock() has returned NULL")
    cat("locked\\n"); input <- file("stdin", "r"); invisible(readLines(input, 1))
    invisible(unlock(held))
    cat("unlocked\\n"); invisible(readLines(input, 1))
} else {
    numbers <- paste0(path, ".number")
    for (turn in seq_len(as.integer(words[3]))) {
        held <- lock(path)
        writeLines(as.character(as.integer(readLines(numbers)) + 1L), numbers)
        unlock(held)
    }
}
"""
# Nextflow tries to lock its history and its cache, and waits for its conda environments.
JAVA = """
import java.io.*;
import java.nio.channels.*;
import java.nio.file.*;

class Lock {
    public static void main(String[] words) throws Exception {
        var file = new RandomAccessFile(words[1], "rw");
        if (words[0].equals("hold")) {
            FileLock lock = file.getChannel().tryLock();
            if (lock == null)
                throw new IllegalStateException("Can't lock file: " + words[1]);
            System.out.println("locked");
            System.in.read();
            lock.release();
            System.out.println("unlocked");
            System.in.read();
            return;
        }
        var numbers = Path.of(words[1] + ".number");
        for (int turn = 0; turn < Integer.parseInt(words[2]); turn++) {
            FileLock lock = file.getChannel().lock();
            int number = Integer.parseInt(Files.readString(numbers).strip());
            Files.writeString(numbers, (number + 1) + "\\n");
            lock.release();
        }
    }
}
"""


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="flockshim-java-")


def _java() -> list[str]:
    require(shutil.which("javac"), "no Java", "apt install openjdk-17-jdk-headless")
    source = Path(_scratch().name) / "Lock.java"
    if not source.exists():
        source.write_text(JAVA)
        subprocess.run(["javac", source], check=True)
    return ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", _scratch().name, "Lock"]


def _r() -> list[str]:
    found = shutil.which("Rscript") and subprocess.run(
        ["Rscript", "-e", "library(filelock)"], capture_output=True, check=False
    )
    require(found and found.returncode == 0, "no R with filelock", "apt install r-base-core r-cran-filelock")
    return ["Rscript", "--vanilla", "-e", R]


def _perl() -> list[str]:
    require(shutil.which("perl"), "no perl", "apt install perl")
    return ["perl", "-e", PERL]


def _python(acquire: str) -> Callable[[], list[str]]:
    return lambda: [sys.executable, "-c", PYTHON.format(acquire=acquire)]


class Program(NamedTuple):
    """How a program is started, and what it says if the lock is held by another or the file system has none."""

    words: Callable[[], list[str]]
    busy: str
    refused: str


PROGRAMS = {
    "lockf": Program(_python(LOCKF), "BlockingIOError: [Errno 11]", "OSError: [Errno 38] Function not implemented"),
    "conda": Program(
        _python(CONDA), "LockError: Failed to acquire lock.", "OSError: [Errno 38] Function not implemented"
    ),
    "spack": Program(_python(SPACK), "LockTimeoutError: ", "OSError: [Errno 38] Function not implemented"),
    "mailbox": Program(
        _python(MAILBOX), "mailbox.ExternalClashError: lockf: ", "OSError: [Errno 38] Function not implemented"
    ),
    "perl": Program(_perl, "fcntl: Resource temporarily unavailable", "fcntl: Function not implemented"),
    "r": Program(_r, "lock() has returned NULL", "Function not implemented"),
    "java": Program(_java, "Can't lock file: ", "java.io.IOException: Function not implemented"),
    "mamba": Program(
        lambda: [str(program("lockfthread"))],
        "Could not set lock (Resource temporarily unavailable)",
        "Could not set lock (Function not implemented)",
    ),
}
