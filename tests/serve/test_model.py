"""How a model is loaded: how many instances, and whether it runs on the event loop."""

from __future__ import annotations

import numpy as np
import pytest

from dlops.artifact import Artifact
from dlops.runtimes import SessionOptions, open_session
from dlops.serve import model as models
from dlops.serve.cells import Cells
from dlops.serve.metrics import Metrics
from dlops.serve.model import ServedModel, load_model
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


def test_the_configuration_says_what_is_in_force(digits_artifact: Artifact) -> None:
    config = loaded(digits_artifact).config()
    assert config["version_policy"] == {"latest": {"num_versions": 1}}
    # Of the 64 rows that a request may have.
    assert config["max_batch_size"] == 64
    assert config["dynamic_batching"] == {"preferred_batch_size": [32], "max_queue_delay_microseconds": 0}
    config = loaded(digits_artifact, queue_delay_us=700, versions=3, max_batch=64, instances=2, workers=2).config()
    assert config["version_policy"] == {"latest": {"num_versions": 3}}
    assert config["dynamic_batching"] == {"preferred_batch_size": [], "max_queue_delay_microseconds": 700}
    assert config["instance_group"][0]["count"] == 4
    assert loaded(digits_artifact, versions=0).config()["version_policy"] == {"all": {}}


def test_batches_that_are_padded_are_told_by_their_sizes(digits_artifact: Artifact) -> None:
    settings = Settings(cuda_graphs=True, max_batch=4)
    session = open_session(digits_artifact, SessionOptions(device="cpu"))
    model = ServedModel(digits_artifact, [session], settings, Metrics(Cells()))
    assert model.config()["dynamic_batching"]["preferred_batch_size"] == [1, 2, 4]
    model.close()


def test_a_session_that_no_longer_runs_is_opened_anew_and_tested(digits_artifact: Artifact, capfd) -> None:
    class Broken:
        def __init__(self, session) -> None:
            self.signature = session.signature
            self.works = False
            self._session = session

        def run(self, feed):
            if not self.works:
                raise RuntimeError("an illegal memory access was encountered")
            return self._session.run(feed)

        def close(self) -> None:
            self.closed = True

    settings = Settings(device="cpu", threads=1)
    model = load_model(entry_of(digits_artifact), settings, Metrics(Cells()))
    instance = model.instances[0]
    broken = Broken(instance.session)
    x = {"image": np.zeros((1, 1, 8, 8), np.float32)}
    instance.session = broken
    for _ in range(3):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            instance.run([x], 1)
    assert instance.session is not broken
    assert broken.closed
    assert not instance.is_broken
    assert instance.run([x], 1).outputs["logits"].shape == (1, 10)
    said = capfd.readouterr().err
    assert "a session no longer runs (RuntimeError: an illegal memory access was encountered)" in said
    assert "opened anew, self-test passed" in said
    model.close()
