"""Which layers of an ExecuTorch program quantization hurts: as `dlops.export.layers` has it, on torch's graphs."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter, Node

from dlops.console import progress_bar
from dlops.errors import GateError
from dlops.export.formats import ExportRequest
from dlops.export.layers import (
    RANKING_SAMPLES,
    Layer,
    Noise,
    Ranking,
    kind_of,
    order_layers,
    relative_noise,
)
from dlops.export.quantize import spread
from dlops.export.to_executorch import calibrated, converted, quietly
from dlops.signature import Array, Feed, Signature

_BATCH = 16
# Of a prepared graph: what watches a tensor's range, and what says how a node is to be quantized.
_OBSERVER, _ANNOTATION = "activation_post_process_", "quantization_annotation"
_GROUPS = 6  # among the arguments of a convolution


def rank_program(request: ExportRequest, feed: Feed) -> Ranking:
    """Quantize one layer at a time, and order layers by the error at the program's outputs, largest first.

    request: of executorch-int8, with calibration samples. feed: samples, of which 64 are used, evenly spread. What is
    run is torchao's reference of what XNNPACK computes. Raises GateError where nothing is quantized, and what
    `to_executorch.export` raises.
    """
    samples, signature = spread(feed, RANKING_SAMPLES), request.signature
    with quietly(request.title), torch.no_grad():
        prepared, _ = calibrated(request)
        layers = _find_layers(prepared)
        if not layers:
            raise GateError(f"{request.title}: XNNPACK quantizes none of its operators, so there is none to rank")
        plain = _only(prepared, ())
        whole = converted(copy.deepcopy(prepared))
        expected = _outputs(plain, samples, signature)
        total = relative_noise(expected, _outputs(whole, samples, signature))
        local = _local(plain, whole, layers, samples, signature)
        alone = []
        with progress_bar(f"{request.title}: layers", total=len(layers)) as bar:
            for layer in layers:
                one = converted(_only(prepared, layer.nodes))
                alone.append(relative_noise(expected, _outputs(one, samples, signature)))
                bar.advance(note=layer.name)
    return order_layers(
        layers, local=local, alone=alone, total=total, title=request.title, samples=len(next(iter(samples.values())))
    )


def _find_layers(prepared: GraphModule) -> list[Layer]:
    """The operators that are quantized, but for those that take over the scale of what they are given."""
    layers = []
    for node in prepared.graph.nodes:
        if node.op != "call_function" or not _is_annotated(node) or _follows(node):
            continue
        found = _weight(node, prepared)
        dims = [] if found is None else list(found.shape)
        convolution = node.target in (torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default)
        groups = int(node.args[_GROUPS]) if convolution and len(node.args) > _GROUPS else 1
        layers.append(
            Layer(
                name=_module_name(node) if dims else node.name,
                operator=str(node.target).split(".")[1],
                kind=kind_of(dims, groups=groups if convolution else None),
                nodes=(node.name, *(one.name for one in _followers(node))),
                output=_output(node).name,
                weights=math.prod(dims) if dims else 0,
            )
        )
    return layers


def _only(prepared: GraphModule, nodes: Collection[str]) -> GraphModule:
    """The calibrated graph with the observers of these nodes alone: what they read, and what others read of them."""
    graph = copy.deepcopy(prepared)
    for observer in [node for node in graph.graph.nodes if _is_observer(node)]:
        source = observer.args[0]
        for user in list(observer.users):
            if source.name not in nodes and user.name not in nodes:
                user.replace_input_with(observer, source)
        if not observer.users:
            graph.graph.erase_node(observer)
    graph.recompile()
    return graph


def _local(
    plain: GraphModule, whole: GraphModule, layers: Sequence[Layer], feed: Feed, signature: Signature
) -> dict[str, float]:
    """Noise over signal of every layer's output by node: in the program that is quantized throughout."""
    places = {name: _rounded(whole, name) for name in {layer.output for layer in layers}}
    noises = {name: Noise() for name in places}
    for inputs in _batches(feed, signature):
        expected, found = _Recorder(plain, places), _Recorder(whole, set(places.values()))
        expected.run(*inputs)
        found.run(*inputs)
        for name, place in places.items():
            noises[name].add(found.kept[place].numpy(), expected.kept[name].numpy())
    return {name: noise.ratio for name, noise in noises.items()}


class _Recorder(Interpreter):
    """Keeps what some nodes of a graph give."""

    def __init__(self, module: GraphModule, wanted: Collection[str] | Mapping[str, str]) -> None:
        super().__init__(module)
        self._wanted = wanted
        self.kept: dict[str, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self._wanted:
            self.kept[n.name] = result
        return result


def _outputs(module: GraphModule, feed: Feed, signature: Signature) -> dict[str, Array]:
    runs = [[one.numpy() for one in module(*inputs)] for inputs in _batches(feed, signature)]
    return {
        spec.name: np.concatenate([run[place] for run in runs]) for place, spec in enumerate(signature.outputs)
    }  # fmt: skip


def _batches(feed: Feed, signature: Signature) -> Iterator[tuple[torch.Tensor, ...]]:
    size = min(_BATCH, signature.max_batch)
    for start in range(0, len(next(iter(feed.values()))), size):
        yield tuple(
            torch.from_numpy(np.ascontiguousarray(feed[spec.name][start : start + size])) for spec in signature.inputs
        )


def _rounded(whole: GraphModule, name: str) -> str:
    """The node that gives what later layers read in the place of `name`: rounded and widened again, where it is."""
    node = next(node for node in whole.graph.nodes if node.name == name)
    for step in ("quantize_per_tensor", "dequantize_per_tensor"):
        following = [user for user in node.users if step in str(user.target)]
        if not following:
            return name
        node = following[0]
    return str(node.name)


def _is_observer(node: Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(_OBSERVER)


def _is_annotated(node: Node) -> bool:
    annotation = node.meta.get(_ANNOTATION)
    return annotation is not None and annotation._annotated


def _follows(node: Node) -> bool:
    """Whether it adds no error of its own: taken into the operator before it, or in the scale of what it is given."""
    annotation = node.meta[_ANNOTATION]
    shared = type(annotation.output_qspec).__name__ == "SharedQuantizationSpec"
    return not annotation.input_qspec_map or shared


def _readers(node: Node) -> list[Node]:
    return [reader for user in node.users for reader in (user.users if _is_observer(user) else [user])]


def _followers(node: Node) -> Iterator[Node]:
    for reader in _readers(node):
        if _is_annotated(reader) and _follows(reader):
            yield reader
            yield from _followers(reader)


def _output(node: Node) -> Node:
    """Past what is taken into the operator."""
    while len(node.users) == 1:
        (reader,) = node.users
        if not _is_annotated(reader) or reader.meta[_ANNOTATION].input_qspec_map:
            break
        node = reader
    return node


def _weight(node: Node, prepared: GraphModule) -> torch.Tensor | None:
    """The first of its inputs that is a parameter of more than one axis."""
    for given in node.all_input_nodes:
        source = given.args[0] if _is_observer(given) else given
        if isinstance(source, Node) and source.op == "get_attr":
            tensor = _attribute(prepared, str(source.target))
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1:
                return tensor
    return None


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _module_name(node: Node) -> str:
    """As the module calls itself; the exported one is inside of ours."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("module").removeprefix(".") or node.name
