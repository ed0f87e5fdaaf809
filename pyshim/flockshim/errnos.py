"""Errnos as people write them (``ENOSYS,524``) and as the shim reads them (``38,524``)."""

import errno

from flockshim import FlockshimError

# The kernel's own ENOTSUPP, which Cray DVS and some NFS servers let through to flock(2); C
# libraries have no name for it, so the errno module has none either.
ENOTSUPP = 524

# include/linux/err.h: the kernel returns no errno beyond this.
MAX_ERRNO = 4095

# What a working lock call answers. Emulating "held by somebody else" would give the lock to two.
ANSWERS = (errno.EWOULDBLOCK, errno.EINTR, errno.EBADF)


def number(text: str, label: str) -> int:
    """Return the errno that *text* names (``ENOSYS``) or spells (``38``).

    :param label: what the user wrote it in, an option or a variable; begins the error's line.
    :raises FlockshimError: when it is neither.
    """
    name = text.strip()
    if name == "ENOTSUPP":
        return ENOTSUPP
    value = getattr(errno, name, None) if name[:1] == "E" else None
    if value is None and name.isascii() and name.isdigit() and 0 < int(name) <= MAX_ERRNO:
        value = int(name)
    if not isinstance(value, int):
        raise FlockshimError(f"{label}: {name!r} is no errno: give a name such as ENOSYS or a number such as 38")
    return value


def numbers(text: str, label: str) -> str:
    """Return the list *text* of errnos that mean "cannot lock" as the shim reads it.

    :param text: names and numbers, separated by commas.
    :param label: what the user wrote it in, an option or a variable; begins the error's line.
    :raises FlockshimError: for an unknown errno, or one that a working ``flock(2)`` answers.
    """
    found: list[str] = []
    for item in text.split(","):
        value = number(item, label)
        if value in ANSWERS:
            raise FlockshimError(
                f"{label}: {item.strip()} is what a working lock call answers, so it cannot mean "
                "that locks fail: leave it out"
            )
        if str(value) not in found:
            found.append(str(value))
    return ",".join(found)
