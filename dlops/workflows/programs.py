"""A program that torch.export saved, as the model to export: unpickled only where that is allowed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlops.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from dlops.program import ProgramInput

_MAX_BATCH = 64
# torch takes sizes 0 and 1 for special, and writes 0 or 2 for "from the smallest on".
_SMALLEST = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedProgram:
    """inputs: as `--input` has them. outputs: names, none where the program gives none. max_batch: 64 at most."""

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    max_batch: int


def is_program(text: str) -> bool:
    """Whether it names a .pt2 file, and not the folder of a checkpoint."""
    return Path(text).suffix == ".pt2" and not Path(text).is_dir()


def open_program(path: Path, *, trust: bool) -> OpenedProgram:
    """The program as a module with its inputs described.

    trust: take torch's own loader, which unpickles, for what dlops does not read by itself. Raises UsageError where it
    is needed and not allowed, and where the batch of the program is fixed or another dim is not; CorruptError where the
    file is damaged.
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
    specs, most = _described(path, program.inputs, program.ranges)
    return OpenedProgram(module=program.module, inputs=specs, outputs=program.outputs, max_batch=most)


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
    specs, most = _described(path, found, ranges)
    module = program.module(check_guards=False)
    # torch's own refuses eval(), which would change nothing.
    return OpenedProgram(module=torch.fx.GraphModule(module, module.graph), inputs=specs, outputs=(), max_batch=most)


def _described(
    path: Path, inputs: tuple[ProgramInput, ...], ranges: Mapping[str, tuple[int, int | None]]
) -> tuple[tuple[str, ...], int]:
    """The inputs as `--input` has them, and the largest batch."""
    specs, batches = [], set()
    for one in inputs:
        if not one.shape or isinstance(one.shape[0], int):
            raise UsageError(
                f"{path}: the batch of its input {one.name} is fixed ({_text(one.shape)})",
                hint='export it with dynamic_shapes, {0: Dim("batch")} for each input',
            )
        batches.add(one.shape[0])
        if strange := [dim for dim in one.shape[1:] if not isinstance(dim, int)]:
            raise UsageError(f"{path}: its input {one.name} has another dynamic dim than the batch ({strange[0]})")
        specs.append(f"{one.name}:{str(one.dtype).removeprefix('torch.')}[batch{_text(one.shape[1:], ',')}]")
    if len(batches) > 1:
        raise UsageError(f"{path}: its inputs have batches of their own ({', '.join(sorted(map(str, batches)))})")
    lowest, highest = ranges.get(str(next(iter(batches), "")), (0, None))
    if lowest > _SMALLEST:
        raise UsageError(f"{path}: its batch begins at {lowest}, and a service needs 1")
    return tuple(specs), _MAX_BATCH if highest is None else min(_MAX_BATCH, highest)


def _text(shape: tuple[Any, ...], before: str = "") -> str:
    return "".join(f"{before or (',' if place else '')}{dim}" for place, dim in enumerate(shape))
