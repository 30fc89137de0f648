from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dlops import parity
from dlops.artifact import Artifact, OwnError, Tolerance
from dlops.directory import DirectoryWriter
from dlops.errors import CorruptError, GateError
from dlops.parity import (
    TOLERANCES,
    Errors,
    check_parity,
    compare,
    run_batched,
    self_test,
    shortfalls,
    stricter,
    tolerance_for,
    tolerance_on,
)
from dlops.preprocess import Scale
from dlops.runtimes import Placement, SessionOptions, open_session
from dlops.signature import DimRange, Feed, Signature, TensorSpec
from dlops.tasks import open_task

TASK = open_task("classification")
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((50, 10)).astype(np.float32)
CPU = SessionOptions(device="cpu", threads=1)


def feed(array: np.ndarray) -> Feed:
    return {"logits": array}


def test_equal_outputs_have_no_error_at_all() -> None:
    errors = compare(feed(LOGITS), feed(LOGITS.copy()), task=TASK)
    assert errors == Errors(samples=50, max_abs=0.0, max_rel=0.0, sqnr_db=None, agreement=1.0, decisions=50)


def test_sqnr_is_the_power_ratio_in_decibels() -> None:
    assert compare(feed(LOGITS), feed(LOGITS * np.float32(1.1)), task=TASK).sqnr_db == pytest.approx(20, abs=1e-3)


def test_max_rel_is_over_the_largest_reference_value() -> None:
    changed = LOGITS.copy()
    changed[3, 4] += 0.5
    assert compare(feed(LOGITS), feed(changed), task=TASK).max_rel == pytest.approx(
        0.5 / np.abs(LOGITS).max(), rel=1e-5
    )


def test_agreement_counts_decisions_that_stay() -> None:
    changed = LOGITS.copy()
    changed[:5] = -changed[:5]
    assert compare(feed(LOGITS), feed(changed), task=TASK).agreement == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("reference", "outputs", "said"),
    [
        (LOGITS[:0], LOGITS[:0], "empty"),
        (np.ones((5, 3), np.float32), np.ones((5, 3), np.float32), "same output for every sample"),
        (np.full((5, 3), np.nan, np.float32), np.full((5, 3), np.nan, np.float32), "NaN"),
        (LOGITS, np.where(LOGITS > 2, np.inf, LOGITS).astype(np.float32), "NaN or infinity"),
        (LOGITS, LOGITS[:-1], "the reference float32"),
        (LOGITS, LOGITS.astype(np.float64), "the reference float32"),
    ],
)
def test_a_comparison_that_proves_nothing_is_refused(reference: np.ndarray, outputs: np.ndarray, said: str) -> None:
    with pytest.raises(GateError, match=said):
        compare(feed(reference), feed(outputs), task=TASK)


def test_other_output_names_are_refused() -> None:
    with pytest.raises(GateError, match="scores"):
        compare(feed(LOGITS), {"scores": LOGITS}, task=TASK)


@pytest.mark.parametrize(
    ("errors", "tolerance", "said"),
    [
        ({"max_abs": 1e-2}, TOLERANCES["fp32"], "absolute"),
        ({"max_rel": 1e-2}, TOLERANCES["fp32"], "relative"),
        ({"max_rel": float("nan")}, TOLERANCES["fp32"], "relative"),
        ({"sqnr_db": 10.0}, TOLERANCES["int8"], "SQNR"),
        ({"agreement": 0.9}, TOLERANCES["int8"], "decisions"),
    ],
)
def test_each_bound_is_held(errors: dict[str, float], tolerance: Tolerance, said: str) -> None:
    fine = {"samples": 100, "max_abs": 0.0, "max_rel": 0.0, "sqnr_db": 40.0, "agreement": 1.0, "decisions": 100}
    assert shortfalls(Errors(**fine), tolerance) == []
    (clause,) = shortfalls(Errors(**(fine | errors)), tolerance)
    assert said in clause


