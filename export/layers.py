"""Which layers of a model quantization hurts: the error that each one adds, measured on calibration samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from dlops.console import progress_bar
from dlops.errors import GateError
from dlops.export.quantize import Quantizer, spread
from dlops.parity import run_batched
from dlops.runtimes import SessionOptions
from dlops.runtimes.onnxruntime import OnnxSession
from dlops.signature import Array, Feed, Signature, TensorSpec

# Every layer costs a pass over them, and what makes a layer fail shows on any of them.
RANKING_SAMPLES = 64
_BATCH = 16
# Every layer's output is held at once, in two models.
_ALL_OUTPUTS_BATCH = 4
# These take over the scale of what they are given: they add no error of their own, and stay or go with their source.
_FOLLOWERS = frozenset(
    {"Relu", "Clip", "MaxPool", "AveragePool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice"}
    | {"Split"}
)
# What the quantizer takes into the operator before it.
_TAKEN_IN = frozenset({"Relu", "Clip"})
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One quantized operator of the fp32 graph.

    name: its module's, or the node's where it has no weights. kind: what sort of its operator it is, "3×3 depthwise",
    say. nodes: of the graph, its own first, then those that only hand on what it gives. output: the tensor. weights:
    elements, biases left out.
    """

    name: str
    operator: str
    kind: str
    nodes: tuple[str, ...]
    output: str
    weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """What quantization does to one layer and through it to the model's outputs.

    local_db: SQNR of the layer's output in the model that is quantized throughout, so with the error that comes in.
    alone_db: SQNR of the model's outputs where this layer alone is. Both null where there is no error
    at all. share: of the error power that all layers add alone, in [0, 1].
    """

    layer: Layer
    local_db: float | None
    alone_db: float | None
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """layers: those that add most to the error of the outputs first. output_db: their SQNR with all quantized."""

    title: str
    layers: tuple[LayerError, ...]
    output_db: float | None
    samples: int

    @property
    def weights(self) -> int:
        return sum(error.layer.weights for error in self.layers)


def rank_layers(quantizer: Quantizer, feed: Feed, signature: Signature) -> Ranking:
    """Quantize one layer at a time, and order layers by the error at the model's outputs, largest first.

    feed: calibration samples, of which 64 are used, evenly spread. Raises GateError where nothing is quantized.

    Why one at a time, and not the SQNR of each layer's own output in the int8 model: that one holds all the error that
    came in from before, so it blames the last layers for what the first one did, and it does not know what the outputs
    make of an error. Nor one layer fewer at a time: an activation between two layers stays in int8 for as long as
    either of them is, so that leaving one out shows nothing where leaving out both would. The three orders are compared
    in docs/benchmarks/int8-repair.md.
    """
    samples = spread(feed, RANKING_SAMPLES)
    whole = quantizer.quantize()
    layers = find_layers(quantizer, whole)
    if not layers:
        raise GateError(f"{quantizer.title}: ONNX Runtime quantizes none of its operators, so there is none to rank")
    local = _local(quantizer, whole, layers, samples, signature)

    def outputs(model: onnx.ModelProto) -> dict[str, Array]:
        return model_outputs(model, samples, signature, title=quantizer.title, precision=quantizer.precision)

    expected = outputs(quantizer.model)
    total = relative_noise(expected, outputs(whole))
    alone = []
    with progress_bar(f"{quantizer.title}: layers", total=len(layers)) as bar:
        for layer in layers:
            alone.append(relative_noise(expected, outputs(quantizer.quantize(only=layer.nodes))))
            bar.advance(note=layer.name)
    return order_layers(
        layers, local=local, alone=alone, total=total, title=quantizer.title, samples=len(next(iter(samples.values())))
    )


def order_layers(
    layers: Sequence[Layer], *, local: Mapping[str, float], alone: Sequence[float], total: float, title: str,
    samples: int,
) -> Ranking:  # fmt: skip
    """The ranking by noise over signal.

    local: of each layer's own output, by tensor, in the model that is quantized throughout. alone: of the outputs where
    each layer alone is quantized, in the order of `layers`; total: where all are.
    """
    added = sum(alone)
    errors = [
        LayerError(
            layer=layer,
            local_db=_db(local[layer.output]),
            alone_db=_db(noise),
            share=noise / added if added else 0.0,
        )
        for layer, noise in zip(layers, alone, strict=True)
    ]
    errors.sort(key=lambda error: -error.share)
    return Ranking(title=title, layers=tuple(errors), output_db=_db(total), samples=samples)


def find_layers(quantizer: Quantizer, quantized: onnx.ModelProto) -> list[Layer]:
    """The operators of the quantizer's graph that `quantized` computes from narrow numbers, in the graph's order."""
    model = quantizer.model
    # Those that read what they did before are as they were; the others read rounded tensors, or became operators on
    # integers under other names.
    unchanged = {(node.name, *node.input) for node in quantized.graph.node}
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type in _FLOATS}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    layers = []
    for node in model.graph.node:
        if (node.name, *node.input) in unchanged or node.op_type not in quantizer.operators - _FOLLOWERS:
            continue
        own = [weights[name] for name in node.input if name in weights and len(weights[name].dims) > 1]
        layers.append(
            Layer(
                name=_layer_name(node, own),
                operator=node.op_type,
                kind=_kind(node, own),
                nodes=(node.name, *(follower.name for follower in _followers(node, readers))),
                output=_output(node, readers),
                weights=sum(math.prod(tensor.dims) for tensor in own),
            )
        )
    return layers


