"""TensorRT engines without a GPU: what they are built from is computed on the CPU, the rest are stand-ins.

tests/gpu/test_tensorrt.py builds and runs real ones.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from dlops.artifact import Artifact, open_artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import CorruptError, GateError, MachineError, UsageError
from dlops.export.pipeline import export_variants, rank_variant
from dlops.export.quantize_operands import _Made
from dlops.model_file import format_of
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, open_session
from dlops.serve.model import ServedModel
from dlops.serve.routes import Application
from dlops.serve.settings import Settings
from tests.tensorrt_stand_in import Cuda, install

from .conftest import SmallNet

VARIANTS = ("tensorrt-fp32", "tensorrt-fp16", "tensorrt-int8", "tensorrt-fp8")
Stand = tuple[Any, Cuda]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Stand:
    return install(monkeypatch)


@pytest.fixture
def made(stand_in: Stand, checkpoint: Checkpoint, tmp_path: Path) -> dict[str, Artifact]:
    found = export_variants(checkpoint, variants=VARIANTS, out=tmp_path, model=SmallNet, max_drop=5.0, device="auto")
    return {artifact.slug: open_artifact(artifact.directory) for artifact in found}


def test_every_precision_is_built_from_a_graph_of_its_types_and_passes_the_gates(
    made: dict[str, Artifact], stand_in: Stand
) -> None:
    assert tuple(made) == VARIANTS
    for slug, artifact in made.items():
        notes = artifact.provenance.notes
        assert (notes["tensorrt"], notes["gpu"], notes["compute_capability"]) == (
            "10.13.3", "NVIDIA H100 80GB HBM3", "9.0",
        )  # fmt: skip
        assert format_of(artifact.path("model")) == "tensorrt"
        graph = onnx.load_from_string(artifact.path("model").read_bytes().removeprefix(b"ftrt"))
        kinds = {onnx.TensorProto.DataType.Name(one.data_type) for one in graph.graph.initializer if len(one.dims) > 1}
        assert kinds == {"FLOAT" if slug == "tensorrt-fp32" else "FLOAT16"}, slug
        rounded = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
        # Four products, of an activation and a weight each.
        # TensorRT has no convolution of one channel in fp8.
        assert len(rounded) == {"tensorrt-int8": 8, "tensorrt-fp8": 6}.get(slug, 0)
        to = {attribute.i for node in rounded for attribute in node.attribute if attribute.name == "output_dtype"}
        number = {"tensorrt-int8": {onnx.TensorProto.INT8}, "tensorrt-fp8": {onnx.TensorProto.FLOAT8E4M3FN}}
        assert to == number.get(slug, set())
        with pytest.raises(UsageError, match="a TensorRT engine that does not say what it is"):
            importlib.import_module("dlops.embedded").read_embedded(artifact.path("model"))
    (profile,) = stand_in[0].Builder.last[1].profiles
    assert profile.shapes == {"input": ((1, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8))}


@pytest.mark.parametrize("slug", ["tensorrt-fp16-sparse24", "tensorrt-int8-sparse24", "tensorrt-fp32-sparse80"])
def test_zeros_are_counted_in_the_graph_and_two_of_four_may_be_skipped(
    slug: str, stand_in: Stand, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    [artifact] = export_variants(checkpoint, variants=[slug], out=tmp_path, model=SmallNet, max_drop=60, device="auto")
    notes = artifact.provenance.notes
    assert notes["sparse_zeros"] >= int(notes["sparse_weights"] * (0.8 if slug.endswith("80") else 0.5)) > 0
    graph, config = stand_in[0].Builder.last
    wide = [numpy_helper.to_array(one) for one in graph.graph.initializer if len(one.dims) > 1]
    assert sum(int((one == 0).sum()) for one in wide) >= notes["sparse_zeros"]
    skips = slug.endswith("24")
    assert config.flags == ["sparse"] * skips
    assert [notes.get(f"sparse_layers_{kind}") for kind in ("eligible", "chosen")] == ([2, 1] if skips else [None] * 2)
    # The graph itself is none of the artifact.
    assert not list(artifact.directory.glob("*.onnx"))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_session_runs_binds_and_replays(made: dict[str, Artifact], stand_in: Stand, cuda_graph: bool) -> None:
    artifact, cuda = made["tensorrt-fp16"], stand_in[1]
    session = open_session(artifact, SessionOptions(device="cuda", cuda_graph=cuda_graph))
    assert (session.placement.runtime, session.placement.device, session.placement.precision) == (
        "tensorrt", "cuda:0", "fp16",
    )  # fmt: skip
    self_test(artifact, session)
    draw = np.random.default_rng(0)
    small, large, other = (draw.standard_normal((n, 1, 8, 8)).astype(np.float32) for n in (2, 9, 2))
    expected = {len(one): session.run({"input": one})["logits"] for one in (small, large)}
    assert expected[9].shape == (9, 10)
    bound = session.bind({"input": small})
    np.testing.assert_array_equal(bound.copy_out()["logits"], expected[2])
    before = cuda.launches
    bound.copy_in({"input": other})
    bound.run()
    bound.synchronize()
    np.testing.assert_array_equal(bound.copy_out()["logits"], session.run({"input": other})["logits"])
    assert cuda.launches - before == cuda_graph
    with pytest.raises(ValueError, match="bind each shape on its own"):
        bound.copy_in({"input": large})
    session.close()


def test_threads_at_once_have_a_context_each_and_the_right_answers(made: dict[str, Artifact], stand_in: Stand) -> None:
    session = open_session(made["tensorrt-fp32"], SessionOptions())
    feeds = [np.full((1 + n, 1, 8, 8), n, np.float32) for n in range(4)]
    expected = [session.run({"input": feed})["logits"] for feed in feeds]
    wrong: list[int] = []

    def call(n: int) -> None:
        for _ in range(20):
            if not np.array_equal(session.run({"input": feeds[n]})["logits"], expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= stand_in[0].engines[-1].contexts <= 4
    buffers = len(stand_in[1].buffers)
    session.close()
    assert len(stand_in[1].buffers) < buffers


def test_an_engine_of_another_machine_is_refused_and_made_again(
    made: dict[str, Artifact], stand_in: Stand, checkpoint: Checkpoint, monkeypatch
) -> None:
    artifact = made["tensorrt-fp32"]
    with pytest.raises(MachineError, match="an engine runs on a GPU alone"):
        open_session(artifact, SessionOptions(device="cpu"))
    monkeypatch.setattr(stand_in[0], "__version__", "11.4.0")
    with pytest.raises(MachineError, match=r"built for tensorrt 10\.13\.3, and here is 11\.4\.0"):
        open_session(artifact)
    monkeypatch.setattr(stand_in[0], "__version__", "10.13.3")
    # Made again, it is one for what is here.
    monkeypatch.setattr(stand_in[0], "__version__", "11.4.0")
    [again] = export_variants(
        checkpoint, variants=["tensorrt-fp32"], out=artifact.directory.parents[1], model=SmallNet, device="auto"
    )
    assert again.provenance.notes["tensorrt"] == "11.4.0"
    artifact = open_artifact(again.directory)
    monkeypatch.setenv("XDG_STATE_HOME", str(artifact.directory / "elsewhere"))
    with pytest.raises(UsageError, match="not made by you on this machine"):
        open_session(artifact)
    open_session(artifact, SessionOptions(trust=True)).close()
    damaged = artifact.path("model")
    damaged.write_bytes(b"xxxx" + damaged.read_bytes()[4:])
    with pytest.raises(CorruptError, match="it is not the file that its manifest names"):
        open_session(artifact, SessionOptions(trust=True))


def test_what_cannot_be_built_says_why(stand_in: Stand, checkpoint: Checkpoint, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UsageError, match="built and checked on a GPU"):
        export_variants(checkpoint, variants=["tensorrt-fp16"], out=tmp_path, model=SmallNet, device="cpu")

    def export(variant: str) -> None:
        export_variants(checkpoint, variants=[variant], out=tmp_path, model=SmallNet, device="auto")

    stand_in[1].capability = (8, 6)
    with pytest.raises(MachineError, match=r"fp8 takes compute capability 8\.9 or later, and NVIDIA H100.* has 8\.6"):
        export("tensorrt-fp8")
    monkeypatch.setattr(stand_in[0].OnnxParser, "refuses", ("MaxPool",))
    with pytest.raises(UsageError, match=r"TensorRT 10\.13\.3 cannot take it: MaxPool: no importer registered"):
        export("tensorrt-fp16")
    monkeypatch.setattr(stand_in[0].OnnxParser, "refuses", ())
    monkeypatch.setattr(stand_in[0].Builder, "fails", "no memory\nfor tactics")
    with pytest.raises(MachineError, match="builds no engine of it: no memory for tactics"):
        export("tensorrt-fp16")
    assert not list(tmp_path.rglob("*.engine"))
    monkeypatch.setattr(stand_in[0].Builder, "starts", False)
    with pytest.raises(MachineError, match="does not start: CUDA initialization failure with error: 35"):
        export("tensorrt-fp16")
    stand_in[1].name = b""
    with pytest.raises(MachineError, match="built and run on an NVIDIA GPU, and CUDA finds none"):
        export("tensorrt-fp16")


def test_ctrl_c_ends_the_build_between_two_steps(stand_in: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("dlops.export.to_tensorrt")
    steps: list[bool] = []

    class Bar:
        def advance(self, steps: int = 1, *, note: str | None = None) -> None: ...

    progress = module.Progress(Bar())
    reached = threading.Event()

    def build() -> None:
        progress.phase_start("Building", None, 1000)
        for step in range(1000):
            steps.append(progress.step_complete("Building", step))
            reached.set()
            if not steps[-1]:
                return
            threading.Event().wait(0.005)

    def interrupted(future: Future[None], timeout: float | None = None) -> None:
        reached.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module._in_a_thread(build, progress)
    assert steps[-1] is False
    assert len(steps) < 1000


def test_what_the_build_raises_comes_out(stand_in: Stand) -> None:
    module = importlib.import_module("dlops.export.to_tensorrt")

    def build() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        module._in_a_thread(build, None)


def test_nothing_stays_on_the_device(made: dict[str, Artifact], stand_in: Stand) -> None:
    session = open_session(made["tensorrt-fp16"], SessionOptions(device="cuda", cuda_graph=True))
    feed = {"input": np.zeros((2, 1, 8, 8), np.float32)}
    for _ in range(3):
        session.bind(feed)
        session.run(feed)
    with pytest.raises(MachineError, match="TensorRT does not take"):
        session.run({"input": np.zeros((0, 1, 8, 8), np.float32)})
    session.close()
    del session
    gc.collect()
    assert not stand_in[1].buffers
    assert not stand_in[1].open_streams


@pytest.mark.parametrize(
    ("number", "weight", "group", "has"),
    [
        ("fp8", (64, 64, 3, 3), 1, True), ("fp8", (64, 3, 7, 7), 1, False), ("fp8", (16, 64, 1, 1), 1, False),
        ("fp8", (64, 1, 3, 3), 64, False), ("fp8", (64, 64, 7, 7), 1, False), ("int8", (64, 3, 7, 7), 1, True),
        ("int8", (64, 1, 3, 3), 64, True), ("int8", (64, 1, 1, 1), 64, False), ("int8", (10, 3, 3, 3), 1, False),
        ("int8", (64, 3, 1, 7), 1, False),
    ],
)  # fmt: skip
def test_convolutions_without_a_kernel_in_8_bits_stay_as_they_are(
    number: str, weight: tuple[int, ...], group: int, has: bool
) -> None:
    graph = helper.make_graph([], "one", [], [], [numpy_helper.from_array(np.zeros(weight, np.float32), "w")])
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=group)
    assert _Made(graph, {}, number, stored=False).has_kernel(node) is has


def test_layers_are_ranked_as_tensorrt_would_round_them_and_what_is_not_rounded_is_refused(
    stand_in: Stand, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranking = rank_variant(checkpoint, variant="tensorrt-int8", model=SmallNet)
    assert len(ranking.layers) == 4
    monkeypatch.setattr("dlops.export.quantize_operands._PRODUCTS", frozenset({"Gemm"}))
    with pytest.raises(GateError, match=r"int8 was asked for, and 1% of the weights are read in it"):
        export_variants(checkpoint, variants=["tensorrt-int8"], out=tmp_path, model=SmallNet, device="auto")


@pytest.mark.parametrize("graphs", [False, True])
def test_it_is_served_and_with_graphs_from_memory_that_the_device_copies_from(
    made: dict[str, Artifact], stand_in: Stand, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    artifact, cuda = made["tensorrt-fp16"], stand_in[1]
    settings = Settings(device="cuda", cuda_graphs=graphs, max_batch=8)
    session = open_session(artifact, SessionOptions(device="cuda", cuda_graph=graphs))
    expected = session.run({"input": np.asarray(artifact.samples().inputs["input"][:8])})["logits"]
    before = set(cuda.buffers)
    app = Application(settings)
    model = ServedModel(artifact, [session], settings, app.metrics)
    app.models.replace([model])
    # One buffer for each bucket's input: 1, 2, 4 and 8 rows.
    assert cuda.locked == (4 if graphs else 0)
    x = artifact.samples().inputs["input"][:8]

    async def ask(client: httpx.AsyncClient, first: int, end: int) -> np.ndarray:
        rows = x[first:end]
        tensor = {"name": "input", "datatype": "FP32", "shape": list(rows.shape), "data": rows.reshape(-1).tolist()}
        response = await client.post(f"/v2/models/{artifact.name}/infer", json={"inputs": [tensor]})
        assert response.status_code == 200, response.text
        return np.array(response.json()["outputs"][0]["data"], np.float32).reshape(end - first, 10)

    async def scenario() -> list[np.ndarray]:
        transport = httpx.ASGITransport(app=app.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(ask(client, 0, 1), ask(client, 1, 4), ask(client, 4, 8))

    np.testing.assert_allclose(np.concatenate(asyncio.run(scenario())), expected, rtol=1e-3, atol=1e-3)
    model.close()
    assert cuda.locked == 0
    assert set(cuda.buffers) <= before