def test_a_small_sample_calls_agreement_too_low_only_beyond_chance() -> None:
    def broken(flips: int) -> list[str]:
        errors = Errors(samples=32, max_abs=0, max_rel=0, sqnr_db=30.0, agreement=1 - flips / 32, decisions=32)
        return shortfalls(errors, TOLERANCES["int8"], sampled=True)

    # 2 of 32 are 6 %, which a true rate of 5 % often gives; 12 of 32 it gives once in a million.
    assert broken(2) == []
    assert broken(12) != []


def test_fp32_on_cuda_is_held_to_half_precision_since_it_computes_in_tf32() -> None:
    cuda = Placement(runtime="r", device="cuda:0", provider="p", precision="fp32", threads=1)
    cpu = Placement(runtime="r", device="cpu", provider="p", precision="fp32", threads=1)
    assert tolerance_on(cuda, "fp32", TOLERANCES["fp32"]) == TOLERANCES["fp16"]
    assert tolerance_on(cpu, "fp32", TOLERANCES["fp32"]) == TOLERANCES["fp32"]
    assert tolerance_on(cuda, "int8", TOLERANCES["int8"]) == TOLERANCES["int8"]


class _WrongAtBatch:
    """Answers its input, except that batches of one size come out doubled."""

    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 10)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 10)),),
        dims={"batch": DimRange(max=64)},
    )
    placement = Placement(runtime="fake", device="cpu", provider="fake", precision="fp32", threads=1)

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, feed: Feed) -> Feed:
        return {"logits": feed["x"] * np.float32(2 if len(feed["x"]) == self.size else 1)}

    def close(self) -> None: ...


def test_parity_names_the_batch_that_is_wrong() -> None:
    arguments = {"task": TASK, "tolerance": TOLERANCES["fp32"], "title": "it"}
    session = _WrongAtBatch(7)
    assert check_parity(session, {"x": LOGITS}, feed(LOGITS), batches=[1, 2, 50], **arguments).batches == (1, 2, 50)
    with pytest.raises(GateError, match="batch 7"):
        check_parity(session, {"x": LOGITS}, feed(LOGITS), batches=[1, 7], **arguments)


def test_parity_over_no_batch_is_refused() -> None:
    with pytest.raises(GateError, match="no batch"):
        check_parity(
            _WrongAtBatch(7), {"x": LOGITS}, feed(LOGITS), batches=[], task=TASK, tolerance=Tolerance(), title="it"
        )


def test_the_batch_size_does_not_change_what_is_returned(digits_artifact: Artifact) -> None:
    session = open_session(digits_artifact, CPU)
    inputs = digits_artifact.samples().inputs
    whole, parts = run_batched(session, inputs, 16)["logits"], run_batched(session, inputs, 5)["logits"]
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-5)


def test_self_test_passes_on_a_good_artifact(digits_artifact: Artifact) -> None:
    found = self_test(digits_artifact, open_session(digits_artifact, CPU))
    assert found.batches == (1, 16)
    assert found.samples == 16
    assert found.max_rel < 1e-5


