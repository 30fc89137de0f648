"""ExecuTorch: the program that phones and boards run, its operators given to XNNPACK where that has them."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dlops.artifact import Precision
from dlops.blame import code_line, operator_line, where
from dlops.errors import CorruptError, GateError, UsageError
from dlops.export.formats import Exported, ExportRequest
from dlops.export.precision import MIN_REPAIRED_SHARE, MIN_SHARE
from dlops.export.quantize import spread
from dlops.export.quantize_static import MAX_CALIBRATION_SAMPLES
from dlops.runtimes.eager import ordered_outputs
from dlops.runtimes.executorch import DELEGATE, NODES, PORTABLE, check_ports, load_method, load_program
from dlops.signature import DimRange, Signature

_registering = logging.getLogger("torch.utils._pytree")
_level = _registering.level
with warnings.catch_warnings():
    # importlib.resources is read the old way there, and torch registers enums that it need not, which it logs too.
    _registering.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    _registering.setLevel(_level)

_CALIBRATION_BATCH = 32
_STORED: dict[Precision, frozenset[torch.dtype]] = {
    "fp32": frozenset({torch.float32, torch.float64}),
    "int8": frozenset({torch.int8, torch.uint8}),
}
# As torchao's own default has it: a constant activation has no range to divide by.
_SMALLEST_SCALE = 2**-12
_MISSING = re.compile(r"Missing out variants: \{'?([\w:., ']+?)'?\}|Operator torch\._ops\.([\w.]+) is not in Core ATen")
_OPERATOR = re.compile(r"\b((?:aten|torchvision|prims)(?:::|\.)[A-Za-z0-9_.]+)")


def export(request: ExportRequest) -> Exported:
    """Write the program to `request.into`, and run it at several batches before it is given back.

    Raises UsageError where the module has what ExecuTorch cannot hold (the operator is named), GateError where the
    written file takes other inputs, fails at a batch that the signature allows, or has other weights than asked for.
    """
    signature, title = request.signature, request.title
    module: nn.Module = _InOrder(request.module, signature).eval()
    notes: dict[str, Any] = {}
    captured: list[torch.export.ExportedProgram] = []
    with _quiet(), torch.no_grad(), _explained(title, captured):
        if request.variant.precision == "int8":
            prepared, samples = calibrated(request)
            module = converted(prepared)
            notes |= {
                "calibration_samples": samples, "calibration_method": request.calibration_method,
                "activations": "int8", "weights": "int8 per channel",
            }  # fmt: skip
        program = _captured(module, signature)
        captured.append(program)
        _check_precision(
            program, request.variant.precision, title=title,
            min_share=MIN_REPAIRED_SHARE if request.excluded else MIN_SHARE,
        )  # fmt: skip
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        nodes = _placed(edge.exported_program().graph_module)
        lowered = edge.to_executorch()
    request.into.write_bytes(lowered.buffer)
    _check_written(request)
    if request.excluded:
        _check_smaller(request)
    taken = sum(nodes.get(DELEGATE, {}).values())
    total = sum(sum(counts.values()) for counts in nodes.values())
    notes |= {"delegated": f"{taken} of {total} operators to XNNPACK", NODES: nodes}
    return Exported(path=request.into, notes=notes)


class _InOrder(nn.Module):
    """The module with its outputs as a tuple in the signature's order: a program's outputs have no names."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.module = module
        self._signature = signature

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(ordered_outputs(self.module(*inputs), self._signature))


def _captured(module: nn.Module, signature: Signature) -> torch.export.ExportedProgram:
    """Captured at the largest sizes that the signature allows.

    Memory is planned for the upper bound of each dim, and tests of sizes inside ExecuTorch bound it by whichever side
    of them the captured size is on: captured at batch 3, a network of 8×8 images had room for 15 of the 32 allowed.
    """
    dims = {name: _dim(name, limits) for name, limits in signature.dims.items()}
    # What can have one size only is none.
    shapes = [
        {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str) and signature.is_free(dim)}
        for spec in signature.inputs
    ]
    example = _example(signature, {name: limits.max for name, limits in signature.dims.items()})
    # `_InOrder.forward` has one name for all its inputs, a module that was captured before a name for each.
    given = (tuple(shapes),) if isinstance(module, _InOrder) else tuple(shapes)
    return torch.export.export(module, example, dynamic_shapes=given, strict=False)


