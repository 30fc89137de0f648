"""How a model is loaded: how many instances, and whether it runs on the event loop."""

from __future__ import annotations

import pytest

from dlops.artifact import Artifact
from dlops.serve import model as models
from dlops.serve.cells import Cells
from dlops.serve.metrics import Metrics
from dlops.serve.model import load_model
from dlops.serve.repository import entry_of
from dlops.serve.settings import Settings


def loaded(artifact: Artifact, **options):
    model = load_model(entry_of(artifact), Settings(device="cpu", threads=1, **options), Metrics(Cells()))
    model.close()
    return model


def test_only_a_model_that_is_always_quick_runs_on_the_event_loop(
    digits_artifact: Artifact, slow_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever the machine does meanwhile.
    monkeypatch.setattr(models, "_INLINE_NS", 10**9)
    assert loaded(digits_artifact).inline
    # A loop in it takes as long as the pixels say.
    assert not loaded(slow_artifact).inline
    assert not loaded(digits_artifact, queue_delay_us=100).inline
    monkeypatch.setattr(models, "_INLINE_NS", 0)
    assert not loaded(digits_artifact).inline


def test_there_are_as_many_instances_as_were_asked_for(digits_artifact: Artifact) -> None:
    model = loaded(digits_artifact, instances=3)
    assert len({id(instance.session) for instance in model.instances}) == 3
    assert not model.inline
    assert model.config()["instance_group"] == [{"name": "digits", "kind": "KIND_CPU", "count": 3}]
    assert len(loaded(digits_artifact).instances) == 1
