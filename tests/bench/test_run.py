"""Measuring end to end: real ONNX artifacts in process, a real server over HTTP, one report on disk."""

from __future__ import annotations

import itertools
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from dlops.bench import cells, sentences
from dlops.bench.compare import compare_reports
from dlops.bench.processes import Process
from dlops.bench.run import Measured, MeasureInterrupted, Offered, choose_fastest, measure, merge, save_report
from dlops.bench.worker import Job
from dlops.cli import run
from dlops.errors import MachineError, UsageError
from dlops.report import STARTS, Load, read_report
from dlops.timing import interleave


def test_in_process_rows_and_network_rows_end_in_one_report(make_artifact, serve, tmp_path) -> None:
    fast, slow = make_artifact("onnx-int8", hidden=8, drop=0.3), make_artifact("onnx-fp32", hidden=50_000)
    server = serve(fast)
    host = measure([slow, fast], batch=(1, 32), duration_s=0.2, threads=1, title="toy", command=("dlops", "bench"))
    network = measure([server.url], payload=fast, concurrency=(1, 2), duration_s=0.2)
    both = choose_fastest(merge(host, network), max_drop=1.0)
    report = save_report(both, tmp_path / "report")

    again = read_report(tmp_path / "report")
    assert again == report
    assert (tmp_path / "report" / "report.html").is_file()
    seen = [(row.artifact, row.boundary, row.load.batch, row.load.concurrency) for row in again.measurements]
    assert seen == [
        ("onnx-fp32", "host", 1, 1),
        ("onnx-int8", "host", 1, 1),
        ("onnx-fp32", "host", 32, 1),
        ("onnx-int8", "host", 32, 1),
        ("onnx-int8", "network", 1, 1),
        ("onnx-int8", "network", 1, 2),
    ]
    samples = again.raw_samples()
    for row in again.measurements:
        assert row.latency.samples == len(samples[row.samples]) == len(samples[row.samples + ".starts"])
        assert row.latency.min_ns <= row.latency.mean_ns <= row.latency.max_ns
        assert row.throughput.value > 0
        assert row.error_count == 0
    base, quick = again.measurements[:2]
    assert again.baseline == "toy/onnx-fp32"
    assert base.speedup is not None
    assert quick.speedup is not None
    assert base.speedup.value == 1.0
    # Whether its interval keeps clear of 1 is up to what else the machine does; its value is not.
    assert quick.speedup.value > 1.0
    assert quick.provider == "CPUExecutionProvider"
    assert (quick.accuracy, quick.drop_points, quick.flips) == (pytest.approx(0.977), 0.3, 1)
    assert quick.peak_memory_bytes is not None
    assert 2**24 < quick.peak_memory_bytes < 2**32
    assert again.chosen == "toy/onnx-int8"


def test_rows_that_ctrl_c_cut_short_cannot_be_quoted(make_artifact, monkeypatch) -> None:
    first, second = make_artifact("onnx-fp32"), make_artifact("onnx-int8")

    def interrupted(runs, *, on_progress, **options):
        rounds = []

        def ctrl_c(fraction: float) -> None:
            rounds.append(fraction)
            if len(rounds) == 3:
                raise KeyboardInterrupt

        return interleave(runs, on_progress=ctrl_c, **options)

    monkeypatch.setattr("dlops.bench.inprocess.interleave", interrupted)
    with pytest.raises(MeasureInterrupted) as caught:
        measure([first, second], duration_s=0.1, threads=1)  # six rounds at least
    assert caught.value.measured.partial
    rows = caught.value.measured.measurements
    assert len(rows) == 2
    for row in rows:
        assert not row.verdict.steady
        assert row.verdict.reasons[0] == "interrupted"
        assert any("only 3 rounds" in reason for reason in row.verdict.reasons)
        assert row.speedup is None
        assert row.latency.p99_ns is None
        assert row.latency.effective_samples == 3


def test_a_target_that_dies_in_the_middle_leaves_the_whole_rounds_of_all(make_artifact, monkeypatch) -> None:
    first, second = make_artifact("onnx-fp32"), make_artifact("onnx-int8")
    started: list[Process] = []

    def start(job: Job) -> Process:
        started.append(Process(job))
        return started[-1]

    def killing(runs, *, on_progress, **options):
        rounds = []

        def kill(fraction: float) -> None:
            rounds.append(fraction)
            if len(rounds) == 3:
                os.kill(started[1].pid, signal.SIGKILL)

        return interleave(runs, on_progress=kill, **options)

    monkeypatch.setattr("dlops.bench.inprocess.Process", start)
    monkeypatch.setattr("dlops.bench.inprocess.interleave", killing)
    measured = measure([first, second], duration_s=0.1, threads=1)  # six rounds at least
    assert measured.partial
    assert len(measured.measurements) == 2
    for row in measured.measurements:
        assert not row.verdict.steady
        said = "cut short: toy/onnx-int8: the process that ran it ended with SIGKILL"
        assert row.verdict.reasons[0] == row.verdict.observed[0] == said
        assert row.latency.effective_samples == 3
    assert "ended with SIGKILL" in measured.report.notes[-1]