def _dim(name: str, limits: DimRange) -> Any:
    if limits.step == 1:
        return torch.export.Dim(name, min=limits.min, max=limits.max)
    steps = torch.export.Dim(f"{name}_steps", min=limits.min // limits.step, max=limits.max // limits.step)
    return limits.step * steps


def _example(signature: Signature, sizes: dict[str, int]) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.zeros(
            [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape], dtype=getattr(torch, spec.dtype)
        )
        for spec in signature.inputs
    )


def calibrated(request: ExportRequest) -> tuple[torch.fx.GraphModule, int]:
    """The program with the ranges of what will be quantized, from calibration samples, and from how many.

    Weights are to be symmetric with a scale a channel, activations int8. Nodes that the request excludes are left.
    """
    assert request.calibration is not None
    samples = spread(request.calibration, MAX_CALIBRATION_SAMPLES)
    count = len(next(iter(samples.values())))
    quantizer = XNNPACKQuantizer().set_global(_config())
    quantizer.set_filter_function(lambda node: node.name not in request.excluded)
    module: nn.Module = _InOrder(request.module, request.signature).eval()
    prepared: torch.fx.GraphModule = prepare_pt2e(_captured(module, request.signature).module(), quantizer)
    size = min(_CALIBRATION_BATCH, request.signature.max_batch)
    for start in range(0, count, size):
        arrays = (np.ascontiguousarray(samples[spec.name][start : start + size]) for spec in request.signature.inputs)
        prepared(*(torch.from_numpy(array) for array in arrays))
    return prepared, count


