"""Whatever comes over the wire, the answer is an error of the sender's, and the next good request is right."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings

from dlops.serve.launch import ServerProcess
from tests.serve.malformed import ALLOWED, KINDS, UNENDED, binary_requests, good, requests, status_of

# As the shared server has it: the oversized are larger.
ROUNDS = 25


def test_no_bytes_bring_it_down(server: ServerProcess) -> None:
    seen = {}
    for number, (kind, request) in enumerate(islice(requests(seed=0), ROUNDS * len(KINDS))):
        status = status_of(server.port, request, ends=kind in UNENDED)
        seen.setdefault(kind, set()).add(status)
        # A byte may be changed where it does not matter, and a request that is cut off needs no answer.
        assert status in ALLOWED | {200, None}, (kind, status, request[:300])
        if number % 40 == 0:
            assert status_of(server.port, good()) == 200
    for kind in ("oversized", "bombs", "forms"):
        assert seen[kind] <= ALLOWED, kind


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=binary_requests())
def test_no_message_of_the_protocol_brings_it_down(server: ServerProcess, request: bytes) -> None:
    assert status_of(server.port, request) in ALLOWED | {200}
    assert status_of(server.port, good()) == 200


@pytest.mark.parametrize("name", [kind.__name__ for kind in KINDS])
def test_each_kind_is_what_it_says(name: str) -> None:
    """Else the test above would send nothing that is wrong."""
    (kind,) = (kind for kind in KINDS if kind.__name__ == name)
    made = [request for found, request in islice(requests(seed=1), 20 * len(KINDS)) if found == kind.__name__]
    assert len(set(made)) > 1
    assert good() not in made
