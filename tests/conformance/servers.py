"""The same models behind our service and behind a real tritonserver.

digits: versions 1 and 2 of a classifier with labels. types: gives back a tensor of each datatype that ONNX Runtime
takes from numpy, halves: one of the other, bfloat16. spare: is there, and not loaded at first.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import onnx
import torch
from onnx import helper
from torch import nn

from dlops.artifact import Artifact, Parity, Provenance, Tolerance, Variant
from dlops.directory import DirectoryWriter
from dlops.environment import describe_environment
from dlops.export.pipeline import export_variants
from dlops.samples import Samples
from dlops.saving import save_checkpoint
from dlops.serve.launch import ServerProcess
from dlops.serve.metadata import model_config
from dlops.signature import BFLOAT16, DimRange, Signature, TensorSpec
from tests.benchmarks.peers.running import free_ports, process, triton_command

HOST = "127.0.0.1"
DTYPES = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64",
)  # fmt: skip
_LOADED = ("digits", "types", "halves")
_START_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Server:
    http: str
    """Host and port, as tritonclient takes them."""
    grpc: str
    name: str

    @property
    def url(self) -> str:
        return f"http://{self.http}"


@contextmanager
def ours(models: Path) -> Iterator[Server]:
    settings = {"DLOPS_MODEL_CONTROL": "explicit", "DLOPS_VERSIONS": "0"}
    with ServerProcess(models, grpc_port=0, env=settings) as running:
        httpx.post(f"{running.url}/v2/repository/models/spare/unload").raise_for_status()
        yield Server(http=f"{HOST}:{running.port}", grpc=f"{HOST}:{running.grpc_port}", name="dlops")


@contextmanager
def tritons(models: Path, folder: Path, artifacts: dict[str, Artifact]) -> Iterator[Server]:
    """Raises UnavailableError where it is not installed and cannot be."""
    for path in models.glob("*/*"):
        version = folder / "models" / path.parent.name / path.name
        version.mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("triton_model.py"), version / "model.py")
        artifact = artifacts[path.parent.name]
        (version.parent / "config.pbtxt").write_text(_config(artifact))
        (version.parent / "labels.txt").write_text("\n".join(artifact.labels))
    http, grpc, metrics = free_ports(3)
    options = ["--http-port", str(http), "--grpc-address", HOST, "--grpc-port", str(grpc)]
    options += ["--model-control-mode", "explicit"]
    options += [word for name in _LOADED for word in ("--load-model", name)]
    command, env = triton_command(folder, *options, metrics_port=metrics)
    with process(command, folder, env) as child:
        server = Server(http=f"{HOST}:{http}", grpc=f"{HOST}:{grpc}", name="tritonserver")
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                if httpx.get(f"{server.url}/v2/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if child.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((folder / "log.txt").read_text())
            time.sleep(0.1)
        yield server


def make_types(directory: Path) -> Artifact:
    """`in_float32` is given back as `out_float32`, and so on; booleans as numbers, which our regression wants."""
    given_back = {dtype: "uint8" if dtype == "bool" else dtype for dtype in DTYPES}

    def declared(name: str, dtype: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), ["batch", 2])

    tensors = [
        [declared(f"in_{dtype}", dtype) for dtype in DTYPES],
        [declared(f"out_{dtype}", out) for dtype, out in given_back.items()],
    ]
    nodes = [
        helper.make_node("Cast", [f"in_{dtype}"], [f"out_{dtype}"], to=helper.np_dtype_to_tensor_dtype(np.dtype(out)))
        for dtype, out in given_back.items()
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "types", *tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    onnx.checker.check_model(model)
    rows = {f"in_{dtype}": np.array([[0, 1], [1, 1]], dtype) for dtype in DTYPES}
    samples = Samples(
        raw=tuple(np.zeros((2, 1))),
        inputs=rows,
        outputs={f"out_{dtype}": rows[f"in_{dtype}"].astype(out) for dtype, out in given_back.items()},
    )
    inputs, outputs = (
        tuple(TensorSpec(name=f"{side}_{name}", dtype=dtype, shape=("batch", 2)) for name, dtype in dtypes.items())
        for side, dtypes in (("in", dict(zip(DTYPES, DTYPES, strict=True))), ("out", given_back))
    )
    with DirectoryWriter(directory) as writer:
        files = {
            "model": writer.add("model.onnx", model.SerializeToString()),
            "samples": writer.add("samples.safetensors", samples.to_bytes()),
        }
        artifact = Artifact(
            name="types", created=datetime.now(UTC), variant=Variant(format="onnx"),
            signature=Signature(inputs=inputs, outputs=outputs, dims={"batch": DimRange(max=64)}),
            preprocess=None, task="regression", requires=("onnxruntime",),
            parity=Parity(
                provider="CPUExecutionProvider", batches=(1,), samples=2, max_abs=0.0, max_rel=0.0, sqnr_db=None,
                agreement=1.0, tolerance=Tolerance(max_abs=1e-3),
            ),
            accuracy=None,
            provenance=Provenance(checkpoint="types", checkpoint_sha256="0" * 64, environment=describe_environment()),
            files=files,
        )  # fmt: skip
        return writer.commit(artifact)


class _GivesBack(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def make_halves(folder: Path, out: Path) -> Artifact:
    """`x`, bfloat16 in rows of two, is given back as `logits`. In a folder of its name in `out`."""
    inputs = np.array([[1.5, -2], [0.25, 8], [3, 0.125]], BFLOAT16)
    checkpoint = save_checkpoint(
        _GivesBack(), folder, evaluation=Samples(raw=tuple(inputs), inputs={"x": inputs}), task="regression",
        name="halves", max_batch=64,
        inputs=[TensorSpec(name="x", dtype="bfloat16", shape=("batch", 2))],
    )  # fmt: skip
    [artifact] = export_variants(checkpoint, variants=["torchscript-fp32"], out=out, model=_GivesBack)
    return artifact


def _config(artifact: Artifact) -> str:
    """As our own service describes the model, in Triton's form."""
    told = model_config(artifact.signature, name=artifact.name, platform="", device="cpu", max_batch=64)

    def tensors(kind: str) -> str:
        labels = ' label_filename: "labels.txt"' if kind == "output" and artifact.labels else ""
        return "\n".join(
            f'{kind} [{{ name: "{one["name"]}" data_type: {one["data_type"]} dims: {one["dims"]}{labels} }}]'
            for one in told[kind]
        )

    return f"""backend: "python"
max_batch_size: 64
{tensors("input")}
{tensors("output")}
version_policy: {{ all {{ }} }}
instance_group [{{ kind: KIND_CPU count: 1 }}]
parameters: {{ key: "model" value: {{ string_value: "{artifact.path("model").resolve()}" }} }}
"""
