"""What `dlops compare` says of two reports, made one after the other: of the same, and of 5 % more work.

No rate of false alarms is stated for those: what slows the machine in one of them looks like a change. Here it is
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dlops.artifact import Artifact, open_artifact
from dlops.bench.compare import Comparison, compare_reports, compare_turns
from dlops.bench.results import Measured
from dlops.bench.run import measure
from dlops.bench.service_turns import measure_in_turns
from dlops.serve.launch import ServerProcess
from dlops.workflows.compare import DURATION_S, PROCESSES

from .test_compare import MARGIN, QUANTITIES, count
from .test_compare_processes import LAYERS, a_core_each, allowed, convolutions, regressed

PAIRS = 40
# A service is one process, and its row has to outlast the spells in which the machine is faster or slower.
_SERVERS, _SERVICE_S = 20, 20.0
_DEFAULT_MARGIN = 0.05
Pair = tuple[Measured, Measured]


def _in_process(folders: Sequence[Path]) -> list[Measured]:
    return [
        measure([open_artifact(folder)], duration_s=DURATION_S, processes=PROCESSES, threads=1) for folder in folders
    ]


def _judged(pairs: Sequence[Pair], margin: float) -> list[Comparison]:
    return [compare_reports(base, new, margin=margin) for base, new in pairs]


def _rows(what: str, pairs: Sequence[Pair]) -> list[list[str]]:
    return _table(what, {margin: _judged(pairs, margin) for margin in (_DEFAULT_MARGIN, MARGIN)})


def _table(what: str, judged_at: Mapping[float, Sequence[Comparison]]) -> list[list[str]]:
    """A line for each margin and quantity."""
    rows = []
    for margin, judged in judged_at.items():
        counts = [count(judged, word) for word in _WORDS]
        for place, quantity in enumerate(QUANTITIES):
            said = [f"{number[place]}" for number in counts]
            rows.append([what, f"{margin:.0%}", quantity, _spread(judged, place), *said])
    return rows


def _spread(comparisons: Sequence[Comparison], place: int) -> str:
    """By how much a quantity was apart, of the pairs of which a ratio is known."""
    ratios = [each.rows[0].judged[place].ratio for each in comparisons]
    changes = [100 * (ratio.value - 1) for ratio in ratios if ratio is not None]
    if len(changes) < len(ratios) / 2:
        return "–"
    low, middle, high = np.quantile(changes, [0.05, 0.5, 0.95])
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"


_WORDS = ("REGRESSED", "IMPROVED", "SAME", "INCONCLUSIVE")
_HEADER = ["NEW is", "margin", "quantity", "NEW/BASE, nine of ten", *_WORDS]


@pytest.mark.timeout(3 * 3600)
def test_reports_of_one_artifact_one_after_the_other(write_page: Callable[..., Path], tmp_path: Path) -> None:
    base, slower = convolutions(LAYERS, tmp_path / "base"), convolutions(LAYERS + 1, tmp_path / "slower")
    folders = [base.directory, base.directory, slower.directory]
    runs = []
    with a_core_each() as pool:
        for made in as_completed([pool.submit(_in_process, folders) for _ in range(PAIRS)]):
            runs.append(made.result())
            print(f"{len(runs)} of {PAIRS}", flush=True)
    same, planted = [(one, two) for one, two, _ in runs], [(one, three) for one, _, three in runs]
    write_page(
        "compare-reports",
        title="`dlops compare` over two reports of artifacts",
        says=(
            f"{PAIRS} times three reports one after the other: of {LAYERS} convolutions as an ONNX artifact, of the "
            f"same again, and of {LAYERS + 1}, which is 5 % more work; {PROCESSES} fresh processes and "
            f"{DURATION_S:g} s each, one thread, batch 1. Between them passes half a minute in which the machine may "
            "turn slower or faster, which no interval within a report can know; in turns within one run it cancels out."
        ),
        header=_HEADER,
        rows=[*_rows("the same", same), *_rows("5 % more work", planted)],
    )
    assert regressed(_judged(same, _DEFAULT_MARGIN)) <= allowed(PAIRS)
    assert count(_judged(planted, MARGIN), "IMPROVED")[0] == 0


def _served(artifact: Artifact, times: int) -> list[Measured]:
    """So many reports of one server's process."""
    with ServerProcess(artifact, threads=1) as server:
        return [measure([server.url], payload=artifact, duration_s=_SERVICE_S) for _ in range(times)]


