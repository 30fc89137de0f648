"""How many connections a process may have open, by its file descriptors."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from dlops.serve.descriptors import allowed_connections, raise_limit
print(allowed_connections())
raise_limit()
print(allowed_connections(), allowed_connections(ports=2), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "before", "after"),
    [
        (256, 1024, 192, (768, 384, 1024, 1024)),
        (1024, 20_000, 768, (10_000, 6_144, 16_384, 20_000)),
        (64, 64, 48, (48, 24, 64, 64)),
    ],
)
def test_connections_are_as_many_as_descriptors_allow(
    soft: int, hard: int, before: int, after: tuple[int, int, int, int]
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(soft=soft, hard=hard)], capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.split() == [str(before), *map(str, after)], ran.stderr
