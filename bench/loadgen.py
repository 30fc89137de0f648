"""MLCommons' LoadGen in the process of a target: it decides when queries come and takes their times.

The workloads here are none of MLPerf's, so what comes out is no MLPerf result. One test a process: LoadGen keeps state.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dlops.bench.arrivals import WANTED_SAMPLES
from dlops.bench.kernel import wake_on_time
from dlops.errors import MachineError, missing_package
from dlops.manifest import Record
from dlops.report import Scenario
from dlops.timing import STRETCH

Integers = NDArray[np.int64]

# LoadGen names its scenarios so, and the number that is each one's result so in its detailed log.
_SCENARIOS: Mapping[Scenario, tuple[str, str]] = {
    "single_stream": ("SingleStream", "result_90.00_percentile_latency_ns"),
    "multi_stream": ("MultiStream", "result_99.00_percentile_per_query_latency_ns"),
    "server": ("Server", "result_99.00_percentile_latency_ns"),
    "offline": ("Offline", "result_samples_per_second"),
}
# It makes its queries before the test, as many as fit by the latency that is expected: too many cost nothing.
_MARGIN = 4.0
# What a sample is does not matter to LoadGen: the target's own are fed in turn.
_LIBRARY = 8
_SAMPLE = re.compile(
    r'"name":"Sample".*?"ph":"b".*?"ts":(\d+)\.(\d{3}),.*?"sample_seq":(\d+),"query_seq":(\d+),'
    r'.*?"issue_start_ns":(-?\d+),"complete_ns":(\d+)'
)
_LOG_LINE = ":::MLLOG "


class Settings(Record):
    """One test. batch: items a call. rate: queries a second, of "server". expected_ns: about what one call takes."""

    scenario: Scenario
    duration_s: float
    batch: int = 1
    rate: float | None = None
    expected_ns: float


class Said(Record):
    """What LoadGen says of its test. value: the scenario's result: ns, or samples a second offline. reasons: why it is
    not valid by its rules. errors: calls that failed, by kind, which LoadGen does not know of."""

    version: str
    value: float | None
    valid: bool
    reasons: tuple[str, ...] = ()
    errors: dict[str, int] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Driven:
    """The calls of a test, in order, in nanoseconds: (n,) each.

    starts_ns: when each was due, from the first; lag_ns: how much later than it could it was issued; latencies_ns:
    from when it was due; service_ns: from when it was issued; succeeded: 1 or 0. By LoadGen's clock, but for "offline":
    there all is due at once, and a call's times are those that its caller took.
    """

    starts_ns: Integers
    lag_ns: Integers
    latencies_ns: Integers
    service_ns: Integers
    succeeded: Integers
    said: Said

    def arrays(self) -> Integers:
        return np.stack([self.starts_ns, self.lag_ns, self.latencies_ns, self.service_ns, self.succeeded])


@dataclass(slots=True)
class Call:
    """One call of a target, by this process's clock. failed: of what kind, or None."""

    begin_ns: int
    end_ns: int
    items: int
    failed: str | None = None


class Target(Protocol):
    """What LoadGen calls its system under test. calls: in the order their queries were issued. keeps_loadgen: whether
    `issue` returns only when its query is answered, so that queries wait in LoadGen. failure: what `close` raises."""

    keeps_loadgen: bool
    failure: BaseException | None

    @property
    def calls(self) -> Sequence[Call]: ...

    def issue(self, samples: list[Any]) -> None:
        """Run them, now or later, and tell LoadGen."""
        ...

    def halt(self) -> None:
        """Begin no call any more: LoadGen waits for ever, in a process that is about to end. From another thread."""
        ...

    def close(self) -> None: ...


def check_installed() -> None:
    """Raise MachineError where LoadGen's package is not there."""
    if find_spec("mlperf_loadgen") is None:
        raise missing_package("mlcommons-loadgen", extra="loadgen", needed_for="--engine loadgen")


