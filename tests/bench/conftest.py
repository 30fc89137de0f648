"""Tiny real artifacts and a tiny real server, so that bench is tested without export and serve."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from dlops.artifact import Accuracy, Artifact, Parity, Provenance, Tolerance, Variant
from dlops.bench.render import render_html
from dlops.bench.results import Measured, choose_fastest
from dlops.bench.stats import rate_interval, ratio_interval, summarize
from dlops.directory import DirectoryWriter
from dlops.environment import Environment, describe_environment
from dlops.report import Calibration, Load, Measurement, Report, Verdict
from dlops.samples import Samples
from dlops.signature import DimRange, Signature, TensorSpec
from tests.browser import Browser, Tab

FEATURES, CLASSES, MAX_BATCH = 16, 10, 64
MakeArtifact = Callable[..., Artifact]


def onnx_mlp(hidden: int, *, seed: int = 0) -> bytes:
    draw = np.random.default_rng(seed)
    weights = {
        "w1": draw.standard_normal((FEATURES, hidden)).astype(np.float32),
        "w2": draw.standard_normal((hidden, CLASSES)).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["input", "w1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "w2"], ["logits"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def run_onnx(model: bytes, inputs: np.ndarray) -> np.ndarray:
    return np.asarray(ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"input": inputs})[0])


@pytest.fixture(autouse=True)
def brief_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a service until three looks at it 50 ms apart show no drift, of a target in process at most a third of a
    second: on a busy machine a tiny model seldom settles."""
    monkeypatch.setattr("dlops.bench.load._WINDOW_S", 0.05)
    monkeypatch.setattr("dlops.bench.inprocess.WARMUP_S", 0.3)