def test_a_wall_clock_that_steps_changes_no_duration(make_artifact, monkeypatch) -> None:
    real, asked = time.time, itertools.count()  # noqa: TID251 - it is what must not matter
    # Back by an hour and forth again, at every look at it.
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * (next(asked) % 2))
    measured = measure([make_artifact()], duration_s=0.3, threads=1)
    (row,) = measured.measurements
    starts = measured.samples[row.samples + STARTS]
    assert np.all(np.diff(starts) > 0)
    assert 0 < row.latency.min_ns <= row.latency.max_ns < 60e9
    assert 0 <= starts[-1] < 60e9


@pytest.mark.parametrize("again", ["http://127.0.0.1:1", "http://127.0.0.1:1/", "oip+http://127.0.0.1:1"])
def test_one_url_twice_is_refused(again, make_artifact) -> None:
    with pytest.raises(UsageError, match=r"http://127\.0\.0\.1:1 is named twice"):
        measure(["http://127.0.0.1:1", again], payload=make_artifact())


def test_a_row_says_which_server_answered(make_artifact, serve) -> None:
    artifact = make_artifact()
    measured = measure([serve(artifact).url + "/"], payload=artifact, duration_s=0.1)
    (row,) = measured.measurements
    assert row.served_by == "toy-server 1"
    assert not row.target.endswith("/")
    assert ", served by toy-server 1)" in sentences.placements([row])[0]
    other = row.model_copy(update={"served_by": "triton 2.65.0"})
    compared = compare_reports(
        measured, replace(measured, report=measured.report.model_copy(update={"measurements": (other,)}))
    )
    assert any(
        text.endswith("was served by toy-server 1 in BASE, by triton 2.65.0 in NEW") for text in compared.warnings
    )


def test_reports_of_two_machines_do_not_become_one(example) -> None:
    here = example()
    environment = here.report.environment.model_copy(update={"cpu": "another", "cores": 64})
    report = here.report.model_copy(update={"environment": environment})
    with pytest.raises(UsageError, match=r"different environments \(cpu, cores\)"):
        merge(here, replace(here, report=report))


def test_rows_of_one_title_are_one_group(example) -> None:
    measured = example()
    rows = measured.report.measurements
    again = [row.model_copy(update={"load": Load(batch=batch)}) for row in rows[:2] for batch in (1, 32)]
    groups = cells.groups(measured.report.model_copy(update={"measurements": tuple(again)}))
    assert [(one.title, len(one.rows)) for one in groups] == [("in process, batch 1", 2), ("in process, batch 32", 2)]


def test_every_row_of_onnx_runtime_says_which_nodes_its_provider_took(make_artifact) -> None:
    (row,) = measure([make_artifact()], duration_s=0.1, threads=1).measurements
    assert list(row.nodes) == ["CPUExecutionProvider"]
    assert sum(row.nodes["CPUExecutionProvider"].values()) >= 2
    assert row.device_memory_bytes is None


def test_nodes_on_another_provider_are_named_below_the_table(example) -> None:
    row = example().measurements[1]
    nodes = {"CUDAExecutionProvider": {"Conv": 40}, "CPUExecutionProvider": {"Gather": 1, "Shape": 2}}
    update = {"provider": "CUDAExecutionProvider, CUDA graph", "threads": None, "nodes": nodes}
    lines = sentences.placements([row.model_copy(update=update)])
    assert lines[1] == "3 of 43 nodes on CPUExecutionProvider (Gather, Shape ×2): onnx-fp32"


def test_nothing_listening_is_one_clear_error(make_artifact) -> None:
    with pytest.raises(MachineError, match=r"http://127\.0\.0\.1:1: no answer"):
        measure(["http://127.0.0.1:1"], payload=make_artifact())


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("ftp://127.0.0.1:1", "no http://HOST:PORT"),
        ("http://127.0.0.1:99999", "port is no number"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("oip+grpc://[zz]:80", "zz"),
        ("http://127.0.0.1:1/predict", "unknown path /predict"),
    ],
)
def test_a_url_that_is_none_is_refused(target, said) -> None:
    with pytest.raises(UsageError, match=said):
        measure([target])


def test_the_fastest_that_keeps_the_accuracy_is_chosen(example) -> None:
    # onnx-int8-pruned50 is faster and loses 1.39 points.
    report = choose_fastest(example(), max_drop=1.0).report
    assert report.chosen == "digits/onnx-int8"
    assert report.chosen_because == (
        "the fastest at batch 1 of the 2 variants that lose at most 1 percentage point of accuracy (1 loses more)"
    )


