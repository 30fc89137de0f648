"""Kept reports worked out again: the same to the last bit by the version that measured, and honest about the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

import dlops
from dlops.bench import slo, stats
from dlops.bench.arrivals import Offered
from dlops.bench.results import choose_fastest
from dlops.bench.run import Measured, MeasureInterrupted, measure, merge, save_report
from dlops.bench.slo import Found, found_among, parse_objective, search
from dlops.cli import run
from dlops.errors import CorruptError, UsageError
from dlops.report import EARLIER, Interval, Report, Telemetry, Verdict, read_report
from dlops.timing import interleave


def again(measured: Measured, folder: Path) -> tuple[Report, Report]:
    """A report written and read, and the same worked out again."""
    save_report(measured, folder)
    report = read_report(folder)
    return report, dlops.reanalyse(report).report


@pytest.fixture
def current(example: Callable[[], Measured]) -> Measured:
    """The example's rows in process as this version would have measured them."""
    drawn = example()
    rows = [
        row.model_copy(update={"paired_with": "row00", "verdict": Verdict(steady=True, observed=())})
        for row in drawn.measurements
        if row.boundary == "host"
    ]
    report = drawn.report.model_copy(update={"measurements": tuple(rows), "notes": ()})
    with TemporaryDirectory() as folder:
        save_report(Measured(report=report, samples=drawn.samples), folder)
        new = dlops.reanalyse(read_report(folder))
    return Measured(report=new.report.model_copy(update={"notes": ()}), samples=new.samples)


@pytest.fixture
def kept(current: Measured, tmp_path: Path) -> Path:
    save_report(current, tmp_path / "kept")
    return tmp_path / "kept"


def failing_sometimes(server) -> str:
    """Its URL; it answers the first requests, which are questions, and then fails one of fifty."""
    server.behave = lambda count: (503, b"{}") if count > 40 and count % 50 == 0 else None
    return server.url


def test_rows_of_every_kind_come_out_the_same_to_the_last_bit(make_artifact, serve, monkeypatch, tmp_path) -> None:
    # Two rates are enough of a search.
    monkeypatch.setattr(slo, "_DOUBLINGS", 1)
    fast, slow = make_artifact("onnx-int8", drop=0.3), make_artifact("onnx-fp32", hidden=1000)
    host = measure([slow, fast], batch=(8,), duration_s=0.2, threads=1)
    network = measure([failing_sometimes(serve(fast))], payload=fast, concurrency=(3,), duration_s=0.2)
    offered = Offered(rates=(300.0,), objective=parse_objective("p50=50ms"))
    at_rates = measure([failing_sometimes(serve(fast))], payload=fast, offered=offered, duration_s=0.2)
    report, new = again(choose_fastest(merge(network, at_rates, host), max_drop=1.0), tmp_path / "report")
    rows = report.measurements
    assert {(row.boundary, row.load.rate is None) for row in rows} == {
        ("host", True), ("network", True), ("network", False)
    }  # fmt: skip
    assert any(row.errors for row in rows)
    assert all(row.speedup is not None for row in rows if row.boundary == "host")
    assert [row.model_dump_json() for row in new.measurements] == [row.model_dump_json() for row in rows]
    (found,) = report.objectives.values()
    assert found.rate is not None or found.missed is not None
    assert (new.objectives, new.chosen, new.chosen_because) == (report.objectives, report.chosen, report.chosen_because)
    kept, made = (one.model_dump(include={"created", "command", "environment", "title"}) for one in (report, new))
    assert kept == made
    assert new.notes[-1].endswith("every number as before")


