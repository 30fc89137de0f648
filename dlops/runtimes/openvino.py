"""OpenVINO on the CPU: in the precision that the artifact was checked in, on as many threads as it was given."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import openvino as ov

from dlops.artifact import Artifact
from dlops.environment import available_cores
from dlops.errors import CorruptError
from dlops.model_file import format_of
from dlops.runtimes.session import Placement, SessionOptions, check_bound, check_cpu
from dlops.signature import Array, Feed, Signature

_DEVICE = "CPU"
_CAN = "OPTIMIZATION_CAPABILITIES"
# How lines of its exceptions begin that name its sources or the call, and not what is wrong.
_WHERE = ("Exception from ", "Check '", "While validating")
# What floating-point kernels are to compute in, by what the file stores, and the name under which the CPU must have it;
# else fp32. Left to itself OpenVINO takes bfloat16 for fp32 on every CPU that multiplies it, and for fp16 on those that
# do not multiply that: with a tenth of its precision.
_HINTS = {"fp16": ("f16", "FP16"), "bf16": ("bf16", "BF16")}
# Its names in the graph that runs for operators whose products make the time.
_PRODUCTS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNCell", "RNNSeq"})
_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8"}


class OpenVinoSession:
    """One compiled model, and a request for each thread that calls it: OpenVINO refuses one that is in use."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        check_cpu(options, title=artifact.title, runtime="OpenVINO")
        path = artifact.path("model")
        # By its content: OpenVINO would try every format that it knows on a file that is none of its own.
        if format_of(path) != "openvino":
            raise CorruptError(f"{artifact.title}: {path.name} is not an OpenVINO model", hint="export it again")
        core = ov.Core()
        try:
            model = core.read_model(path, artifact.path("weights"))
            self._compiled = core.compile_model(model, _DEVICE, _settings(core, artifact.variant.precision, options))
        except RuntimeError as error:
            raise CorruptError(f"{artifact.title}: OpenVINO cannot load it: {reason_of(error)}") from error
        self.signature = artifact.signature
        _check_ports(self._compiled, self.signature, artifact.title)
        self._own = threading.local()
        self.placement = _placement(self._compiled)

    def run(self, feed: Feed) -> Feed:
        inputs = {place: feed[spec.name] for place, spec in enumerate(self.signature.inputs)}
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        results = self._own.request.infer(inputs, share_inputs=True)
        return {spec.name: results[place] for place, spec in enumerate(self.signature.outputs)}

    def bind(self, feed: Feed) -> OpenVinoBound:
        return OpenVinoBound(self._compiled, feed, self.run(feed), signature=self.signature)

    def close(self) -> None:
        del self._own, self._compiled


class OpenVinoBound:
    """A request over numpy arrays of its own: nothing is copied in a run."""

    stream: int | None = None
    enqueues = False

    def __init__(self, compiled: ov.CompiledModel, feed: Feed, outputs: Feed, *, signature: Signature) -> None:
        """outputs: what the session gives for the feed."""
        self._request = compiled.create_infer_request()
        self._inputs = {spec.name: np.array(feed[spec.name], order="C") for spec in signature.inputs}
        self._outputs: dict[str, Array | None] = {}
        for place, array in enumerate(self._inputs.values()):
            self._request.set_input_tensor(place, ov.Tensor(array, shared_memory=True))
        given = {dim for spec in signature.inputs for dim in spec.shape}
        for place, spec in enumerate(signature.outputs):
            if any(isinstance(dim, str) and dim not in given for dim in spec.shape):
                # Its size may depend on the data: OpenVINO keeps the buffer, and makes it larger where it must.
                self._outputs[spec.name] = None
            else:
                self._outputs[spec.name] = array = np.empty_like(outputs[spec.name])
                self._request.set_output_tensor(place, ov.Tensor(array, shared_memory=True))
        self.run()

    def copy_in(self, feed: Feed) -> None:
        check_bound(self._inputs, feed)
        for name, array in self._inputs.items():
            array[...] = feed[name]

    def run(self) -> None:
        self._request.infer(share_outputs=True)

    def synchronize(self) -> None:
        """`run` has waited already."""

    def copy_out(self) -> Feed:
        return {
            name: np.array(self._request.get_output_tensor(place).data if array is None else array)
            for place, (name, array) in enumerate(self._outputs.items())
        }


def open_session(artifact: Artifact, options: SessionOptions) -> OpenVinoSession:
    return OpenVinoSession(artifact, options)


def reason_of(error: RuntimeError) -> str:
    """The line of OpenVINO's exception that says what is wrong: those before it say where in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(_WHERE)]
    return (told or lines or [type(error).__name__])[0][:300]


def _settings(core: ov.Core, precision: str, options: SessionOptions) -> dict[str, Any]:
    hint, capability = _HINTS.get(precision, ("f32", "FP32"))
    return {
        "INFERENCE_PRECISION_HINT": hint if capability in core.get_property(_DEVICE, _CAN) else "f32",
        "INFERENCE_NUM_THREADS": options.threads or available_cores(),
        # One request at a time, on all of those threads.
        "PERFORMANCE_HINT": "LATENCY",
        # Pinned, the threads of two services or two measured processes would share the first cores and leave others.
        "ENABLE_CPU_PINNING": False,
    }


def _check_ports(compiled: ov.CompiledModel, signature: Signature, title: str) -> None:
    """Raise CorruptError unless inputs and outputs stand in the signature's order, by which they are fed."""
    for kind, specs, ports in (
        ("inputs", signature.inputs, compiled.inputs), ("outputs", signature.outputs, compiled.outputs),
    ):  # fmt: skip
        names = [port.get_names() for port in ports]
        if len(specs) != len(names) or any(spec.name not in n for spec, n in zip(specs, names, strict=True)):
            raise CorruptError(
                f"{title}: its {kind} are {', '.join('/'.join(sorted(n)) for n in names)}, the signature has "
                f"{', '.join(spec.name for spec in specs)}",
                hint="export it again",
            )


def _placement(compiled: ov.CompiledModel) -> Placement:
    """What OpenVINO says that it runs, which may be another precision and fewer threads than it was told."""
    devices = ", ".join(compiled.get_property("EXECUTION_DEVICES"))
    operators: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        said = node.get_rt_info()
        kind = said["layerType"].astype(str)
        if kind not in ("Input", "Output", "Const"):
            operators[kind] += 1
        if kind in _PRODUCTS:
            # "brgconv_avx2_f32": its "runtimePrecision" would be that of the weights before they are widened.
            kernels[said["primitiveType"].astype(str).rpartition("_")[2].lower()] += 1
    # int8 where anything is: the rest of such a model is at its edges, or was returned to fp32 on purpose.
    floating = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    used = "i8" if kernels["i8"] else max(kernels, key=kernels.__getitem__, default=floating)
    return Placement(
        runtime="openvino",
        device=devices.lower(),
        provider=devices,
        precision=_PRECISIONS.get(used) or _PRECISIONS.get(floating, floating),
        threads=int(compiled.get_property("INFERENCE_NUM_THREADS")),
        nodes={devices: dict(sorted(operators.items()))},
    )
