"""A way to name the library in LD_PRELOAD when its own path has a space or a colon in it."""

import hashlib
import os
import stat

from flockshim import FlockshimError
from flockshim.launch import UNQUOTABLE

DEFAULT = "/dev/shm"
LAST_RESORT = "/tmp"


def to(home: str, rendezvous: str) -> str:
    """Return a path to the directory *home* that ``LD_PRELOAD`` can carry: a symbolic link.

    :param home: absolute path of the package.
    :param rendezvous: what ``FLOCKSHIM_DIR`` says; may be empty.
    :raises FlockshimError: when no directory that is the user's own can be had for the link.
    """
    # The name tells the target, so that two installations never fight over one link.
    link = "home-" + hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    name = f"flockshim-{os.geteuid()}"
    reasons = []
    for place in (rendezvous or f"{DEFAULT}/{name}", f"{LAST_RESORT}/{name}"):
        if any(character in UNQUOTABLE for character in place):
            continue
        try:
            _make_private(place)
            return _linked(os.path.join(place, link), home)
        except OSError as error:
            reasons.append(f"{place!r}: {error.strerror}")
    raise FlockshimError(
        f"LD_PRELOAD cannot carry {home!r} because of a character in it, and there is no private "
        f"directory for a link to it ({'; '.join(reasons)}): set FLOCKSHIM_DIR to one"
    )


def _make_private(directory: str) -> None:
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        found = os.lstat(directory)
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(0, "not a directory") from None
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(0, "not this user's alone (mode 0700)") from None


def _linked(link: str, home: str) -> str:
    try:
        os.symlink(home, link)  # atomic: of several launchers at once, one makes it
    except FileExistsError:
        if os.readlink(link) != home:
            raise FileExistsError(0, f"{link!r} leads elsewhere, remove it") from None
    return link
