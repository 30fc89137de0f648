"""One probe a process: run a tiny model on a device, check its answer, and print what happened as one line of JSON.

`python -m dlops.doctor_probes onnxruntime cuda` does one; `dlops doctor` starts them all. Nothing but numpy is imported
until a probe needs it, and the ONNX model is written out by hand, so that no exporter is needed to test a runtime.
"""

from __future__ import annotations

import base64
import ctypes
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata, util
from pathlib import Path

import numpy as np

from dlops.signature import Array

# Small whole numbers: exact in fp16 and TF32 too, so that a right answer is an equal one.
_X = np.array([[1, -2, 3, 0], [0, 1, -1, 2]], np.float32)
_W = np.array([[1, 0, 2], [-1, 1, 0], [0, -2, 1], [3, 1, -1]], np.float32)
_EXPECTED = np.maximum(_X @ _W, 0)
_FLOAT, _IR_VERSION, _OPSET = 1, 8, 13
_ERRORS_ONLY = 3


class _AbsentError(Exception):
    """There is nothing to run on; the message says what is not there."""


class _UntriedError(Exception):
    """What it takes is there, and no model was run; the message says what was tried instead."""


def tiny_onnx_model() -> bytes:
    """relu(x @ w) for x of (2, 4): an ONNX file, opset 13."""
    weights = (
        b"".join(_varint_field(1, size) for size in _W.shape)
        + _varint_field(2, _FLOAT)
        + _bytes_field(8, b"w")
        + _bytes_field(9, _W.astype("<f4").tobytes())
    )
    graph = (
        _bytes_field(1, _node("MatMul", [b"x", b"w"], b"product"))
        + _bytes_field(1, _node("Relu", [b"product"], b"y"))
        + _bytes_field(2, b"probe")
        + _bytes_field(5, weights)
        + _bytes_field(11, _value_info(b"x", _X.shape))
        + _bytes_field(12, _value_info(b"y", _EXPECTED.shape))
    )
    opset = _bytes_field(1, b"") + _varint_field(2, _OPSET)
    return _varint_field(1, _IR_VERSION) + _bytes_field(7, graph) + _bytes_field(8, opset)


def _onnxruntime(provider: str) -> str:
    try:
        import onnxruntime as ort
    except ModuleNotFoundError:
        raise _AbsentError("onnxruntime is not installed") from None
    if provider not in ort.get_available_providers():
        raise _AbsentError(f"onnxruntime {ort.__version__} was built without {provider}")
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = 1
    if provider != "CPUExecutionProvider":
        ort.preload_dlls()
        # Then loading fails where a node would be placed on the CPU, instead of the CPU giving the right answer.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(tiny_onnx_model(), sess_options=options, providers=[provider])
    used = session.get_providers()[0]
    if used != provider:
        raise RuntimeError(f"{provider} was asked for and {used} was given: its libraries do not load")
    _check(session.run(["y"], {"x": _X})[0])
    return f"onnxruntime {ort.__version__} ran on {used}"


def _openvino() -> str:
    try:
        import openvino as ov
    except ModuleNotFoundError:
        raise _AbsentError("openvino is not installed") from None
    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(tiny_onnx_model()), "CPU", settings)
    _check(compiled(_X)[0])
    return f"openvino {ov.__version__.partition('-')[0]} ran on {', '.join(compiled.get_property('EXECUTION_DEVICES'))}"


def _torch(device: str) -> str:
    if device == "mps" and sys.platform != "darwin" and util.find_spec("torch"):
        # Nothing that torch, which takes seconds to import, could add.
        raise _AbsentError("no Apple GPU here")
    try:
        import torch
    except ModuleNotFoundError:
        raise _AbsentError("torch is not installed") from None
    if device == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        problem = f"torch {torch.__version__} ({built}) finds no GPU"
        raise RuntimeError(problem) if torch.version.cuda else _AbsentError(problem)
    if device == "mps" and not torch.backends.mps.is_available():
        raise _AbsentError("no Apple GPU here")
    with torch.inference_mode():
        result = torch.relu(torch.from_numpy(_X).to(device) @ torch.from_numpy(_W).to(device))
    if result.device.type != device:
        raise RuntimeError(f"{device} was asked for and the result is on {result.device}")
    _check(result.cpu().numpy())
    where = torch.cuda.get_device_name(0) if device == "cuda" else device
    return f"torch {torch.__version__} ran on {where}"


