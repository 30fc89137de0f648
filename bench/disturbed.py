"""What the telemetry says of a report's rows: other load, throttling, energy; each reason beside the row's verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dlops.bench.attended import AttendedTurn
from dlops.bench.nvml import THROTTLING, same_gpu
from dlops.bench.results import Measured, telemetry_key
from dlops.bench.series import recorded
from dlops.bench.telemetry import Timeline
from dlops.report import Measurement, Verdict

# Of the CPU time of the processors that the run may use: from here on a row is not to be quoted ...
OTHER_LOAD = 0.10
# ... and from here on it is said.
_SOME_LOAD = 0.03
# Clock ticks of 10 ms tell no less than this apart.
_SHORTEST_S = 1.0
_STEAL_NAMED = 0.005
# A processor that runs this much slower at the end of a row than at its begin, as busy as then, is throttled.
_FREQUENCY_FALL = 0.10
_AS_BUSY = 0.8
_FREQUENCY_SAMPLES = 12
# A GPU that is used less than this is not what a service ran on.
_GPU_USED_PPM = 50_000
_THROTTLED_SAMPLES = 0.05
_STOPPED = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a run knows of the time that a row took, on the clock that all processes share.

    service: the URL of a row over the network. gpu: the PCI address of the one that a row in process ran on, None on
    the CPU and where CUDA did not say. alone: no other target took turns with it. items: answered in that time, in
    process those of the lead-ins included. turn_energy_uj: of its own turns, None where no counter tells.
    """

    begin_ns: int
    end_ns: int
    items: float
    service: str | None = None
    gpu: str | None = None
    alone: bool = True
    turn_energy_uj: int | None = None

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e9


def seen_in_turns(turns: Sequence[Sequence[AttendedTurn]], own: int, *, batch: int, gpu: str | None = None) -> Seen:
    """Of the target with number `own` among those that took `turns`: at least one each, all from one run.

    gpu: the PCI address of the one that it ran on.
    """
    mine = turns[own]
    spent = [turn.energy_uj for turn in mine]
    # A counter that stood still through a turn is too coarse for turns.
    known = [energy for energy in spent if energy]
    return Seen(
        begin_ns=min(one[0].begin_ns for one in turns),
        end_ns=max(one[-1].end_ns for one in turns),
        items=batch * sum(turn.calls for turn in mine),
        gpu=gpu,
        alone=len(turns) == 1,
        turn_energy_uj=sum(known) if len(known) == len(spent) else None,
    )


def seen_under_load(row: Measurement, *, began_ns: int, service: str) -> Seen:
    """Of a row over the network, which lasted from `began_ns` on."""
    assert row.duration_ns is not None
    items = row.throughput.value * row.duration_ns / 1e9
    return Seen(begin_ns=began_ns, end_ns=began_ns + row.duration_ns, items=items, service=service)


def attach(measured: Measured, timeline: Timeline, seen: Mapping[str, Seen]) -> Measured:
    """The report with the telemetry, and its rows with what that says of them. seen: by the rows' keys."""
    rows = tuple(_judged(row, timeline, seen[row.samples]) for row in measured.measurements)
    spans = {key: (one.begin_ns, one.end_ns) for key, one in seen.items()}
    absent = dict(timeline.absent) | _untold(timeline, rows, seen)
    telemetry, arrays = recorded(replace(timeline, absent=absent), spans=spans, key=telemetry_key(0))
    report = measured.report.model_copy(update={"measurements": rows, "telemetry": (telemetry,)})
    return replace(measured, report=report, samples=measured.samples | arrays)


def other_load(timeline: Timeline, seen: Seen) -> tuple[float, float] | None:
    """Of the CPU time in between, the shares that were not the run's, and of them what other virtual machines took.

    None where the machine does not tell, or the time is too short.
    """
    if seen.seconds < _SHORTEST_S or timeline.services.get(seen.service or "") == "hidden":
        return None
    found = [timeline.grown(name, seen.begin_ns, seen.end_ns) for name in ("busy_ticks", "ours_ticks", "steal_ticks")]
    busy, ours, steal = found
    if busy is None or ours is None or steal is None:
        return None
    capacity = timeline.cpus * timeline.ticks_a_second * seen.seconds
    return (max(0.0, busy - ours) + steal) / capacity, steal / capacity


def _judged(row: Measurement, timeline: Timeline, seen: Seen) -> Measurement:
    against = _throttled(row, timeline, seen)
    remarks: list[str] = []
    load = other_load(timeline, seen)
    if load is not None and load[0] >= _SOME_LOAD:
        said = f"other load on the machine: {load[0]:.0%} of the CPU time was not ours"
        if load[1] >= _STEAL_NAMED:
            said += f"; other virtual machines took {load[1]:.0%} (steal)"
        (against if load[0] >= OTHER_LOAD else remarks).append(said)
    energy = _energy(row, timeline, seen)
    update: dict[str, Any] = {
        "other_load": None if load is None else round(load[0], 4),
        "energy_j_per_item": None if energy is None else energy[0],
        "energy_sources": () if energy is None else energy[1],
    }
    if against or remarks:
        old = row.verdict
        update["verdict"] = Verdict(
            steady=old.steady and not against,
            reasons=(*against, *old.reasons, *remarks),
            observed=None if old.observed is None else (*against, *old.observed),
            remarks=(*old.remarks, *remarks),
        )
    return row.model_copy(update=update)