@pytest.mark.parametrize(
    ("max_drop", "chosen", "because"),
    [
        (0, "onnx-fp32", "the only variant that is known to lose no accuracy (2 lose more)"),
        (
            2.0,
            "onnx-int8-pruned50",
            "the fastest of 3 variants at batch 1, and all of them lose at most 2 percentage points",
        ),
    ],
)
def test_the_choice_says_what_it_was_made_from(example, max_drop, chosen, because) -> None:
    report = choose_fastest(example(), max_drop=max_drop).report
    assert report.chosen == f"digits/{chosen}"
    assert report.chosen_because.startswith(because)


def test_the_choice_counts_variants_whose_accuracy_is_not_known(example) -> None:
    measured = example()
    rows = tuple(
        row.model_copy(update={"drop_points": None}) if row.artifact == "onnx-fp32" else row
        for row in measured.measurements
    )
    measured = Measured(report=measured.report.model_copy(update={"measurements": rows}), samples=measured.samples)
    assert choose_fastest(measured, max_drop=1.0).report.chosen_because == (
        "the only variant that is known to lose at most 1 percentage point of accuracy "
        "(1 loses more, and the accuracy of 1 is not known)"
    )
    (eager, only) = (row for row in rows if row.target in ("eager", "digits/onnx-int8"))
    alone = Measured(
        report=measured.report.model_copy(update={"measurements": (eager, only)}), samples=measured.samples
    )
    assert choose_fastest(alone, max_drop=1.0).report.chosen_because == (
        "the only variant measured, and it loses at most 1 percentage point of accuracy"
    )


def test_where_no_variant_keeps_the_accuracy_none_is_chosen(example) -> None:
    report = choose_fastest(example(), max_drop=-1.0).report
    assert report.chosen is None
    assert report.chosen_because == (
        "no variant is known to lose at most -1 percentage points of accuracy: 3 lose more"
    )


def test_a_median_that_is_not_certified_is_chosen_where_it_is_the_lowest_and_said(example) -> None:
    measured = example()

    def blurred(*targets: str):
        rows = [
            row.model_copy(update={"latency": row.latency.model_copy(update={"p50_ns": None})})
            if row.target in targets
            else row
            for row in measured.measurements
        ]
        report = measured.report.model_copy(update={"measurements": tuple(rows)})
        return choose_fastest(Measured(report=report, samples=measured.samples), max_drop=1.0).report

    one = blurred("digits/onnx-int8")
    assert one.chosen == "digits/onnx-int8"
    assert one.chosen_because.endswith("; too few calls were made to be sure of its median")
    assert "sure" not in blurred("digits/onnx-fp32").chosen_because


def test_a_choice_within_the_noise_or_not_to_be_quoted_says_so(example) -> None:
    measured = example()
    chosen = next(row for row in measured.measurements if row.target == "digits/onnx-int8")

    def changed(target: str, **changes: object) -> str:
        rows = [row.model_copy(update=changes) if row.target == target else row for row in measured.measurements]
        report = measured.report.model_copy(update={"measurements": tuple(rows)})
        return choose_fastest(replace(measured, report=report), max_drop=1.0).report.chosen_because or ""

    alike = changed("digits/onnx-fp32", latency=chosen.latency)
    assert alike.endswith("; by the intervals of their p50 it is not told from digits/onnx-fp32")
    unsteady = changed("digits/onnx-int8", verdict=chosen.verdict.model_copy(update={"steady": False}))
    assert unsteady.endswith("; its row is not to be quoted, for the reasons beside it")


def test_a_batch_that_the_signature_does_not_allow_is_refused_before_anything_runs(make_artifact) -> None:
    with pytest.raises(UsageError, match=r"toy/onnx-fp32: batch 65 asked, it takes 1 to 64"):
        measure([make_artifact()], batch=(1, 65))


def test_a_report_that_was_there_is_replaced_whole(example, tmp_path) -> None:
    save_report(example(title="old"), tmp_path / "r")
    save_report(example(title="new"), tmp_path / "r")
    assert read_report(tmp_path / "r").title == "new"
    assert "<h1>new</h1>" in (tmp_path / "r" / "report.html").read_text()
    assert len(list((tmp_path / "r").iterdir())) == 3


def test_a_checkpoint_adds_eager_as_the_baseline(make_artifact, tmp_path) -> None:
    torch = pytest.importorskip("torch", reason="the eager row needs torch")
    from dlops.saving import save_checkpoint

    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    inputs = torch.randn(8, 16).numpy()
    checkpoint = save_checkpoint(module, tmp_path / "c", evaluation=(inputs, np.zeros(8, np.int64)), max_batch=64)
    measured = measure([make_artifact()], checkpoint=checkpoint, model=module, duration_s=0.2, threads=1)
    eager, artifact = measured.measurements
    assert (eager.target, eager.runtime, eager.accuracy) == ("eager", "eager", 0.98)
    assert measured.report.baseline == "eager"
    assert eager.speedup.value == 1.0
    assert artifact.speedup.value > 1.0
    assert eager.peak_memory_bytes is None
    assert "its peak memory and cold start are not known" in measured.report.notes[0]


