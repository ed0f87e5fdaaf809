"""The FUSE mount is a good file system: only its locks fail."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flockshim.pytest_plugin import require

AT_FDCWD = -100
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
NOBODY = 65534


def rename2(old: Path, new: Path, flags: int) -> int:
    """Return the errno of renameat2(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)
    return ctypes.get_errno() if failed else 0


def as_nobody(what: Callable[[], object]) -> int:
    """Do it in a child that is an ordinary user; return the errno, 0 for success."""
    child = os.fork()
    if child == 0:
        status = 255
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            what()
            status = 0
        except OSError as error:
            status = error.errno or 255
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Names


def test_hard_links_are_one_inode(nolock_dir: Path) -> None:
    first, second = nolock_dir / "first", nolock_dir / "second"
    first.write_text("one")
    os.link(first, second)
    assert first.stat().st_ino == second.stat().st_ino
    assert first.stat().st_nlink == second.stat().st_nlink == 2
    second.write_text("two")
    assert first.read_text() == "two"
    first.unlink()
    assert second.stat().st_nlink == 1
    assert second.read_text() == "two"


def test_an_unlinked_open_file_goes_on_working(nolock_dir: Path) -> None:
    with open(nolock_dir / "file", "w+b", buffering=0) as file:
        file.write(b"before ")
        os.unlink(nolock_dir / "file")
        file.write(b"after")
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.fstat(file.fileno()).st_size == 12
        assert os.pread(file.fileno(), 20, 0) == b"before after"
        os.ftruncate(file.fileno(), 6)
        os.fchmod(file.fileno(), 0o640)
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o640
        assert Path(f"/proc/self/fd/{file.fileno()}").read_bytes() == b"before"
        (nolock_dir / "file").write_text("another")
        assert os.fstat(file.fileno()).st_ino != (nolock_dir / "file").stat().st_ino


def test_rename_replaces_and_keeps_the_inode(nolock_dir: Path) -> None:
    old, new = nolock_dir / "old", nolock_dir / "sub" / "new"
    new.parent.mkdir()
    old.write_text("old")
    new.write_text("new")
    inode = old.stat().st_ino
    with open(new) as replaced:
        old.rename(new)
        assert replaced.read() == "new"
        assert os.fstat(replaced.fileno()).st_nlink == 0
    assert new.stat().st_ino == inode
    assert not old.exists()
    new.parent.rename(nolock_dir / "moved")
    assert (nolock_dir / "moved" / "new").read_text() == "old"


def test_rename_has_its_flags(nolock_dir: Path) -> None:
    one, two = nolock_dir / "one", nolock_dir / "two"
    one.write_text("1")
    two.write_text("2")
    assert rename2(one, two, RENAME_NOREPLACE) == errno.EEXIST
    assert rename2(one, two, RENAME_EXCHANGE) == 0
    assert (one.read_text(), two.read_text()) == ("2", "1")
    assert rename2(one, nolock_dir / "three", RENAME_NOREPLACE) == 0
    assert sorted(os.listdir(nolock_dir)) == ["three", "two"]


def test_symbolic_links(nolock_dir: Path) -> None:
    link = nolock_dir / "link"
    link.symlink_to("dangling/\udcff")
    assert os.readlink(link) == "dangling/\udcff"
    assert stat.S_ISLNK(link.lstat().st_mode)
    os.utime(link, ns=(1, 2), follow_symlinks=False)
    assert link.lstat().st_mtime_ns == 2
    os.link(link, nolock_dir / "same", follow_symlinks=False)
    assert (nolock_dir / "same").lstat().st_ino == link.lstat().st_ino
    assert not link.exists()


def test_names_are_bytes_of_up_to_255(nolock_dir: Path) -> None:
    for name in (b"n" * 255, b"\xff\xfe", b" ", b"a\nb"):
        path = os.fsencode(nolock_dir) + b"/" + name
        os.mkdir(path)
        assert os.listdir(os.fsencode(nolock_dir)) == [name]
        os.rmdir(path)
    with pytest.raises(OSError) as caught:
        (nolock_dir / ("n" * 256)).touch()
    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_listing_is_right_while_names_come_and_go(nolock_dir: Path) -> None:
    names = {f"{number:04}-{'x' * 40}" for number in range(2000)}
    for name in names:
        (nolock_dir / name).touch()
    seen = []
    with os.scandir(nolock_dir) as entries:
        for entry in entries:
            seen.append(entry.name)
            os.unlink(entry.path)
            (nolock_dir / f"new{len(seen)}").touch()
    stayed = [name for name in seen if name in names]
    assert sorted(stayed) == sorted(names)
    assert len(seen) == len(set(seen))
    assert len(os.listdir(nolock_dir)) == len(seen)


