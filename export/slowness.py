"""Why a variant is no faster than what it was made of: what its runtime tells of kernels, providers and precision."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlops.artifact import Artifact, Repair, Variant
from dlops.export.quantize import saturates
from dlops.runtimes import Placement, SessionOptions, open_session
from dlops.signature import Feed

# Runs that are profiled: enough that a single slow one does not decide, and few beside a second of timing.
_PROFILED_RUNS = 20
# What computes with weights in floats once ONNX Runtime has fused what it can.
_FLOAT_PRODUCTS = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM", "GRU"}
)
_INTEGER_PRODUCTS = frozenset(
    {"QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"}
    | {"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
)
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast"})
# Below these shares something is not why.
_MUCH, _MOST = 0.1, 0.5
_BLOCK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """count: its nodes in the graph that truly runs. ns: what they take together in one inference."""

    count: int
    ns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A variant as it ran. latency_ns: median of a call. operators: by type, null where the runtime does not tell."""

    variant: Variant
    placement: Placement
    latency_ns: float
    operators: Mapping[str, Operator] | None


def operators_of(artifact: Artifact, feed: Feed, options: SessionOptions) -> Mapping[str, Operator] | None:
    """What ONNX Runtime runs for the feed after all its fusions, by its own profile; null for the other runtimes."""
    if artifact.variant.format != "onnx":
        return None
    from dlops.runtimes.onnxruntime import OnnxSession

    with tempfile.TemporaryDirectory(prefix="dlops-profile-") as folder:
        session = open_session(artifact, replace(options, profile_prefix=Path(folder, "profile")))
        assert isinstance(session, OnnxSession)
        try:
            for _ in range(_PROFILED_RUNS):
                session.run(feed)
            events = json.loads(session.end_profile().read_bytes())
        finally:
            session.close()
    by_node: dict[str, tuple[str, list[float]]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if name.endswith("_kernel_time"):
            by_node.setdefault(name, (event["args"]["op_name"], []))[1].append(1000.0 * event["dur"])
    found: dict[str, Operator] = {}
    for operator, spent in by_node.values():
        before = found.get(operator, Operator(count=0, ns=0.0))
        typical = sorted(spent)[len(spent) // 2]
        found[operator] = Operator(count=before.count + 1, ns=before.ns + typical)
    return found


def reasons(side: Side, parent: Side, *, widths: Sequence[int], repair: Repair | None) -> tuple[str, ...]:
    """What is known to make `side` no faster than `parent`, a clause each; empty where nothing was found."""
    found = [*_of_precision(side), *_of_placement(side, parent)]
    if side.variant.pruned_fraction:
        found += _of_widths(widths)
    if repair is not None:
        found.append(f"{len(repair.layers)} of {repair.of} layers were returned to fp32")
    # What its arithmetic is not meant to speed up needs no more explaining.
    if side.placement.precision != "fp32" or side.variant.precision == "fp32":
        found += _of_operators(side, parent)
    return tuple(found)


def _of_precision(side: Side) -> list[str]:
    precision, where = side.variant.precision, side.placement.provider
    if precision == "int8wo":
        return ["int8wo computes in fp32 by design: it makes the file smaller and not faster"]
    if precision == "fp8" and side.placement.precision == "fp32":
        return [f"{where} rounds to fp8 and computes in fp32: fp8 is for GPUs of compute capability 8.9 and later"]
    if side.placement.precision != precision and side.placement.precision == "fp32":
        return [f"{where} computes {precision} in fp32 here, and converts at the ends"]
    if precision in ("int8", "int8dyn") and side.placement.device == "cpu" and saturates():
        return ["this CPU has no VNNI, so int8 products take several instructions"]
    return []


def _of_placement(side: Side, parent: Side) -> list[str]:
    """Nodes that another provider than the first had to take, where the parent had fewer of them."""
    first, *_ = side.placement.provider.split(",")
    fallen = {kind: n for provider, kinds in side.placement.nodes.items() if provider != first
              for kind, n in kinds.items()}  # fmt: skip
    before = sum(n for provider, kinds in parent.placement.nodes.items() if provider != first for n in kinds.values())
    if sum(fallen.values()) <= before:
        return []
    named = ", ".join(f"{kind} ({n})" for kind, n in sorted(fallen.items(), key=lambda item: -item[1])[:3])
    return [f"{sum(fallen.values())} nodes fell back from {first}, {before} of {parent.variant.slug}: {named}"]


def _of_widths(widths: Sequence[int]) -> list[str]:
    odd = [width for width in widths if width % _BLOCK]
    if not odd:
        return []
    named = ", ".join(str(width) for width in odd[:4])
    return [f"{len(odd)} of {len(widths)} layers have a width that is no multiple of {_BLOCK} ({named})"]


def _of_operators(side: Side, parent: Side) -> list[str]:
    mine, others = side.operators, parent.operators
    # On a GPU these are the times that launching took.
    if not mine or not others or side.placement.device != "cpu":
        return []
    total = sum(operator.ns for operator in mine.values())
    before = sum(operator.ns for operator in others.values())
    found = []
    if side.variant.precision in ("int8", "int8dyn"):
        found += _of_products(mine)
    converting = {kind: mine[kind] for kind in mine if kind in _CONVERSIONS}
    spent = sum(operator.ns for operator in converting.values())
    if total and spent >= _MUCH * total:
        nodes = " and ".join(f"{operator.count} {kind}" for kind, operator in sorted(converting.items()))
        found.append(f"{spent / total:.0%} of the kernels' time goes to {nodes} left in the graph")
    if before and total > before:
        found.append(f"its kernels take {_most(mine)}, those of {parent.variant.slug} {_most(others)}")
    elif total < _MOST * side.latency_ns:
        found.append(
            f"kernels are {total / side.latency_ns:.0%} of a call of {side.latency_ns / 1e3:.0f} µs, "
            "the rest is the call itself"
        )
    return found


def _of_products(operators: Mapping[str, Operator]) -> list[str]:
    """Products that ONNX Runtime had no integer kernel for."""
    floats = {kind: operators[kind].count for kind in operators if kind in _FLOAT_PRODUCTS}
    integers = sum(operators[kind].count for kind in operators if kind in _INTEGER_PRODUCTS)
    if not floats:
        return []
    named = ", ".join(f"{kind} ({n})" for kind, n in sorted(floats.items()))
    return [f"no integer kernel for {sum(floats.values())} of {sum(floats.values()) + integers} products: {named}"]


def _most(operators: Mapping[str, Operator]) -> str:
    """The time of all, and of the two that take most of it."""
    total = sum(operator.ns for operator in operators.values())
    ranked = sorted(operators.items(), key=lambda item: -item[1].ns)[:2]
    named = ", ".join(f"{kind} {operator.ns / 1e3:.0f}" for kind, operator in ranked)
    return f"{total / 1e3:.0f} µs ({named})"
