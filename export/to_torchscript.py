"""TorchScript: the module traced, frozen, and stripped of its source locations; in fp32 or bfloat16."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dlops.adapters import Detector, is_adapted
from dlops.blame import code_line, last_line, where
from dlops.checkpoint import example_inputs
from dlops.console import say
from dlops.embedded import EXTRA_FILE
from dlops.errors import GateError, UsageError, first_line
from dlops.export.capture import capture
from dlops.export.formats import EXAMPLE_BATCH, Exported, ExportRequest, check_embedded
from dlops.export.narrow import Narrowed
from dlops.export.precision import MIN_SHARE
from dlops.runtimes.eager import outputs_by_name
from dlops.runtimes.torchscript import computed_precision
from dlops.signature import Signature

# Beside each source file: pickled locations of the code that was traced, absolute paths of this machine among them.
_DEBUG_SUFFIX = ".debug_pkl"
_TracerWarning: type[Warning] = torch.jit.TracerWarning  # type: ignore[attr-defined]
_STORED = {"fp32": (torch.float32, torch.float64), "bf16": (torch.bfloat16,)}
# What the writer adds by itself.
_WRITTEN_BY_TORCH = ("version", ".data/serialization_id", "byteorder", ".data/version")


def export(request: ExportRequest) -> Exported:
    """Write the traced module to `request.into`; reopened, it must run at other batches than it was traced with.

    Raises UsageError where the module cannot be traced, GateError where tracing would bake in a branch or a size, or
    where the written file differs from the request.
    """
    module = request.module
    if request.variant.precision == "bf16":
        if computed_precision("bf16", torch.device("cpu")) != "bf16":
            say(
                f"WARNING: {request.title}: this CPU has no bfloat16 instructions: it is slower than fp32 here, "
                "and so is this check"
            )
        if isinstance(module, Detector):
            raise UsageError(
                f"{request.title}: a detector's boxes are chosen by comparisons, which bfloat16 would decide otherwise",
                hint="take torchscript-fp32",
            )
        module = Narrowed(module, request.signature, torch.bfloat16).eval()
    compiled = _script(request, module) if is_adapted(module) else _trace(request, module)
    # Into memory: torch's writer ends the process where a disk is full (an exception thrown while it is destroyed).
    buffer = io.BytesIO()
    extra = {EXTRA_FILE: request.embedded.to_json()} if request.embedded is not None else {}
    with _without_retirement_notices():
        torch.jit.save(compiled, buffer, _extra_files=extra)
    request.into.write_bytes(without_debug_files(buffer.getvalue()))
    check_written(request.into, request.signature, precision=request.variant.precision, title=request.title)
    check_embedded(request)
    way = "scripted" if is_adapted(module) else "traced"
    return Exported(path=request.into, notes={"torchscript": f"{way} and frozen", "torch": torch.__version__})


def check_written(path: Path, signature: Signature, *, precision: str, title: str) -> None:
    """Raise GateError unless the file takes the signature's inputs, gives its outputs, at several batches.

    90 % of its weights must be stored in `precision`.

    Its tensors have no names: inputs and outputs are matched by their place, and by number, shape and dtype.
    """
    with _without_retirement_notices():
        module = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    taken = len(module.forward.schema.arguments) - 1  # the first is the module itself
    if taken != len(signature.inputs):
        raise GateError(f"{title}: the written file takes {taken} inputs, the signature has {len(signature.inputs)}")
    for batch in sorted({min(batch, signature.max_batch) for batch in (1, 2, EXAMPLE_BATCH + 2)}):
        feed = example_inputs(signature, batch=batch)
        try:
            with torch.inference_mode():
                outputs = outputs_by_name(module(*feed), signature)
        except (RuntimeError, ValueError) as error:
            raise GateError(f"{title}: the written file does not run at batch {batch}: {first_line(error)}") from error
        for spec in signature.outputs:
            array = outputs[spec.name]
            wanted = (spec.dtype, tuple(batch if dim == "batch" else dim for dim in spec.shape))
            if not _fits(array, *wanted):
                raise GateError(
                    f"{title}: output {spec.name} at batch {batch} is {array.dtype}{list(array.shape)}, "
                    f"asked for was {spec.dtype}{list(wanted[1])}"
                )
    _check_precision(module, precision, title=title)


def stored_tensors(path: Path) -> Iterator[torch.Tensor]:
    """The floating tensors in a file that `export` wrote."""
    with _without_retirement_notices():
        module = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    for tensor, _ in _weights(module):
        yield tensor.detach()


def without_debug_files(content: bytes) -> bytes:
    """A TorchScript file without its source locations, its records aligned as torch.jit.load wants them."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    records = {name: reader.get_record(name) for name in reader.get_all_records()}
    del reader
    # torch's own writer aligns the tensors to 64 bytes.
    stripped = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stripped)
    for name, content in records.items():
        if not name.endswith(_DEBUG_SUFFIX) and name not in _WRITTEN_BY_TORCH:
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return stripped.getvalue()