def test_a_call_under_way_when_the_row_begins_is_kept_and_counts(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact()
    measured = measure([serve(artifact).url], payload=artifact, concurrency=(4,), duration_s=0.3)
    key = measured.measurements[0].samples + EARLIER
    # Whether any call was under way when the row began is chance: here two more were.
    more = np.sort(np.append(measured.samples[key], [1000, 2000]))
    report, new = again(Measured(report=measured.report, samples=measured.samples | {key: more}), tmp_path / "report")
    assert new.measurements[0].throughput.value > report.measurements[0].throughput.value
    assert new.notes[-1].endswith("changed are row00 (throughput)")


def test_what_the_server_counted_of_a_row_stays_as_it_was(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    stats = {"success": 3, "queue": 3, "compute_infer": 3}
    # Counts that never move: a process beside the one that answers.
    entry = {"inference_stats": {name: {"count": n, "ns": n} for name, n in stats.items()}}
    server.statistics = lambda: {"model_stats": [entry | {"inference_count": 3, "execution_count": 3}]}
    report, new = again(measure([server.url], payload=artifact, duration_s=0.3), tmp_path / "report")
    assert any("no server times: it counted 0 of" in reason for reason in new.measurements[0].verdict.reasons)
    assert new.measurements == report.measurements


@pytest.fixture
def interrupting(monkeypatch) -> None:
    def interrupted(runs, *, on_progress, **options):
        rounds = []

        def ctrl_c(fraction: float) -> None:
            rounds.append(fraction)
            if len(rounds) == 6:  # as many as there are at least
                raise KeyboardInterrupt

        return interleave(runs, on_progress=ctrl_c, **options)

    monkeypatch.setattr("dlops.bench.inprocess.interleave", interrupted)


def test_a_report_that_ctrl_c_cut_short_stays_partial_and_marked(make_artifact, interrupting, tmp_path) -> None:
    with pytest.raises(MeasureInterrupted) as caught:
        measure([make_artifact("onnx-fp32"), make_artifact("onnx-int8")], duration_s=0.1, threads=1)
    report, new = again(caught.value.measured, tmp_path / "report")
    assert new.partial
    assert new.measurements == report.measurements
    assert all("interrupted" in row.verdict.reasons and not row.verdict.steady for row in new.measurements)


def test_merged_rows_keep_their_pairs(current, tmp_path) -> None:
    merged = merge(current, current)
    assert [row.paired_with for row in merged.measurements] == ["row00"] * 4 + ["row04"] * 4
    report, new = again(merged, tmp_path / "report")
    assert new.measurements == report.measurements


def test_new_statistics_are_taken_and_what_changed_is_said(current, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(stats, "ratio_interval", lambda top, bottom: Interval(value=7.0, low=6.0, high=8.0))
    report, new = again(current, tmp_path / "report")
    assert [row.speedup.value for row in new.measurements] == [7.0] * 4
    assert new.measurements[0].latency == report.measurements[0].latency
    assert new.notes[-1] == (
        f"worked out again from its samples by dlops {dlops.__version__}: changed are "
        "row00 (speedup), row01 (speedup), row02 (speedup), row03 (speedup)"
    )


def test_a_search_is_found_again_from_its_outcomes() -> None:
    draw = np.random.default_rng(0)
    for case in range(300):
        limit, start = 10 ** draw.uniform(-1, 4), 10 ** draw.uniform(0, 3)
        tried: list[tuple[float, str]] = []

        def probe(rate: float, limit: float = limit, tried: list[tuple[float, str]] = tried) -> str:
            unsure = draw.random() < 0.3
            tried.append((rate, "unsure" if unsure else "met" if rate <= limit else "missed"))
            return tried[-1][1]

        found = search(probe, start=start)
        assert found_among(tried) == found, (case, tried)
    assert found_among([]) == Found(met=None, missed=None)


def test_a_report_without_what_it_takes_is_refused(example, tmp_path) -> None:
    save_report(example(), tmp_path / "old")
    with pytest.raises(UsageError, match=r"row00 \(eager\) does not keep .* an older dlops measured it"):
        dlops.reanalyse(read_report(tmp_path / "old"))


def test_pairs_that_do_not_belong_together_are_refused(kept: Path, tmp_path) -> None:
    report = read_report(kept)
    row = report.measurements[0].model_copy(update={"paired_with": "row07"})
    save_report(Measured(report=report.model_copy(update={"measurements": (row,)}), samples=report.raw_samples()), kept)
    with pytest.raises(CorruptError, match="row00 is paired with row07, which is no row"):
        dlops.reanalyse(read_report(kept))


@pytest.mark.parametrize(
    ("edited", "said"),
    [
        ("no rows", "a report without rows"),
        ("one twice", "two rows have the samples row00"),
        ("other spans", "telemetry names row07, which are no rows"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(edited: str, said: str, kept: Path, tmp_path, capsys) -> None:
    report = read_report(kept)
    first = report.measurements[0]
    rows = {"no rows": (), "one twice": (first, first)}.get(edited, (first,))
    watched = Telemetry(key="telemetry00", interval_s=1.0, samples=2, cpus=1, spans={"row07": (0, 1)})
    update = {"measurements": rows, "telemetry": (watched,) if edited == "other spans" else ()}
    save_report(Measured(report=report.model_copy(update=update), samples=report.raw_samples()), kept)
    assert run(["bench", "--from", str(kept), "--out", str(tmp_path / "new")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_command_writes_a_new_report_and_every_copy(kept: Path, tmp_path, capsys) -> None:
    before = (kept / "report.json").read_bytes()
    new = tmp_path / "new"
    copies = [tmp_path / name for name in ("a.json", "a.md", "a.csv", "a.html")]
    options = [part for flag, copy in zip(("json", "markdown", "csv", "html"), copies, strict=True)
               for part in (f"--{flag}", str(copy))]  # fmt: skip
    status = run(["bench", "--from", str(kept / "report.json"), "--out", str(new), *options])
    said = capsys.readouterr()
    assert status in (0, 3)
    assert "onnx-int8-pruned50" in said.out
    assert read_report(new).measurements == read_report(kept).measurements
    assert (kept / "report.json").read_bytes() == before
    assert json.loads(copies[0].read_text())["notes"] == list(read_report(new).notes)
    assert copies[1].read_text().startswith("**in process, batch 1**")
    assert copies[2].read_text().startswith("target,artifact,")
    assert "worked out again from its samples" in copies[3].read_text()


def test_one_copy_may_go_to_stdout_and_not_two(kept: Path, tmp_path, capsys) -> None:
    assert run(["bench", "--from", str(kept), "--out", str(tmp_path / "new"), "--csv", "-"]) in (0, 3)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["target", "eager"]
    assert run(["bench", "--from", str(kept), "--csv", "-", "--markdown", "-"]) == 2
    assert "--markdown - and --csv - both want stdout" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http://127.0.0.1:1", "--duration", "3", "--rate", "5"], "TARGET, --rate, --duration: nothing is measured"),
        (["--device", "auto"], "--device: nothing is measured with --from"),
        (["--out", "KEPT"], "the report itself is there"),
        (["--json", "KEPT/report.json"], "the report itself is there"),
    ],
)
def test_what_says_what_to_measure_is_refused_beside_a_kept_report(kept, capsys, arguments, said) -> None:
    assert run(["bench", "--from", str(kept), *[one.replace("KEPT", str(kept)) for one in arguments]]) == 2
    assert said in capsys.readouterr().err


def test_altered_samples_are_refused_in_one_line(kept: Path, tmp_path, capsys) -> None:
    path = read_report(kept).path("samples")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert run(["bench", "--from", str(kept), "--out", str(tmp_path / "new")]) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
