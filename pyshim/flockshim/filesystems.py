"""Which file system a directory lies on, and how far the flock locks of its type are known to reach."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# How far a lock reaches that the kernel has granted.
LOCAL = "local"
"""There is no other host: the file system is this host's own."""
HOSTS = "hosts"
"""All hosts that mount the file system, as far as can be told."""
HOST = "host"
"""The programs of this host only, as far as can be told."""
UNKNOWN = "unknown"
"""Nothing is known of this type."""


class FileSystem(NamedTuple):
    """One mounted file system, as /proc/self/mountinfo describes it (proc(5))."""

    type: str
    source: str
    mount_point: str
    options: tuple[str, ...]
    device: str
    """``MAJOR:MINOR``, of which st_dev is made."""


NOT_FOUND = FileSystem("unknown", "", "", (), "")
"""What stands for a file system that mountinfo does not show, as in some containers."""


class Reach(NamedTuple):
    """How far flock locks reach: LOCAL, HOSTS, HOST or UNKNOWN, and how that is known."""

    scope: str
    why: str


def mounted() -> list[FileSystem]:
    """Return the mounted file systems that this process sees, in the order of mounting.

    :raises OSError: when there is no /proc.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        return parse(file.read())


def parse(mountinfo: bytes) -> list[FileSystem]:
    """Return the file systems that the text of /proc/self/mountinfo tells of (proc(5))."""
    found = []
    for line in mountinfo.split(b"\n"):
        # The optional fields before the lone hyphen vary in number.
        mount, hyphen, file_system = line.partition(b" - ")
        fields, more = mount.split(b" "), file_system.split(b" ")
        if not hyphen or len(fields) < 6 or len(more) < 3:
            continue
        options = _merged(_text(fields[5]).split(","), _text(more[2]).split(","))
        names = (_text(more[0]), _text(more[1]), _text(fields[4]))
        found.append(FileSystem(*names, options, os.fsdecode(fields[2])))
    return found


def _text(field: bytes) -> str:
    """Undo the escapes of space, tab, newline, backslash and ``#``: three octal digits each."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 255]), field))


def _merged(mount: Iterable[str], file_system: Iterable[str]) -> tuple[str, ...]:
    """Join the options of the mount and of its file system; what either has read-only, is."""
    options = dict.fromkeys([*mount, *file_system])
    if "ro" in options:
        options.pop("rw", None)
    return tuple(option for option in options if option)


def containing(path: str, device: int | None, file_systems: Iterable[FileSystem]) -> FileSystem:
    """Return the file system on which *path* lies.

    :param path: absolute and free of symbolic links.
    :param device: its st_dev, or None where it cannot be asked for; tells apart what lies under another mount.
    """
    around = [system for system in file_systems if _is_below(path, system.mount_point)]
    if device is not None:
        number = f"{os.major(device)}:{os.minor(device)}"
        # Subvolumes of btrfs have device numbers of their own, which mountinfo does not show.
        around = [system for system in around if system.device == number] or around
    # Of two on one mount point the later hides the other, and max() returns the first of equals.
    return max(reversed(around), key=lambda system: len(system.mount_point), default=NOT_FOUND)


def _is_below(path: str, mount_point: str) -> bool:
    return mount_point in ("/", path) or path.startswith(mount_point + "/")


def reach(system: FileSystem, release: str) -> Reach:
    """Return how far the flock locks of *system* reach, once the kernel grants them.

    :param release: of the kernel, as uname(2) tells it: for types that have changed.
    """
    if system.type in BY_OPTIONS:
        return BY_OPTIONS[system.type](set(system.options), release)
    if system.type in LOCAL_TYPES:
        return Reach(LOCAL, f"{system.type} is a file system of this host alone")
    if system.type in ELSEWHERE:
        return ELSEWHERE[system.type]
    if system.type.partition(".")[0] == "fuse":
        return Reach(HOST, "a FUSE file system: unless its program does more, the kernel locks for this host only")
    return Reach(UNKNOWN, f"nothing is known here of the type {system.type}")


def _nfs(options: set[str], _: str) -> Reach:
    """See nfs(5); the kernel shows local_lock= for every version."""
    if "nolock" in options:
        return Reach(HOST, "mounted with nolock: locks stay on this host")
    if options & {"local_lock=all", "local_lock=flock"}:
        return Reach(HOST, "mounted with local_lock: flock locks stay on this host")
    if "local_lock=posix" in options:
        return Reach(HOSTS, "the NFS server keeps flock locks; record locks stay on this host (local_lock=posix)")
    return Reach(HOSTS, "the NFS server keeps the locks")


def _lustre(options: set[str], _: str) -> Reach:
    """See mount.lustre(8)."""
    if "localflock" in options:
        return Reach(HOST, "mounted with localflock: locks stay on this host")
    if "flock" in options:
        return Reach(HOSTS, "mounted with flock: Lustre keeps the locks for all hosts")
    return Reach(HOST, "mounted without flock: Lustre's locks of all hosts are not switched on")


