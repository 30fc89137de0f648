"""A ResNet-50 on a GPU, through the service and in process, in turns: instances, CUDA graphs, and the waterfall."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import dlops
from dlops.artifact import Artifact
from dlops.bench.boundcall import BoundCall
from dlops.bench.load import closed_loop
from dlops.bench.results import save_report
from dlops.runtimes import SessionOptions, open_session
from dlops.runtimes.session import Device
from dlops.serve.launch import ServerProcess
from tests.benchmarks.conftest import PAGES
from tests.benchmarks.resnet50 import make_resnet50

ROUNDS = 6
SECONDS = 5.0
BATCHES = (1, 8, 32, 64)
CONNECTIONS = (32, 128)
INSTANCES = (1, 2)
WANTED = 0.90
_BODIES = 16

# What is measured: where, batch or connections, instances (0 in process), with CUDA graphs.
Setting = tuple[str, int, int, bool]
Rates = Mapping[Setting, Sequence[float]]


def posts(artifact: Artifact) -> list[bytes]:
    """Whole requests of one row each, the tensor in binary both ways."""
    (spec,) = artifact.signature.inputs
    rows = np.random.default_rng(1).standard_normal((_BODIES, *spec.shape[1:])).astype(spec.dtype)
    requests = []
    for row in rows:
        parameters = {"binary_data_size": row.nbytes}
        shape = [1, *row.shape]
        head = json.dumps({
            "inputs": [{"name": spec.name, "datatype": "FP32", "shape": shape, "parameters": parameters}],
            "parameters": {"binary_data_output": True},
        }).encode()  # fmt: skip
        requests.append(
            f"POST /v2/models/{artifact.name}/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Inference-Header-Content-Length: {len(head)}\r\nContent-Length: {len(head) + row.nbytes}\r\n\r\n".encode()
            + head
            + row.tobytes()
        )
    return requests


@contextmanager
def in_process(artifact: Artifact, *, device: Device, batch: int, graph: bool) -> Iterator[Callable[[float], float]]:
    """Rows a second of calls that bring the rows to the device and the outputs back, one after the other."""
    (spec,) = artifact.signature.inputs
    rows = np.random.default_rng(1).standard_normal((batch, *spec.shape[1:])).astype(spec.dtype)
    session = open_session(artifact, SessionOptions(device=device, cuda_graph=graph))
    call = BoundCall(session.bind({spec.name: rows}), lambda: {spec.name: rows}, copies=True)

    def rate(seconds: float) -> float:
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            call()
            done += batch
        return done / (time.perf_counter() - began)

    yield rate
    session.close()


def measured(
    artifact: Artifact, *, device: Device, graphs: Sequence[bool], batches: Sequence[int] = BATCHES,
    connections: Sequence[int] = CONNECTIONS, rounds: int = ROUNDS, seconds: float = SECONDS,
) -> Rates:  # fmt: skip
    """Rows a second of every setting in every round, in an order drawn at random."""
    requests = posts(artifact)
    with ExitStack() as stack:
        run: dict[Setting, Callable[[float], float]] = {}
        for graph in graphs:
            for batch in batches:
                run["in process", batch, 0, graph] = stack.enter_context(
                    in_process(artifact, device=device, batch=batch, graph=graph)
                )
            for instances in INSTANCES:
                server = stack.enter_context(served(artifact, device=device, instances=instances, graph=graph))
                for count in connections:
                    run["service", count, instances, graph] = (
                        lambda seconds, server=server, count=count: _loaded(server, requests, count, seconds)
                    )  # fmt: skip
        rates: dict[Setting, list[float]] = {setting: [] for setting in run}
        for rate in run.values():  # each once, for nothing
            rate(min(1.0, seconds))
        draw = np.random.default_rng(0)
        for _ in range(rounds):
            for number in draw.permutation(len(run)):
                setting = list(run)[number]
                rates[setting].append(run[setting](seconds))
    return rates


def served(artifact: Artifact, *, device: Device, instances: int, graph: bool) -> ServerProcess:
    env = {"DLOPS_INSTANCES": str(instances), "DLOPS_MAX_BATCH": str(artifact.signature.max_batch)}
    return ServerProcess(artifact, device=device, env=env | ({"DLOPS_CUDA_GRAPHS": "1"} if graph else {}))


def _loaded(server: ServerProcess, requests: list[bytes], connections: int, seconds: float) -> float:
    loaded = closed_loop(
        "127.0.0.1", server.port, requests, concurrency=connections, duration_s=seconds, max_warmup_s=1.0
    )
    assert not loaded.errors, loaded.errors
    ended = np.concatenate([loaded.starts_ns + loaded.latencies_ns, loaded.earlier_ns])
    return int((ended <= loaded.duration_ns).sum()) / loaded.duration_ns * 1e9


def best(rates: Rates, where: str) -> Setting:
    return max((one for one in rates if one[0] == where), key=lambda one: float(np.median(rates[one])))


def table(rates: Rates) -> list[list[str]]:
    return [
        [where, str(count), str(instances) if instances else "–", "yes" if graph else "no",
         f"{np.median(found):.1f}", f"{min(found):.1f}", f"{max(found):.1f}"]
        for (where, count, instances, graph), found in rates.items()
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is false")
@pytest.mark.timeout(1800)
def test_a_resnet_50_through_the_service_and_in_process(write_page: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_resnet50(tmp_path / "run", max_batch=max(BATCHES))
    (artifact,) = dlops.export_variants(
        checkpoint, variants=["onnx-fp16"], out=tmp_path / "artifacts", device="cuda", max_drop=100.0
    )
    rates = measured(artifact, device="cuda", graphs=(False, True))
    inside, outside = best(rates, "in process"), best(rates, "service")
    ratio = float(np.median(rates[outside]) / np.median(rates[inside]))
    with served(artifact, device="cuda", instances=outside[2], graph=outside[3]) as server:
        url = f"oip+http://127.0.0.1:{server.port}/v2/models/{artifact.name}"
        report = save_report(
            dlops.measure([url], concurrency=[outside[1]], title="ResNet-50 served"), PAGES / "resnet50-served"
        )
    write_page(
        "serving-gpu",
        title="A ResNet-50 on a GPU, through the service and in process",
        says=f"fp16 by ONNX Runtime, 3×224×224 float32 tensors in binary, one row a request, so many connections in a "
        f"closed loop; in process: bound calls that copy the rows in and the outputs out. {ROUNDS} rounds of "
        f"{SECONDS:g} s each, in an order drawn at random. At the best of each the service reaches **{ratio:.2f}** of "
        f"the throughput in process; {WANTED:g} is wanted. Where the time of a request goes is in "
        "[the report](resnet50-served/report.html).",
        header=["", "batch or connections", "instances", "CUDA graphs", "rows/s", "least", "most"],
        rows=table(rates),
    )
    assert report.measurements
    assert ratio >= WANTED, table(rates)
