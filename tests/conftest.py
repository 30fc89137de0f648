"""Fixtures that several stages' tests share, and what the suite's two processes may use of the machine."""

from __future__ import annotations

import functools
import gc
import io
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def _own_cores() -> None:
    """Keep this process of several, and what it starts, to its share of the cores.

    Otherwise each takes them all for its threads, and threads that wait for one another spin on cores that the other
    process computes on: training a small network then takes ten times as long.
    """
    # A thread that waits for another one gives its core up: with three groups on two cores there is work for it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= workers:
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers])


# Before numpy is there, whose libraries count the cores once.
_own_cores()

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from dlops.artifact import Artifact, Parity, Precision, Provenance, Tolerance, Variant  # noqa: E402
from dlops.directory import DirectoryWriter  # noqa: E402
from dlops.environment import describe_environment  # noqa: E402
from dlops.preprocess import Decode, Preprocess, Resize, Scale  # noqa: E402
from dlops.report import Calibration, Interval, Machine, SendingCost, TimingCost  # noqa: E402
from dlops.samples import Samples  # noqa: E402
from dlops.signature import DimRange, Signature, TensorSpec  # noqa: E402
from tests.browser import Browser  # noqa: E402

MakeArtifact = Callable[..., Artifact]

# The groups that take longest, longest first: begun last, one of them would keep one process waiting for the other.
LONGEST = (
    "export", "working_folder", "workflows/test_quickstart.py", "train/test_training.py", "serve/test_launch.py",
    "bench/test_openloop.py", "bench/test_processes.py", "test_doctor.py", "deploy/test_libtorch.py",
    "bench/test_run.py", "workflows/test_sources.py", "deploy/test_bento.py",
)  # fmt: skip


@functools.cache
def _group(path: str) -> str:
    """What one process runs as a whole: a file, or the files that share what takes half a minute to make."""
    here = Path(__file__).parent
    name = Path(path).relative_to(here.name).as_posix()
    if name.startswith("export/"):
        return "export"
    return "working_folder" if "working_folder" in (here / name).read_text() else name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(_group(item.nodeid.split("::")[0]), len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the garbage collector pass over what is imported here, the million objects of torch among them.

    Each of its rounds through them takes half a second otherwise, and what times calls begins with one.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 20, 10)
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # Its own --dist loadgroup does nothing: it marks node ids in a way that pytest 9.2 no longer knows.
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid.split("::")[0])

    return ByGroup(config, log)


def around(value: float) -> Interval:
    return Interval(value=value, low=value * 0.9, high=value * 1.1)


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    """A full one for a machine of no such name: 0.1 µs a call, a floor of 0.1 ms, 10,000/s closed, 4,000/s a sender."""
    return Calibration(
        created=datetime(2026, 11, 20, 9, 30, tzinfo=UTC),
        machine=Machine(cpu="Example 9000", cores=2, system="Linux 6.1", python="3.11.7", dlops_version="0.1.0"),
        quick=False,
        timing=TimingCost(
            added_ns=around(100.0), share_of_1_ms=Interval(value=0.0005, low=0.0004, high=0.0006), clock_step_ns=50,
            clock_read_ns=75.0,
        ),
        network=SendingCost(
            floor_ns=around(100_000.0), closed_concurrency=8, closed_rate=around(10_000.0), capacity=4000.0,
            missed=4400.0, lag_rate=500.0, lag_p50_ns=around(60_000.0), lag_p99_ns=around(240_000.0),
            oversleep_p50_ns=around(70_000.0), oversleep_p99_ns=around(150_000.0),
        ),
    )  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def cache_folder(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Commands keep nothing in the person's own cache, and find a calibration there instead of making one."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # Installers that tests run go on with the packages that they have.
        for name, tool in (("UV_CACHE_DIR", "uv"), ("PIP_CACHE_DIR", "pip")):
            patch.setenv(name, os.environ.get(name, str(own / tool)))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        from dlops.bench.calibrate import this_machine
        from dlops.bench.kept import keep

        keep(calibration.model_copy(update={"machine": this_machine()}))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators() -> Iterator[None]:
    """torch.onnx.export parses the source of 500 operators anew each time: a second, for always the same table."""
    from onnxscript._framework_apis import torch_2_11

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_2_11, "get_torchlib_ops", functools.cache(torch_2_11.get_torchlib_ops))
        yield