@pytest.mark.timeout(3 * 3600)
def test_services_in_turns(write_page: Callable[..., Path], tmp_path: Path) -> None:
    base, slower = convolutions(LAYERS, tmp_path / "base"), convolutions(LAYERS + 1, tmp_path / "slower")
    judged: dict[str, dict[float, list[Comparison]]] = {"the same": {}, "5 % more work": {}}
    for done in range(1, _SERVERS + 1):
        with ExitStack() as stack:
            servers = [stack.enter_context(ServerProcess(one, threads=1)) for one in (base, base, slower)]
            measured = measure_in_turns(
                [server.url for server in servers], payload=None, batch=[1], concurrency=[1], duration_s=_SERVICE_S
            )
        first, *others = measured.measurements
        for (_, found), other in zip(judged.items(), others, strict=True):
            pair = replace(measured, report=measured.report.model_copy(update={"measurements": (first, other)}))
            for margin in (_DEFAULT_MARGIN, MARGIN):
                found.setdefault(margin, []).append(compare_turns(pair, base="base", new="new", margin=margin))
        print(f"{done} of {_SERVERS}", flush=True)
    mean_ms = first.latency.mean_ns / 1e6
    write_page(
        "compare-services-in-turns",
        title="`dlops compare` of two services in turns",
        says=(
            f"{_SERVERS} times three fresh servers: of {LAYERS} convolutions, of the same again, and of {LAYERS + 1}, "
            "which is 5 % more of the model's work; over the loopback, one request in flight in turns within one run "
            f"({mean_ms:.1f} ms in the last), {_SERVICE_S:g} s a server. The same servers by reports made one after "
            "the other are in [compare-services](compare-services.md)."
        ),
        header=_HEADER,
        rows=[row for what, found in judged.items() for row in _table(what, found)],
    )
    assert max(regressed(found) for found in judged["the same"].values()) <= allowed(_SERVERS)
    assert count(judged["5 % more work"][MARGIN], "IMPROVED")[0] == 0


@pytest.mark.timeout(3 * 3600)
def test_reports_of_one_service_one_after_the_other(write_page: Callable[..., Path], tmp_path: Path) -> None:
    base, slower = convolutions(LAYERS, tmp_path / "base"), convolutions(LAYERS + 1, tmp_path / "slower")
    runs = []
    for _ in range(_SERVERS):
        runs.append([*_served(base, 2), *_served(slower, 1)])
        print(f"{len(runs)} of {_SERVERS}", flush=True)
    same, planted = [(one, two) for one, two, _ in runs], [(one, three) for one, _, three in runs]
    restarted = [(one[0], two[0]) for one, two in pairwise(runs)]
    mean_ms = np.mean([one[0].measurements[0].latency.mean_ns for one in runs]) / 1e6
    write_page(
        "compare-services",
        title="`dlops compare` over two reports of services",
        says=(
            f"{_SERVERS} times: a server of {LAYERS} convolutions starts and is measured twice, then one of "
            f"{LAYERS + 1}, which is 5 % more of the model's work; over the loopback, one request in flight "
            f"({mean_ms:.1f} ms), {_SERVICE_S:g} s a report. Restarted: the first report of a server against that of "
            "the next one of the same model, a minute later. A report of a service is of one process; `dlops compare` "
            "says so above its table."
        ),
        header=_HEADER,
        rows=[
            *_rows("the same server", same),
            *_rows("the same, restarted", restarted),
            *_rows("5 % more work", planted),
        ],
    )
    assert regressed(_judged(same, _DEFAULT_MARGIN)) <= allowed(len(same))
    assert count(_judged(planted, MARGIN), "IMPROVED")[0] == 0
