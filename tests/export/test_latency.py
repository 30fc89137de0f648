from __future__ import annotations

import pytest
from torch import nn

from dlops.artifact import Variant
from dlops.checkpoint import Checkpoint
from dlops.errors import GateError, UsageError
from dlops.export.latency import fit_latency
from dlops.export.pipeline import prune_to_latency

INT8 = Variant(format="onnx", precision="int8")


def falling(percent: float) -> float:
    return 0.010 * (1 - percent)


@pytest.mark.parametrize(
    ("target_s", "slug"),
    [
        (0.011, "onnx-int8"), (0.010, "onnx-int8"), (0.00951, "onnx-int8-pruned05"), (0.00601, "onnx-int8-pruned40"),
        (0.00599, "onnx-int8-pruned41"), (0.00051, "onnx-int8-pruned95"),
    ],
)  # fmt: skip
def test_the_least_pruning_that_keeps_the_target_is_found_in_few_measurements(target_s: float, slug: str) -> None:
    fitted = fit_latency(INT8, target_s=target_s, time_of=lambda variant: falling(variant.pruned_fraction))
    assert fitted.variant.slug == slug
    assert fitted.p50_s[fitted.percent] <= target_s
    assert len(fitted.p50_s) <= 2 + 7


def test_a_target_that_no_pruning_keeps_is_refused_with_what_was_measured() -> None:
    with pytest.raises(GateError, match=r"p50 is 10 ms dense and 0\.5 ms with 95 % of the MACs removed, above 0\.4 ms"):
        fit_latency(INT8, target_s=0.0004, time_of=lambda variant: falling(variant.pruned_fraction))


def test_candidates_are_timed_in_their_runtime_without_recovery(
    checkpoint: Checkpoint, small_net: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("recovered")

    monkeypatch.setattr("dlops.export.reduce.recover", fail)
    monkeypatch.setattr("dlops.export.latency.TIMED_S", 0.05)
    found = prune_to_latency(checkpoint, variant="onnx-fp32", target_s=1.0, model=small_net)
    assert found.variant.slug == "onnx-fp32"
    assert 0 < found.p50_s[0] < 1
    # Nothing is as fast as that: dense and the strongest pruning are tried, and both reported.
    with pytest.raises(GateError, match="with 95 % of the MACs removed") as refused:
        prune_to_latency(checkpoint, variant="onnx-fp32", target_s=1e-9, model=small_net)
    assert "higher target" in (refused.value.hint or "")


def test_only_dense_variants_and_times_above_zero_can_be_asked_for(checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="onnx-fp32-pruned50 is pruned already"):
        prune_to_latency(checkpoint, variant="onnx-fp32-pruned50", target_s=0.01)
    with pytest.raises(UsageError, match="latency of 0 s"):
        prune_to_latency(checkpoint, variant="onnx-fp32", target_s=0)
