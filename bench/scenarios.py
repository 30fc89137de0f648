"""MLPerf's scenarios: what each asks of a target, and which number is its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dlops.bench.arrivals import Offered
from dlops.errors import UsageError
from dlops.report import Arrivals, Engine, Load, Metric, Scenario

# As the rules of MLPerf Inference have them. Its result for "server" is the highest rate whose p99 keeps a limit: a
# rate is given here, and `--slo` looks for the highest.
METRICS: Mapping[Scenario, Metric] = {
    "single_stream": "p90", "multi_stream": "p99", "server": "p99", "offline": "throughput"
}  # fmt: skip
SAMPLES_PER_QUERY = 8
# Offline, where nothing else is asked: as many items a call, and requests in flight at a URL.
_OFFLINE_BATCH, _OFFLINE_IN_FLIGHT = 32, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What every target is asked at one batch. scenario: as it was asked for by name, else None.

    concurrency: requests in flight at URLs, and without a scenario threads that call in process. offered: of URLs, and
    in process where the scenario is "server".
    """

    scenario: Scenario | None
    batch: int
    concurrency: tuple[int, ...] = ()
    offered: Offered | None = None

    @property
    def callers(self) -> tuple[int, ...]:
        """Threads that call a session in process."""
        return (self.concurrency or (1,)) if self.scenario is None else (1,)

    @property
    def rates(self) -> list[float | None]:
        """Each rate that is offered; None where none is."""
        return [None] if self.offered is None else [*sorted(set(self.offered.rates))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options that decide on loads, each None (scenarios: empty) where it was not given."""

    scenarios: Sequence[Scenario] = ()
    engine: Engine = "dlops"
    batch: Sequence[int] | None = None
    concurrency: Sequence[int] | None = None
    offered: Offered | None = None
    samples_per_query: int | None = None


def load_of(
    scenario: Scenario | None, *, batch: int, concurrency: int = 1, rate: float | None = None,
    arrivals: Arrivals | None = None, pauses_s: tuple[float, float] | None = None, trace: str | None = None,
    attempt: int = 1,
) -> Load:  # fmt: skip
    """A row's load. scenario: as it was asked for by name; None takes the one that the rest amounts to."""
    implied: Scenario = "server" if rate is not None else "single_stream" if batch == concurrency == 1 else "offline"
    return Load(
        scenario=scenario or implied, metric=None if scenario is None else METRICS[scenario], batch=batch,
        concurrency=concurrency, rate=rate, arrivals=arrivals, pauses_s=pauses_s, trace=trace, attempt=attempt,
    )  # fmt: skip


def steps(asked: Asked, *, in_process: bool, over_network: bool, most_items: int) -> list[Step]:
    """What is to be done, in order. most_items: the largest batch that all targets take.

    Raises UsageError for options that contradict each other, or have no meaning for these targets.
    """
    if not asked.scenarios:
        return _without_scenarios(asked, in_process=in_process, over_network=over_network)
    _check(asked, in_process=in_process, over_network=over_network)
    found = []
    for scenario in (one for one in METRICS if one in asked.scenarios):
        if scenario == "server":
            assert asked.offered is not None
            found.append(Step(scenario=scenario, batch=1, offered=asked.offered))
        elif scenario == "offline":
            batches = (min(_OFFLINE_BATCH, most_items),) if asked.batch is None else asked.batch
            in_flight = numbers("concurrency", asked.concurrency or (_OFFLINE_IN_FLIGHT,))
            found += [Step(scenario=scenario, batch=one, concurrency=in_flight) for one in numbers("batch", batches)]
        else:
            items = (asked.samples_per_query or SAMPLES_PER_QUERY) if scenario == "multi_stream" else 1
            found.append(Step(scenario=scenario, batch=items, concurrency=(1,)))
    return found


def _without_scenarios(asked: Asked, *, in_process: bool, over_network: bool) -> list[Step]:
    if asked.engine != "dlops":
        raise UsageError(f"--engine {asked.engine} runs MLPerf's scenarios", hint="add --scenario single_stream")
    if asked.samples_per_query is not None:
        raise UsageError(
            "--samples-per-query is for --scenario multi_stream", hint="--batch gives the items of other calls"
        )
    given = ((1,) if asked.offered is None else ()) if asked.concurrency is None else asked.concurrency
    # Beside a rate none in flight may be asked for.
    concurrency = numbers("concurrency", given) if given else ()
    if not over_network and asked.offered is not None:
        raise UsageError("a rate is for URLs", hint="add --scenario server for a queue in front of the session")
    return [
        Step(scenario=None, batch=batch, concurrency=concurrency, offered=asked.offered)
        for batch in numbers("batch", (1,) if asked.batch is None else asked.batch)
    ]


def _check(asked: Asked, *, in_process: bool, over_network: bool) -> None:
    scenarios, offered = set(asked.scenarios), asked.offered
    if asked.samples_per_query is not None:
        if "multi_stream" not in scenarios:
            raise UsageError("--samples-per-query is for --scenario multi_stream")
        numbers("samples per query", (asked.samples_per_query,))
    if asked.batch is not None and "offline" not in scenarios:
        raise UsageError(
            "--batch is for --scenario offline: the other scenarios say how many samples a query has",
            hint="--samples-per-query N with multi_stream",
        )
    if asked.concurrency is not None and not (over_network and "offline" in scenarios):
        raise UsageError("--concurrency beside scenarios is for --scenario offline at URLs")
    if "server" not in scenarios:
        if offered is not None:
            raise UsageError("a rate is for --scenario server", hint="name it too, or leave the rate out")
    elif offered is None:
        raise UsageError("--scenario server needs a rate", hint="such as --rate 100")
    else:
        _check_server(asked, offered, in_process=in_process)


def _check_server(asked: Asked, offered: Offered, *, in_process: bool) -> None:
    if offered.arrivals != "poisson" or offered.pauses is not None or offered.trace is not None:
        raise UsageError(
            "--scenario server has Poisson arrivals, without pauses",
            hint="leave --scenario out for other schedules, at URLs",
        )
    if offered.objective is not None and (in_process or asked.engine != "dlops"):
        raise UsageError("--slo is for URLs, with dlops' own generator", hint="--rate R")
    if offered.senders is not None and (in_process or asked.engine != "dlops"):
        raise UsageError("--senders is for URLs, with dlops' own generator")


def numbers(what: str, given: Sequence[int]) -> tuple[int, ...]:
    """Each of them once, in order. Raises UsageError where there is none, or one below 1."""
    if not given or any(number < 1 for number in given):
        raise UsageError(f"{what} {', '.join(map(str, given)) or 'empty'}: whole numbers from 1 up are wanted")
    return tuple(sorted(set(given)))