@pytest.fixture
def soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed loop takes a server for gone when its calls have failed for half a second."""
    monkeypatch.setattr("dlops.bench.load._DEAD_AFTER_S", 0.5)


def write_artifact(
    folder: Path, slug: str = "onnx-fp32", *, hidden: int = 8, drop: float = 0.0, name: str = "toy"
) -> Artifact:
    model = onnx_mlp(hidden)
    onnx.checker.check_model(onnx.load_from_string(model))
    inputs = np.random.default_rng(1).standard_normal((12, FEATURES)).astype(np.float32)
    logits = run_onnx(model, inputs)
    samples = Samples(raw=tuple(inputs), inputs={"input": inputs}, outputs={"logits": logits}, targets=logits.argmax(1))
    signature = Signature(
        inputs=(TensorSpec(name="input", dtype="float32", shape=("batch", FEATURES)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", CLASSES)),),
        dims={"batch": DimRange(max=MAX_BATCH)},
    )
    with DirectoryWriter(folder / name / slug) as writer:
        files = {
            "model": writer.add("model.onnx", model),
            "samples": writer.add("samples.safetensors", samples.to_bytes()),
        }
        return writer.commit(
            Artifact(
                name=name,
                created=datetime.now(UTC),
                variant=Variant.parse(slug),
                signature=signature,
                preprocess=None,
                labels=tuple(str(i) for i in range(CLASSES)),
                task="classification",
                requires=("onnxruntime",),
                parity=Parity(
                    provider="CPUExecutionProvider",
                    batches=(1, 2),
                    samples=12,
                    max_abs=0.0,
                    max_rel=0.0,
                    sqnr_db=None,
                    agreement=1.0,
                    tolerance=Tolerance(max_abs=1e-3, max_rel=1e-3),
                ),
                accuracy=Accuracy(
                    metric="accuracy",
                    samples=360,
                    value=0.98 - drop / 100,
                    reference=0.98,
                    drop_points=drop,
                    drop_low=drop - 0.4,
                    drop_high=drop + 0.4,
                    flips=round(drop * 3.6),
                    max_drop=1.0,
                    strict=False,
                ),
                provenance=Provenance(checkpoint=name, checkpoint_sha256="0" * 64, environment=describe_environment()),
                files=files,
            )
        )


@pytest.fixture
def make_artifact(tmp_path: Path) -> MakeArtifact:
    """make_artifact("onnx-fp32", hidden=8, drop=0.0, name="toy") writes a real artifact and returns it."""
    return partial(write_artifact, tmp_path)


class QuietServer(ThreadingHTTPServer):
    """Connections that a test breaks are not worth a traceback."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class OipServer:
    """A real server of one ONNX artifact; `behave` may answer a request itself by returning (status, body).

    statistics: what it answers to GET .../stats; None for a server without that extension.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        # Without it tensors come and go as numbers in JSON, and anything else is refused.
        self.binary = True
        # Whether it has its model under a version, too; extra: fields of each tensor that it answers in JSON.
        self.versioned = False
        self.extra: dict[str, object] = {}
        self.requests = 0
        self.connections: list[socket.socket] = []
        self.behave: Callable[[int], tuple[int, bytes] | None] = lambda count: None
        self.statistics: Callable[[], object] | None = None
        session = ort.InferenceSession(str(artifact.path("model")), providers=["CPUExecutionProvider"])
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def setup(self) -> None:
                super().setup()
                outer.connections.append(self.connection)

            def log_message(self, *args: object) -> None:
                pass

            def answer(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

            def do_GET(self) -> None:
                if self.path == "/v2":
                    known = ["binary_tensor_data"] if outer.binary else []
                    server = {"name": "toy-server", "version": "1", "extensions": known}
                    self.answer(200, json.dumps(server).encode())
                elif self.path in outer.paths():
                    self.answer(200, json.dumps(metadata(artifact)).encode())
                elif self.path == f"/v2/models/{artifact.name}/stats" and outer.statistics is not None:
                    self.answer(200, json.dumps(outer.statistics()).encode())
                else:
                    self.answer(404, b'{"error": "no such model"}')

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path.removesuffix("/infer") not in outer.paths():
                    self.answer(404, b'{"error": "no such path"}')
                    return
                with lock:
                    outer.requests += 1
                    count = outer.requests
                special = outer.behave(count)
                if special is not None:
                    self.answer(*special)
                    return
                if not outer.binary:
                    self.answer_numbers(body)
                    return
                length = int(self.headers["Inference-Header-Content-Length"])
                (entry,) = json.loads(body[:length])["inputs"]
                array = np.frombuffer(body[length:], np.float32).reshape(entry["shape"])
                (logits,) = session.run(None, {"input": array})
                head = json.dumps(
                    {
                        "model_name": artifact.name,
                        "outputs": [
                            {
                                "name": "logits",
                                "datatype": "FP32",
                                "shape": list(logits.shape),
                                "parameters": {"binary_data_size": logits.nbytes},
                            }
                        ],
                    }
                ).encode()
                self.answer(200, head + logits.tobytes(), Inference_Header_Content_Length=str(len(head)))

            def answer_numbers(self, body: bytes) -> None:
                if self.headers["Content-Type"] != "application/json":
                    self.answer(400, b'{"error": "JSON is wanted"}')
                    return
                (entry,) = json.loads(body)["inputs"]
                array = np.array(entry["data"], np.float32).reshape(entry["shape"])
                (logits,) = session.run(None, {"input": array})
                output = {
                    "name": "logits", "datatype": "FP32", "shape": list(logits.shape), "data": logits.ravel().tolist()
                } | outer.extra  # fmt: skip
                self.answer(200, json.dumps({"model_name": artifact.name, "outputs": [output]}).encode())

        self._server = QuietServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def paths(self) -> list[str]:
        path = f"/v2/models/{self.artifact.name}"
        return [path, f"{path}/versions/1"] if self.versioned else [path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # the client closed it first
                connection.shutdown(socket.SHUT_RDWR)


def metadata(artifact: Artifact) -> dict[str, object]:
    def tensor(spec: TensorSpec) -> dict[str, object]:
        return {
            "name": spec.name,
            "datatype": "FP32",
            "shape": [-1 if isinstance(dim, str) else dim for dim in spec.shape],
        }

    return {
        "name": artifact.name,
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [tensor(spec) for spec in artifact.signature.inputs],
        "outputs": [tensor(spec) for spec in artifact.signature.outputs],
    }


@pytest.fixture
def serve() -> Iterator[Callable[[Artifact], OipServer]]:
    """serve(artifact) starts a server on a free port; all are stopped at the end."""
    running: list[OipServer] = []

    def start(artifact: Artifact) -> OipServer:
        running.append(OipServer(artifact))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


MACHINE = Environment(
    system="Linux 6.1", machine="x86_64", cpu="Example 9000", instruction_sets=("avx2", "avx512_vnni"), cores=2,
    memory_bytes=16_000_000_000, python="3.11.7", gpus=(), packages={"numpy": "2.0.0", "onnxruntime": "1.31.1"},
)  # fmt: skip
_ROUNDS, _CALLS = 40, 40
# target, slug, median in ns, points lost, model bytes, flips
_ROWS = (
    ("eager", None, 1_400_000, 0.0, None, None),
    ("digits/onnx-fp32", "onnx-fp32", 210_000, 0.0, 180_000, 0),
    ("digits/onnx-int8", "onnx-int8", 150_000, 0.28, 52_000, 1),
    ("digits/onnx-int8-pruned50", "onnx-int8-pruned50", 102_000, 1.39, 31_000, 9),
)


def example_report(*, title: str = "digits") -> Measured:
    """Samples are drawn from a fixed seed; onnx-fp32 drifts, and the network row has too few calls for p99."""
    draw = np.random.default_rng(0)
    turns = np.repeat(np.arange(_ROUNDS), _CALLS)
    rows, samples, base = [], {}, None
    for index, (target, slug, median, drop, size, flips) in enumerate(_ROWS):
        latencies = (median * np.exp(draw.normal(0, 0.1, len(turns)))).astype(np.int64)
        by_turn = np.split(latencies, _ROUNDS)
        base = base or by_turn
        key = f"row{index:02d}"
        samples |= {key: latencies, f"{key}.starts": np.cumsum(latencies), f"{key}.turns": turns}
        drifts = slug == "onnx-fp32"
        rows.append(
            Measurement(
                target=target,
                artifact=slug,
                runtime="onnxruntime" if slug else "eager",
                provider="CPUExecutionProvider" if slug else "cpu",
                device="cpu",
                precision="int8" if slug and "int8" in slug else "fp32",
                threads=2,
                boundary="host",
                load=Load(),
                samples=key,
                latency=summarize(latencies, turns=turns),
                throughput=rate_interval(np.full(_ROUNDS, _CALLS), np.array([turn.sum() / 1e9 for turn in by_turn])),
                speedup=ratio_interval(base, by_turn),
                warmup_calls=200,
                model_bytes=size,
                peak_memory_bytes=81_000_000 if slug else 440_000_000,
                accuracy=0.9861 - drop / 100,
                accuracy_samples=360,
                drop_points=drop,
                drop_low=drop - 0.7 if slug else None,
                drop_high=drop + 0.7 if slug else None,
                flips=flips,
                verdict=Verdict(
                    steady=not drifts, reasons=("not steady: the median moved by +12% over the run",) if drifts else ()
                ),
            )
        )
    latencies = (900_000 * np.exp(draw.normal(0, 0.3, 300))).astype(np.int64)
    samples |= {"row04": latencies, "row04.starts": np.cumsum(latencies)}
    rows.append(
        Measurement(
            target="http://127.0.0.1:3000",
            artifact="onnx-int8",
            runtime="onnxruntime_onnx",
            provider="unknown",
            device="unknown",
            precision="int8",
            threads=None,
            boundary="network",
            load=Load(scenario="offline", concurrency=8),
            samples="row04",
            latency=summarize(latencies),
            throughput=rate_interval(np.full(30, 10), np.full(30, 0.03)),
            errors={"HTTP 503": 2},
            warmup_calls=50,
            verdict=Verdict(
                steady=False,
                reasons=(
                    "2 of 302 calls failed: HTTP 503 ×2",
                    "under-sampled: p99 is not certified: 300 effective samples of 300, it needs 368",
                ),
            ),
        )
    )
    report = Report(
        title=title,
        dlops_version="0.1.0",
        created=datetime(2026, 11, 21, 12, 0, tzinfo=UTC),
        command=("dlops", "bench", "artifacts/digits/onnx-int8"),
        environment=MACHINE,
        measurements=tuple(rows),
        baseline="eager",
        notes=("a note on all of it",),
    )
    return choose_fastest(Measured(report=report, samples=samples), max_drop=1.0)


@pytest.fixture
def example(calibration: Calibration) -> Callable[..., Measured]:
    """example(title=...) gives a report of every kind of row, with a calibration."""

    def make(**options: str) -> Measured:
        measured = example_report(**options)
        report = measured.report.model_copy(update={"calibration": calibration})
        return Measured(report=report, samples=measured.samples)

    return make


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[[Measured], Tab]]:
    """open_tab(measured) shows the measured report's page in a browser."""
    tabs: list[Tab] = []

    def show(measured: Measured) -> Tab:
        tabs.append(Tab(browser, render_html(measured.report, measured.samples)))
        return tabs[-1]

    yield show
    for tab in tabs:
        tab.close()
