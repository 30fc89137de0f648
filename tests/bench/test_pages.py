"""A report as a person sees it: console, Markdown, CSV, and the page in a real browser."""

from __future__ import annotations

import csv
import html
import http.server
import io
import itertools
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlops.bench import cells, sentences
from dlops.bench.render import render_html
from dlops.bench.results import Measured, merge, save_report
from dlops.bench.table import table_text, to_csv, to_markdown
from dlops.report import ColdStart, Interval, Load, Profile, ProfiledOperator, ProviderUse, ServerTime, Telemetry

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def test_the_table_fits_80_columns_and_wraps_no_variant(example) -> None:
    text = table_text(example().report, width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    row = next(line for line in text.splitlines() if line.startswith("onnx-int8-pruned50 "))
    assert re.split(r"\s+", row.strip())[1:7] == ["31", "kB", "97.22", "−1.39", "0.102", "0.128"]
    assert row.endswith("81 MB")


def test_the_table_marks_what_is_not_to_be_quoted_and_says_why(example) -> None:
    text = " ".join(table_text(example().report).split())
    assert "onnx-fp32 * " in text
    assert "in process, batch 1: onnx-fp32: not steady: the median moved by +12% over the run" in text
    assert "2 of 302 calls failed: HTTP 503 ×2" in text
    # What stands against no row is one line here, and whole on the page and in Markdown.
    assert "under-sampled: 1 of 5 rows do not know p50 to ±1% and p99 to ±5%; report.html says" in text
    assert "it needs 368" not in text
    assert "under-sampled: p99 is not certified: 300 effective samples of 300, it needs 368" in to_markdown(
        example().report
    )


def test_a_p99_that_may_be_many_times_as_much_is_not_said(example) -> None:
    row = example().report.measurements[1]
    for high, said in ((1.9e6, "1.00"), (2.1e6, "–"), (None, "–")):
        p99 = Interval(value=1e6, low=0.9e6, high=high)
        loose = row.model_copy(update={"latency": row.latency.model_copy(update={"p99_ns": p99})})
        assert cells.values(loose)["p99 ms"] == said


def test_rows_with_the_same_against_them_share_a_line(example) -> None:
    report = example().report
    said = {
        0: ("not steady: the median moved by -42% over the run", "p99 is not certified: 366 effective samples"),
        1: ("not steady: the median moved by +12% over the run", "p99 is not certified: 12 effective samples"),
        2: ("not steady: the median moved by +3% over the run", "2 of 302 calls failed: HTTP 503 ×2"),
        3: ("2 of 302 calls failed: HTTP 429 ×2",),
    }
    rows = tuple(
        row.model_copy(
            update={
                "errors": {"HTTP": 2},
                "verdict": row.verdict.model_copy(update={"steady": False, "reasons": said[index]}),
            }
        )
        for index, row in enumerate(report.measurements[:4])
    )
    lines = sentences.footnotes(report.model_copy(update={"measurements": rows, "notes": ()}))
    names = [cells.name(row) for row in rows]
    assert lines == [
        f"in process, batch 1: {', '.join(names[:3])}: not steady: the median moved by -42% to +12% over the run",
        f"in process, batch 1: {', '.join(names[:2])}: p99 is not certified: 12 to 366 effective samples",
        f"in process, batch 1: {names[2]}: 2 of 302 calls failed: HTTP 503 ×2",
        f"in process, batch 1: {names[3]}: 2 of 302 calls failed: HTTP 429 ×2",
    ]


def test_numbers_of_four_digits_and_more_make_ranges_too(example) -> None:
    report = example().report
    said = ("that takes about 987 s", "that takes about 1,234 s", "that takes about 12,345 s")
    rows = tuple(
        row.model_copy(update={"verdict": row.verdict.model_copy(update={"reasons": (reason,)})})
        for row, reason in zip(report.measurements, said, strict=False)
    )
    (line,) = sentences.footnotes(report.model_copy(update={"measurements": rows, "notes": ()}))
    assert line.endswith("that takes about 987 to 12,345 s")


def test_two_models_of_one_variant_have_names_of_their_own(example) -> None:
    measured = example()
    first, second, third, *_ = measured.measurements
    rows = tuple(
        row.model_copy(update={"target": target, "artifact": target.partition("/")[2].partition("#")[0] or None})
        for row, target in ((first, "digits-cnn/onnx-fp32"), (second, "digits-mlp/onnx-fp32"), (third, "eager"))
    )
    report = measured.report.model_copy(update={"measurements": rows, "chosen": "digits-mlp/onnx-fp32"})
    page = render_html(report, measured.samples)
    for target in ("digits-cnn/onnx-fp32", "digits-mlp/onnx-fp32"):
        assert f"| {target} " in to_markdown(report)
        assert any(line.startswith(f"{target} ") for line in table_text(report).splitlines())
        assert f"</i>{target}</li>" in page
    # One model twice is one model.
    again = rows[0].model_copy(update={"target": "digits-cnn/onnx-fp32#2"})
    text = table_text(report.model_copy(update={"measurements": (rows[0], again), "chosen": None}))
    names = [line.split()[0] for line in text.splitlines() if "fp32" in line.split(" ")[0]]
    assert names[:2] == ["onnx-fp32", "digits-cnn/onnx-fp32#2"]


def test_a_run_without_a_choice_has_a_summary_of_its_own(example) -> None:
    measured = example()
    report = measured.report.model_copy(update={"chosen": None, "chosen_because": None})
    page = render_html(report, measured.samples)
    assert "At a glance" in page
    # Of the four that have a median, one is not steady.
    assert "In process, batch 1: onnx-int8-pruned50 is the fastest of 3: median" in page
    assert "3 of 5 rows can be quoted" in page
    assert "At a glance" not in render_html(measured.report, measured.samples)


def test_a_summary_names_no_winner_without_evidence(example) -> None:
    measured = example()
    bare = measured.report.model_copy(update={"chosen": None, "chosen_because": None})
    steady = [row for row in bare.measurements if row.verdict.steady and row.boundary == "host"]

    def page_of(*rows) -> str:
        page = render_html(bare.model_copy(update={"measurements": rows}), measured.samples)
        return page.split("At a glance")[1].split("</div>")[0]

    one = steady[0]
    again = one.model_copy(update={"target": f"{one.target}#2", "artifact": None})
    page = page_of(one, again)
    assert f"has the lowest median of 2, and is not told from {one.target}#2" in page
    assert "is the fastest" not in page
    # What had another load is not slower for it, and what cannot be quoted is no winner.
    loaded = again.model_copy(update={"load": one.load.model_copy(update={"concurrency": 8})})
    assert "lowest" not in page_of(one, loaded)
    assert "fastest" not in page_of(one, loaded)
    unsteady = one.verdict.model_copy(update={"steady": False})
    assert "median" not in page_of(*[row.model_copy(update={"verdict": unsteady}) for row in (one, again)])


def test_one_core_is_one_core(example) -> None:
    measured = example()
    machine = measured.report.environment.model_copy(update={"cores": 1})
    page = render_html(measured.report.model_copy(update={"environment": machine}), measured.samples)
    assert page.count("1 core,") == 1
    assert "Example 9000, 1 core<" in page
    assert "1 cores" not in page


def test_a_quantile_that_is_not_certified_is_a_dash(example) -> None:
    report = example().report
    assert report.measurements[4].latency.p99_ns is None
    (line,) = [line for line in to_markdown(report).splitlines() if line.startswith("| onnx-int8 with 8 in flight")]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["0.895", "–", "333"]


def test_the_console_says_in_flight_where_it_fits_80_columns(example) -> None:
    report = example().report
    whole = table_text(report)
    assert "onnx-int8 ×8 *" in whole
    assert "×8: with 8 requests in flight" in whole
    over_http = tuple(row for row in report.measurements if row.boundary == "network")
    others = (Load(scenario="server", rate=1200.0), Load(scenario="offline"))
    loads = tuple(over_http[0].model_copy(update={"load": load}) for load in others)
    rows = (*report.measurements[:4], *loads)
    text = table_text(report.model_copy(update={"measurements": rows}))
    assert "@1,200: at 1,200 requests a second" in text
    assert "×1: with 1 request in flight" in text
    assert "onnx-int8 with 8 in flight *" in table_text(report.model_copy(update={"measurements": over_http}))
    long_name = "onnx-int8-pruned50-and-a-name-that-is-rather-long"
    rows = (over_http[0].model_copy(update={"artifact": long_name}),)
    text = table_text(report.model_copy(update={"measurements": rows}))
    assert f"{long_name} ×8 *" in text
    assert max(len(line) for line in text.split("chosen:")[0].splitlines()) <= 80


def test_one_table_has_a_section_a_load(example) -> None:
    lines = table_text(example().report).splitlines()
    assert sum(line.startswith("variant ") for line in lines) == 1
    titles = ("in process, batch 1", "over HTTP, batch 1")
    assert [line for line in lines if line in titles] == list(titles)


def test_csv_has_a_line_a_row_in_base_units(example) -> None:
    report = example().report
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert [row["target"] for row in rows] == [row.target for row in report.measurements]
    assert float(rows[0]["p50_ns"]) == report.measurements[0].latency.p50_ns.value
    assert rows[4]["p99_ns"] == ""
    assert rows[4]["errors"] == "2"


def test_csv_has_every_number_of_a_row(example) -> None:
    report = example().report
    server = ServerTime(
        requests=301, items=302, executions=303, queue_ns=304.5, compute_input_ns=305.5, compute_infer_ns=306.5,
        compute_output_ns=307.5, cache_ns=308.5, client_ns=309.5,
    )  # fmt: skip
    cold = ColdStart(total_ns=401, load_ns=402, first_call_ns=403)
    rows = [
        row.model_copy(update={"server": server, "cold_start": cold, "duration_ns": 404, "lag_p99_ns": 405.5})
        for row in report.measurements
    ]
    rows[0] = rows[0].model_copy(update={"service": rows[0].latency})

    def numbers(part: object) -> list[float]:
        if isinstance(part, dict):
            # The service times are told by their quantiles, which are the same here; failed calls are counted together.
            left_out = ("errors", "verdict", "clocks") + (("service",) if part.get("service") else ())
            return [one for name, each in part.items() if name not in left_out for one in numbers(each)]
        return [float(part)] if isinstance(part, int | float) and not isinstance(part, bool) else []

    text = to_csv(report.model_copy(update={"measurements": tuple(rows)}))
    for row, line in zip(rows, csv.DictReader(io.StringIO(text)), strict=True):
        written = {float(value) for value in line.values() if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", value)}
        assert set(numbers(row.model_dump())) <= written


def test_merging_keeps_every_rows_samples(example) -> None:
    one = example()
    both = merge(one, one)
    assert len({row.samples for row in both.measurements}) == 10
    for row, source in zip(both.measurements, one.measurements * 2, strict=True):
        assert (both.samples[row.samples] == one.samples[source.samples]).all()
    assert both.report.chosen == "digits/onnx-int8"


def test_names_are_escaped(example, tmp_path) -> None:
    nasty = '<script>alert(1)</script> & "co"'
    save_report(example(title=nasty), tmp_path / "r")
    page = (tmp_path / "r" / "report.html").read_text()
    assert "<script" not in page
    assert html.escape(nasty) in page


def test_the_page_asks_the_network_for_nothing(example, tmp_path) -> None:
    save_report(example(), tmp_path / "r")
    page = (tmp_path / "r" / "report.html").read_text()
    links = set(re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', page))
    assert links == {"data:,"}
    assert "@import" not in page


class _Pages(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


# What is on the page, in pixels: read after layout.
_SEEN = """() => {
  const seen = (query) => [...document.querySelectorAll(query)].filter((node) => node.getClientRects().length);
  const sizes = (query) => seen(query).map((node) => {
    const box = node.getBoundingClientRect(); return [Math.round(box.width), Math.round(box.height)]; });
  const texts = (svg) => [...svg.querySelectorAll("text")].map((node) => {
    const box = node.getBBox(); return [node.textContent, box.x, box.y, box.x + box.width, box.y + box.height]; });
  const labels = (svg) => [...svg.querySelectorAll("text.label")].map((node) => node.textContent);
  const plots = seen("svg").map((svg) => ({ name: svg.getAttribute("aria-label"), labels: labels(svg),
    view: svg.getAttribute("viewBox").split(" ").map(Number), texts: texts(svg), size: svg.className.baseVal }));
  const tables = [...document.querySelectorAll(".scroll")].map((node) => node.scrollWidth - node.clientWidth);
  return { svg: sizes("svg"), dots: sizes("svg .dot"), bars: sizes("svg rect.fill"), plots,
    curves: sizes("svg .curve"), overflow: tables, front: seen("svg .front").length,
    page: document.documentElement.scrollWidth - innerWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches, ground: getComputedStyle(document.body).backgroundColor };
}"""
# Written into the document that --dump-dom prints.
_PROBE = f"""<script>
window.problems = []; window.onerror = (text) => window.problems.push(text);
addEventListener("load", () => {{
  const result = {{ ...({_SEEN})(), problems: window.problems }};
  const out = document.createElement("pre"); out.id = "probe"; out.textContent = JSON.stringify(result);
  document.body.append(out);
}});</script>"""
_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome is installed")


def _load(folder: Path, *options: str) -> dict[str, Any]:
    """What a browser of its own makes of the folder's report.html, which it asks a server for."""
    page = folder / "report.html"
    page.write_text(page.read_text().replace("</head>", _PROBE + "</head>"))
    handler = type("Handler", (_Pages,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--window-size=1200,900", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
            "--dump-dom", *options, f"http://127.0.0.1:{server.server_address[1]}/report.html",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert handler.asked == ["/report.html"]
    assert "CONSOLE" not in done.stderr
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert probe, done.stderr[-2000:]
    seen = json.loads(html.unescape(probe[1]))
    assert seen["problems"] == []
    return seen


@_BROWSER
@pytest.mark.parametrize("dark", [False, True])
def test_a_real_browser_draws_every_plot_and_asks_for_nothing_else(example, tmp_path, dark) -> None:
    save_report(example(), tmp_path / "r")
    seen = _load(tmp_path / "r", *(["--force-dark-mode"] if dark else []))
    assert len(seen["svg"]) == 5  # curves, Pareto and throughput in process; curves and throughput over HTTP
    assert all(width > 400 and height > 60 for width, height in seen["svg"])
    assert len(seen["curves"]) == 5
    assert all(width > 5 and height > 100 for width, height in seen["curves"])
    assert len(seen["dots"]) == 4 + 4 + 1
    assert all(width >= 8 and height >= 8 for width, height in seen["dots"])
    assert all(width > 1 and height > 10 for width, height in seen["bars"])
    assert max(seen["overflow"]) <= 0
    assert seen["page"] <= 0
    assert seen["dark"] is dark
    assert seen["ground"] == ("rgb(16, 20, 27)" if dark else "rgb(246, 247, 249)")


_CROWD = (
    "torchscript-fp32", "onnx-fp32", "onnx-fp16", "onnx-int8", "onnx-fp32-pruned50", "onnx-fp16-pruned50",
    "onnx-int8-pruned50", "tensorrt-fp32", "tensorrt-fp16", "tensorrt-int8", "openvino-int8-pruned50",
    "openvino-fp16-with-a-name-that-is-far-too-long-for-a-narrow-page",
)  # fmt: skip


def crowded_report(measured: Measured, medians_ms: Sequence[float], accuracies: Sequence[float]) -> Measured:
    """The example's onnx-int8 as often as there are medians, each under a name of its own."""
    row = measured.measurements[2]
    rows = []
    for name, median_ms, accuracy in zip(_CROWD, medians_ms, accuracies, strict=False):
        factor = median_ms * 1e6 / row.latency.p50_ns.value
        latency = {"p50_ns": Interval(**{end: value * factor for end, value in row.latency.p50_ns})}
        rows.append(
            row.model_copy(
                update={
                    "target": f"digits/{name}",
                    "artifact": name,
                    "accuracy": accuracy,
                    "latency": row.latency.model_copy(update=latency),
                }
            )
        )
    report = measured.report.model_copy(update={"measurements": tuple(rows), "chosen": None, "chosen_because": None})
    return Measured(report=report, samples=measured.samples)


def _look(tab: Any, width: int) -> dict[str, Any]:
    """What is on the page where the browser is `width` pixels wide."""
    tab.be(width=width)
    seen: dict[str, Any] = tab.tell(f"({_SEEN})()")
    return seen


def _overlaps(one: Sequence[float], two: Sequence[float]) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


@pytest.mark.parametrize(
    ("medians_ms", "accuracies"),
    [
        pytest.param([0.02] * 12, [0.99] * 12, id="twelve points in one place"),
        pytest.param([0.02 * (1 + i % 3 / 50) for i in range(12)], [0.99] * 12, id="three heaps side by side"),
        pytest.param([0.02 * 1.4**i for i in range(12)], [0.99 - i % 5 / 200 for i in range(12)], id="spread"),
        pytest.param([0.019, 0.25], [0.99, 0.99], id="two at the far ends"),
    ],
)
def test_no_text_of_a_plot_is_cut_or_lies_on_another(example, open_tab, medians_ms, accuracies) -> None:
    tab = open_tab(crowded_report(example(), medians_ms, accuracies))
    for width, size in ((1200, "wide"), (500, "narrow")):
        seen = _look(tab, width)
        assert [plot["name"] for plot in seen["plots"]] == [
            "Latency distributions", "Accuracy against latency", "Throughput",
        ]  # fmt: skip
        assert {plot["size"] for plot in seen["plots"]} == {size}
        assert len(seen["plots"][1]["labels"]) == len(medians_ms)
        for plot in seen["plots"]:
            _check_texts(plot)
        assert seen["page"] <= 0


def _check_texts(plot: dict[str, Any]) -> None:
    """Each lies inside the plot, and none on another."""
    left, top, wide, high = plot["view"]
    for text, *box in plot["texts"]:
        inside = box[0] >= left and box[1] >= top and box[2] <= left + wide and box[3] <= top + high
        assert inside, f"{plot['name']}: {text} at {box} leaves {plot['view']}"
    pairs = itertools.combinations(plot["texts"], 2)
    assert [(one[0], two[0]) for one, two in pairs if _overlaps(one[1:], two[1:])] == [], plot["name"]


@pytest.mark.parametrize("width", [1000, 1200])
def test_the_tables_fit_a_page_of_1000_pixels(example, open_tab, width) -> None:
    measured = example()
    slow = [
        row.model_copy(update={"provider": "CPUExecutionProvider", "accuracy_samples": 10_000, "flips": 1234})
        for row in measured.measurements
    ]
    measured = Measured(
        report=measured.report.model_copy(update={"measurements": tuple(slow)}), samples=measured.samples
    )
    assert max(_look(open_tab(measured), width)["overflow"]) <= 0


@pytest.mark.parametrize("width", [500, 1200])
def test_where_the_time_goes_fits_the_page_whatever_the_names(example, open_tab, width) -> None:
    name = "void at::native::(anonymous namespace)::a_kernel<4, std::array<char*, 3ul>>(int)" * 3
    operator = ProfiledOperator(name=name, op_type="<b>Conv</b>" * 8, provider="cuda", calls=7, total_ns=9, share=0.6)
    profile = Profile(
        target="digits/onnx-int8", artifact="onnx-int8", runtime="onnxruntime", provider="CUDAExecutionProvider",
        device="cuda:0", threads=1, batch=1, calls=10, total_ns=3_000_000, times="device", operators=(operator,) * 10,
        others=2, others_share=0.1, outside_share=0.1,
        op_types={operator.op_type: 0.8, **dict.fromkeys("abcdefgh", 0.0125)},
        providers={
            "cuda": ProviderUse(operators=11, share=0.8), "x": ProviderUse(operators=1, share=0.1, names=("y",)),
        },
        trace="trace00", traced_calls=3,
    )  # fmt: skip
    measured = example()
    report = measured.report.model_copy(update={"profiles": (profile, profile.model_copy(update={"batch": 32}))})
    page = render_html(report, measured.samples)
    assert "<b>Conv" not in page
    assert page.count('class="track"') == 2
    seen = _look(open_tab(Measured(report=report, samples=measured.samples)), width)
    assert seen["page"] <= 0
    assert max(seen["overflow"][-2:]) <= 0


def watched(measured: Measured, *, gpus: int = 2) -> Measured:
    """With a telemetry of half a minute: every kind of track, a steal, and a sensor that never moves."""
    count = 240
    times = np.arange(count) * 125_000_000
    draw = np.random.default_rng(0)
    other = draw.integers(20_000, 300_000, count)
    series = {
        "cpu_ours_ppm": draw.integers(300_000, 700_000, count), "cpu_other_ppm": other, "cpu_steal_ppm": other // 3,
        "cpu_frequency_khz": draw.integers(2_900_000, 3_400_000, count), "memory_stall_ppm": np.zeros(count),
        "cpu_temperature_mc": draw.integers(50_000, 90_000, count), "cpu_throttle_count": times // 25_000_000_000,
        "package-0_power_mw": draw.integers(50_000, 65_000, count),
    }  # fmt: skip
    for gpu in range(gpus):
        series |= {
            f"gpu{gpu}_utilization_ppm": draw.integers(0, 1_000_000, count),
            f"gpu{gpu}_sm_clock_khz": draw.integers(1_200_000, 1_980_000, count),
            f"gpu{gpu}_power_mw": draw.integers(100_000, 700_000, count),
            f"gpu{gpu}_memory_bytes": np.full(count, 12_000_000_000),
            f"gpu{gpu}_clock_events_bits": np.where(times > 20_000_000_000, 4, 1),
        }
    spans = {f"row0{n}": (3_000_000_000, 15_000_000_000) for n in range(4)} | {
        "row04": (18_000_000_000, 19_000_000_000)
    }
    telemetry = Telemetry(
        key="telemetry00", interval_s=0.125, samples=count + 1, cost=0.003, cpus=2, gpus=("Example GPU",) * gpus,
        series=tuple(series), spans=spans, absent={"CPU <b>energy</b>": "for root alone"},
    )  # fmt: skip
    arrays = {f"telemetry00.{name}": np.asarray(values, np.int64) for name, values in series.items()}
    arrays["telemetry00.times_ns"] = times
    report = measured.report.model_copy(update={"telemetry": (telemetry,)})
    return Measured(report=report, samples=measured.samples | arrays)


@pytest.mark.parametrize(("width", "gpus"), [(1200, 2), (500, 8)])
def test_the_timeline_of_the_machine_fits_the_page_and_cuts_no_text(example, open_tab, width, gpus) -> None:
    measured = watched(example(), gpus=gpus)
    page = render_html(measured.report, measured.samples)
    assert "<b>energy" not in page
    assert "12.0 GB throughout" in page
    seen = _look(open_tab(measured), width)
    (plot,) = [plot for plot in seen["plots"] if plot["name"] == "The machine during the run"]
    texts = [text for text, *_ in plot["texts"]]
    for title in (
        "CPU time, %", "other load", "steal", "CPU frequency, GHz", "GPU in use, %", "GPU clock, GHz", "Power, W",
        "Temperature, °C", "Thermal throttle events of the CPU", "GPU throttled (1) or not (0)", "batch 1",
    ):  # fmt: skip
        assert title in texts, title
    assert "GPU memory in use, GB" not in texts, "what never moves is said, not drawn"
    _check_texts(plot)
    assert seen["page"] <= 0


@pytest.mark.parametrize(("accuracies", "lines"), [([0.98, 0.99], 1), ([0.99, 0.98], 0), ([0.99, 0.99], 0)])
def test_the_caption_names_the_dashed_line_only_where_it_is_drawn(example, tmp_path, accuracies, lines) -> None:
    save_report(crowded_report(example(), [0.02, 0.04], accuracies), tmp_path / "r")
    page = (tmp_path / "r" / "report.html").read_text()
    assert page.count('class="front"') == 2 * lines  # for wide pages and for narrow ones
    assert page.count("The dashed line joins") == lines
    assert page.count("torchscript-fp32 is the fastest, and none is more accurate.") == 1 - lines
