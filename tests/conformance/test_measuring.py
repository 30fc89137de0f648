"""`dlops bench` measures our service and a real tritonserver alike, by REST and gRPC, with the server's own times."""

from __future__ import annotations

import pytest

from dlops.artifact import Artifact
from dlops.bench.arrivals import Offered
from dlops.bench.run import measure
from tests.conformance.servers import Server

from .test_conformance import server

__all__ = ["server"]


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_it_is_measured_with_the_times_it_counted(transport: str, server: Server, digits_artifact: Artifact) -> None:
    url = f"oip+http://{server.http}/v2/models/digits" if transport == "http" else f"oip+grpc://{server.grpc}/digits"
    measured = measure(
        [url], payload=digits_artifact, batch=(1, 4), concurrency=(1, 2), offered=Offered(rates=(50.0,)), duration_s=0.3
    )
    rows = measured.measurements
    assert [(row.load.batch, row.load.concurrency, row.load.rate) for row in rows] == [
        (batch, *load) for batch in (1, 4) for load in ((1, None), (2, None), (rows[2].load.concurrency, 50.0))
    ]
    for row in rows:
        assert row.errors == {}
        # Of the artifact that is served there: its samples were sent, and the answers are those that it is known by.
        assert row.artifact == digits_artifact.variant.slug
        assert row.server is not None
        assert row.server.requests > 0
        assert row.server.compute_infer_ns > 0
        # What the server counted is within what its client waited for.
        assert row.server.queue_ns + row.server.compute_infer_ns < row.server.client_ns
    assert not [note for note in measured.report.notes if "does not say" in note or "JSON" in note]
