"""A module's signature, from what it does with real samples: dtypes, shapes, and which sizes follow which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from dlops.errors import InputError, UsageError
from dlops.signature import DimRange, DType, Feed, Signature, TensorSpec
from dlops.sizes import resized, sizes_of

if TYPE_CHECKING:
    import torch
    from torch import nn

_DTYPE_HINT = f"convert it inside the model to one of {', '.join(get_args(DType))}"
Sizes = Mapping[str, int]
Shapes = Mapping[str, tuple[int, ...]]


def probe_signature(
    model: nn.Module, feed: Feed, *, max_batch: int, output_names: Sequence[str],
    inputs: Sequence[TensorSpec] = (), dims: Mapping[str, DimRange] | None = None,
) -> Signature:  # fmt: skip
    """The signature of what the module does with one or two samples.

    inputs: names and shapes where dims beside the batch have names, whose ranges are in `dims`; the module is run at
    both ends of each. An output's dim that is an input's at all of them has its name; one that changes otherwise is
    called after its output and axis. Raises UsageError where the module fails, or does not give tensors.
    """
    dims = dict(dims or {})
    specs = tuple(inputs) or tuple(
        _spec(name, ("batch", *array.shape[1:]), array.dtype.name) for name, array in feed.items()
    )
    check_named(specs, dims, feed)
    outputs = _run(model, feed, output_names)
    count = len(next(iter(feed.values())))
    for name, tensor in outputs.items():
        if not tensor.ndim or tensor.shape[0] != count:
            raise InputError(f"{name}: no batch axis in front (shape {list(tensor.shape)})", field=name)
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in outputs.items()}
    derived: dict[str, DimRange] = {}
    if dims:
        few = {name: array[:1] for name, array in feed.items()}

        def measure(sizes: Sizes) -> Shapes:
            found = _run(model, resized(few, specs, sizes), output_names)
            return {name: tuple(tensor.shape[1:]) for name, tensor in found.items()}

        named, derived = _follow(shapes, sizes_of(feed, specs), dims, measure)
    else:
        named = {name: tuple(shape) for name, shape in shapes.items()}
    return Signature(
        inputs=specs,
        outputs=tuple(
            _spec(name, ("batch", *named[name]), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in outputs.items()
        ),
        dims={"batch": DimRange(min=1, max=max_batch), **dims, **derived},
    )


def check_named(specs: Sequence[TensorSpec], dims: Mapping[str, DimRange], feed: Feed) -> None:
    """Raise UsageError unless every named dim has a range, every range is used, and the feed fits them all."""
    used = {dim for spec in specs for dim in spec.shape if isinstance(dim, str)} - {"batch"}
    if missing := sorted(used - set(dims)):
        raise UsageError(f"dim {missing[0]!r} of an input has no range", hint=f"--dim {missing[0]}=MIN:MAX")
    if unused := sorted(set(dims) - used):
        raise UsageError(f"dim {unused[0]!r} has a range and is in no input", hint="--input name:dtype[batch,...]")
    ranges = {"batch": DimRange(max=max(1, len(next(iter(feed.values())))))} | dict(dims)
    try:
        Signature(inputs=tuple(specs), outputs=tuple(specs), dims=ranges).check(feed)
    except InputError as error:
        raise UsageError(f"the samples do not fit the inputs: {error.message}", hint=error.hint) from None


def _follow(
    shapes: Shapes, base: Sizes, dims: Mapping[str, DimRange], measure: Callable[[Sizes], Shapes]
) -> tuple[dict[str, tuple[int | str, ...]], dict[str, DimRange]]:
    """The outputs' dims by name, and the ranges of those that are none of the inputs'."""
    runs: list[tuple[Sizes, Shapes]] = [(base, shapes)]
    low, high = ({name: getattr(limits, end) for name, limits in dims.items()} for end in ("min", "max"))
    for sizes in [low, high, *({**dict(base), name: low[name]} for name in dims)]:
        if all(sizes != before for before, _ in runs):
            found = measure(sizes)
            if {name: len(shape) for name, shape in found.items()} != {name: len(s) for name, s in shapes.items()}:
                raise UsageError(f"at {_said(sizes)} the model gives outputs of other ranks than at {_said(base)}")
            runs.append((sizes, found))
    named: dict[str, tuple[int | str, ...]] = {}
    derived: dict[str, DimRange] = {}
    for name, shape in shapes.items():
        parts: list[int | str] = []
        for axis in range(len(shape)):
            seen = [found[name][axis] for _, found in runs]
            same = [dim for dim in dims if all(sizes[dim] == size for (sizes, _), size in zip(runs, seen, strict=True))]
            if len(set(seen)) == 1:
                parts.append(shape[axis])
            elif same:
                parts.append(same[0])
            else:
                parts.append(f"{name}_{axis + 1}")
                derived[f"{name}_{axis + 1}"] = DimRange(min=max(1, min(seen)), max=max(seen))
        named[name] = tuple(parts)
    return named, derived


def _run(model: nn.Module, feed: Feed, output_names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The outputs by name, of the module in eval mode; it is left in the modes that it was in."""
    import torch

    from dlops.unchanged import run_on_copies

    modes = {module: module.training for module in model.modules()}
    try:
        result: Any = run_on_copies(model.eval(), feed, title=type(model).__name__)
    except UsageError:
        raise
    except Exception as error:  # a person's own code, which may raise anything
        sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
        raise UsageError(
            f"running the model on the evaluation samples failed ({sizes}): {type(error).__name__}: {error}"
        ) from error
    finally:
        # One by one: layers that were frozen in eval mode stay so.
        for module, was_training in modes.items():
            module.training = was_training
    if isinstance(result, Mapping):
        outputs = dict(result)
    else:
        tensors = list(result) if isinstance(result, (tuple, list)) else [result]
        if len(tensors) != len(output_names):
            raise UsageError(
                f"the model gives {len(tensors)} outputs, and names are given for {len(output_names)}",
                hint="a name for each: --output NAME in the command, output_names= in Python",
            )
        outputs = dict(zip(output_names, tensors, strict=True))
    strange = [name for name, value in outputs.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise UsageError(f"the model gives {', '.join(strange)}, which are not tensors", hint="return tensors only")
    return outputs


def _spec(name: str, shape: Sequence[int | str], dtype: str) -> TensorSpec:
    if dtype not in get_args(DType):
        raise InputError(f"{name}: {dtype} is not a dtype that artifacts have", field=name, hint=_DTYPE_HINT)
    return TensorSpec(name=name, dtype=cast("DType", dtype), shape=tuple(shape))


def _said(sizes: Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
