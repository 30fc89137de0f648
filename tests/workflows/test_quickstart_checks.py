"""What `dlops quickstart` refuses before it trains, and what it makes of the service's answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dlops.artifact import Artifact
from dlops.errors import GateError, MachineError, UsageError
from dlops.samples import Samples
from dlops.workflows import quickstart as stages
from dlops.workflows.ask import Answers, ask_artifact, check_answers
from dlops.workflows.quickstart import ASKED, quickstart, samples_to_ask


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object) -> None:
        pytest.fail("it trained first")

    monkeypatch.setattr(stages, "train_recipe", begun)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("max_drop", [200.0, -1.0, math.nan])
def test_a_loss_that_cannot_be_is_refused_before_training(max_drop: float) -> None:
    with pytest.raises(UsageError, match="percentage points from 0 to 100"):
        quickstart(max_drop=max_drop)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("variants", [["torchscript-fp32"], ["onnx-fp32"]])
def test_a_gpu_that_is_not_there_is_said_before_training(variants: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Each of the two runtimes is asked: torch may see a GPU that ONNX Runtime has no build for.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "onnx-fp32" in variants)
    monkeypatch.setattr("dlops.runtimes.onnxruntime.cuda_works", lambda: False)
    with pytest.raises(MachineError, match="CUDA was asked for"):
        quickstart(variants=variants, device="cuda")


@pytest.mark.usefixtures("untrained")
def test_a_missing_bentoml_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlops.serve.launch.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"serving needs bentoml, .*dlops\[serve\]"):
        quickstart(device="cpu")


@pytest.mark.usefixtures("untrained")
def test_a_variant_of_no_known_format_is_refused_before_training() -> None:
    with pytest.raises(UsageError, match="onnxx"):
        quickstart(variants=["onnxx-fp32"], device="cpu")


def test_the_service_is_asked_about_every_class_of_samples_in_the_order_of_their_folders() -> None:
    targets = np.repeat(np.arange(10), 36)
    evaluation = Samples(raw=tuple(np.full((1, 1), i, np.float32) for i in range(360)), targets=targets)
    checkpoint: Any = SimpleNamespace(samples=lambda split: evaluation)
    asked = samples_to_ask(checkpoint)
    assert asked.targets is not None
    assert len(asked) == ASKED
    assert np.bincount(asked.targets).tolist() == [10] * 10


def test_the_artifact_is_asked_through_its_own_preprocessing(digits_artifact: Artifact) -> None:
    samples = digits_artifact.samples()
    decided = samples.outputs["logits"].argmax(axis=1)
    assert ask_artifact(digits_artifact, Samples(raw=samples.raw), device="cpu") == tuple(str(i) for i in decided)


def answers(*predicted: str) -> Answers:
    return Answers(asked=len(predicted), correct=0, predicted=predicted, expected=predicted)


def test_answers_that_the_artifact_does_not_give_itself_are_counted_in_the_error() -> None:
    check_answers(answers("4", "7"), ("4", "7"), title="it")
    with pytest.raises(
        GateError, match=r"labels 2 of 3 samples otherwise .*sample 1 is '9' there and '7' here"
    ) as caught:
        check_answers(answers("4", "9", "1"), ("4", "7", "2"), title="it")
    assert caught.value.exit_status == 1


@pytest.mark.parametrize(("wrong", "raised"), [(0, None), (1, "labels 1 of 16 samples otherwise")])
def test_quickstart_ends_with_an_error_after_its_report_where_the_service_answers_otherwise(
    wrong: int, raised: str | None, digits_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but asking is taken as done."""
    samples = digits_artifact.samples()
    own = list(ask_artifact(digits_artifact, samples, device="cpu"))
    given = [*(["none"] * wrong), *own[wrong:]]
    concluded: list[Answers] = []
    report = SimpleNamespace(chosen=digits_artifact.title, chosen_because="it is the only one")
    measured = SimpleNamespace(report=report)
    checkpoint = SimpleNamespace(name="digits", samples=lambda split: samples, spec=SimpleNamespace(labels=()))
    done: dict[str, Callable[..., Any]] = {
        "check_first": lambda *_, **__: None,
        "train_recipe": lambda *_: checkpoint,
        "_export": lambda *_, **__: ([digits_artifact], {}),
        "verify_artifact": lambda *_, **__: SimpleNamespace(parity=SimpleNamespace(provider="it")),
        "measure": lambda *_, **__: measured,
        "choose_fastest": lambda *_, **__: measured,
        "merge": lambda *_: measured,
        "calibrated": lambda *_: measured,
        "save_or_rescue": lambda *_: report,
        "ServerProcess": lambda *_, **__: nullcontext(SimpleNamespace(url="http://it")),
        "ask_service": lambda *_, **__: answers(*given),
        "_conclude": lambda *arguments: concluded.append(arguments[3]),
        "Outcome": lambda **named: named["answers"],
    }
    for name, instead in done.items():
        monkeypatch.setattr(stages, name, instead)
    with pytest.raises(GateError, match=raised) if raised else nullcontext():
        quickstart(device="cpu")
    assert [one.predicted for one in concluded] == [tuple(given)]