def test_self_test_refuses_a_model_that_computes_something_else(
    make_digits_artifact: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = make_digits_artifact(tmp_path, scale=1.01)
    with pytest.raises(GateError, match="differ from the reference"):
        self_test(artifact, open_session(artifact, CPU))


@pytest.mark.parametrize("recorded", [Tolerance(), Tolerance(max_abs=1e9, max_rel=float("inf"))])
def test_a_recorded_tolerance_cannot_let_a_wrong_model_pass(
    make_digits_artifact: Callable[..., Artifact], tmp_path: Path, recorded: Tolerance
) -> None:
    artifact = make_digits_artifact(tmp_path, scale=1.01)
    own = OwnError(samples=16, max_abs=2e-2, max_rel=5e-3)
    parity = artifact.parity.model_copy(update={"tolerance": recorded, "own_error": own})
    lenient = artifact.model_copy(update={"parity": parity}).located_at(tmp_path)
    with pytest.raises(GateError, match="differ from the reference"):
        self_test(lenient, open_session(artifact, CPU))


def test_the_stricter_of_two_tolerances_is_taken_bound_by_bound() -> None:
    table = Tolerance(max_abs=1e-2, min_sqnr_db=15.0)
    recorded = Tolerance(max_abs=1e-3, max_rel=0.5, min_sqnr_db=10.0)
    assert stricter(recorded, table) == Tolerance(max_abs=1e-3, max_rel=0.5, min_sqnr_db=15.0)
    assert stricter(Tolerance(), table) == table
    assert stricter(Tolerance(max_abs=float("nan")), table) == table
    for precision, tolerance in TOLERANCES.items():
        assert stricter(Tolerance(), tolerance) == tolerance, precision


@pytest.mark.parametrize(
    ("max_abs", "max_rel", "allowed"),
    [
        (1e-5, 1e-6, (2e-4, 1e-4)),
        (1e-3, 1e-6, (4e-3, 1e-4)),
        (1e-3, 1e-3, (4e-3, 4e-3)),
        # Half precision's bounds are the most, and an own error above either excuses nothing.
        (2e-2, 5e-3, (2e-2, 5e-3)),
        (2.1e-2, 1e-3, (2e-4, 1e-4)),
        (1e-3, 5.1e-3, (2e-4, 1e-4)),
        (float("inf"), float("inf"), (2e-4, 1e-4)),
        (float("nan"), 1e-3, (2e-4, 1e-4)),
        (-1.0, -1.0, (2e-4, 1e-4)),
    ],
)
def test_an_own_error_widens_the_bounds_of_fp32_up_to_a_ceiling(
    max_abs: float, max_rel: float, allowed: tuple[float, float]
) -> None:
    own = OwnError(samples=4, max_abs=max_abs, max_rel=max_rel)
    found = tolerance_for("segmentation", "fp32", own=own)
    assert (found.max_abs, found.max_rel) == pytest.approx(allowed)
    for task, precision in (("segmentation", "fp16"), ("segmentation", "int8"), ("detection", "fp32")):
        assert tolerance_for(task, precision, own=own) == tolerance_for(task, precision)


def test_a_precision_without_any_bound_is_not_called_tested(
    make_digits_artifact: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As one of a later version.
    monkeypatch.delitem(parity.TOLERANCES, "fp8")
    artifact = make_digits_artifact(tmp_path, precision="fp8")
    unbound = artifact.model_copy(update={"parity": artifact.parity.model_copy(update={"tolerance": Tolerance()})})
    with pytest.raises(CorruptError, match="records no tolerance"):
        self_test(unbound.located_at(tmp_path), open_session(artifact, CPU))


def test_self_test_refuses_a_preprocessing_that_makes_other_tensors(digits_artifact: Artifact) -> None:
    assert digits_artifact.preprocess is not None
    *kept, _ = digits_artifact.preprocess.steps
    changed = digits_artifact.preprocess.model_copy(update={"steps": (*kept, Scale(factor=1 / 254))})
    other = digits_artifact.model_copy(update={"preprocess": changed})
    with pytest.raises(GateError, match="preprocessing gives other tensors"):
        self_test(other, open_session(digits_artifact, CPU))


def test_self_test_without_samples_is_no_test(digits_artifact: Artifact, tmp_path: Path) -> None:
    empty = digits_artifact.samples().take([])
    with DirectoryWriter(tmp_path) as writer:
        files = {**digits_artifact.files, "samples": writer.add("samples.safetensors", empty.to_bytes())}
        bare = writer.commit(digits_artifact.model_copy(update={"files": files}))
    session = SimpleNamespace(run=lambda feed: feed)
    with pytest.raises(CorruptError, match="no samples"):
        self_test(bare, session)  # type: ignore[arg-type]


def test_self_test_of_onnx_needs_no_torch(digits_artifact: Artifact) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from dlops import open_artifact, open_session; from dlops.parity import self_test\n"
        "from dlops.runtimes import SessionOptions\n"
        "artifact = open_artifact(sys.argv[1])\n"
        "print(self_test(artifact, open_session(artifact, SessionOptions(device='cpu', threads=1))).provider)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(digits_artifact.directory)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "CPUExecutionProvider"
