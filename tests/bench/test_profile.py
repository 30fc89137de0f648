"""`--profile`: real profiles of real artifacts, what is kept of them, and how they are shown."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dlops.bench import breakdown, profile
from dlops.bench.inprocess import subjects
from dlops.bench.profile import add_profiles, profile_each, record_enough
from dlops.bench.results import MeasureInterrupted, merge, save_report
from dlops.bench.run import measure
from dlops.bench.table import table_text, to_markdown
from dlops.bench.traces import Recording
from dlops.bench.worker import Job
from dlops.checkpoint import load_checkpoint
from dlops.errors import CorruptError, MachineError, UsageError
from dlops.inspect import describe
from dlops.report import Profile, ProfiledOperator, ProviderUse, read_report
from dlops.runtimes.session import SessionOptions
from dlops.workflows.benchmark import benchmark
from dlops.workflows.publish import Outputs

ONE_THREAD = SessionOptions(device="cpu", threads=1)


def made_up(**changes: object) -> Profile:
    fields = {
        "target": "digits/onnx-int8", "artifact": "onnx-int8", "runtime": "onnxruntime",
        "provider": "CPUExecutionProvider", "device": "cpu", "threads": 2, "batch": 1, "calls": 10,
        "total_ns": 3_000_000,
        "operators": tuple(
            ProfiledOperator(name=f"node_{index}", op_type=op, provider="CPUExecutionProvider", calls=10, total_ns=1,
                             share=share)
            for index, (op, share) in enumerate([("Conv", 0.4), ("Conv", 0.2), ("Gemm|x", 0.1)])
        ),
        "others": 2, "others_share": 0.1, "outside_share": 0.2, "op_types": {"Conv": 0.6, "Gemm|x": 0.1, "Add": 0.1},
        "providers": {"CPUExecutionProvider": ProviderUse(operators=5, share=0.8)},
        "trace": "trace00", "traced_calls": 3,
    }  # fmt: skip
    return Profile(**fields | changes)


def with_profiles(measured, *profiles: Profile):
    report = measured.report.model_copy(update={"profiles": profiles})
    return type(measured)(report=report, samples=measured.samples, traces={one.trace: b"x" for one in profiles})


def test_the_command_profiles_after_the_timing_and_keeps_the_trace(digits_artifact, tmp_path, capsys) -> None:
    benchmark(
        [digits_artifact], checkpoint=None, compiled=False, batch=[2], boundary=["host"], concurrency=None,
        offered=None, duration_s=0.1, payload=None, model=None, profile=True, device=["cpu"], threads=[1],
        outputs=Outputs(directory=tmp_path / "r"), command=(),
    )  # fmt: skip
    printed = capsys.readouterr()
    assert printed.err.index("timing 1 target") < printed.err.index("profiling: ")
    assert "where the time goes\n\nonnx-fp32, batch 2: " in printed.out
    assert "Gemm" in printed.out
    assert "Where the time goes" in (tmp_path / "r" / "report.html").read_text()

    report = read_report(tmp_path / "r")
    (one,) = report.profiles
    assert (one.artifact, one.runtime, one.batch, one.threads, one.times) == ("onnx-fp32", "onnxruntime", 2, 1, "host")
    shares = sum(operator.share for operator in one.operators) + one.others_share + one.outside_share
    assert shares == pytest.approx(1.0)
    assert {operator.calls for operator in one.operators} == {one.calls}
    assert set(one.providers) == {"CPUExecutionProvider"}
    assert 1 <= one.traced_calls <= one.calls
    runs = [event for event in events_of(report.path("trace00")) if event["name"] == "model_run"]
    assert len(runs) == one.traced_calls + 3  # the warm-up is in the file, and not in the table

    assert {state.role: state.problem for state in describe(tmp_path / "r").files} == {"samples": None, "trace00": None}
    report.path("trace00").write_bytes(b"x")
    with pytest.raises(CorruptError, match="1 bytes where the manifest says"):
        read_report(tmp_path / "r")


def events_of(path: Path) -> list[dict]:
    document = json.loads(gzip.decompress(path.read_bytes()))
    return document["traceEvents"] if isinstance(document, dict) else document


def test_the_eager_module_of_a_checkpoint_is_profiled_by_torch(working_folder, tmp_path, capsys, monkeypatch) -> None:
    # How much is recorded has a test of its own; torch takes seconds to sum up what is recorded for users.
    monkeypatch.setattr(profile, "_MAX_EVENTS", 2_000)
    torch = pytest.importorskip("torch", reason="this is torch's profiler")
    job = Job(
        target="eager", kind="eager", directory=str(working_folder / "runs" / "cnn" / "short"), batch=2, device="cpu",
        samples=str(working_folder / "artifacts" / "digits-cnn" / "onnx-int8"), threads=1,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        profile.main(job.model_dump_json(), tmp_path / "t.json.gz")
    finally:
        torch.set_num_threads(threads)
    found = Profile(target="eager", artifact=None, batch=2, trace="trace00", **json.loads(capsys.readouterr().out))
    assert (found.runtime, found.provider, found.threads, found.times) == ("eager", "cpu", 1, "host")
    assert any("conv" in one.name and one.calls == 6 * found.calls for one in found.operators)
    assert set(found.providers) == {"cpu"}
    assert found.total_ns > 0
    assert sum(found.op_types.values()) + found.outside_share == pytest.approx(1.0)
    calls = [event for event in events_of(tmp_path / "t.json.gz") if event.get("cat") == "user_annotation"]
    assert len(calls) == found.traced_calls
    assert [path.name for path in tmp_path.iterdir()] == ["t.json.gz"]


def test_an_onnx_artifact_is_profiled_without_torch(digits_artifact, tmp_path) -> None:
    script = f"""
