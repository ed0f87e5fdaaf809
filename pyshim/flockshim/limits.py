"""The resource limits of our own background processes, which act for many programs: getrlimit(2)."""

from __future__ import annotations

import resource

MAX_DESCRIPTORS = 65536


def raise_to_hard() -> int:
    """Take what the hard limits allow, lest a program's own soft limits end us. Returns that of descriptors."""
    for limit in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_DATA):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (hard, hard))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