class Direct:
    """Queries are run where they are issued. Under "server" those that come due meanwhile are issued late, and count
    from when they were due: it is the queue in front of one session, without a hand-over to another thread."""

    keeps_loadgen = True

    def __init__(self, call: Callable[[], object], batch: int) -> None:
        self._call, self._batch = call, batch
        self.calls: list[Call] = []
        self._complete = completer()
        self.failure: BaseException | None = None

    def issue(self, samples: list[Any]) -> None:
        for first in range(0, len(samples), self._batch):
            self._run(samples[first : first + self._batch])

    def halt(self) -> None:
        self._call = threading.Event().wait

    def close(self) -> None:
        """Raises what a call raised: an exception in LoadGen's own thread would end the process without a word."""
        if self.failure is not None:
            raise self.failure

    def _run(self, samples: list[Any]) -> None:
        begin = time.perf_counter_ns()
        if self.failure is None:
            try:
                self._call()
            except Exception as error:  # noqa: BLE001 - raised again in close()
                self.failure = error
        end = time.perf_counter_ns()
        # First: until LoadGen knows, the query's time runs.
        self._complete(samples)
        self.calls.append(Call(begin_ns=begin, end_ns=end, items=len(samples)))


def completer() -> Callable[[Sequence[Any]], None]:
    """What tells LoadGen that samples are answered; the answers are none of its business in a performance run."""
    import mlperf_loadgen

    tell, response = mlperf_loadgen.QuerySamplesComplete, mlperf_loadgen.QuerySampleResponse
    return lambda samples: tell([response(one.id, 0, 0) for one in samples])


def drive_session(call: Callable[[], object], settings: Settings) -> Driven:
    """One test of a session of this process, to its end. call: runs one batch. Raises what that raised."""
    target = Direct(call, settings.batch)
    with log_folder() as folder:
        run_test(target, settings, folder)
        return read_test(target, settings, folder)


@contextmanager
def log_folder() -> Iterator[Path]:
    """A folder for LoadGen's logs, for one test."""
    with tempfile.TemporaryDirectory(prefix="dlops-loadgen-") as folder:
        yield Path(folder)


def run_test(target: Target, settings: Settings, folder: Path) -> None:
    """Run LoadGen's test on the target, which is closed. Raises what a call of the target raised."""
    import mlperf_loadgen

    # LoadGen sleeps until a query is due; what it oversleeps is in the query's latency.
    wake_on_time()
    log = mlperf_loadgen.LogSettings()
    log.log_output.outdir = str(folder)
    log.log_output.copy_summary_to_stdout = False
    # The only place where it writes every query's times.
    log.enable_trace = True
    sut = mlperf_loadgen.ConstructSUT(target.issue, _nothing)
    library = mlperf_loadgen.ConstructQSL(_LIBRARY, _LIBRARY, _nothing, _nothing)
    try:
        mlperf_loadgen.StartTestWithLogSettings(sut, library, _test_settings(settings), log, "")
    finally:
        mlperf_loadgen.DestroyQSL(library)
        mlperf_loadgen.DestroySUT(sut)
        target.close()


def read_test(target: Target, settings: Settings, folder: Path, *, cut_short: bool = False) -> Driven:
    """What LoadGen's logs and the target's calls say of a test. cut_short: it runs still, and counts as far as it is.

    Raises MachineError where no query was answered.
    """
    calls = list(target.calls)
    if cut_short:
        said = Said(version=_version(), value=None, valid=False, reasons=("it was interrupted",))
    else:
        said = read_result(folder / "mlperf_log_detail.txt", settings.scenario)
    if settings.scenario == "offline":
        return _offline(calls, settings.batch, said)
    numbers, due, late, latencies = read_trace(folder / "mlperf_log_trace.json", cut_short=cut_short)
    if not cut_short and len(calls) != len(due):
        raise MachineError(f"LoadGen issued {len(calls)} queries and its trace holds {len(due)}")
    # Where several are in flight, of those that are answered some were issued after some that are not.
    answered = [calls[number] for number in numbers.tolist()]
    succeeded = np.array([call.failed is None for call in answered], np.int64)
    said = said.model_copy(update={"errors": _errors(answered)})
    return Driven(
        starts_ns=due - due[0],
        lag_ns=np.maximum(0, late - _held_up(due, latencies)) if target.keeps_loadgen else late,
        latencies_ns=latencies,
        service_ns=latencies - late,
        succeeded=succeeded,
        said=said,
    )


def _held_up(due_ns: Integers, latencies_ns: Integers) -> Integers:
    """For how long after it was due each query had to wait for the one before it."""
    ended = (due_ns + latencies_ns)[:-1]
    return np.concatenate([[0], np.maximum(0, ended - due_ns[1:])])


