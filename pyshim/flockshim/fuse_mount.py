"""Mounts and unmounts a FUSE file system: by mount(2) as root, else by fusermount3(1)."""

import errno
import os
import shutil
import socket
import subprocess

from flockshim import FlockshimError, fuse_libc

_DEVICE = "/dev/fuse"
_NAME = "flockshim-nolockfs"


class MountError(FlockshimError):
    """The file system cannot be mounted; the text says why and how to get what is missing."""


def mount(mountpoint: str) -> int:
    """Mount on the directory *mountpoint* and return the descriptor to serve the requests from.

    The kernel checks permissions by itself. Other users are let in if root mounts.

    :raises MountError: when something is missing or forbidden.
    """
    if not os.path.exists(_DEVICE):
        raise MountError(
            f"{_DEVICE} is missing: load the kernel module (modprobe fuse), "
            f"or give the container the device (--device {_DEVICE} --cap-add SYS_ADMIN)"
        )
    return _mount_as_root(mountpoint) if os.geteuid() == 0 else _mount_as_user(mountpoint)


def unmount(mountpoint: str, *, lazy: bool) -> None:
    """Unmount, *lazy* even if files are open there.

    :raises OSError: EBUSY when files are open and not *lazy*, EINVAL when nothing is mounted.
    """
    if os.geteuid() == 0:
        fuse_libc.umount(mountpoint, fuse_libc.MNT_DETACH if lazy else 0)
        return
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        raise OSError(errno.EBUSY, "fusermount3 cannot unmount", mountpoint)


def _mount_as_root(mountpoint: str) -> int:
    try:
        device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(
            f"{_DEVICE}: {error.strerror}: load the kernel module (modprobe fuse), or allow the container the device"
        ) from error
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    flags = fuse_libc.MS_NOSUID | fuse_libc.MS_NODEV
    try:
        fuse_libc.mount(_NAME, mountpoint, "fuse.nolockfs", flags, options)
    except OSError as error:
        os.close(device)
        raise MountError(
            f"cannot mount on {mountpoint}: {error.strerror}: "
            "needs CAP_SYS_ADMIN (docker run --cap-add SYS_ADMIN --device /dev/fuse)"
        ) from error
    return device


def _mount_as_user(mountpoint: str) -> int:
    if not shutil.which("fusermount3"):
        raise MountError("fusermount3 is missing: install the package fuse3")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = f"default_permissions,fsname={_NAME},subtype=nolockfs"
        helper = subprocess.run(
            ["fusermount3", "-o", options, "--", mountpoint],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            check=False,
        )
        if helper.returncode != 0:
            why = os.fsdecode(helper.stderr).strip().replace("\n", "; ")
            raise MountError(
                f"cannot mount on {mountpoint}: {why}: ordinary users need the package fuse3 "
                f"(fusermount3 set-uid root) and {_DEVICE} with mode 0666"
            )
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
