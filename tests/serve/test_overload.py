"""More requests than the model can answer: what is taken is answered in time, the rest is told so at once."""

from __future__ import annotations

import json
from collections import Counter

import httpx
import numpy as np

from dlops.bench import pacing
from dlops.bench.arrivals import constant
from dlops.bench.openloop import open_loop
from dlops.serve.launch import ServerProcess

DEADLINE_S = 6.0


def test_at_several_times_the_capacity_answers_come_in_time_or_at_once(slow_artifact, slow_request) -> None:
    # One row a run, of some 50 ms: a minute of it is asked for in three seconds.
    body = json.dumps(slow_request(100_000)).encode()
    head = f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: h\r\nX-Request-Timeout-Ms: {DEADLINE_S * 1000:.0f}\r\n"
    request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with ServerProcess(slow_artifact, threads=1, env={"DLOPS_MAX_BATCH": "1"}) as server:
        for _ in range(3):  # by which it knows its pace
            httpx.post(f"{server.url}/v2/models/digits/infer", content=body).raise_for_status()
        loaded = open_loop("127.0.0.1", server.port, [request], constant(400, duration_s=3), senders=1)
        statuses = Counter(pacing.outcome_name(code) for code in loaded.outcome.tolist())
        # 504 is for what was taken before the machine slowed down, which is never most of what came too much.
        assert set(statuses) <= {"HTTP 200", "HTTP 429", "HTTP 504"}, statuses
        assert statuses["HTTP 200"] > 0
        assert statuses["HTTP 504"] < statuses["HTTP 429"] / 4, statuses
        # Told at once, and not after having waited for nothing.
        waited_s = (loaded.arrived_ns - loaded.sent_ns) / 1e9
        assert np.median(waited_s[loaded.outcome == 429]) < np.median(waited_s[loaded.outcome == 200])
        # Without deadlines the last would wait for a minute.
        assert loaded.service_ns.max() / 1e9 < 2 * DEADLINE_S
        answer = httpx.post(f"{server.url}/v2/models/digits/infer", content=body)
        assert answer.status_code == 200