def _torchscript() -> str:
    try:
        import torch
    except ModuleNotFoundError:
        raise _AbsentError("torch is not installed") from None
    weights = torch.from_numpy(_W)
    with warnings.catch_warnings():
        # torch announces TorchScript's retirement at every use; whether it works is the question here.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: torch.relu(x @ weights), torch.zeros(_X.shape))  # type: ignore[no-untyped-call]
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)  # type: ignore[no-untyped-call]
    _check(loaded(torch.from_numpy(_X)).numpy())
    return f"torch {torch.__version__} saved, loaded and ran a TorchScript module on the CPU"


def _compiler() -> str:
    """Whether there is what AOTInductor compiles with. torch is not imported: that takes seconds, and adds nothing."""
    if util.find_spec("torch") is None:
        raise _AbsentError("torch is not installed")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise _AbsentError(f"no C++ compiler here: {compiler}")
    with tempfile.TemporaryDirectory(prefix="dlops-doctor-") as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text('#include <vector>\nextern "C" int probe() { return std::vector<int>(7).size(); }\n')
        subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True, capture_output=True)
        answer = ctypes.CDLL(str(library)).probe()
    if answer != 7:
        raise RuntimeError(f"what {compiler} compiles gives {answer}, not 7")
    raise _UntriedError(f"{compiler} compiles a library that loads, which torch {metadata.version('torch')} needs")


def _aotinductor() -> str:
    """Half a minute where nothing of it is in inductor's cache."""
    try:
        import torch
    except ModuleNotFoundError:
        raise _AbsentError("torch is not installed") from None
    weights = torch.from_numpy(_W)

    class Tiny(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ weights)

    with tempfile.TemporaryDirectory(prefix="dlops-doctor-") as folder, torch.no_grad():
        program = torch.export.export(Tiny().eval(), (torch.zeros(_X.shape),))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, "probe.pt2")))
        _check(torch._inductor.aoti_load_package(package)(torch.from_numpy(_X)).numpy())
    return f"torch {torch.__version__} compiled, loaded and ran a package on the CPU"


def _executorch() -> str:
    try:
        import torch
        from executorch import version
        from executorch.extension.pybindings import _C as bindings  # noqa: N811
    except ModuleNotFoundError as error:
        raise _AbsentError(f"{(error.name or '').partition('.')[0]} is not installed") from None
    # relu(x @ w) lowered to XNNPACK, in base64: lowering it here would take the exporter, and half a minute when busy.
    program = base64.b64decode(Path(__file__).with_name("doctor_executorch.txt").read_bytes())
    module = bindings._load_for_executorch_from_buffer(program)
    _check(module.forward([torch.from_numpy(_X)])[0].numpy())
    return f"executorch {version.__version__} ran on XnnpackBackend"


def _torchvision() -> str:
    try:
        import torch
        import torchvision
    except ModuleNotFoundError as error:
        raise _AbsentError(f"{error.name} is not installed") from None
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    if kept != [0, 2]:
        raise RuntimeError(f"its operators give wrong results: nms kept {kept}")
    return f"torchvision {torchvision.__version__} and its operators fit torch {torch.__version__}"


