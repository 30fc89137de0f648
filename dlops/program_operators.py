"""Which operators a stored program may use: those that compute, and none that reaches a file, a name or a process.

The list is a rule over operators' schemas, so that it holds for all of ATen and is not a copy of it that ages.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z0-9_]{1,100})\.([A-Za-z0-9_]{1,100})")
# Text reaches an operator in these arguments alone, each the name of a way to compute. `filename` is what
# aten::from_file and aten::save take, and anything new is refused until it is looked at.
_TEXTS = frozenset(
    {"approximate", "assert_msg", "driver", "equation", "indexing", "interpolation", "mode", "norm", "ord"}
    | {"pad_mode", "padding", "padding_side", "reduce", "rounding_mode", "side", "UPLO"}
)
# What the others may take: no storage, stream, generator, object or "any".
_PLAIN = frozenset({"Tensor", "int", "float", "bool", "number", "complex", "Device"})
_WRAPPED = re.compile(r"(?:Optional|List)\[(.+)\]")
# Arithmetic on sizes. Without pow, whose integers have no end.
_ON_NUMBERS: Mapping[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "le", "ge", "lt", "gt")
    },
    "math.trunc": math.trunc,
    "math.floor": math.floor,
    "math.ceil": math.ceil,
    "torch.sym_int": torch.sym_int,
    "torch.sym_float": torch.sym_float,
    "torch.sym_not": torch.sym_not,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
}


def find_operator(target: str) -> Callable[..., Any] | None:
    """The operator that a program names, None where it is none of those that only compute."""
    if target in _ON_NUMBERS:
        return _ON_NUMBERS[target]
    match = _ATEN.fullmatch(target)
    if match is None:
        return None
    packet = getattr(torch.ops.aten, match[1], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    found = getattr(packet, match[2], None)
    if not isinstance(found, torch._ops.OpOverload):
        return None
    return found if all(_is_harmless(argument) for argument in found._schema.arguments) else None


def _is_harmless(argument: torch.Argument) -> bool:
    kind = str(argument.type)
    while match := _WRAPPED.fullmatch(kind):
        kind = match[1]
    # The reader gives no generator, so an operator that takes one draws from torch's own.
    return kind in _PLAIN or (kind == "str" and argument.name in _TEXTS) or str(argument.type) == "Optional[Generator]"
