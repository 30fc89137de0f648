"""TensorRT engines themselves: every precision computes what the model computed, bound, replayed and from threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import dlops
from dlops import cudart
from dlops.checkpoint import Checkpoint
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, open_session
from dlops.train.launch import configure, train_recipe

CUDA = SessionOptions(device="cuda")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    pytest.importorskip("tensorrt", reason="TensorRT is not installed: pip install 'dlops[tensorrt]'")
    config = configure("cnn", overrides=["epochs=12", "accelerator=cuda"])
    return train_recipe("cnn", config, run_dir=tmp_path_factory.mktemp("gpu") / "run")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "fp8"])
def test_an_engine_computes_what_the_model_computed(precision: str, trained: Checkpoint, tmp_path: Path) -> None:
    if precision == "fp8" and cudart.compute_capability(0) < (8, 9):
        pytest.skip("fp8 takes compute capability 8.9 or later")
    [artifact] = dlops.export_variants(trained, variants=[f"tensorrt-{precision}"], out=tmp_path, device="cuda")
    session = open_session(artifact, CUDA)
    assert session.placement.runtime == "tensorrt"
    self_test(artifact, session)
    feed = artifact.samples().feed(artifact.signature, artifact.preprocess)
    rows = [{name: array[n : n + 2] for name, array in feed.items()} for n in range(0, 16, 2)]
    expected = [session.run(row)["logits"] for row in rows]
    with ThreadPoolExecutor(4) as pool:
        for wanted, found in zip(expected, pool.map(session.run, rows), strict=True):
            np.testing.assert_array_equal(found["logits"], wanted)
    session.close()


def test_two_of_four_weights_may_be_skipped(trained: Checkpoint, tmp_path: Path) -> None:
    [artifact] = dlops.export_variants(
        trained, variants=["tensorrt-fp16-sparse24"], out=tmp_path, device="cuda", max_drop=10
    )
    notes = artifact.provenance.notes
    assert 2 * notes["sparse_zeros"] >= notes["sparse_weights"] > 0
    # As TensorRT's log has it: a version of other words would leave them out, and the docs would be wrong.
    assert notes["sparse_layers_eligible"] >= notes["sparse_layers_chosen"] >= 0
    session = open_session(artifact, CUDA)
    self_test(artifact, session)
    session.close()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_bound_calls_give_the_same(cuda_graph: bool, trained: Checkpoint, tmp_path: Path) -> None:
    [artifact] = dlops.export_variants(trained, variants=["tensorrt-fp16"], out=tmp_path, device="cuda")
    session = open_session(artifact, SessionOptions(device="cuda", cuda_graph=cuda_graph))
    feed = artifact.samples().feed(artifact.signature, artifact.preprocess)
    first, second = ({name: array[rows] for name, array in feed.items()} for rows in (slice(0, 4), slice(4, 8)))
    bound = session.bind(first)
    for one in (second, first):
        bound.copy_in(one)
        bound.run()
        bound.synchronize()
        np.testing.assert_array_equal(bound.copy_out()["logits"], session.run(one)["logits"])
    session.close()