def converted(prepared: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Rounded where it was prepared to be; it is used up."""
    module: torch.fx.GraphModule = convert_pt2e(prepared)
    return module


@contextmanager
def quietly(title: str) -> Iterator[None]:
    """For what is done with a program besides `export`: nothing is announced, and errors are explained as there."""
    with _quiet(), _explained(title, []):
        yield


def _config() -> Any:
    """XNNPACK's, with ranges from the smallest to the largest value seen, which is what "minmax" says."""
    config = get_symmetric_quantization_config(is_per_channel=True)
    observer = MinMaxObserver.with_args(eps=_SMALLEST_SCALE)
    return replace(
        config,
        input_activation=replace(config.input_activation, observer_or_fake_quant_ctr=observer),
        output_activation=replace(config.output_activation, observer_or_fake_quant_ctr=observer),
    )


def _placed(graph: torch.fx.GraphModule) -> dict[str, dict[str, int]]:
    """How many operators of the module each side runs, those that only convert between the two left out."""
    found: dict[str, Counter[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and hasattr(getattr(graph, str(node.target), None), "original_module"):
            inner = getattr(graph, str(node.target)).original_module.graph_module
            found.setdefault(DELEGATE, Counter()).update(_operators(inner))
    if own := Counter(_operators(graph)):
        found[PORTABLE] = own
    return {provider: dict(sorted(counts.items())) for provider, counts in found.items() if counts}


def _operators(graph: torch.fx.GraphModule) -> Iterator[str]:
    for node in graph.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target))
        if node.op != "call_function" or not name.startswith(("aten.", "dim_order_ops.")):
            continue
        yield name.removeprefix("aten.").partition(".")[0]


def _check_smaller(request: ExportRequest) -> None:
    """Raise GateError where a quantized file with layers left in fp32 no longer saves anything."""
    quantized = request.into.stat().st_size
    dense = sum(4 * tensor.numel() for tensor in request.module.state_dict().values() if tensor.is_floating_point())
    if quantized >= dense:
        raise GateError(
            f"{request.title}: with {len(request.excluded)} operators left in fp32 the file has {quantized} bytes, and "
            f"all weights in fp32 have {dense}: {request.variant.precision} in name only"
        )


def _check_precision(
    program: torch.export.ExportedProgram, precision: Precision, *, title: str, min_share: float = MIN_SHARE
) -> None:
    """Raise GateError unless that share of the weights that go into the file is stored as asked for."""
    total, kept, left = 0, 0, Counter[str]()
    for tensor, users in _weights(program):
        quantized = tensor.dtype in _STORED["int8"]
        # Biases and scales stay in fp32 in int8: matrices decide.
        if tensor.ndim > 1 if precision == "int8" else tensor.is_floating_point() or quantized:
            total += tensor.numel()
            if tensor.dtype in _STORED[precision]:
                kept += tensor.numel()
            else:
                left.update(dict.fromkeys(users, tensor.numel()))
    if not total and precision != "fp32":
        raise GateError(f"{title}: {precision} was asked for, the program holds no weights")
    if kept < min_share * total:
        named = ", ".join(f"{user} ({count})" for user, count in left.most_common(5))
        raise GateError(
            f"{title}: {precision} was asked for, {kept / total:.0%} of the weights are in it; left over: {named}",
            hint=f"what is left over has no form in {precision} here: take another precision",
        )


def _weights(program: torch.export.ExportedProgram) -> Iterator[tuple[torch.Tensor, set[str]]]:
    """The tensors that the graph reads, and the operators that do; those that quantization replaced stay unread."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters, **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }  # fmt: skip
    stored = {**program.constants, **program.state_dict}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names and node.users:
            tensor = stored[names[node.name]]
            if isinstance(tensor, torch.Tensor):
                yield tensor, {str(getattr(user.target, "__name__", user.target)) for user in node.users}


def _check_written(request: ExportRequest) -> None:
    """Raise GateError unless the file has room for every size that is allowed, and runs at several of them."""
    signature, title = request.signature, request.title
    method = load_method(load_program(request.into, title=title), title=title)
    try:
        check_ports(method, signature, title=title)
    except CorruptError as error:
        raise GateError(error.message) from error
    limits = {name: (one.min, one.max) for name, one in signature.dims.items()}
    low, high = ({name: ends[place] for name, ends in limits.items()} for place in (0, 1))
    batches = sorted({low.get("batch", 1), min(2, signature.max_batch), signature.max_batch})
    for sizes in [*({**high, "batch": batch} for batch in batches), low]:
        try:
            results = method(list(_example(signature, {"batch": 1, **sizes})))
        except RuntimeError as error:
            raise GateError(f"{title}: the written file does not run at {_said(sizes)}: {error}") from error
        for spec, result in zip(signature.outputs, results, strict=True):
            wanted = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
            if list(result.shape) != wanted or str(result.dtype).removeprefix("torch.") != spec.dtype:
                raise GateError(
                    f"{title}: output {spec.name} at {_said(sizes)} is {result.dtype}{list(result.shape)}, asked for "
                    f"was {spec.dtype}{wanted}"
                )


def _said(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


@contextmanager
def _explained(title: str, captured: Sequence[torch.export.ExportedProgram]) -> Iterator[None]:
    """Capturing and lowering raise classes of many packages, all of them about this module.

    captured: what was, by the time of the error.
    """
    try:
        yield
    except (GateError, UsageError):
        raise
    except Exception as error:
        text = str(error)
        missing = _MISSING.search(text)
        lacking = missing and (missing[1] or missing[2])
        found = (operator_line(program.graph.nodes, lacking) for program in captured if lacking)
        line = where(next((one for one in found if one), None) or code_line(error))
        if lacking:
            raise UsageError(
                f"{title}: ExecuTorch has no form of the operator {lacking} in this module{line}",
                hint="replace it by operators that ExecuTorch has, or export to onnx",
            ) from error
        named = _OPERATOR.search(text)
        first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
        raise UsageError(
            f"{title}: ExecuTorch cannot take this module{f' (at {named[1]})' if named else ''}{line}: {first[:300]}",
            hint="branches on tensor values and fixed batch sizes are the usual reasons; onnx may still take it",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """What capturing and lowering announce of their own future; what they refuse they raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.filterwarnings("ignore", category=category)
            yield
    finally:
        logging.disable(disabled)