import sys
from pathlib import Path
sys.modules["torch"] = None
from dlops.bench.inprocess import subjects
from dlops.bench.profile import main
from dlops.bench.worker import Job
directory = {str(digits_artifact.directory)!r}
job = Job(target="it", kind="artifact", directory=directory, samples=directory, batch=1, device="cpu", threads=1)
main(job.model_dump_json(), Path({str(tmp_path / "t.json.gz")!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {one["op_type"] for one in found["operators"]} <= {"Flatten", "Gemm", "FusedGemm", "Reshape"}
    assert [path.name for path in tmp_path.iterdir()] == ["t.json.gz"]


def test_a_target_that_fails_is_noted_and_the_others_are_kept(
    make_digits_artifact, digits_artifact, example, tmp_path
) -> None:
    broken = make_digits_artifact(tmp_path / "digits" / "broken", name="broken")
    broken.path("model").write_bytes(b"x" * broken.model_bytes)
    result = add_profiles(example(), [digits_artifact, broken], checkpoint=None, options=ONE_THREAD)
    assert [one.target for one in result.report.profiles] == ["digits/onnx-fp32"]
    assert result.partial
    note = result.report.notes[-1]
    assert note.startswith("broken/onnx-fp32 at batch 1 has no profile: ")
    assert "SHA-256 differs" in note


def test_eager_is_first_and_an_artifact_named_twice_is_profiled_once(
    digits_artifact, working_folder, monkeypatch
) -> None:
    monkeypatch.setattr(profile, "_profile", lambda subject, **_: MachineError(subject.target))
    checkpoint = load_checkpoint(working_folder / "runs" / "cnn" / "short")
    chosen = subjects([digits_artifact, digits_artifact], checkpoint=checkpoint, model=None, compiled=True)
    found = profile_each(chosen, batch=1, options=ONE_THREAD)
    assert [target for target, _ in found] == ["eager", "torch.compile", "digits/onnx-fp32"]


def test_ctrl_c_keeps_the_timing_and_the_profiles_made(example, digits_artifact, tmp_path, monkeypatch) -> None:
    def interrupted(*_, **__):
        yield "digits/onnx-int8", profile.Profiled(profile=made_up(), trace=b"a trace")
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "profile_each", interrupted)
    measured = example()
    with pytest.raises(MeasureInterrupted) as caught:
        add_profiles(measured, [digits_artifact], checkpoint=None, options=ONE_THREAD)
    kept = caught.value.measured
    assert kept.partial
    assert kept.report.measurements == measured.report.measurements
    assert save_report(kept, tmp_path / "r").path("trace00").read_bytes() == b"a trace"
    assert kept.report.notes[-1] == "interrupted before every target was profiled"


def test_a_module_passed_in_is_not_profiled_and_a_note_says_so(example, working_folder) -> None:
    checkpoint = load_checkpoint(working_folder / "runs" / "cnn" / "short")
    result = add_profiles(example(), [], checkpoint=checkpoint, options=ONE_THREAD, model=object())
    assert result.report.profiles == ()
    assert result.report.notes[-1] == "eager is not profiled: a fresh process cannot build a module passed in"


def test_a_service_alone_cannot_be_profiled() -> None:
    with pytest.raises(UsageError, match="--profile is for artifacts"):
        benchmark(
            ["http://127.0.0.1:9"], checkpoint=None, compiled=False, batch=[1], boundary=["host"], concurrency=None,
            offered=None, duration_s=0.1, payload=None, model=None, profile=True, device=["cpu"], threads=[1],
            outputs=Outputs(), command=(),
        )  # fmt: skip


def test_ctrl_c_ends_the_profiled_process_and_leaves_nothing_of_it(digits_artifact, tmp_path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [
        sys.executable, "-m", "dlops", "bench", str(digits_artifact.directory), "--profile", "--duration", "0.1",
        "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "r"),
    ]  # fmt: skip
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ | {
        "TMPDIR": str(scratch)
    })  # fmt: skip
    process = psutil.Process(running.pid)
    while not (list(scratch.glob("dlops-profile-*")) and process.children()):
        assert running.poll() is None, "it ended before it profiled anything"
        time.sleep(0.01)
    children = process.children(recursive=True)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert list(scratch.glob("dlops-*")) == []
    report = read_report(tmp_path / "r")
    assert report.partial
    assert report.profiles == ()
    assert len(report.measurements) == 1


@pytest.mark.parametrize(
    ("first_ns", "events", "asked"),
    [(1_000_000, 50, [5, 2000]), (1_000_000_000, 50, [5]), (1_000_000, 30_000, [5]), (0, 0, [5, 100_000])],
)
def test_how_many_calls_are_recorded(first_ns, events, asked) -> None:
    seen = []

    def record(calls: int) -> Recording:
        seen.append(calls)
        return Recording(
            calls=calls, total_ns=first_ns, times="host", operators=(), trace=[{}] * events, ends_us=(0.0,) * calls
        )

    record_enough(record)
    assert seen == asked


def test_merging_keeps_every_profiles_trace(example) -> None:
    one = with_profiles(example(), made_up())
    two = with_profiles(example(), made_up(batch=32))
    two.traces["trace00"] = b"y"
    both = merge(one, two)
    assert [(p.batch, both.traces[p.trace]) for p in both.report.profiles] == [(1, b"x"), (32, b"y")]


def test_the_console_fits_80_columns_and_shows_fewer_operators_of_many_targets(example) -> None:
    long = made_up(
        operators=(made_up().operators[0].model_copy(update={"name": "a_node_whose_name_has_no_end_" * 4}),),
    )
    text = table_text(with_profiles(example(), long, made_up(batch=32)).report)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "onnx-int8, batch 1: 10 profiled calls, mean 0.300 ms (timed p50 0.150 ms)" in text
    assert "onnx-int8, batch 32: 10 profiled calls, mean 0.300 ms\n" in text
    assert "onnx-int8: 2.0 times slower under the profiler" in " ".join(text.split())
    crowd = [made_up(batch=batch) for batch in range(1, 9)]
    assert all("node_2" not in one[0] for one in breakdown.rows(crowd[0], ["operator", "share"], 2))
    assert breakdown.rows(crowd[0], ["operator", "share"], 2) == [
        ["node_0", "40.0%"], ["node_1", "20.0%"], ["3 others", "20.0%"], ["outside operators", "20.0%"],
    ]  # fmt: skip


def test_profiles_under_several_numbers_of_threads_are_told_apart(example) -> None:
    text = " ".join(table_text(with_profiles(example(), made_up(), made_up(threads=1)).report).split())
    assert "onnx-int8, batch 1, 2 threads: 10 profiled calls, mean 0.300 ms (timed p50 0.150 ms)" in text
    assert "onnx-int8, batch 1, 1 thread: 10 profiled calls, mean 0.300 ms operator" in text


def test_nodes_on_another_provider_are_named_beside_the_placement(example) -> None:
    cuda = made_up(
        provider="CUDAExecutionProvider",
        providers={
            "CUDAExecutionProvider": ProviderUse(operators=38, share=0.7),
            "CPUExecutionProvider": ProviderUse(operators=3, share=0.1, names=("topk", "shape", "gather")),
        },
        copies=2,
    )
    measured = with_profiles(example(), cuda)
    said = "onnx-int8 at batch 1: 3 of 41 nodes ran on CPUExecutionProvider: topk, shape, gather"
    for text in (" ".join(table_text(measured.report).split()), to_markdown(measured.report)):
        assert said in text
        assert "2 of 41 nodes copy between host and device" in text
        assert "records no kernels" in text
    assert "provider" in breakdown.headings([cuda])


def test_markdown_has_a_table_a_target_with_bars_escaped(example) -> None:
    text = to_markdown(with_profiles(example(), made_up()).report)
    assert "| node_2 | Gemm\\|x | 1 | 10.0% |" in text
    assert "where the time goes" not in to_markdown(example().report)


def test_a_target_without_a_profiler_is_measured_and_noted_and_the_report_is_whole(openvino_artifact) -> None:
    measured = measure([openvino_artifact], duration_s=0.1)
    assert [row.runtime for row in measured.measurements] == ["openvino"]
    report = add_profiles(measured, [openvino_artifact], checkpoint=None, options=ONE_THREAD).report
    assert not report.partial
    assert report.notes == ("digits/openvino-fp32 is not profiled: there is no profiler for openvino here",)
    assert report.profiles == ()


def test_a_format_that_has_no_profiler_is_named_and_no_process_is_started(openvino_artifact) -> None:
    chosen = subjects([openvino_artifact], checkpoint=None, model=None, compiled=False)
    ((target, found),) = profile_each(chosen, batch=1, options=ONE_THREAD)
    assert target == "digits/openvino-fp32"
    assert isinstance(found, UsageError)
    assert "no profiler for openvino here" in found.message