def _check_precision(module: torch.jit.ScriptModule, precision: str, *, title: str) -> None:
    weights: Counter[tuple[torch.dtype, str]] = Counter()
    total: Counter[torch.dtype] = Counter()
    for tensor, users in _weights(module):
        total[tensor.dtype] += tensor.numel()
        weights.update(dict.fromkeys(((tensor.dtype, user) for user in users), tensor.numel()))
    kept = sum(total[dtype] for dtype in _STORED[precision])
    if not total and precision != "fp32":
        raise GateError(f"{title}: {precision} was asked for, the written file holds no weights")
    if kept < MIN_SHARE * total.total():
        left = [(user, n, dtype) for (dtype, user), n in weights.most_common() if dtype not in _STORED[precision]][:5]
        named = ", ".join(f"{user} ({n} in {str(dtype).removeprefix('torch.')})" for user, n, dtype in left)
        raise GateError(
            f"{title}: {precision} was asked for, {kept / total.total():.0%} of the weights in the written file "
            f"are in it{f'; left over: {named}' if named else ''}",
            hint="take torchscript-fp32",
        )


def _weights(module: torch.jit.ScriptModule) -> Iterator[tuple[torch.Tensor, set[str]]]:
    """The floating tensors of a frozen module, which are constants of its graph, and what computes with each."""
    for node in module.graph.findAllNodes("prim::Constant", recurse=True):  # type: ignore[attr-defined]
        value = node.output().toIValue()
        users = {use.user.kind() for use in node.output().uses()}
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.ndim:
                yield tensor, users
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            yield tensor, {"an attribute"}


def _trace(request: ExportRequest, module: nn.Module) -> torch.jit.ScriptModule:
    example = example_inputs(request.signature, batch=EXAMPLE_BATCH)
    try:
        # Recorded and not raised: raised inside torch's C code a warning comes out as a SystemError.
        with warnings.catch_warnings(record=True) as recorded, torch.no_grad():
            warnings.simplefilter("always")
            # The parity gate compares with eager on real inputs at several batches, which torch's own check does not.
            traced = torch.jit.trace(module, example, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
            frozen: torch.jit.ScriptModule = torch.jit.freeze(traced)
    except (RuntimeError, TypeError, ValueError) as error:
        inside = " in bfloat16" if request.variant.precision == "bf16" else ""
        raise UsageError(
            f"{request.title}: torch.jit.trace cannot take this module{inside}{where(code_line(error))}: "
            f"{first_line(error)}"
        ) from error
    baked = next((entry for entry in recorded if issubclass(entry.category, _TracerWarning)), None)
    if baked is not None and not _follows_from_sizes(request):
        line = where(last_line([(baked.filename, baked.lineno)]))
        raise GateError(
            f"{request.title}: tracing would bake in what should depend on the input{line}: "
            f"{first_line(Warning(baked.message))}",
            hint="rewrite that branch with tensor operations (torch.where), or export to onnx",
        )
    return frozen


def _follows_from_sizes(request: ExportRequest) -> bool:
    """Whether what became a Python number in the trace follows from sizes, and from no values: torch.export then takes
    the module and reads nothing out of a tensor. That no size is baked in, parity shows at others."""
    try:
        program = capture(request, device=torch.device("cpu"))
    except (GateError, UsageError):
        return False
    graphs = [one for one in program.graph_module.modules() if isinstance(one, torch.fx.GraphModule)]
    return not any("_local_scalar_dense" in str(node.target) for graph in graphs for node in graph.graph.nodes)


def _script(request: ExportRequest, module: nn.Module) -> torch.jit.ScriptModule:
    """Loops over what was found, which tracing would unroll, are kept."""
    try:
        with _without_retirement_notices():
            frozen: torch.jit.ScriptModule = torch.jit.freeze(torch.jit.script(module))
    except (RuntimeError, torch.jit.frontend.NotSupportedError) as error:
        raise UsageError(f"{request.title}: torch.jit.script cannot take this module: {first_line(error)}") from error
    return frozen


def _fits(array: np.ndarray, dtype: str, shape: tuple[int | str, ...]) -> bool:
    return (
        array.dtype.name == dtype
        and array.ndim == len(shape)
        and all(isinstance(dim, str) or size == dim for size, dim in zip(array.shape, shape, strict=True))
    )


class _without_retirement_notices(warnings.catch_warnings):  # noqa: N801 - used like the function it extends
    """torch announces TorchScript's retirement at every call; the format was the user's choice."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated.*")
