"""Token ids that a table does not have: an error of the request that has them, and of no other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from torch import nn
from tritonclient.utils import InferenceServerException

import dlops
from dlops.artifact import Artifact, open_artifact
from dlops.errors import InputError
from dlops.runtimes import SessionOptions, open_session
from dlops.runtimes.refusal import refusal
from dlops.runtimes.session import Session
from dlops.samples import Samples
from dlops.serve.instance import Instance
from dlops.serve.launch import ServerProcess

TOKENS = 10
# OpenVINO reads zeros instead, and refuses nothing.
VARIANTS = ("onnx-fp32", "torchscript-fp32", "torchexport-fp32", "executorch-fp32")


class Table(nn.Module):
    """The sum of its tokens' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).sum(dim=1)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("tokens")
    ids = np.random.default_rng(0).integers(0, TOKENS, (16, 3))
    samples = Samples(raw=tuple(ids), inputs={"ids": ids}, targets=ids[:, 0] % 2)
    checkpoint = dlops.save_checkpoint(
        Table(), folder / "run", evaluation=samples, labels=("even", "odd"), name="tokens", max_batch=8
    )
    made = dlops.export_variants(checkpoint, variants=VARIANTS, model=Table, out=folder / "artifacts")
    return {Path(one.directory).name: open_artifact(one.directory) for one in made}


@pytest.fixture(scope="module")
def server(artifacts: dict[str, Artifact]) -> Iterator[ServerProcess]:
    # As long as a person takes: requests sent together are one run.
    with ServerProcess(artifacts["onnx-fp32"], grpc_port=0, env={"DLOPS_QUEUE_DELAY_US": "300000"}) as running:
        yield running


def tensor(ids: list[int], module: Any) -> Any:
    """Of tritonclient.http or tritonclient.grpc."""
    made = module.InferInput("ids", [1, 3], "INT64")
    made.set_data_from_numpy(np.array([ids]))
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
def test_every_runtime_that_refuses_an_index_says_so(artifacts: dict[str, Artifact], variant: str, capfd) -> None:
    session = open_session(artifacts[variant], SessionOptions(device="cpu"))
    instance = Instance(session)
    with pytest.raises(InputError, match=r"^the model refuses what is in its input: [^\n]+$") as caught:
        instance.run([{"ids": np.array([[0, 1, TOKENS]])}], 1)
    assert "Error" not in str(caught.value)
    assert len(instance.run([{"ids": np.array([[0, 1, 2]])}], 1).outputs["logits"]) == 1
    if variant == "onnx-fp32":
        assert str(caught.value).endswith(
            "Gather: indices element out of data bounds, idx=10 must be within the inclusive range [-10,9]"
        )
        # A client must not fill the log.
        assert capfd.readouterr().err == ""
    session.close()


@pytest.mark.parametrize(
    "error",
    [
        IndexError("list index out of range"),
        IndexError("tuple index out of range"),
        IndexError("index 10 is out of bounds for axis 0 with size 3"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("method->execute() failed with error 0x21"),
        MemoryError("index out of range in self"),
        ValueError("index out of range in self"),
    ],
)
def test_what_may_be_the_sessions_fault_or_ours_is_no_refusal(error: Exception) -> None:
    assert refusal(error) is None


def test_a_session_that_refuses_everything_is_looked_at(artifacts: dict[str, Artifact]) -> None:
    session = open_session(artifacts["onnx-fp32"], SessionOptions(device="cpu"))
    examined: list[Session] = []

    def renew(session: Session) -> Session:
        examined.append(session)
        return session

    instance = Instance(session, renew=renew)
    for _ in range(3):
        with pytest.raises(InputError):
            instance.run([{"ids": np.array([[0, 1, TOKENS]])}], 1)
    assert examined == [session]
    session.close()


def test_only_the_guilty_request_of_a_batch_is_refused(server: ServerProcess) -> None:
    wanted = [[0, 1, 2], [3, 4, TOKENS], [5, 6, 7], [-99, 0, 0], [8, 9, 0]]

    async def asked() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            bodies = [
                {"inputs": [{"name": "ids", "datatype": "INT64", "shape": [1, 3], "data": ids}]} for ids in wanted
            ]
            return await asyncio.gather(*[client.post("/v2/models/tokens/infer", json=body) for body in bodies])

    answers = asyncio.run(asked())
    assert [answer.status_code for answer in answers] == [200, 400, 200, 400, 200]
    assert "idx=10" in answers[1].json()["error"]
    assert "idx=-99" in answers[3].json()["error"]
    assert "Traceback" not in server.log_path.read_text()
    # Each of them ran alone, and once.
    (statistics,) = httpx.get(f"{server.url}/v2/models/tokens/stats").json()["model_stats"]
    assert [(one["batch_size"], one["compute_infer"]["count"]) for one in statistics["batch_stats"]] == [(1, 3)]


def test_the_other_ways_in_refuse_alike(server: ServerProcess) -> None:
    body = {"inputs": [3, 4, TOKENS]}
    assert httpx.post(f"{server.url}/predict", json=body).status_code == 400
    with (
        tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")) as web,
        pytest.raises(InferenceServerException, match=r"^\[400\] the model refuses .* idx=10"),
    ):
        web.infer("tokens", [tensor([3, 4, TOKENS], tritonclient.http)])
    with (
        tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as grpc,
        pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*the model refuses .* idx=10"),
    ):
        grpc.infer("tokens", [tensor([3, 4, TOKENS], tritonclient.grpc)])
