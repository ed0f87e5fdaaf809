"""Which file system a path lies on, and how far the locks of each type are known to reach."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flockshim import filesystems
from flockshim.filesystems import HOST, HOSTS, LOCAL, UNKNOWN, FileSystem, containing, parse, reach

NEW, OLD = "6.1.0-18-amd64", "5.4.0"

MOUNTINFO = rb"""
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw,errors=continue
23 22 0:21 / /proc rw,nosuid shared:2 master:1 propagate_from:3 - proc proc rw
30 22 0:40 /export/home /home rw,nosuid - nfs4 server:/home rw,vers=4.2,local_lock=none
31 22 0:41 / /mnt/a\040b\011c\134d\012e\043f rw - fuse.sshfs me@host:/x\040y rw,user_id=0
32 22 0:42 / /data ro,relatime - xfs /dev/sdb rw,attr2
33 22 0:43 / /data/below rw - tmpfs tmpfs rw
34 22 0:44 / /data rw - tmpfs above rw
35 22 0:45 / /home/me rw - btrfs /dev/sdc ro,subvol=/
nothing that means anything
36 22 0:46 / /short - ext4
"""


def at(path: str, device: int | None = None) -> FileSystem:
    return containing(path, device, parse(MOUNTINFO))


def test_a_line_with_optional_fields() -> None:
    assert at("/home") == FileSystem(
        "nfs4", "server:/home", "/home", ("rw", "nosuid", "vers=4.2", "local_lock=none"), "0:40"
    )
    assert at("/proc/1") == FileSystem("proc", "proc", "/proc", ("rw", "nosuid"), "0:21")


def test_lines_that_mean_nothing_are_passed_over() -> None:
    assert len(parse(MOUNTINFO)) == 8
    assert parse(b"") == []


def test_escapes() -> None:
    system = at("/mnt/a b\tc\\d\ne#f/g")
    assert system.mount_point == "/mnt/a b\tc\\d\ne#f"
    assert system.source == "me@host:/x y"


def test_names_that_are_no_text() -> None:
    (system,) = parse(b"1 0 0:1 / /\xff\\377 rw - ext4 /dev/\xfe rw\n")
    assert os.fsencode(system.mount_point) == b"/\xff\xff"
    assert os.fsencode(system.source) == b"/dev/\xfe"


@pytest.mark.parametrize(
    ("path", "mount_point"),
    [
        ("/", "/"),
        ("/etc", "/"),
        ("/home", "/home"),
        ("/home/me/x", "/home/me"),
        ("/homes", "/"),
        ("/home2/me", "/"),
    ],
)
def test_the_deepest_mount_that_contains_the_path(path: str, mount_point: str) -> None:
    assert at(path).mount_point == mount_point


def test_of_two_on_one_mount_point_the_last_wins() -> None:
    assert at("/data").source == "above"
    assert at("/data/x").source == "above"


def test_the_device_tells_what_is_hidden() -> None:
    assert at("/data/below/x").source == "tmpfs"
    assert at("/data/below/x", os.makedev(0, 44)).source == "above"
    assert at("/data/x", os.makedev(0, 42)).type == "xfs"


def test_a_device_that_mountinfo_does_not_show() -> None:
    assert at("/home/me/subvolume", os.makedev(0, 99)).type == "btrfs"


@pytest.mark.parametrize(
    ("path", "options"), [("/data", ("ro", "relatime", "attr2")), ("/home/me", ("ro", "subvol=/"))]
)
def test_read_only_is_what_either_has_read_only(path: str, options: tuple[str, ...]) -> None:
    device = os.makedev(0, 42) if path == "/data" else None
    assert at(path, device).options == options


def test_no_file_system_is_found() -> None:
    assert containing("/", None, []) == filesystems.NOT_FOUND


def test_the_real_ones(tmp_path: Path) -> None:
    system = containing("/proc/self", os.stat("/proc/self").st_dev, filesystems.mounted())
    assert (system.type, system.mount_point) == ("proc", "/proc")
    system = containing("/dev/shm", os.stat("/dev/shm").st_dev, filesystems.mounted())
    assert system.mount_point == "/dev/shm"


# How far locks reach


@pytest.mark.parametrize(
    ("kind", "options", "scope"),
    [
        *((kind, "rw", LOCAL) for kind in ("ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk")),
        ("nfs", "rw,vers=3,local_lock=none", HOSTS),
        ("nfs", "rw,vers=3,nolock,local_lock=all", HOST),
        ("nfs", "rw,vers=3,nolock", HOST),
        ("nfs", "rw,local_lock=flock", HOST),
        ("nfs", "rw,local_lock=posix", HOSTS),
        ("nfs4", "rw,vers=4.2,local_lock=none", HOSTS),
        ("nfs4", "rw,local_lock=all", HOST),
        ("lustre", "rw,flock,user_xattr", HOSTS),
        ("lustre", "rw,localflock", HOST),
        ("lustre", "rw", HOST),
        ("cifs", "rw,vers=3.1.1", HOSTS),
        ("cifs", "rw,nobrl", HOST),
        ("smb3", "rw,nolock", HOST),
        ("gfs2", "rw", HOSTS),
        ("gfs2", "rw,localflocks", HOST),
        ("ocfs2", "rw,localflocks", HOST),
        ("afs", "rw", HOSTS),
        ("afs", "rw,flock=local", HOST),
        ("ceph", "rw", HOSTS),
        ("fuse.ceph-fuse", "rw", HOSTS),
        ("fuse.glusterfs", "rw", HOSTS),
        ("fuse.juicefs", "rw", HOSTS),
        ("gpfs", "rw", HOST),
        ("beegfs", "rw", HOST),
        ("9p", "rw", HOST),
        ("virtiofs", "rw", HOST),
        ("orangefs", "rw", HOST),
        ("dvs", "rw", HOST),
        ("fuse", "rw", HOST),
        ("fuse.sshfs", "rw", HOST),
        ("fuse.whatever", "rw", HOST),
        ("fused", "rw", UNKNOWN),
        ("wekafs", "rw", UNKNOWN),
        ("unknown", "", UNKNOWN),
    ],
)
def test_how_far_locks_reach(kind: str, options: str, scope: str) -> None:
    known = reach(FileSystem(kind, "source", "/mnt", tuple(options.split(",")), "0:1"), NEW)
    assert known.scope == scope
    assert known.why


@pytest.mark.parametrize(
    ("release", "scope"),
    [(OLD, HOST), ("4.18.0-513.el8.x86_64", HOST), ("5.5.0", HOSTS), ("6", HOSTS), ("10.1", HOSTS)],
)
def test_smb_mounts_have_passed_locks_on_since_linux_5_5(release: str, scope: str) -> None:
    assert reach(FileSystem("cifs", "//s/x", "/mnt", ("rw",), "0:1"), release).scope == scope
