"""The search: what is asked once, what a refusal settles, how it goes on, and what it concludes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import dlops as dlops_api
from dlops.artifact import Artifact
from dlops.bench.slo import parse_objective
from dlops.checkpoint import Checkpoint
from dlops.cli import run
from dlops.errors import CorruptError, LossError, MachineError
from dlops.report import Interval
from dlops.workflows import optimize as module
from dlops.workflows.optimize import JOURNAL, PAGE, RESULT, Outcome, Result, optimize
from dlops.workflows.optimize_page import render_page
from dlops.workflows.trials import Question, Search, Setting, Trial

QUESTION = Question(
    checkpoint="digits", checkpoint_sha256="ab" * 32, max_drop=1.0, quantile="p99", limit_ns=5e6, batch=1, device="cpu",
    cpu="A CPU", cores=2, dlops_version="0.1.0", variants=(), threads=(),
)  # fmt: skip
SETTINGS = [
    Setting(variant=slug, threads=threads)
    for slug in ("onnx-fp32", "onnx-int8", "onnx-fp32-pruned30", "onnx-int8-pruned30", "onnx-int8-pruned50")
    for threads in (1, 2)
]


def trial(setting: Setting, milliseconds: float = 2.0, **changes: object) -> Trial:
    ns = milliseconds * 1e6
    made = Trial(
        setting=setting, tail=Interval(value=ns, low=0.9 * ns, high=1.1 * ns),
        median=Interval(value=0.5 * ns, low=None, high=None), metric="accuracy", accuracy=0.97, drop_points=0.5,
        drop_low=-0.1, drop_high=1.1, provider="CPUExecutionProvider", model_bytes=1000,
    )  # fmt: skip
    return made.model_copy(update=changes)


def test_every_setting_is_asked_for_once_the_dense_ones_first(tmp_path: Path) -> None:
    search = Search(tmp_path / JOURNAL, QUESTION, SETTINGS, seed=0)
    asked = []
    while (setting := search.ask()) is not None:
        asked.append(setting)
        search.tell(trial(setting) if "int8" not in setting.variant else Trial(setting=setting, reason="it lost"))
    assert sorted(asked, key=str) == sorted(SETTINGS, key=str)
    assert asked[:2] == [Setting(variant="onnx-fp32", threads=2), Setting(variant="onnx-int8", threads=2)]
    assert search.untried == []


def test_a_cuda_graph_is_a_setting_of_its_own(tmp_path: Path) -> None:
    settings = [
        Setting(variant=slug, threads=None, cuda_graph=graph)
        for slug in ("onnx-fp32", "onnx-fp16")
        for graph in (False, True)
    ]
    search = Search(tmp_path / JOURNAL, QUESTION, settings, seed=0)
    first = search.ask()
    assert first is not None
    search.tell(trial(first))
    again = Search(tmp_path / JOURNAL, QUESTION, settings, seed=0)
    assert again.trials == [trial(first)]
    rest = []
    while (setting := again.ask()) is not None:
        rest.append(setting)
        again.tell(trial(setting))
    assert sorted([first, *rest], key=str) == sorted(settings, key=str)
    assert settings[1].text == "onnx-fp32, CUDA graph"


def test_what_would_be_of_no_use_here_is_left_out_with_the_reason(checkpoint: Checkpoint, capsys) -> None:
    here = module._slugs(checkpoint, None, 1.0, on_gpu=False)
    said = " ".join(capsys.readouterr().err.split())
    assert "left out: tensorrt: it takes an NVIDIA GPU, and none is used here" in said
    assert "left out: onnx-fp8, which a CPU computes in fp32" in said
    assert {"onnx-fp32", "openvino-fp32"} < set(here)
    assert not [slug for slug in here if "tensorrt" in slug or "fp8" in slug]


def test_a_search_goes_on_where_it_was_stopped_and_another_question_begins_anew(tmp_path: Path) -> None:
    search = Search(tmp_path / JOURNAL, QUESTION, SETTINGS, seed=0)
    first = search.ask()
    assert first is not None
    search.tell(trial(first))
    cut_short = search.ask()
    # As a kill leaves it: one is open, and another is in the queue.
    search._study.enqueue_trial({"variant": "onnx-int8-pruned50", "threads": 1})
    again = Search(tmp_path / JOURNAL, QUESTION, SETTINGS, seed=0)
    assert again.trials == [trial(first)]
    assert again.resumed == 1
    rest = []
    while (setting := again.ask()) is not None:
        rest.append(setting)
        again.tell(trial(setting))
    assert len(rest) == len(set(rest)) == len(SETTINGS) - 1
    assert cut_short in rest
    other = Search(tmp_path / JOURNAL, QUESTION.model_copy(update={"limit_ns": 1e6}), SETTINGS, seed=0)
    assert other.trials == []


def test_with_other_variants_to_choose_from_what_was_tried_is_taken_over(tmp_path: Path) -> None:
    def asking(settings: list[Setting], **changes: object) -> Search:
        choice = {"variants": tuple(one.variant for one in settings), "threads": tuple(one.threads for one in settings)}
        return Search(tmp_path / JOURNAL, QUESTION.model_copy(update={**choice, **changes}), settings, seed=0)

    few = asking(SETTINGS[:2])
    while (setting := few.ask()) is not None:
        few.tell(trial(setting, 3.0))
    more = asking(SETTINGS)
    assert sorted(more.trials, key=str) == sorted(few.trials, key=str)
    assert more.resumed == 2
    rest = []
    while (setting := more.ask()) is not None:
        rest.append(setting)
        more.tell(trial(setting))
    assert sorted([*SETTINGS[:2], *rest], key=str) == sorted(SETTINGS, key=str)
    # None of a setting that is no more to choose, and each once.
    fewer = asking(SETTINGS[1:3])
    assert sorted(one.setting.text for one in fewer.trials) == sorted(one.text for one in SETTINGS[1:3])
    assert asking(SETTINGS[1:3]).resumed == 2
    # Of another question nothing is.
    assert asking(SETTINGS[:3], limit_ns=1e6).trials == []


def test_the_journal_is_json_line_by_line_and_one_of_others_is_refused(tmp_path: Path) -> None:
    search = Search(tmp_path / JOURNAL, QUESTION, SETTINGS, seed=0)
    setting = search.ask()
    assert setting is not None
    search.tell(trial(setting))
    for line in (tmp_path / JOURNAL).read_text().splitlines():
        assert isinstance(json.loads(line), dict)
    (tmp_path / JOURNAL).write_bytes(b"\x80\x04nothing of ours\n")
    with pytest.raises(CorruptError, match="not a journal"):
        Search(tmp_path / JOURNAL, QUESTION, SETTINGS, seed=0)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    digits = load_digits()
    images, targets = (digits.images[:, None] / 16).astype(np.float32), digits.target
    torch.manual_seed(0)
    model = _Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(torch.from_numpy(images[400:])), torch.from_numpy(targets[400:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return dlops_api.save_checkpoint(
        model, tmp_path_factory.mktemp("runs") / "digits", evaluation=(images[:400], targets[:400]), name="digits"
    )


Searched = Callable[..., Outcome]


@pytest.fixture
def searched(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Searched:
    """searched(times, limit): a search whose measurements are `times`, in ms by setting; None is a refusal."""

    def search(
        times: dict[tuple[str, int], float | None], limit: str = "p99=5ms", finals: object = None, **changes: object
    ) -> Outcome:
        tried: list[Setting] = []

        def try_out(self: object, setting: Setting) -> Trial:
            tried.append(setting)
            found = times[setting.variant, setting.threads or 0]
            if isinstance(found, BaseException):
                raise found
            return Trial(setting=setting, reason="it lost") if found is None else trial(setting, found)

        def fastest(search: Search, runs: object, directory: Path) -> list[Trial]:
            measured = sorted((one for one in search.trials if one.tail), key=lambda one: one.tail.value)
            return measured[: module.FINALISTS]

        refused = LossError("it lost")
        monkeypatch.setattr(module._Runs, "try_out", try_out)
        monkeypatch.setattr(module._Exports, "get", lambda self, slug: refused if times[slug, 1] is None else slug)
        monkeypatch.setattr(module, "_finals", finals or fastest)
        settings = {
            "variants": list(dict.fromkeys(slug for slug, _ in times)), "threads": [1, 2], "device": "cpu",
            "report": tmp_path / "report", "out": tmp_path / "artifacts",
        }  # fmt: skip
        outcome = optimize(checkpoint, objective=parse_objective(limit), **{**settings, **changes})
        search.tried = tried
        return outcome

    return search


def test_the_fastest_that_certainly_keeps_the_limit_wins(searched: Searched, tmp_path: Path) -> None:
    times = {("onnx-fp32", 1): 6.0, ("onnx-fp32", 2): 4.8, ("onnx-int8wo", 1): 4.0, ("onnx-int8wo", 2): 4.2}
    outcome = searched(times)
    assert outcome.status == 0
    assert outcome.result.winner == Setting(variant="onnx-int8wo", threads=1)
    assert not outcome.result.left
    assert Result.model_validate_json((tmp_path / "report" / RESULT).read_text()) == outcome.result
    page = (tmp_path / "report" / PAGE).read_text()
    assert "onnx-int8wo, 1 thread" in page
    assert "5 ms" in page


def test_one_that_keeps_the_limit_by_its_estimate_alone_does_not_win(searched: Searched) -> None:
    outcome = searched({("onnx-fp32", 1): 4.8, ("onnx-fp32", 2): 4.9})
    assert outcome.status == 1
    assert outcome.result.winner is None
    assert "nothing certainly keeps p99 5 ms; nearest is onnx-fp32, 1 thread: 4.8 ms (4.32 to 5.28)" in (
        outcome.result.because
    )


def test_what_was_measured_once_alone_does_not_win(searched: Searched) -> None:
    unsure = lambda search, runs, directory: [trial(one.setting, tail=None) for one in search.trials]  # noqa: E731
    outcome = searched({("onnx-fp32", 1): 2.0, ("onnx-fp32", 2): 3.0}, finals=unsure)
    assert (outcome.status, outcome.result.winner) == (1, None)
    assert "nothing certainly keeps p99 5 ms" in outcome.result.because


def test_where_nothing_meets_the_target_the_nearest_is_named(searched: Searched, tmp_path: Path) -> None:
    outcome = searched({("onnx-fp32", 1): 9.0, ("onnx-fp32", 2): 7.0})
    assert outcome.status == 1
    assert outcome.result.nearest == Setting(variant="onnx-fp32", threads=2)
    assert "nothing keeps p99 5 ms; nearest is onnx-fp32, 2 threads: 7 ms" in outcome.result.because
    assert "Nothing meets the target" in (tmp_path / "report" / PAGE).read_text()


def test_ctrl_c_keeps_what_was_found_and_the_same_command_goes_on(searched: Searched) -> None:
    times: dict[tuple[str, int], object] = {
        ("onnx-fp32", 1): 3.0, ("onnx-fp32", 2): 2.0, ("onnx-fp16", 1): 3.0, ("onnx-fp16", 2): KeyboardInterrupt(),
    }  # fmt: skip
    cut = searched(times)
    assert cut.status == 130
    assert cut.result.partial
    assert cut.result.winner is None
    assert cut.result.because.startswith("cut short; the best so far is onnx-fp32, 2 threads")
    assert cut.result.left == 3
    again = searched({**times, ("onnx-fp16", 2): 1.0})
    assert Setting(variant="onnx-fp32", threads=2) not in searched.tried
    assert (again.status, again.result.winner) == (0, Setting(variant="onnx-fp16", threads=2))


def test_no_trial_begins_after_the_budget(searched: Searched) -> None:
    outcome = searched({("onnx-fp32", 1): 3.0, ("onnx-fp32", 2): 3.0}, budget_s=0.0)
    assert searched.tried == []
    assert outcome.status == 1
    assert outcome.result.because == "nothing could be measured"


def test_a_refused_variant_is_not_tried_on_other_threads(searched: Searched) -> None:
    times = {("onnx-fp32", 1): 3.0, ("onnx-fp32", 2): 3.0, ("onnx-fp16", 1): None, ("onnx-fp16", 2): None}
    outcome = searched(times)
    assert [one.variant for one in searched.tried].count("onnx-fp16") == 1
    assert [one.reason for one in outcome.result.trials if one.setting.variant == "onnx-fp16"] == ["it lost"] * 2


def test_what_cuts_off_more_than_a_structure_that_lost_too_much_is_ruled_out(tmp_path: Path) -> None:
    search = Search(tmp_path / JOURNAL, QUESTION, SETTINGS, seed=0)

    class _Refusing:
        class exports:  # noqa: N801
            @staticmethod
            def get(slug: str) -> LossError:
                return LossError("it lost")

    refused = Setting(variant="onnx-fp32-pruned30", threads=1)
    search.note(Trial(setting=refused, reason="it lost"))
    module._rule_out(search, _Refusing, Trial(setting=refused, reason="it lost"))
    left = {setting.variant for setting in search.untried}
    # int8 of the same structure may be refused or not; of a smaller one it is.
    assert left == {"onnx-fp32", "onnx-int8", "onnx-int8-pruned30"}


def test_a_real_search_exports_measures_and_names_an_artifact(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRIAL_S", 0.3)
    monkeypatch.setattr(module, "FINAL_S", 0.3)
    # Whether so short a run certifies a quantile is up to what else the machine does; its mean is there in any case.
    mean = lambda row, _: Interval(value=row.latency.mean_ns, low=row.latency.mean_ns, high=row.latency.mean_ns)  # noqa: E731
    monkeypatch.setattr(module, "_tail", mean)
    outcome = optimize(
        checkpoint, objective=parse_objective("p50=10s"), device="cpu", variants=["onnx-fp32", "onnx-fp16"],
        threads=[1], out=tmp_path / "artifacts", report=tmp_path / "report", model=_Net, max_drop=2.0,
    )  # fmt: skip
    assert outcome.status == 0
    assert outcome.artifact is not None
    assert outcome.artifact.directory.parent == tmp_path / "artifacts" / "digits"
    measured = [one for one in outcome.result.trials if one.tail]
    assert {one.setting.variant for one in measured} == {"onnx-fp32", "onnx-fp16"}
    assert all(one.provider == "CPUExecutionProvider" for one in measured)
    assert len(outcome.result.finals) == 2
    report = dlops_api.read_report(tmp_path / "report" / "finals")
    assert {row.artifact for row in report.measurements} == {"onnx-fp32", "onnx-fp16"}


@pytest.mark.parametrize("fails", ["at once", "in the middle"])
def test_a_variant_that_this_machine_cannot_run_ends_no_search(fails: str, digits_artifact: Artifact) -> None:
    class _Given:
        def get(self, slug: str) -> Artifact:
            return digits_artifact

    class _Rowless:
        measurements = ()

    def measure(*_: object, **__: object) -> _Rowless:
        if fails == "at once":
            raise MachineError("out of memory")
        return _Rowless()

    runs = module._Runs(QUESTION, exports=_Given(), command=())
    runs.measure = measure
    setting = Setting(variant="onnx-fp32", threads=1)
    reason = {"at once": "it could not be measured: out of memory", "in the middle": "it failed while it was measured"}
    assert runs.try_out(setting) == Trial(setting=setting, reason=reason[fails])


def test_the_page_is_whole_where_names_and_reasons_need_escaping() -> None:
    setting = SETTINGS[0]
    result = Result(
        created=datetime.now(UTC), command=("dlops", "optimize", "<b>"), question=QUESTION,
        trials=(trial(setting), Trial(setting=SETTINGS[2], reason="it <lost> too much")), finals=(trial(setting),),
        winner=setting, nearest=None, because="so & so", left=3, partial=False,
    )  # fmt: skip
    page = render_page(result)
    assert "it &lt;lost&gt; too much" in page
    assert "so &amp; so" in page
    assert "<script" not in page
    assert page.count("<svg") == 2
    # Without accuracy there is nothing to draw it against, and the table is still there.
    bare = result.model_copy(update={"trials": (trial(setting, accuracy=None),), "finals": ()})
    assert "<svg" not in render_page(bare)
    assert "All that was measured" in render_page(bare)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one latency is to be kept, none was given"),
        (["--latency-p99", "5ms", "--latency-p50", "1ms"], "one latency is to be kept, 2 was given"),
        (["--latency-p99", "soon"], "no checkpoint"),
        (["--latency-p99", "5ms", "--max-drop", "little"], "not percentage points"),
        (["--latency-p99", "5ms", "--budget", "long"], "not a time"),
    ],
)
def test_bad_options_are_one_clear_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["optimize", *arguments]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