def test_what_was_measured_before_a_service_refuses_is_kept(make_artifact, serve) -> None:
    artifact = make_artifact()
    # A rate so low that nothing comes due is only found when the service's turn comes.
    measured = measure([artifact, serve(artifact).url], offered=Offered(rates=(0.001,)), duration_s=0.1, threads=1)
    (row,) = measured.measurements
    assert row.boundary == "host"
    assert measured.partial
    assert "none is due" in measured.report.notes[-1]
    with pytest.raises(UsageError, match="none is due"):
        measure([serve(artifact).url], payload=artifact, offered=Offered(rates=(0.001,)), duration_s=0.1)


def test_the_command_does_not_end_well_where_a_target_failed(make_artifact, serve, tmp_path, capsys) -> None:
    artifact = make_artifact()
    load = ["--rate", "0.001", "--duration", "0.1", "--threads", "1", "--out", str(tmp_path / "r")]
    assert run(["bench", str(artifact.directory), serve(artifact).url, *load]) == 4
    assert "incomplete: a target failed" in capsys.readouterr().err
    assert read_report(tmp_path / "r").partial


def test_a_version_in_the_url_is_asked_for(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    url = f"{server.url}/v2/models/{artifact.name}/versions"
    with pytest.raises(UsageError, match=r"GET /v2/models/toy/versions/7 answered 404"):
        measure([f"{url}/7"], payload=artifact, duration_s=0.1)
    with pytest.raises(UsageError, match="unknown path /v2/models/toy/infer"):
        measure([f"{server.url}/v2/models/toy/infer"], payload=artifact)
    server.versioned = True
    (row,) = measure([f"{url}/1/"], payload=artifact, duration_s=0.1).measurements
    assert row.target == f"{url}/1"
    assert row.error_count == 0


@pytest.mark.parametrize("host", ["my..host:3000", ".:1", f"{'a' * 300}.b:3000", "ä..b:3000"])
@pytest.mark.parametrize("scheme", ["http", "oip+grpc"])
def test_a_host_that_can_be_none_is_one_line(host, scheme) -> None:
    with pytest.raises(UsageError, match="is no host name"):
        measure([f"{scheme}://{host}"])


def test_case_and_slashes_name_no_other_target(make_artifact, serve) -> None:
    artifact = make_artifact()
    url = serve(artifact).url
    measured = measure([url.replace("http", "HTTP") + "/"], payload=artifact, duration_s=0.1)
    assert measured.measurements[0].target == url
    assert "over HTTP" in cells.groups(measured.report)[0].title


def test_optional_fields_that_are_null_are_as_good_as_missing(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    server.binary, server.extra = False, {"parameters": None}
    (row,) = measure([server.url], payload=artifact, duration_s=0.1).measurements
    assert row.error_count == 0


def test_an_error_is_said_once_and_with_its_own_hint(make_artifact, serve, capsys) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    server.behave = lambda count: (400, b"wrong") if count > 20 else None
    assert run(["bench", server.url, "--payload", str(artifact.directory), "--concurrency", "100000"]) == 4
    said = capsys.readouterr().err
    assert said.count("may have") == 1
    assert "the server's log" not in said


def test_a_row_of_one_request_cannot_be_quoted(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact()
    measured = measure([serve(artifact).url], payload=artifact, offered=Offered(trace=np.array([200_000_000])))
    (row,) = measured.measurements
    assert row.latency.p50_ns is None
    assert not row.verdict.steady


def test_a_process_is_started_where_no_folder_for_temporary_files_is(make_artifact, monkeypatch) -> None:
    def none(*arguments: object, **options: object) -> object:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("dlops.bench.child.tempfile.TemporaryFile", none)
    (row,) = measure([make_artifact()], duration_s=0.1, threads=1).measurements
    assert row.error_count == 0


def test_a_partial_report_worked_out_again_is_no_verdict_on_the_whole(make_artifact, tmp_path, monkeypatch) -> None:
    # Whatever else the machine does meanwhile.
    monkeypatch.setattr("dlops.workflows.reanalyse.exit_status", lambda report: 0)
    whole = measure([make_artifact()], duration_s=0.1, threads=1)
    for partial, status in ((False, 0), (True, 3)):
        kept = tmp_path / f"kept{status}"
        save_report(replace(whole, report=whole.report.model_copy(update={"partial": partial})), kept)
        assert run(["bench", "--from", str(kept), "--out", str(tmp_path / f"again{status}")]) == status
