"""How many connections a process may have open, by its file descriptors."""

from __future__ import annotations

import resource

# Each takes some 20 kB, idle.
_MOST_CONNECTIONS = 10_000
# The rest are for files, models, gRPC's connections and those that are about to be ended.
_SHARE = 0.75
_WANTED = 16_384


def raise_limit() -> None:
    """Let this process open more files than the shell said, which often is 1,024, where the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def allowed_connections(*, ports: int = 1) -> int:
    """As many to each of so many ports as its file descriptors allow."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(int(soft * _SHARE) // ports, _MOST_CONNECTIONS)
