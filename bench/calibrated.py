"""What a calibration says of a report's rows: reasons beside their verdicts."""

from __future__ import annotations

from dataclasses import replace

from dlops.bench.calibrate import MAX_LAG_NS
from dlops.bench.cells import over_grpc, significant
from dlops.bench.openloop import senders_for
from dlops.bench.peak_share import shared, unshared
from dlops.bench.results import Measured
from dlops.report import Calibration, Measurement, SendingCost, TimingCost, Verdict

# In process, where more than this share of the median is the harness's.
_MAX_ADDED_SHARE = 0.01
# Over HTTP, where the median is less than this many times what a null server's is.
_NEAR_FLOOR = 3.0
# In a closed loop, where more than this share of what the client reaches against a null server was reached.
_NEAR_CLOSED_RATE = 0.8
# Nothing goes beyond what it is measured against, unless that was measured on a busier machine.
_ABOVE_PEAK = 1.05


def attach(measured: Measured, calibration: Calibration, *, senders: int | None = None) -> Measured:
    """The report with the calibration, and its rows with what that says against them.

    senders: how many processes offered the rates, where that was asked for.
    """
    rows = tuple(_judged(shared(row, calibration.peaks), calibration, senders) for row in measured.measurements)
    notes = (*measured.report.notes, *unshared(rows, calibration.peaks))
    update = {"calibration": calibration, "measurements": rows, "notes": tuple(dict.fromkeys(notes))}
    report = measured.report.model_copy(update=update)
    return replace(measured, report=report)


def _judged(row: Measurement, calibration: Calibration, senders: int | None) -> Measurement:
    """The row as it was, or with a reason more. Only "client-bound" takes its quotability."""
    if row.engine != "dlops":
        # What was calibrated is our own timing and sending.
        said = []
    elif row.boundary != "network":
        said = [*_short_call(row, calibration.timing), *_of_peak(row)]
    elif calibration.network is None:
        said = []
    elif over_grpc(row):
        many = row.load.rate is not None or row.load.concurrency > 1
        said = ["whether the client bounded it is not known: the calibration speaks HTTP"] if many else []
    else:
        network, rate = calibration.network, row.load.rate
        said = _too_many_calls(row, network) if rate is None else _too_high_rate(row, rate, network, senders)
        said += _near_floor(row, network)
    said = [reason for reason in said if reason not in row.verdict.reasons]
    if not said:
        return row
    old = row.verdict
    against = [reason for reason in said if reason.startswith("client-bound")]
    remarks = [reason for reason in said if reason not in against]
    verdict = Verdict(
        steady=old.steady and not against,
        reasons=(*against, *old.reasons, *remarks),
        observed=None if old.observed is None else (*against, *old.observed),
        remarks=(*old.remarks, *remarks),
    )
    return row.model_copy(update={"verdict": verdict})


def _short_call(row: Measurement, timing: TimingCost) -> list[str]:
    median = row.latency.p50_ns
    if median is None or timing.added_ns.value <= _MAX_ADDED_SHARE * median.value:
        return []
    share = timing.added_ns.value / median.value
    return [f"a short call: {share:.1%} of the median is what timing adds (calibration)"]


def _of_peak(row: Measurement) -> list[str]:
    said = []
    if row.peak_share is not None:
        anew = ": dlops bench --calibrate anew" if row.peak_share > _ABOVE_PEAK else ""
        said.append(f"achieves {significant(row.peak_share * 100)}% of the measured peak FLOP/s (calibration){anew}")
    if row.bandwidth_share is not None:
        cached = ": caches keep some of it" if row.bandwidth_share > 1 else ""
        share = f"{significant(row.bandwidth_share * 100)}% of the measured bandwidth (calibration){cached}"
        said.append(f"weights, inputs and outputs, each once a call, take {share}")
    return said


def _near_floor(row: Measurement, network: SendingCost) -> list[str]:
    # Under a rate the p50 counts from when a request was due: from its send it is the service's.
    latency = row.service or row.latency
    if latency.p50_ns is None or network.floor_ns is None:
        return []
    if latency.p50_ns.value >= _NEAR_FLOOR * network.floor_ns.value:
        return []
    floor, median = (significant(one.value / 1e6) for one in (network.floor_ns, latency.p50_ns))
    return [f"near the floor: client and loopback alone take {floor} ms of a median of {median} ms (calibration)"]


def _too_many_calls(row: Measurement, network: SendingCost) -> list[str]:
    # One call in flight is what the floor is for.
    if network.closed_rate is None or row.load.concurrency == 1:
        return []
    calls = row.throughput.value / row.load.batch
    if calls <= _NEAR_CLOSED_RATE * network.closed_rate.value:
        return []
    most = f"{network.closed_rate.value:,.0f}"
    if calls > (network.closed_rate.high or network.closed_rate.value):
        # The client cannot be bound by what it has just exceeded: the machine was busier then.
        return [f"{calls:,.0f} calls a second, more than the {most} of the calibration: dlops bench --calibrate anew"]
    return [f"client-bound: {calls:,.0f} calls a second, and the client reaches {most} with no model (calibration)"]


def _too_high_rate(row: Measurement, rate: float, network: SendingCost, senders: int | None) -> list[str]:
    if network.capacity is None:
        return []
    count = senders or senders_for(rate)
    most = count * network.capacity
    if rate <= most:
        return []
    limit = f"{most:,.5g} a second that {'one sender keeps' if count == 1 else f'{count} senders keep'} (calibration)"
    if row.lag_p99_ns is not None and row.lag_p99_ns <= MAX_LAG_NS:
        # What was seen in this very run goes before what an earlier one let expect.
        return [f"offered more than the {limit}; 99% left within {row.lag_p99_ns / 1e6:.2g} ms all the same"]
    return [f"client-bound: offered more than the {limit}"]