def test_rewinding_a_directory_reads_it_again(nolock_dir: Path) -> None:
    directory = os.open(nolock_dir, os.O_RDONLY)
    assert os.listdir(directory) == []
    (nolock_dir / "new").mkdir()
    assert os.listdir(directory) == ["new"]  # fdopendir(3) and rewinddir(3)
    os.close(directory)


def test_a_listing_knows_inodes_and_types(nolock_dir: Path) -> None:
    (nolock_dir / "file").touch()
    (nolock_dir / "directory").mkdir()
    (nolock_dir / "link").symlink_to("file")
    listed = subprocess.run(["ls", "-ai1", nolock_dir], capture_output=True, text=True, check=True)
    inodes = {name: int(ino) for ino, name in (line.split() for line in listed.stdout.splitlines())}
    assert inodes == {name: (nolock_dir / name).lstat().st_ino for name in (".", "..", "file", "directory", "link")}
    with os.scandir(nolock_dir) as entries:
        kinds = {entry.name: (entry.is_file(follow_symlinks=False), entry.is_dir()) for entry in entries}
    assert kinds == {"file": (True, False), "directory": (False, True), "link": (False, False)}


# Attributes


def test_mode_and_times_to_the_nanosecond(nolock_dir: Path) -> None:
    file = nolock_dir / "file"
    file.touch()
    file.chmod(0o4751)
    assert stat.S_IMODE(file.stat().st_mode) == 0o4751
    for times in ((1_000_000_007, 2_000_000_000_000_000_009), (-1_500_000_000, 0)):
        os.utime(file, ns=times)
        assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == times
    subprocess.run(["touch", "-m", "-d", "@77.5", file], check=True)
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (-1_500_000_000, 77_500_000_000)
    subprocess.run(["touch", "-a", file], check=True)
    assert file.stat().st_atime > 1_000_000_000
    assert file.stat().st_mtime_ns == 77_500_000_000


def test_the_file_system_has_the_sizes_of_the_backing_one(nolock_dir: Path, tmp_path: Path) -> None:
    ours, theirs = os.statvfs(nolock_dir), os.statvfs(tmp_path)
    assert (ours.f_blocks, ours.f_bsize, ours.f_namemax) == (
        theirs.f_blocks,
        theirs.f_bsize,
        theirs.f_namemax,
    )


def test_extended_attributes_are_cleanly_unsupported(nolock_dir: Path) -> None:
    with pytest.raises(OSError) as caught:
        os.setxattr(nolock_dir, "user.name", b"value")
    assert caught.value.errno == errno.EOPNOTSUPP


# Contents


def test_open_flags(nolock_dir: Path) -> None:
    file = nolock_dir / "file"
    one = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    two = os.open(file, os.O_RDWR | os.O_APPEND)
    for text in (b"a", b"b", b"c"):
        os.write(one, text)
        os.write(two, text.upper())
    assert file.read_bytes() == b"aAbBcC"
    with pytest.raises(FileExistsError):
        os.open(file, os.O_CREAT | os.O_EXCL)
    os.close(os.open(file, os.O_WRONLY | os.O_TRUNC))
    assert file.stat().st_size == 0
    os.write(one, b"d")
    assert os.pread(two, 10, 0) == b"d"
    os.close(one)
    os.close(two)


def test_a_file_made_unwritable_can_be_written_by_who_made_it(nolock_dir: Path) -> None:
    fd = os.open(nolock_dir / "file", os.O_WRONLY | os.O_CREAT, 0o400)
    os.write(fd, b"x")
    os.close(fd)
    assert stat.S_IMODE((nolock_dir / "file").stat().st_mode) == 0o400


