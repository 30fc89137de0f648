"""The experiments beside peers and beside a session in process, in short: what is compared is right, not how fast."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from dlops.bench.load import closed_loop
from dlops.preprocess import Preprocess
from dlops.runtimes import SessionOptions, open_session
from dlops.serve.launch import ServerProcess
from dlops.tasks import open_task
from tests.benchmarks.peers import running, test_peers
from tests.benchmarks.peers.mlp import make_artifact
from tests.benchmarks.peers.running import Server
from tests.benchmarks.peers.test_peers import Turn, verdicts
from tests.benchmarks.serving.photos import jpegs, posts


def test_stock_bentoml_and_ours_take_turns_under_one_load_and_answer_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The BentoML that is installed here, not the pinned one.
    monkeypatch.setattr(running, "environment", lambda name: Path(sys.prefix))
    monkeypatch.setattr(running, "version", lambda name: name)
    for name, short in (("ROUNDS", 6), ("SECONDS", 0.2), ("WARMUP_S", 0.1), ("FIRST_S", 0.1), ("CONNECTIONS", (2, 8))):
        monkeypatch.setattr(test_peers, name, short)
    artifact = make_artifact(tmp_path)
    (tmp_path / "bentoml").mkdir()
    with ExitStack() as stack:
        [ours] = stack.enter_context(running.dlops(artifact, tmp_path))
        [theirs] = stack.enter_context(running.bentoml(artifact, tmp_path / "bentoml"))
        for server in (ours, theirs):
            running.check_answers(server, artifact)
        turns = test_peers.compare([ours, theirs])
    assert {key: len(found) for key, found in turns.items()} == {
        (server.name, connections): 6 for server in (ours, theirs) for connections in (2, 8)
    }
    assert all(turn.rate > 0 and turn.p99_ms >= turn.p50_ms > 0 for found in turns.values() for turn in found)
    rows = test_peers.table(turns, [ours, theirs], ours.name)
    assert [row[0] for row in rows] == ["2", "2", "8", "8"]
    assert {row[2] for row in rows} == {"binary, V2", "JSON"}


def made_up(**rates: float) -> tuple[dict[tuple[str, int], list[Turn]], dict[str, list[Server]]]:
    """Turns of servers at a rate each; p99 is the more, the fewer requests a second there are."""
    turns = {
        (name, connections): [
            Turn(rate=rate * wobble, p50_ms=1.0, p99_ms=1e4 / rate, cpu_us=1.0) for wobble in (0.99, 1.0, 1.01) * 2
        ]
        for name, rate in rates.items()
        for connections in test_peers.CONNECTIONS
    }
    servers = {
        name: [Server(name=name, form="", port=0, pid=None, requests=(), decode=None)] for name in rates
    }  # fmt: skip
    return turns, servers


@pytest.mark.parametrize(
    ("rates", "done"),
    [
        ({"dlops": 1000, "tritonserver": 950, "bentoml": 120}, [True, True, True]),
        # Near enough by its rate, and p99 is to be no worse.
        ({"dlops": 950, "tritonserver": 1000, "bentoml": 100}, [True, False, True]),
        ({"dlops": 890, "tritonserver": 1000, "bentoml": 112}, [False, False, False]),
        ({"dlops": 1000, "bentoml": 126}, [False]),
    ],
)
def test_what_is_wanted_of_ours_beside_each(rates: dict[str, float], done: list[bool]) -> None:
    turns, servers = made_up(**rates)
    found = list(verdicts(turns, servers))
    assert [one.done for one in found] == done * len(test_peers.CONNECTIONS)
    assert all(one.says.endswith(("yes", "no")) for one in found)


def test_photos_through_the_service_have_the_labels_that_they_have_in_process(digits_artifact) -> None:
    """Many at once over several connections, each decoded by the service, and each alone in process."""
    bodies = jpegs(12)
    preprocess = digits_artifact.preprocess
    assert isinstance(preprocess, Preprocess)
    session = open_session(digits_artifact, SessionOptions(device="cpu", threads=1))
    (spec,) = digits_artifact.signature.inputs
    expected = open_task("classification").answer(
        session.run({spec.name: preprocess.batch(bodies)}), labels=digits_artifact.labels
    )
    session.close()
    with ServerProcess(digits_artifact, threads=1) as server:
        loaded = closed_loop("127.0.0.1", server.port, posts(bodies), concurrency=4, duration_s=0.5, max_warmup_s=0.1)
        assert not loaded.errors
        assert len(loaded.latencies_ns) >= len(bodies)
        for body, answer in zip(bodies, expected, strict=True):
            response = httpx.post(f"{server.url}/predict", content=body, headers={"Content-Type": "image/jpeg"})
            (found,) = json.loads(response.content)["predictions"]
            assert found["label"] == answer["label"]
            np.testing.assert_allclose(found["probability"], answer["probability"], rtol=1e-4)