def _tensorrt() -> str:
    try:
        import tensorrt as trt
    except ModuleNotFoundError:
        raise _AbsentError("tensorrt is not installed") from None
    from dlops.runtimes.session import SessionOptions
    from dlops.runtimes.tensorrt import Log, TensorrtSession, made
    from dlops.signature import Signature, TensorSpec

    log = Log()
    builder = made(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if not trt.OnnxParser(network, log).parse(tiny_onnx_model()):
        raise RuntimeError(f"tensorrt {trt.__version__} cannot read a graph: {log.reason}")
    engine = builder.build_serialized_network(network, builder.create_builder_config())
    if engine is None:
        raise RuntimeError(f"tensorrt {trt.__version__} builds no engine: {log.reason}")
    shapes = {"x": _X.shape, "y": _EXPECTED.shape}
    x, y = (TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())
    session = TensorrtSession(
        bytes(engine), signature=Signature(inputs=(x,), outputs=(y,)), precision="fp32", options=SessionOptions(),
        title="probe",
    )  # fmt: skip
    _check(np.asarray(session.run({"x": _X})["y"]))
    session.close()
    return f"tensorrt {trt.__version__} built and ran an engine"


PROBES: Mapping[str, Callable[[], str]] = {
    "onnxruntime cpu": lambda: _onnxruntime("CPUExecutionProvider"),
    "onnxruntime cuda": lambda: _onnxruntime("CUDAExecutionProvider"),
    "onnxruntime tensorrt": lambda: _onnxruntime("TensorrtExecutionProvider"),
    "openvino cpu": _openvino,
    "executorch cpu": _executorch,
    "tensorrt cuda": _tensorrt,
    "torch cpu": lambda: _torch("cpu"),
    "torch cuda": lambda: _torch("cuda"),
    "torch mps": lambda: _torch("mps"),
    "torchscript cpu": _torchscript,
    "aotinductor cpu": _compiler,
    "torchvision cpu": _torchvision,
}

# What takes half a minute, in place of what PROBES has under that name.
COMPILING: Mapping[str, Callable[[], str]] = {"aotinductor cpu": _aotinductor}


def run_probe(name: str, *, compiling: bool = False) -> dict[str, str]:
    """`{"status": "ok" | "failed" | "absent" | "untried", "reason": one line}` for one of PROBES.

    compiling: take the one of COMPILING, where there is one of that name.
    """
    probe = COMPILING.get(name, PROBES[name]) if compiling else PROBES[name]
    try:
        return {"status": "ok", "reason": probe()}
    except _AbsentError as absence:
        return {"status": "absent", "reason": str(absence)}
    except _UntriedError as untried:
        return {"status": "untried", "reason": str(untried)}
    except Exception as error:  # noqa: BLE001 - whatever a broken library raises is the finding
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {"status": "failed", "reason": first[:300]}


def _check(result: Array) -> None:
    if result.shape != _EXPECTED.shape or not np.array_equal(result, _EXPECTED):
        raise RuntimeError(f"it gives a wrong result: {np.asarray(result).tolist()}, not {_EXPECTED.tolist()}")


# Protocol buffers by hand, https://protobuf.dev/programming-guides/encoding: a field is its number and wire type, then
# a varint, or a length and bytes. The numbers are those of onnx.proto.
def _varint(value: int) -> bytes:
    encoded = b""
    while value > 0x7F:
        encoded += struct.pack("B", value & 0x7F | 0x80)
        value >>= 7
    return encoded + struct.pack("B", value)


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes_field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _node(operator: str, inputs: list[bytes], output: bytes) -> bytes:
    return (
        b"".join(_bytes_field(1, name) for name in inputs)
        + _bytes_field(2, output)
        + _bytes_field(4, operator.encode())
    )


def _value_info(name: bytes, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(_bytes_field(1, _varint_field(1, size)) for size in shape)
    tensor = _varint_field(1, _FLOAT) + _bytes_field(2, dims)
    return _bytes_field(1, name) + _bytes_field(2, _bytes_field(1, tensor))


if __name__ == "__main__":
    _, *words = sys.argv
    is_compiling = "--compile" in words
    answer = run_probe(" ".join(word for word in words if word != "--compile"), compiling=is_compiling)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