def test_a_shared_mapping_is_written_back_where_it_belongs(nolock_dir: Path) -> None:
    size = 3 * mmap.PAGESIZE + 5
    fd = os.open(nolock_dir / "file", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.ftruncate(fd, size)
    with mmap.mmap(fd, size) as mapping:
        mapping[-5:] = b"first"
        os.write(fd, b" last")
        mapping[:5] = b"again"
        mapping.flush()
    content = os.pread(fd, size + 10, 0)
    os.close(fd)
    assert len(content) == size + 5
    assert content[:5] == b"again"
    assert content[5:-10] == bytes(size - 10)
    assert content[-10:] == b"first last"


def test_a_mapping_is_shared_between_processes(nolock_dir: Path) -> None:
    (nolock_dir / "file").write_bytes(bytes(mmap.PAGESIZE))
    code = "import mmap, os, sys; mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)[:4] = b'seen'"
    with open(nolock_dir / "file", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        subprocess.run([sys.executable, "-c", code, nolock_dir / "file"], check=True)
        assert mapping[:4] == b"seen"


def test_a_large_file_with_holes(nolock_dir: Path) -> None:
    far = 5 << 30
    fd = os.open(nolock_dir / "file", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, 1 << 20)
    assert os.fstat(fd).st_size == 1 << 20
    os.pwrite(fd, b"far", far)
    assert os.pread(fd, 10, far) == b"far"
    assert os.fstat(fd).st_blocks * 512 < 1 << 30
    assert os.lseek(fd, 1 << 20, os.SEEK_DATA) <= far
    os.fsync(fd)
    os.fdatasync(fd)
    block = os.urandom(3 << 20)
    os.pwrite(fd, block, 12345)
    assert os.pread(fd, len(block), 12345) == block
    assert os.copy_file_range(fd, fd, 3, far, 0) == 3
    assert os.pread(fd, 3, 0) == b"far"
    os.close(fd)


def test_a_nameless_file_can_be_given_a_name(nolock_dir: Path) -> None:
    try:
        fd = os.open(nolock_dir, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        supported = error.errno != errno.EOPNOTSUPP
        require(supported, "no O_TMPFILE on FUSE", "Linux 6.2, and a TMPDIR that has O_TMPFILE")
        raise
    os.write(fd, b"named")
    assert os.listdir(nolock_dir) == []
    directory = os.open(nolock_dir, os.O_PATH)  # os.link() follows links only with a dir_fd
    os.link(f"/proc/self/fd/{fd}", "name", dst_dir_fd=directory, follow_symlinks=True)
    assert (nolock_dir / "name").read_bytes() == b"named"
    os.close(fd)
    os.close(directory)


def test_a_program_is_executed(nolock_dir: Path) -> None:
    program = shutil.copy(shutil.which("echo") or "", nolock_dir / "program")
    done = subprocess.run([program, "ran"], capture_output=True, text=True, check=True)
    assert done.stdout == "ran\n"


# Special files


def test_fifos_connect_processes(nolock_dir: Path) -> None:
    os.mkfifo(nolock_dir / "fifo", 0o640)
    assert stat.S_IMODE((nolock_dir / "fifo").stat().st_mode) == 0o640
    writer = subprocess.Popen(["sh", "-c", 'echo through >"$0"', nolock_dir / "fifo"])
    assert (nolock_dir / "fifo").read_text() == "through\n"
    assert writer.wait() == 0


def test_unix_sockets_are_bound(nolock_dir: Path) -> None:
    path = os.path.relpath(nolock_dir / "socket")  # short: unix(7)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        client.connect(path)
        client.sendall(b"x")
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(1) == b"x"
    assert stat.S_ISSOCK((nolock_dir / "socket").lstat().st_mode)


# Other users


def test_other_users_are_checked_and_own_what_they_make(nolock_dir: Path) -> None:
    require(os.geteuid() == 0, "needs other users", "run as root")
    secret, shared = nolock_dir / "secret", nolock_dir / "shared"
    secret.touch(0o600)
    shared.mkdir()
    shared.chmod(0o1777)
    assert as_nobody(secret.read_text) == errno.EACCES
    assert as_nobody((nolock_dir / "new").touch) == errno.EACCES
    for name, make in (
        ("file", (shared / "file").touch),
        ("directory", (shared / "directory").mkdir),
        ("fifo", lambda: os.mkfifo(shared / "fifo")),
        ("link", lambda: (shared / "link").symlink_to("file")),
    ):
        assert as_nobody(make) == 0
        made = (shared / name).lstat()
        assert (made.st_uid, made.st_gid) == (NOBODY, NOBODY)
    os.chown(shared / "file", 0, 0)
    assert as_nobody((shared / "file").unlink) == errno.EPERM  # sticky directory


def test_special_bits_are_kept_and_taken_as_they_should(nolock_dir: Path) -> None:
    require(os.geteuid() == 0, "needs other users", "run as root")
    os.chown(nolock_dir, 0, 12345)
    nolock_dir.chmod(0o2777)
    file = nolock_dir / "file"
    assert as_nobody(lambda: os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o4755))) == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o4755
    assert (file.stat().st_uid, file.stat().st_gid) == (NOBODY, 12345)
    assert as_nobody(lambda: file.write_text("x")) == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o755
    assert as_nobody((nolock_dir / "directory").mkdir) == 0
    assert (nolock_dir / "directory").stat().st_mode & stat.S_ISGID
