"""How a source's inputs, ranges, arguments and preprocessing are written on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from pydantic import JsonValue, ValidationError

from dlops.builders import Published, is_family, published_preprocess
from dlops.errors import UsageError, from_os_error
from dlops.manifest import explain_validation
from dlops.preprocess import CenterCrop, Decode, Normalize, Preprocess, Resize, Scale, Step
from dlops.signature import DimRange, DType, TensorSpec

_INPUT = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*):([a-z]+\d*)\[([^\]]*)\]")
_RANGE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(\d+):(\d+)(?::(\d+))?")
_IMAGENET = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def parse_input(text: str) -> TensorSpec:
    """`pixels:float32[batch,3,224,224]`. Raises UsageError for what is not written so."""
    match = _INPUT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise UsageError(f"--input {text!r}: expected name:dtype[dims]", hint="such as pixels:float32[batch,3,224,224]")
    name, dtype, dims = match.groups()
    if dtype not in get_args(DType):
        raise UsageError(f"--input {text!r}: {dtype} is not one of {', '.join(get_args(DType))}")
    parts = dims.split(",") if dims else []
    if not parts or parts[0] != "batch":
        raise UsageError(f"--input {text!r}: the first dim is the batch", hint=f"{name}:{dtype}[batch,...]")
    if strange := [part for part in parts[1:] if not (part.isdecimal() or part.isidentifier()) or part == "batch"]:
        raise UsageError(
            f"--input {text!r}: {strange[0]!r} is no size", hint="a number, or a name with a range: --dim NAME=MIN:MAX"
        )
    shape = ("batch", *(int(part) if part.isdecimal() else part for part in parts[1:]))
    return TensorSpec(name=name, dtype=cast("DType", dtype), shape=shape)


def parse_dims(given: Sequence[str]) -> dict[str, DimRange]:
    """`height=224:640` or `height=224:640:32`, the last a step, as ranges by name. Raises UsageError."""
    ranges = {}
    for one in given:
        match = _RANGE.fullmatch(one.replace(" ", ""))
        if match is None:
            raise UsageError(f"--dim {one!r}: expected NAME=MIN:MAX or NAME=MIN:MAX:STEP", hint="height=224:640:32")
        name, low, high, step = match.groups()
        if int(low) > int(high):
            raise UsageError(f"--dim {one!r}: from {low} to {high} there is nothing", hint=f"--dim {name}={high}:{low}")
        try:
            ranges[name] = DimRange(min=int(low), max=int(high), step=int(step or 1))
        except ValidationError as error:
            raise UsageError(f"--dim {one!r}: {explain_validation(error)}") from None
    return ranges


def parse_arguments(given: Sequence[str]) -> dict[str, JsonValue]:
    """`num_classes=10` as arguments of a builder; values are JSON, or else text. Raises UsageError."""
    arguments: dict[str, JsonValue] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not key or not equals:
            raise UsageError(f"--set {one!r}: expected KEY=VALUE", hint="such as num_classes=10")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments


def chosen_preprocess(
    given: str | None, source: str, specs: Sequence[TensorSpec], published: Published | None
) -> Preprocess | None:
    """What images go through: as given, else as the published weights want it, else scaled to [0, 1]."""
    if given is not None and given not in ("imagenet", "unit"):
        return _read_preprocess(Path(given))
    default = (
        published.preprocess if published is not None else published_preprocess(source) if is_family(source) else None
    )
    if given is None and default is not None:
        return _sized(default, specs)
    shape = default.shape if default is not None else specs[0].shape[1:] if len(specs) == 1 else ()
    if len(shape) != 3 or shape[0] not in (1, 3) or not all(isinstance(size, int) for size in shape):
        return None
    channels, height, width = (int(size) for size in shape)
    steps: list[Step] = [
        Decode(mode="RGB" if channels == 3 else "L"), Resize(size=max(height, width)), CenterCrop(size=(height, width)),
        Scale(),
    ]  # fmt: skip
    if given == "imagenet":
        if channels != 3:
            raise UsageError("--preprocess imagenet: normalizes three channels, and the input has one")
        steps.append(_IMAGENET)
    return Preprocess(input="image", shape=(channels, height, width), steps=tuple(steps))


def _sized(preprocess: Preprocess, specs: Sequence[TensorSpec]) -> Preprocess:
    """Where images are stretched to one size, and the input is given another: that one."""
    shape = specs[0].shape[1:] if len(specs) == 1 else ()
    if len(shape) != 3 or not all(isinstance(dim, int) for dim in shape) or shape == preprocess.shape:
        return preprocess
    size = (int(shape[1]), int(shape[2]))
    steps = tuple(
        Resize(size=size, interpolation=step.interpolation)
        if isinstance(step, Resize) and isinstance(step.size, tuple) else step
        for step in preprocess.steps
    )  # fmt: skip
    stretched = steps != preprocess.steps
    return Preprocess(input="image", shape=(preprocess.shape[0], *size), steps=steps) if stretched else preprocess


def _read_preprocess(path: Path) -> Preprocess:
    try:
        return Preprocess.model_validate_json(path.read_bytes())
    except OSError as error:
        raise from_os_error(error, doing=f"--preprocess {path}") from error
    except ValidationError as error:
        raise UsageError(
            f"--preprocess {path}: {explain_validation(error)}", hint="as `preprocess` stands in an artifact.json"
        ) from None
