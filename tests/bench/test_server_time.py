"""Where a request's time goes: the server's counts around a row, over REST, and what does not add up."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dlops.bench import plots, plots_waterfall
from dlops.bench.oip import find_endpoint
from dlops.bench.results import save_report
from dlops.bench.run import measure
from dlops.bench.sentences import parts, waterfalls
from dlops.bench.server_time import Counts, NoStatisticsError, Sent, Watch, account
from dlops.bench.table import to_markdown
from dlops.report import Report, ServerTime, read_report

NONE = Counts(
    requests=0, failures=0, items=0, executions=0, cached=0, queue_ns=0, compute_input_ns=0, compute_infer_ns=0,
    compute_output_ns=0, cache_ns=0,
)  # fmt: skip
SENT = Sent(attempts=100, answered=100, in_flight=4, client_ns=900_000)


def stats(requests: int, *, queue_ns: int = 100_000) -> dict[str, object]:
    """The answer of a server whose every request waited for `queue_ns` and was computed in 50 µs, four at a time."""
    spent = {"success": 200_000, "queue": queue_ns, "compute_infer": 50_000}
    inference = {part: {"count": requests, "ns": ns * requests} for part, ns in spent.items()}
    model = {"inference_stats": inference, "inference_count": requests, "execution_count": requests // 4}
    return {"model_stats": [model]}


def counts(requests: int) -> Counts:
    return Counts.of(stats(requests)["model_stats"])  # type: ignore[arg-type]


def test_a_rows_times_are_the_difference_of_what_the_server_counted(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    # What it counted before the row was dearer: it must not be in the row's means.
    earlier = 1000

    def statistics() -> object:
        then = Counts.of(stats(earlier, queue_ns=9_000_000)["model_stats"])  # type: ignore[arg-type]
        now = stats(server.requests)
        (model,) = now["model_stats"]  # type: ignore[misc]
        model["inference_stats"]["queue"]["ns"] += then.queue_ns
        model["inference_stats"]["success"]["count"] += earlier
        return now

    server.statistics = statistics
    measured = measure([f"oip+{server.url}"], payload=artifact, concurrency=(3,), duration_s=0.5)
    (row,) = measured.measurements
    assert row.server is not None
    assert (row.server.queue_ns, row.server.compute_infer_ns, row.server.compute_output_ns) == (100_000, 50_000, 0)
    assert row.server.mean_batch == pytest.approx(4, rel=0.3)
    assert row.server.outside_ns == pytest.approx(row.latency.mean_ns - 150_000)
    # A call that begins in the run is counted in it; so are a few before, while the server was asked.
    assert row.latency.samples <= row.server.requests < server.requests
    assert measured.report.notes == ()


def test_a_server_without_statistics_has_no_times_and_is_told_of_once(make_artifact, serve) -> None:
    artifact = make_artifact()
    measured = measure([serve(artifact).url], payload=artifact, batch=(1, 2), duration_s=0.3)
    (note,) = measured.report.notes
    assert "does not say where its time goes: GET /v2/models/toy/stats answered 404" in note
    for row in measured.measurements:
        assert row.server is None
        assert not any("server" in reason for reason in row.verdict.reasons)


@pytest.mark.parametrize(
    "document", [{}, {"model_stats": []}, {"model_stats": [{"inference_stats": {}}]}, {"model_stats": [None]}, []]
)
def test_what_is_no_statistics_is_said(make_artifact, serve, document) -> None:
    server = serve(make_artifact())
    server.statistics = lambda: document
    with pytest.raises(NoStatisticsError, match="answered no statistics"):
        find_endpoint(server.url, model="toy").client.statistics()


def test_versions_are_added_up_and_our_own_service_is_read() -> None:
    from dlops.serve.cells import Cells
    from dlops.serve.statistics import Statistics

    ours = Statistics(Cells(), name="m", version="1")
    ours.add_success(rows=3, total_ns=100, queue_ns=50, compute_ns=30, input_ns=5)
    ours.add_failure(7)
    model = ours.as_json()
    assert Counts.of([model, model]) == replace(
        NONE, requests=2, failures=2, items=6, queue_ns=100, compute_input_ns=10, compute_infer_ns=60,
        compute_output_ns=30,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("whole", "kept", "has_times", "against", "remark"),
    [
        (counts(100), counts(60), True, None, None),
        (replace(counts(90), failures=10), counts(60), True, None, None),
        (replace(counts(100), failures=4), counts(60), True, None, None),
        (replace(counts(100), failures=5), counts(60), True, "other clients used the server: it counted 105", None),
        (counts(300), counts(200), True, "it counted 300 requests, 100 were ours", None),
        (replace(counts(100), cached=7), replace(counts(60), cached=7), True, "7 of 60 requests from a cache", None),
        (replace(counts(100), queue_ns=-1), counts(60), False, None, "its counts went down"),
        (counts(52), counts(30), False, None, "it counted 52 of 100 requests"),
        (counts(100), NONE, False, None, "no request within the run"),
    ],
)
def test_counts_that_do_not_add_up_are_said(whole, kept, has_times, against, remark) -> None:
    sent = SENT if whole.failures != 10 else replace(SENT, answered=90)
    accounted = account(whole, kept, sent)
    assert (accounted.server is not None) == has_times
    for text, said in ((against, accounted.against), (remark, accounted.remarks)):
        assert len(said) == (text is not None)
        assert text is None or text in said[0]


def test_a_count_that_comes_late_is_waited_for_and_a_server_that_falls_silent_is_said() -> None:
    answers = iter([counts(0), counts(10), counts(109), counts(110)])
    watch = Watch(lambda: next(answers))
    watch.before()
    watch.start()
    accounted = watch.end(replace(SENT, attempts=110, answered=110))
    assert accounted.server is not None
    assert accounted.server.requests == 100

    def gone() -> Counts:
        raise NoStatisticsError("GET /stats: connection refused")

    watch = Watch(gone)
    watch.before()
    assert watch.end(SENT).remarks == ("no server times: GET /stats: connection refused",)


def with_server(example, **changes: object) -> Report:
    """The example report, its network row with a server that says where its time goes."""
    measured = example()
    *rows, row = measured.report.measurements
    times = ServerTime(
        requests=300, items=300, executions=100, queue_ns=400_000, compute_input_ns=10_000, compute_infer_ns=150_000,
        compute_output_ns=20_000, client_ns=950_000,
    )  # fmt: skip
    row = row.model_copy(update={"server": times.model_copy(update=changes)})
    return measured.report.model_copy(update={"measurements": (*rows, row)})


def test_the_parts_add_up_to_what_the_client_saw(example) -> None:
    times = with_server(example).measurements[-1].server
    assert times is not None
    assert sum(parts(times).values()) == times.client_ns
    assert "cache" not in parts(times)
    # Means over slightly different requests may disagree; nothing is drawn backwards.
    swollen = with_server(example, queue_ns=2_000_000.0).measurements[-1].server
    assert swollen is not None
    assert swollen.outside_ns == 0


def test_a_page_and_a_table_show_the_waterfall_and_others_do_not(example, tmp_path: Path) -> None:
    measured, report = example(), with_server(example, cache_ns=5_000.0)
    (line,) = waterfalls(report)
    assert line == (
        "over HTTP, batch 1: onnx-int8 with 8 in flight: a mean request's 0.950 ms: queue 0.400, input 0.0100, "
        "cache 0.00500, model 0.150, output 0.0200, network and framework 0.365; 3.00 items a run of the model"
    )
    assert line in to_markdown(report)
    save_report(type(measured)(report=report, samples=measured.samples), tmp_path / "with")
    save_report(measured, tmp_path / "without")
    page = (tmp_path / "with" / "report.html").read_text()
    assert page.count('class="part model"') == 3, "the legend, and a bar at both widths"
    assert "onnx-int8 with 8 in flight: queue 0.400 ms" in page
    assert 'class="part' not in (tmp_path / "without" / "report.html").read_text()
    assert read_report(tmp_path / "with").measurements == report.measurements


@pytest.mark.parametrize("width", [420, 840])
def test_bars_lie_end_to_end_and_inside_the_picture(example, width: int) -> None:
    report = with_server(example)
    series = [plots.Series(row=report.measurements[-1], number=0, latencies_ns=example().samples["row04"])]
    drawn = plots_waterfall.waterfall_bars(series, width)
    bars = [(float(x), float(w)) for x, w in re.findall(r'class="part[^>]* x="([\d.]+)"[^>]* width="([\d.]+)"', drawn)]
    assert len(bars) == 5
    for (x, extent), (following, _) in itertools.pairwise(bars):
        assert x + extent == pytest.approx(following, abs=0.11)
    assert bars[-1][0] + bars[-1][1] < width


def test_a_report_from_before_is_read_without_them(example, tmp_path: Path) -> None:
    report = save_report(example(), tmp_path / "r")
    path = tmp_path / "r" / "report.json"
    document = json.loads(path.read_text())
    assert all(row.pop("server") is None for row in document["measurements"])
    assert Report.model_validate(document).measurements == report.measurements