def _errors(calls: Sequence[Call]) -> dict[str, int]:
    return dict(Counter(call.failed for call in calls if call.failed))


def read_trace(path: Path, *, cut_short: bool = False) -> tuple[Integers, Integers, Integers, Integers]:
    """Each query's number, when it was due, how much later it was issued, and its latency from when it was due: (n,),
    ns, in order.

    Of several samples in one query the last counts. cut_short: the file is being written, and the query that it ends
    with may lack some of its samples. Raises MachineError where the trace holds no query.
    """
    found: dict[int, tuple[int, int, int]] = {}
    last = -1
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if (match := _SAMPLE.search(line)) is None:
                continue
            micro, nano, _, query, lag, latency = (int(group) for group in match.groups())
            latency = max(latency, found[query][2]) if query in found else latency
            found[query] = (micro * 1000 + nano, lag, latency)
            last = query
    if cut_short:
        found.pop(last, None)
    if not found:
        raise MachineError("LoadGen's trace holds no query", hint="a longer --duration")
    rows = np.array([(query, *found[query]) for query in sorted(found)], np.int64)
    return rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3]


def read_result(path: Path, scenario: Scenario) -> Said:
    """What LoadGen's detailed log says of the test."""
    values: dict[str, Any] = {}
    reasons: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith(_LOG_LINE):
                continue
            entry = json.loads(line.removeprefix(_LOG_LINE))
            values[entry["key"]] = entry["value"]
            if entry["metadata"]["is_error"] or entry["key"] in ("result_invalid_reason", "early_stopping_result"):
                reasons.append(" ".join(str(entry["value"]).replace("*", "").split()))
    valid = values.get("result_validity") == "VALID"
    value = values.get(_SCENARIOS[scenario][1])
    return Said(
        version=_version(),
        value=None if value is None else float(value),
        valid=valid,
        reasons=() if valid else tuple(dict.fromkeys(reason for reason in reasons if reason)),
    )


def _test_settings(settings: Settings) -> Any:
    import mlperf_loadgen

    test = mlperf_loadgen.TestSettings()
    test.scenario = getattr(mlperf_loadgen.TestScenario, _SCENARIOS[settings.scenario][0])
    test.mode = mlperf_loadgen.TestMode.PerformanceOnly
    test.min_duration_ms = round(settings.duration_s * 1000)
    test.min_query_count = WANTED_SAMPLES
    expected_ns = max(1, round(settings.expected_ns / _MARGIN))
    match settings.scenario:
        case "single_stream":
            test.single_stream_expected_latency_ns = expected_ns
        case "multi_stream":
            test.multi_stream_expected_latency_ns = expected_ns
            test.multi_stream_samples_per_query = settings.batch
        case "server":
            assert settings.rate is not None
            test.server_target_qps = settings.rate
            # A limit on latency is for dlops to judge, and a test is not to be called invalid for it.
            test.server_target_latency_ns = 2**62
        case "offline":
            test.offline_expected_qps = settings.batch * 1e9 / settings.expected_ns
    if settings.scenario != "offline":
        test.max_duration_ms = round(STRETCH * settings.duration_s * 1000)
    return test


def _offline(calls: Sequence[Call], batch: int, said: Said) -> Driven:
    """The whole batches that are answered: the rest of a query that is none took as long and answered less."""
    ended = (call for call in calls if call.items == batch and call.end_ns >= 0)
    whole = sorted(ended, key=lambda call: call.begin_ns)
    if not whole:
        raise MachineError(
            "LoadGen's query was smaller than one batch", hint="a longer --duration or a smaller --batch"
        )
    begin, end = (np.array([getattr(call, name) for call in whole], np.int64) for name in ("begin_ns", "end_ns"))
    return Driven(
        starts_ns=begin - begin[0],
        lag_ns=np.zeros(len(whole), np.int64),
        latencies_ns=end - begin,
        service_ns=end - begin,
        succeeded=np.array([call.failed is None for call in whole], np.int64),
        said=said.model_copy(update={"errors": _errors(whole)}),
    )


def _version() -> str:
    return version("mlcommons-loadgen")


def _nothing(*_: object) -> None:
    return None
