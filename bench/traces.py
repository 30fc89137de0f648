"""What a profiler recorded, as a table of operators: ONNX Runtime's trace, and torch's averages with its trace."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dlops.errors import MachineError
from dlops.report import ProfiledOperator, ProviderUse

COSTLIEST = 10
# What one call is named in torch's trace; ONNX Runtime names its own.
CALL = "dlops.call"
# Enough to look at, and about a megabyte of ONNX Runtime's events once compressed.
_KEPT_EVENTS = 10_000
_NODE_SUFFIX = "_kernel_time"
_NS_PER_US = 1000

Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """total_ns: its own time over all calls, without that of operators inside it."""

    name: str
    op_type: str
    provider: str
    calls: int
    total_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """calls: how many were recorded, the warm-up not among them, which took total_ns in all.

    trace: Chrome's JSON, as an object or as its list of events. ends_us: when each call ended, by the trace's clock.
    """

    calls: int
    total_ns: int
    times: Literal["host", "device"]
    operators: tuple[Operator, ...]
    trace: Mapping[str, Any] | Sequence[Event]
    ends_us: tuple[float, ...]

    @property
    def events(self) -> Sequence[Event]:
        return self.trace["traceEvents"] if isinstance(self.trace, Mapping) else self.trace


class Average(Protocol):
    """What is used of torch.autograd.profiler_util.FunctionEventAvg; times in microseconds."""

    key: str
    count: int
    device_type: Any
    is_user_annotation: bool
    cpu_time_total: float
    self_cpu_time_total: float
    self_device_time_total: float


def read_onnxruntime(events: Sequence[Event], *, warmup: int) -> Recording:
    """The calls after the first `warmup`, from the events of ONNX Runtime's profile; its clock counts whole us.

    A build with CUDA profiling lists the kernels that a node launched behind it: the node's time is then theirs, since
    the host only starts them. Raises MachineError where no call is in it.
    """
    runs = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "Session" and event["name"] == "model_run"
    )[warmup:]
    if not runs:
        raise MachineError("ONNX Runtime's profile names none of the calls", hint="upgrade onnxruntime")
    kernels_us: dict[int, float] = defaultdict(float)
    nodes: list[Event] = []
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_NODE_SUFFIX):
            nodes.append(event)
        elif event.get("cat") == "Kernel" and nodes:
            kernels_us[id(nodes[-1])] += event["dur"]
    on_device = bool(kernels_us)
    counted = [node for node in nodes if node["ts"] >= runs[0][0]]
    own_us = {id(node): kernels_us.get(id(node), 0.0) for node in counted} if on_device else _self_times(counted)
    calls: Counter[tuple[str, str, str]] = Counter()
    total_us: dict[tuple[str, str, str], float] = defaultdict(float)
    for node in counted:
        arguments = node.get("args", {})
        key = (
            node["name"].removesuffix(_NODE_SUFFIX),
            str(arguments.get("op_name", "unknown")),
            str(arguments.get("provider", "unknown")),
        )
        calls[key] += 1
        total_us[key] += own_us[id(node)]
    return Recording(
        calls=len(runs),
        total_ns=_ns(sum(end - start for start, end in runs)),
        times="device" if on_device else "host",
        operators=tuple(
            Operator(name=key[0], op_type=key[1], provider=key[2], calls=calls[key], total_ns=_ns(total_us[key]))
            for key in calls
        ),
        trace=events,
        ends_us=tuple(end for _, end in runs),
    )


def read_torch(averages: Iterable[Average], trace: Mapping[str, Any], *, device: str) -> Recording:
    """From key_averages() and the exported trace of calls that ran inside record_function(CALL).

    On the CPU the rows are operators with their self time. On a GPU they are kernels and copies, because an operator's
    own time is that of starting them.
    """
    averages = list(averages)
    (whole,) = (one for one in averages if one.key == CALL and _on_host(one))
    on_device = not device.startswith("cpu")
    if on_device:
        rows = [
            (one, _kernel_type(one.key), one.self_device_time_total)
            for one in averages
            if not _on_host(one) and not one.is_user_annotation
        ]
    else:
        rows = [(one, one.key, one.self_cpu_time_total) for one in averages if one is not whole]
    annotations = (
        event for event in trace["traceEvents"] if event["name"] == CALL and event.get("cat") == "user_annotation"
    )
    return Recording(
        calls=whole.count,
        total_ns=_ns(whole.cpu_time_total),
        times="device" if on_device else "host",
        operators=tuple(
            Operator(name=one.key, op_type=kind, provider=device.partition(":")[0], calls=one.count, total_ns=_ns(us))
            for one, kind, us in rows
        ),
        trace=trace,
        ends_us=tuple(sorted(event["ts"] + event["dur"] for event in annotations)),
    )


def profile_fields(recording: Recording, *, provider: str) -> dict[str, Any]:
    """The part of a `Profile` that is counted from a recording. provider: the session's own."""
    ranked = sorted(recording.operators, key=lambda one: (-one.total_ns, one.name))
    inside = sum(one.total_ns for one in ranked)
    # Streams that work side by side can add up to more than the clock shows.
    whole = max(recording.total_ns, inside, 1)
    costliest = ranked[:COSTLIEST]
    op_types: Counter[str] = Counter()
    by_provider: dict[str, list[Operator]] = defaultdict(list)
    for one in ranked:
        op_types[one.op_type] += one.total_ns
        by_provider[one.provider].append(one)
    return {
        "calls": recording.calls,
        "total_ns": whole,
        "times": recording.times,
        "operators": tuple(
            ProfiledOperator(
                name=one.name, op_type=one.op_type, provider=one.provider, calls=one.calls, total_ns=one.total_ns,
                share=one.total_ns / whole,
            )
            for one in costliest
        ),
        "others": len(ranked) - len(costliest),
        "others_share": sum(one.total_ns for one in ranked[COSTLIEST:]) / whole,
        "outside_share": (whole - inside) / whole,
        "op_types": {name: total / whole for name, total in op_types.most_common()},
        "providers": {
            name: ProviderUse(
                operators=len(ones),
                share=sum(one.total_ns for one in ones) / whole,
                names=() if name == provider else tuple(one.name for one in ones),
            )
            for name, ones in by_provider.items()
        },
        "copies": sum(one.op_type.startswith("Memcpy") for one in ranked),
    }  # fmt: skip