def model_outputs(
    model: onnx.ModelProto, feed: Feed, signature: Signature, *, title: str, precision: str = "int8"
) -> dict[str, Array]:
    """What ONNX Runtime computes of a graph on the CPU; precision: of what is quantized in it, if anything is."""
    session = OnnxSession(
        model.SerializeToString(), signature=signature, precision=precision, options=SessionOptions(device="cpu"),
        title=title,
    )  # fmt: skip
    try:
        return run_batched(session, feed, min(_BATCH, signature.max_batch))
    finally:
        session.close()


@dataclass(slots=True)
class Noise:
    """Power of an error and of the signal that it is in, summed over batches."""

    error: float = 0.0
    signal: float = 0.0

    def add(self, found: Array, expected: Array) -> None:
        wanted = np.asarray(expected, np.float64)
        self.error += float(np.square(np.asarray(found, np.float64) - wanted).sum())
        self.signal += float(np.square(wanted).sum())

    @property
    def ratio(self) -> float:
        if self.signal:
            return self.error / self.signal
        return 0.0 if self.error == 0 else math.inf


def relative_noise(expected: Feed, found: Feed) -> float:
    """Power of the error over the power of the signal, the mean over the outputs."""
    ratios = []
    for name, array in expected.items():
        noise = Noise()
        noise.add(found[name], array)
        ratios.append(noise.ratio)
    return sum(ratios) / len(ratios)


def kind_of(dims: Sequence[int], *, groups: int | None) -> str:
    """What sort of its operator a layer is, by the shape of its weight; groups: of a convolution, else null."""
    if not dims:
        return "–"
    if groups is None:
        return "×".join(map(str, dims))
    grouped = "" if groups == 1 else " depthwise" if dims[1] == 1 else f" in {groups} groups"
    return "×".join(map(str, dims[2:])) + grouped


def _local(
    quantizer: Quantizer, whole: onnx.ModelProto, layers: Sequence[Layer], feed: Feed, signature: Signature
) -> dict[str, float]:
    """Noise over signal of every layer's output by tensor: of what the quantized model has against the fp32 model's."""
    places = _stand_ins(whole, [layer.output for layer in layers])
    runs = zip(
        _all_outputs(quantizer, quantizer.model, list(places), feed, signature),
        _all_outputs(quantizer, whole, list(places.values()), feed, signature),
        strict=True,
    )
    noises = {name: Noise() for name in places}
    for expected, found in runs:
        for name, place in places.items():
            noises[name].add(found[place], expected[name])
    return {name: noise.ratio for name, noise in noises.items()}


def _all_outputs(
    quantizer: Quantizer, model: onnx.ModelProto, tensors: Sequence[str], feed: Feed, signature: Signature
) -> Iterator[Feed]:
    """Those tensors of the graph, batch by batch."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    there = {value.name for value in model.graph.output}
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in there)
    session = OnnxSession(
        wide.SerializeToString(),
        signature=signature.model_copy(
            update={"outputs": tuple(TensorSpec(name=name, dtype="float32", shape=("batch",)) for name in tensors)}
        ),
        precision=quantizer.precision, options=SessionOptions(device="cpu"), title=quantizer.title,
    )  # fmt: skip
    size = min(_ALL_OUTPUTS_BATCH, signature.max_batch)
    try:
        for start in range(0, len(next(iter(feed.values()))), size):
            yield session.run({name: array[start : start + size] for name, array in feed.items()})
    finally:
        session.close()


def _stand_ins(quantized: onnx.ModelProto, tensors: Sequence[str]) -> dict[str, str]:
    """For each tensor of the fp32 graph the one in its place that later layers of the int8 graph read."""
    rounded = {node.input[0]: node.output[0] for node in _of_type(quantized, "QuantizeLinear")}
    back = {node.input[0]: node.output[0] for node in _of_type(quantized, "DequantizeLinear")}
    # An output of the model keeps its name, and what it was before rounding gets another.
    return {name: back[rounded[name]] if name in rounded else name for name in tensors}


def _followers(node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]]) -> Iterator[onnx.NodeProto]:
    for name in node.output:
        for reader in readers.get(name, []):
            if reader.op_type in _FOLLOWERS and reader.input[0] == name:
                yield reader
                yield from _followers(reader, readers)


def _output(node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]]) -> str:
    name = node.output[0]
    while len(following := readers.get(name, [])) == 1 and following[0].op_type in _TAKEN_IN:
        name = following[0].output[0]
    return str(name)


def _layer_name(node: onnx.NodeProto, own: Sequence[onnx.TensorProto]) -> str:
    """As the module calls itself: its weight's name without the last part."""
    module, dot, _ = own[0].name.rpartition(".") if own else ("", "", "")
    return module if dot else node.name


def _kind(node: onnx.NodeProto, own: Sequence[onnx.TensorProto]) -> str:
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    convolution = node.op_type in ("Conv", "ConvTranspose")
    return kind_of(list(own[0].dims) if own else [], groups=groups if convolution else None)


def _of_type(model: onnx.ModelProto, kind: str) -> Iterator[onnx.NodeProto]:
    return (node for node in model.graph.node if node.op_type == kind)


def _db(noise: float) -> float | None:
    return None if noise == 0 else -10 * math.log10(noise)
