"""A calibration in words, for the console, Markdown and HTML."""

from __future__ import annotations

from dlops.bench.cells import significant
from dlops.report import Calibration, Interval, Peaks, SendingCost, TimingCost


def facts(calibration: Calibration) -> list[tuple[str, str]]:
    """All that it says, as (what, sentence) in the order to be read."""
    timing, network = calibration.timing, calibration.network
    how = "in short, within this run" if calibration.quick else "by dlops bench --calibrate"
    found = [
        ("When", f"{calibration.created:%d %B %Y, %H:%M UTC}, {how}"),
        ("Timing a call", f"adds {_range(timing.added_ns, 1e3)} µs; 1 ms is recorded {_excess(timing)} too long"),
        ("Clock", f"steps of {timing.clock_step_ns} ns, {timing.clock_read_ns:.0f} ns a reading"),
    ]
    if network is not None:
        found += _network_facts(network)
    if calibration.peaks is not None:
        found += _peak_facts(calibration.peaks)
    if calibration.reasons:
        found.append(("To be read with care", "; ".join(calibration.reasons)))
    return found


def line(calibration: Calibration) -> str:
    """The same in one line."""
    words = [f"timing adds {significant(calibration.timing.added_ns.value / 1e3)} µs to a call"]
    network = calibration.network
    if network is not None and network.floor_ns is not None:
        words.append(f"client and loopback take {significant(network.floor_ns.value / 1e6)} ms of a request")
    if network is not None and network.capacity is not None:
        words.append(f"one sender keeps {network.capacity:,.5g} requests a second")
    return f"harness ({calibration.created:%d %B %Y}{', in short' if calibration.quick else ''}): {', '.join(words)}"


def _network_facts(network: SendingCost) -> list[tuple[str, str]]:
    found = []
    if network.floor_ns is not None:
        floor = _range(network.floor_ns, 1e6)
        found.append(("Client and loopback", f"take {floor} ms of a request: the p50 against a null server"))
    if network.closed_rate is not None:
        many = f"{network.closed_concurrency} calls in flight"
        found.append(("Closed loop", f"at most {_range(network.closed_rate, 1)} requests a second with {many}"))
    if network.capacity is not None:
        missed = "" if network.missed is None else f", no longer {network.missed:,.5g}"
        found.append(("One sender", f"keeps its schedule up to {network.capacity:,.5g} requests a second{missed}"))
    for what, p50, p99 in (
        (f"Requests at {network.lag_rate:g} a second", network.lag_p50_ns, network.lag_p99_ns),
        ("A sleep of 1 ms", network.oversleep_p50_ns, network.oversleep_p99_ns),
    ):
        verb = "leave late by" if what.startswith("Requests") else "is longer by"
        told = [f"{_range(one, 1e6)} ms ({q})" for q, one in (("p50", p50), ("p99", p99)) if one is not None]
        if told:
            found.append((what, f"{verb} {', '.join(told)}"))
    return found


def _peak_facts(peaks: Peaks) -> list[tuple[str, str]]:
    found = []
    for one in peaks.cpu:
        threads = f"{one.threads} thread{'' if one.threads == 1 else 's'}"
        rates = f"{_rate(one.flops, 'FLOP/s')} in a float32 matrix product, {_rate(one.bytes_per_s, 'B/s')} in a copy"
        found.append((f"Peak of {threads}", rates))
    for number, gpu in enumerate(peaks.gpus):
        rates = ", ".join(f"{_rate(flops, 'FLOP/s')} ({kind})" for kind, flops in gpu.flops.items())
        found.append((f"Peak of GPU {number}", f"{rates}, {_rate(gpu.bytes_per_s, 'B/s')} in a copy ({gpu.name})"))
    found += [(f"No peak: {what}", reason) for what, reason in peaks.absent.items()]
    return found


def _rate(value: float, unit: str) -> str:
    prefix, scale = next((one for one in (("T", 1e12), ("G", 1e9)) if value >= one[1]), ("M", 1e6))
    return f"{significant(value / scale)} {prefix}{unit}"


def _excess(timing: TimingCost) -> str:
    share = timing.share_of_1_ms
    if share.low is None or share.high is None:
        return f"{share.value:.3%}"
    return f"{share.value:.3%} ({share.low:.3%} to {share.high:.3%})"


def _range(interval: Interval, scale: float) -> str:
    value = significant(interval.value / scale)
    if interval.low is None or interval.high is None:
        return value
    return f"{value} ({significant(interval.low / scale)} to {significant(interval.high / scale)})"