def compress_trace(recording: Recording, *, limit: int = _KEPT_EVENTS) -> tuple[bytes, int]:
    """The trace as gzipped JSON, cut after as many whole calls as `limit` events hold (one at least), and how many."""
    times = sorted(event["ts"] for event in recording.events if "ts" in event)
    kept = len(recording.ends_us)
    while kept > 1 and bisect_right(times, recording.ends_us[kept - 1]) > limit:
        kept -= 1
    end = recording.ends_us[kept - 1]
    events = [event for event in recording.events if event.get("ts", end) <= end]
    trace = recording.trace
    document = dict(trace) | {"traceEvents": events} if isinstance(trace, Mapping) else events
    text = json.dumps(document, separators=(",", ":"))
    # No time of day in the file: the same trace has the same digest.
    return gzip.compress(text.encode(), compresslevel=6, mtime=0), kept


def _self_times(nodes: Iterable[Event]) -> dict[int, float]:
    """Duration of each less that of the nodes inside it, as those of a loop's body are, by the event's id()."""
    own: dict[int, float] = {}
    ordered = sorted(nodes, key=lambda node: (node.get("tid", 0), node["ts"], -node["dur"]))
    for _, group in itertools.groupby(ordered, key=lambda node: node.get("tid", 0)):
        for node, parent in _with_parents(group):
            own[id(node)] = own.get(id(node), 0.0) + node["dur"]
            if parent is not None:
                own[id(parent)] -= node["dur"]
    # The clock's whole microseconds can make parts longer than their whole.
    return {key: max(0.0, value) for key, value in own.items()}


def _with_parents(ordered: Iterable[Event]) -> Iterator[tuple[Event, Event | None]]:
    open_nodes: list[Event] = []
    for node in ordered:
        while open_nodes and node["ts"] >= open_nodes[-1]["ts"] + open_nodes[-1]["dur"]:
            open_nodes.pop()
        yield node, open_nodes[-1] if open_nodes else None
        open_nodes.append(node)


def _on_host(average: Average) -> bool:
    return bool(average.device_type.name == "CPU")


def _kernel_type(name: str) -> str:
    """A kernel's function without return type, template arguments and parameters."""
    name = name.removeprefix("void ")
    return re.split(r"[<(]", name, maxsplit=1)[0].strip() or name


def _ns(us: float) -> int:
    return max(0, round(us * _NS_PER_US))
