"""Serves a mount in a child process and unmounts it however that ends.

The guard is the parent. It does no I/O on the mount, so it can always unmount: when it is told to,
when the owner (a test run, say) was killed, and when the server died.
"""

import contextlib
import os
import select
import signal
import socket
import traceback
from typing import Optional

from flockshim import fuse_libc, fuse_mount
from flockshim.fuse_server import LockAnswer, Server

_GRACE_SECONDS = 1.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(backing: str, mountpoint: str, flock: LockAnswer, posix: LockAnswer, owner: Optional[int]) -> None:
    """Mount, print ``ready PID`` when it can be used, and return when it is unmounted.

    :param owner: unmount when the process of this pid has ended.
    :raises MountError: when it cannot be mounted.
    """
    wakeup = _wakeup_on_signals()
    watched = [wakeup.fileno()]
    if owner is not None:
        try:
            watched.append(os.pidfd_open(owner))
        except ProcessLookupError:
            return
    device = fuse_mount.mount(mountpoint)
    server = os.fork()
    if server == 0:
        _serve(device, backing, flock, posix)
    os.close(device)  # so that the server's death ends the connection
    server_end = os.pidfd_open(server)
    select.select([*watched, server_end], [], [])
    _unmount(mountpoint, server)
    if not select.select([server_end], [], [], _GRACE_SECONDS)[0]:
        os.kill(server, signal.SIGKILL)  # another mount namespace still has a copy of the mount
    os.waitpid(server, 0)
    # A signal that comes now finds nobody at the socket's other end.
    signal.set_wakeup_fd(-1)


def _wakeup_on_signals() -> socket.socket:
    """Return a socket that becomes readable at the first signal that says stop."""
    ours, handlers = socket.socketpair()
    handlers.setblocking(False)
    signal.set_wakeup_fd(handlers.detach())
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    return ours


def _serve(device: int, backing: str, flock: LockAnswer, posix: LockAnswer) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the guard's to handle
    fuse_libc.signal_on_parent_death(signal.SIGKILL)
    status = 1
    try:
        os.umask(0)
        Server(device, backing, flock, posix, _say_ready).serve()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _say_ready() -> None:
    print("ready", os.getpid(), flush=True)


def _unmount(mountpoint: str, server: int) -> None:
    """Unmount cleanly if nobody uses it, so that the server ends by itself; else by force."""
    os.kill(server, signal.SIGCONT)
    try:
        fuse_mount.unmount(mountpoint, lazy=False)
    except OSError:
        with contextlib.suppress(OSError):  # somebody else may have unmounted it
            fuse_mount.unmount(mountpoint, lazy=True)
        os.kill(server, signal.SIGKILL)
