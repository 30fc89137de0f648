"""A program that torch.export saved, as the model to export: unpickled only where that is allowed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from dlops.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from dlops.program import ProgramInput

_MAX_BATCH = 64
# torch takes sizes 0 and 1 for special, and writes 0 or 2 for "from the smallest on".
_SMALLEST = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedProgram:
    """inputs, dims: as `--input` and `--dim` have them. outputs: names, none where the program gives none. max_batch:
    64 at most."""

    module: nn.Module
    inputs: tuple[str, ...]
    dims: tuple[str, ...]
    outputs: tuple[str, ...]
    max_batch: int


class _Described(TypedDict):
    inputs: tuple[str, ...]
    dims: tuple[str, ...]
    max_batch: int


def is_program(text: str) -> bool:
    """Whether it names a .pt2 file, and not the folder of a checkpoint."""
    return Path(text).suffix == ".pt2" and not Path(text).is_dir()


def open_program(path: Path, *, trust: bool) -> OpenedProgram:
    """The program as a module with its inputs described.

    trust: take torch's own loader, which unpickles, for what dlops does not read by itself. Raises UsageError where it
    is needed and not allowed, and where the batch of the program is fixed or another dim has no end; CorruptError where
    the file is damaged.
    """
    from dlops.program import read_program

    try:
        program = read_program(path)
    except UsageError as error:
        if not path.is_file():
            raise
        if not trust:
            raise UsageError(
                error.message,
                hint=f"{error.hint + '; or ' if error.hint else ''}--trust has torch's own loader read it, which "
                "unpickles and evaluates what the file holds: for files of people whom you trust",
            ) from None
        return _load_trusting(path)
    described = _described(path, program.inputs, program.ranges)
    return OpenedProgram(module=program.module, outputs=program.outputs, **described)


def _load_trusting(path: Path) -> OpenedProgram:
    import torch

    from dlops.program import ProgramInput

    # It logs the whole trace of a loader that it tries first.
    log = logging.getLogger("torch.export")
    was_disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(str(path))
    except Exception as error:  # noqa: BLE001 - whatever a pickle raises
        lines = str(error).splitlines() or [type(error).__name__]
        raise CorruptError(f"{path}: torch.export.load cannot read it: {lines[0][:300]}") from None
    finally:
        log.disabled = was_disabled
    names = program.graph_signature.user_inputs
    found = tuple(
        ProgramInput(
            name=node.name, dtype=node.meta["val"].dtype,
            shape=tuple(size if isinstance(size, int) else str(size) for size in node.meta["val"].shape),
        )
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    )  # fmt: skip
    ranges = {
        str(symbol): (int(limits.lower), int(limits.upper) if limits.upper.is_Integer else None)
        for symbol, limits in program.range_constraints.items()
    }
    described = _described(path, found, ranges)
    module = program.module(check_guards=False)
    # torch's own refuses eval(), which would change nothing.
    return OpenedProgram(module=torch.fx.GraphModule(module, module.graph), outputs=(), **described)


def _described(
    path: Path, inputs: tuple[ProgramInput, ...], ranges: Mapping[str, tuple[int, int | None]]
) -> _Described:
    """The inputs as `--input` has them, the ranges of their dims as `--dim` has them, and the largest batch."""
    specs, batches, dims = [], set(), dict[str, str]()
    for one in inputs:
        if not one.shape or isinstance(one.shape[0], int):
            raise UsageError(
                f"{path}: the batch of its input {one.name} is fixed ({_text(one.shape)})",
                hint='export it with dynamic_shapes, {0: Dim("batch")} for each input',
            )
        batches.add(one.shape[0])
        for dim in one.shape[1:]:
            if isinstance(dim, str) and dim not in dims:
                dims[dim] = _range(path, one.name, dim, ranges)
        specs.append(f"{one.name}:{str(one.dtype).removeprefix('torch.')}[batch{_text(one.shape[1:], ',')}]")
    if len(batches) > 1:
        raise UsageError(f"{path}: its inputs have batches of their own ({', '.join(sorted(map(str, batches)))})")
    lowest, highest = ranges.get(str(next(iter(batches), "")), (0, None))
    if lowest > _SMALLEST:
        raise UsageError(f"{path}: its batch begins at {lowest}, and a service needs 1")
    if strange := batches & dims.keys():
        raise UsageError(f"{path}: the batch is another dim of an input, too ({min(strange)})")
    most = _MAX_BATCH if highest is None else min(_MAX_BATCH, highest)
    return {"inputs": tuple(specs), "dims": tuple(dims.values()), "max_batch": most}


def _range(path: Path, name: str, dim: str, ranges: Mapping[str, tuple[int, int | None]]) -> str:
    if not dim.isidentifier():
        raise UsageError(
            f"{path}: a dim of its input {name} follows from another ({dim})", hint="give each a Dim of its own"
        )
    low, high = ranges.get(dim, (0, None))
    if high is None:
        raise UsageError(
            f"{path}: a dim of its input {name} has no largest size ({dim})",
            hint='export it with Dim("length", min=2, max=512), say',
        )
    return f"{dim}={low if low == 1 else max(low, _SMALLEST)}:{high}"


def _text(shape: tuple[Any, ...], before: str = "") -> str:
    return "".join(f"{before or (',' if place else '')}{dim}" for place, dim in enumerate(shape))