@pytest.fixture(autouse=True)
def python_answers_ctrl_c() -> Iterator[None]:
    """Commands and libraries that run in this process may leave SIGINT handled otherwise, or not at all."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def digit_pngs() -> list[bytes]:
    """40 scanned digits, 8×8 grey PNG files; the digit that each shows is `digit_targets`."""
    from sklearn.datasets import load_digits

    images = load_digits().images[:40]
    return [_png(np.round(image / 16 * 255).astype(np.uint8)) for image in images]


@pytest.fixture(scope="session")
def digit_targets() -> np.ndarray:
    from sklearn.datasets import load_digits

    return load_digits().target[:40]


@pytest.fixture(scope="session")
def make_digits_artifact(digit_pngs: list[bytes]) -> MakeArtifact:
    """Writes a real ONNX artifact, a ridge classifier of scanned digits; no torch is needed to make or run it.

    scale: of the weights in the file but not in the samples' outputs, so that 1 is right and anything else is broken.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Closed form, on what digit_pngs does not show; 10 spreads the scores so that softmax has something to say.
    pixels = np.hstack([digits.data[40:] / 16, np.ones((len(digits.data) - 40, 1))])
    normal = pixels.T @ pixels + 0.1 * np.eye(65)
    solution = 10 * np.linalg.solve(normal, pixels.T @ np.eye(10)[digits.target[40:]])
    weights, bias = solution[:64].astype(np.float32), solution[64].astype(np.float32)

    def make(
        directory: Path, *, name: str = "digits", scale: float = 1.0, precision: Precision = "fp32",
        created: datetime | None = None,
    ) -> Artifact:  # fmt: skip
        preprocess = Preprocess(
            input="image", shape=(1, 8, 8), steps=(Decode(mode="L"), Resize(size=(8, 8)), Scale(factor=1 / 255))
        )
        raw = tuple(digit_pngs[:16])
        inputs = preprocess.batch(raw)
        samples = Samples(
            raw=raw, inputs={"image": inputs}, outputs={"logits": inputs.reshape(16, 64) @ weights + bias}
        )
        with DirectoryWriter(directory) as writer:
            files = {
                "model": writer.add("model.onnx", _linear_onnx(weights * np.float32(scale), bias)),
                "samples": writer.add("samples.safetensors", samples.to_bytes()),
            }
            artifact = Artifact(
                name=name, created=created or datetime.now(UTC), variant=Variant(format="onnx", precision=precision),
                signature=Signature(
                    inputs=(TensorSpec(name="image", dtype="float32", shape=("batch", 1, 8, 8)),),
                    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 10)),),
                    dims={"batch": DimRange(max=64)},
                ),
                preprocess=preprocess, labels=tuple("0123456789"), task="classification", requires=("onnxruntime",),
                parity=Parity(
                    provider="CPUExecutionProvider", batches=(1,), samples=16, max_abs=0.0, max_rel=0.0, sqnr_db=None,
                    agreement=1.0, tolerance=Tolerance(max_abs=1e-3),
                ),
                accuracy=None,
                provenance=Provenance(
                    checkpoint=name, checkpoint_sha256="0" * 64, environment=describe_environment()
                ),
                files=files,
            )  # fmt: skip
            return writer.commit(artifact)

    return make


@pytest.fixture(scope="session")
def digits_artifact(make_digits_artifact: MakeArtifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One that is right, in a folder of its own."""
    return make_digits_artifact(tmp_path_factory.mktemp("artifact") / "digits" / "onnx-fp32")


@pytest.fixture(scope="session")
def openvino_artifact(digits_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same classifier as OpenVINO's pair of files; tests must not change the folder."""
    import openvino as ov

    source, folder = tmp_path_factory.mktemp("openvino") / "model.xml", tmp_path_factory.mktemp("artifact")
    model = ov.Core().read_model(digits_artifact.path("model"))
    ov.save_model(model, source, compress_to_fp16=False)
    with DirectoryWriter(folder / "digits" / "openvino-fp32") as writer:
        graph, weights = writer.add_together("model", [source, source.with_suffix(".bin")])
        changes = {
            "variant": Variant(format="openvino"), "requires": ("openvino",),
            "files": {
                "model": graph, "weights": weights,
                "samples": writer.add_file("samples.safetensors", digits_artifact.path("samples")),
            },
        }  # fmt: skip
        return writer.commit(digits_artifact.model_copy(update=changes))


@pytest.fixture(scope="session")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's folder after a short training and two exports: runs/cnn/short and artifacts/digits-cnn/."""
    from dlops.export.pipeline import export_variants
    from dlops.train.launch import configure, train_recipe

    folder = tmp_path_factory.mktemp("work")
    config = configure("cnn", overrides=["data=digits", "epochs=6"])
    checkpoint = train_recipe("cnn", config, run_dir=folder / "runs" / "cnn" / "short")
    export_variants(checkpoint, variants=["onnx-fp32", "onnx-int8"], out=folder / "artifacts", max_drop=5)
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for all tests, which takes longer to start than to show a page."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no chromium or chrome is installed")
    started = Browser(program, tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _linear_onnx(weights: np.ndarray, bias: np.ndarray) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())