def _throttled(row: Measurement, timeline: Timeline, seen: Seen) -> list[str]:
    if not _ran_here(timeline, seen):
        return []
    on_gpu = row.device.startswith("cuda")
    against = []
    if not on_gpu:
        rose = timeline.grown("cpu_throttle_count", seen.begin_ns, seen.end_ns)
        if rose is not None and rose >= 1:
            against.append(f"throttled: the processor's thermal throttle counters rose by {rose:.0f}")
        against += _frequency_fell(timeline, seen)
        stopped = timeline.grown("quota_stall_us", seen.begin_ns, seen.end_ns)
        share = 0.0 if stopped is None else stopped / 1e6 / seen.seconds
        if share >= _STOPPED:
            against.append(f"throttled: a CPU quota stopped it for {share:.0%} of the time, summed over processors")
    if on_gpu or seen.service is not None:
        against += _gpu_throttled(timeline, seen)
    return against


def _frequency_fell(timeline: Timeline, seen: Seen) -> list[str]:
    frequencies = timeline.within("cpu_frequency_khz", seen.begin_ns, seen.end_ns)
    quarter = len(frequencies) // 4
    length_ns = (seen.end_ns - seen.begin_ns) // 4
    busy_first = timeline.grown("ours_ticks", seen.begin_ns, seen.begin_ns + length_ns)
    busy_last = timeline.grown("ours_ticks", seen.end_ns - length_ns, seen.end_ns)
    if len(frequencies) < _FREQUENCY_SAMPLES or busy_first is None or busy_last is None:
        return []
    first, last = (float(np.median(part)) for part in (frequencies[:quarter], frequencies[-quarter:]))
    if last > (1 - _FREQUENCY_FALL) * first or busy_last < _AS_BUSY * busy_first:
        return []
    return [f"throttled: the processor's frequency fell from {first / 1e6:.2f} to {last / 1e6:.2f} GHz under load"]


def _gpu_throttled(timeline: Timeline, seen: Seen) -> list[str]:
    against = []
    for gpu in _used_gpus(timeline, seen):
        events = timeline.within(f"gpu{gpu}_clock_events_bits", seen.begin_ns, seen.end_ns)
        for bit, reason in THROTTLING.items():
            share = float(((events & bit) != 0).mean()) if len(events) else 0.0
            if share >= _THROTTLED_SAMPLES:
                against.append(f"throttled: GPU {gpu}: {reason} in {share:.0%} of the samples")
    return against


def _used_gpus(timeline: Timeline, seen: Seen) -> list[int]:
    """The one that the row ran on. Of a service, whose GPU is not known, those that did something meanwhile or do not
    tell, and of a row in process whose GPU CUDA did not say none."""
    if seen.service is None:
        return [number for number, gpu in enumerate(timeline.gpus) if seen.gpu and same_gpu(gpu.pci, seen.gpu)]
    used = []
    for gpu in range(len(timeline.gpus)):
        utilization = timeline.within(f"gpu{gpu}_utilization_ppm", seen.begin_ns, seen.end_ns)
        if not len(utilization) or utilization.mean() >= _GPU_USED_PPM:
            used.append(gpu)
    return used


def _energy(row: Measurement, timeline: Timeline, seen: Seen) -> tuple[float, tuple[str, ...]] | None:
    """Joules an item, and of which counters; None where none tells this row's from another's."""
    if not _ran_here(timeline, seen) or not seen.items:
        return None
    packages = [name for name in timeline.values if name.endswith("_energy_uj") and not name.startswith("gpu")]
    on_gpu = row.device.startswith("cuda")
    if seen.service is None and not on_gpu:
        if seen.turn_energy_uj is None:
            return None
        return seen.turn_energy_uj / 1e6 / seen.items, tuple(_counter(name) for name in packages)
    if not seen.alone:
        return None
    gpus = [name for gpu in _used_gpus(timeline, seen) if (name := f"gpu{gpu}_energy_uj") in timeline.values]
    if on_gpu and not gpus:
        return None
    counters = [*packages, *gpus]
    spent = [timeline.grown(name, seen.begin_ns, seen.end_ns) for name in counters]
    known = [energy for energy in spent if energy is not None]
    if not counters or len(known) < len(spent):
        return None
    return sum(known) / 1e6 / seen.items, tuple(_counter(name) for name in counters)


def _untold(timeline: Timeline, rows: Sequence[Measurement], seen: Mapping[str, Seen]) -> dict[str, str]:
    """What the run could not tell of some rows, with the reason."""
    found = {}
    hidden = [url for url, where in timeline.services.items() if where == "hidden"]
    if hidden:
        found[f"other load under {', '.join(hidden)}"] = (
            "what listens there is another user's or in a container: its CPU time cannot be told from other load"
        )
    far = [url for url, where in timeline.services.items() if where == "elsewhere"]
    if far:
        found[f"energy of {', '.join(far)}"] = "it runs on another machine"
    on_gpu = [seen[row.samples] for row in rows if row.device.startswith("cuda")]
    if timeline.gpus and any(not _used_gpus(timeline, one) for one in on_gpu):
        found["which GPU some rows ran on"] = (
            "CUDA did not say where on the bus it is, or NVML knows none there: no energy and no throttling of it"
        )
    if any(not one.alone for one in on_gpu):
        found["energy of rows that take turns on a GPU"] = (
            f"its counter is read every {timeline.interval_s:g} s and turns are shorter: measure one target a run"
        )
    return found


def _ran_here(timeline: Timeline, seen: Seen) -> bool:
    return seen.service is None or timeline.services.get(seen.service) in ("here", "hidden")


def _counter(name: str) -> str:
    return name.removesuffix("_energy_uj")