def _cifs(options: set[str], release: str) -> Reach:
    """See mount.cifs(8), and flock(2) for the kernel's change."""
    if options & {"nobrl", "nolock"}:
        return Reach(HOST, "mounted with nobrl: locks stay on this host")
    version = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if version < (5, 5):
        return Reach(HOST, "before Linux 5.5 SMB mounts keep flock locks on this host")
    return Reach(HOSTS, "the SMB server keeps the locks")


def _shared_disk(options: set[str], _: str) -> Reach:
    """See mount.gfs2(8) and ocfs2.rst of the kernel's documentation."""
    if options & {"localflocks", "lockproto=lock_nolock"}:
        return Reach(HOST, "mounted so that locks stay on this host")
    return Reach(HOSTS, "its lock manager keeps the locks for all hosts of the cluster")


def _afs(options: set[str], _: str) -> Reach:
    """The flock= modes of the kernel's fs/afs; "openafs" if none is given."""
    if "flock=local" in options:
        return Reach(HOST, "mounted with flock=local: locks stay on this host")
    return Reach(HOSTS, "the AFS server keeps the locks of whole files; those of ranges may stay on this host")


# Object stores, where two hosts can both succeed in renaming one file: the name is copied, then deleted.
RENAME_COPIES = frozenset(
    [
        *("s3fs", "goofys", "mountpoint-s3", "gcsfuse", "rclone", "blobfuse", "blobfuse2"),
        *("cloudfuse", "ossfs", "ossfs2", "cosfs", "obsfs"),
    ]
)


def object_store(system: FileSystem) -> str | None:
    """Return the name of the object store's program behind a FUSE mount; None if it is none, or not known as one.

    Some give their name as the subtype, some as the source.
    """
    kind, _, subtype = system.type.partition(".")
    names = RENAME_COPIES.intersection([subtype, system.source]) if kind == "fuse" else ()
    return next(iter(names), None)


BY_OPTIONS: dict[str, Callable[[set[str], str], Reach]] = {
    "nfs": _nfs,
    "nfs4": _nfs,
    "lustre": _lustre,
    "cifs": _cifs,
    "smb3": _cifs,
    "gfs2": _shared_disk,
    "ocfs2": _shared_disk,
    "afs": _afs,
}

LOCAL_TYPES = frozenset(
    [
        *("ext2", "ext3", "ext4", "xfs", "btrfs", "bcachefs", "zfs", "f2fs", "jfs", "reiserfs", "nilfs2"),
        *("tmpfs", "ramfs", "rootfs", "overlay", "aufs"),
        *("vfat", "exfat", "ntfs", "ntfs3", "fuseblk", "hfs", "hfsplus", "udf", "iso9660", "squashfs", "erofs"),
    ]
)

ELSEWHERE = {
    "ceph": Reach(HOSTS, "the Ceph metadata server keeps the locks"),
    # It answers FUSE's flock requests: src/client/fuse_ll.cc of Ceph.
    "fuse.ceph-fuse": Reach(HOSTS, "the Ceph metadata server keeps the locks"),
    "fuse.glusterfs": Reach(HOSTS, "the GlusterFS servers keep the locks"),
    # Its metadata engines record flock locks by client session.
    "fuse.juicefs": Reach(HOSTS, "the JuiceFS metadata engine keeps the locks"),
    # Seen on real clusters: two nodes held one exclusive flock, while fcntl locks excluded each
    # other (GitHub: versity/versitygw issue 2351, ibm-granite/granite.build issue 330).
    "gpfs": Reach(HOST, "on GPFS flock locks were seen to stay on one host, while record locks reach all"),
    # beegfs-client.conf: tuneUseGlobalFileLocks is false unless changed.
    "beegfs": Reach(HOST, "BeeGFS keeps locks on this host unless tuneUseGlobalFileLocks is set"),
    # The client takes the lock for itself first; the other side need not do anything.
    "9p": Reach(HOST, "what is behind a 9p mount need not keep locks, so they count on this host only"),
    # virtiofsd leaves locks to the guest unless told otherwise.
    "virtiofs": Reach(HOST, "by default the locks of virtiofs stay inside this virtual machine"),
    # fs/orangefs of the kernel passes no lock on.
    "orangefs": Reach(HOST, "OrangeFS has no locks of its own: the kernel locks for this host only"),
    "pvfs2": Reach(HOST, "OrangeFS has no locks of its own: the kernel locks for this host only"),
    # It hands over fcntl locks, and answers flock with 524.
    "dvs": Reach(HOST, "DVS does not pass flock locks on to its servers"),
    "fuse.sshfs": Reach(HOST, "sshfs has no locks of its own: the kernel locks for this host only"),
    "vboxsf": Reach(HOST, "a shared folder has no locks of its own: the kernel locks inside this virtual machine only"),
}
