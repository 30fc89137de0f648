"""Whether a variant is worth having: what is compared with what, the verdict, and the reason where it is no faster."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from dlops.artifact import Artifact, FloatLayer, Repair, Variant, Worth, open_artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import CorruptError, GateError
from dlops.export import gates, making, slowness, worth
from dlops.export.pipeline import export_variants
from dlops.export.slowness import Operator, Side, operators_of, reasons
from dlops.export.worth import median_interval, narrowed_widths, parent_of, verdict_on, weigh, worth_text
from dlops.inspect import describe
from dlops.runtimes import Placement, SessionOptions, open_session
from dlops.signature import Feed

OPTIONS = SessionOptions(device="cpu", threads=1)
WORTH = Worth(
    parent="onnx-fp32",
    batch=1,
    speed=0.5,
    speed_low=0.4,
    speed_high=0.6,
    size=1.0,
    verdict="neither",
    reason="it is so",
)


@pytest.mark.parametrize(
    ("slug", "parent"),
    [
        ("onnx-fp32", None),
        ("onnx-int8", "onnx-fp32"),
        ("torchscript-bf16", "torchscript-fp32"),
        ("onnx-fp32-pruned50", "onnx-fp32"),
        ("onnx-int8-pruned50", "onnx-int8"),
    ],
)
def test_a_variant_is_compared_with_what_it_was_made_of(slug: str, parent: str | None) -> None:
    found = parent_of(Variant.parse(slug))
    assert (found.slug if found else None) == parent


@pytest.mark.parametrize(("count", "outside"), [(6, 0), (8, 0), (9, 1), (12, 2), (20, 5)])
def test_the_interval_of_a_median_leaves_out_as_many_values_as_tables_of_the_sign_test_do(
    count: int, outside: int
) -> None:
    median, low, high = median_interval([float(value) for value in reversed(range(count))])
    assert (median, low, high) == ((count - 1) / 2, outside, count - 1 - outside)


def test_five_values_have_no_such_interval() -> None:
    with pytest.raises(ValueError, match="6 are the fewest"):
        median_interval([1.0] * 5)


@pytest.mark.parametrize(
    ("low", "high", "size", "verdict"),
    [
        (1.1, 1.3, 2.0, "both"),
        (1.1, 1.3, 1.0, "faster"),
        (0.5, 0.9, 2.0, "smaller"),
        (0.5, 3.0, 2.0, "smaller"),
        (0.5, 0.9, 1.01, "neither"),
        (0.97, 1.02, 0.9, "neither"),
        (0.5, 3.0, 1.0, "unsure"),
    ],
)
def test_the_verdict_goes_by_the_whole_interval_and_the_size(
    low: float, high: float, size: float, verdict: str
) -> None:
    assert verdict_on(low, high, size=size) == verdict


class _Slowed:
    """A session that takes 20 ms a call longer."""

    def __init__(self, artifact: Artifact, options: SessionOptions | None = None) -> None:
        self._session = open_session(artifact, options)
        self.placement = self._session.placement

    def run(self, feed: Feed) -> Feed:
        time.sleep(0.02)
        return self._session.run(feed)

    def close(self) -> None:
        self._session.close()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worth, "BUDGET_S", 0.01)
    monkeypatch.setattr(worth, "_WARMUP_S", 0.01)


def test_one_that_is_slower_and_larger_is_not_worth_it_and_the_reason_is_looked_for(
    exported_dense: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    small, large = exported_dense["onnx-int8"], exported_dense["onnx-fp32"]
    monkeypatch.setattr(worth, "open_session", lambda side, options: (
        _Slowed if side is large else open_session)(side, options))  # fmt: skip
    found = weigh(large, small, large.samples().inputs, widths=[], options=OPTIONS)
    assert found.verdict == "neither"
    assert found.speed_high < 0.9
    assert found.size == small.model_bytes / large.model_bytes < 1
    assert found.reason is not None
    assert "the rest is the call itself" in found.reason or "its kernels take" in found.reason
    assert worth_text(found).startswith("NOT WORTH IT here")
    turned = weigh(small, large, large.samples().inputs, widths=[], options=OPTIONS)
    assert (turned.verdict, turned.reason) == ("both", None)
    assert "NOT WORTH" not in worth_text(turned)


def test_what_onnx_runtime_truly_runs_is_read_from_its_profile(exported_dense: dict[str, Artifact]) -> None:
    feed = {name: array[:1] for name, array in exported_dense["onnx-int8"].samples().inputs.items()}
    operators = operators_of(exported_dense["onnx-int8"], feed, OPTIONS)
    assert operators is not None
    assert operators["QLinearConv"].count == 3
    assert operators["QLinearConv"].ns > 0
    assert "Conv" not in operators
    assert operators_of(exported_dense["torchscript-fp32"], feed, OPTIONS) is None


def side(slug: str, *, precision: str | None = None, **changes: object) -> Side:
    variant = Variant.parse(slug)
    placement = Placement(
        runtime="onnxruntime", device="cpu", provider="CPUExecutionProvider", threads=1,
        precision=precision or variant.precision,
    )  # fmt: skip
    return replace(Side(variant=variant, placement=placement, latency_ns=100e3, operators=None), **changes)


def test_half_precision_that_the_cpu_widens_is_said_of_a_real_session(exported_dense: dict[str, Artifact]) -> None:
    session = open_session(exported_dense["onnx-fp16"], OPTIONS)
    found = reasons(side("onnx-fp16", placement=session.placement), side("onnx-fp32"), widths=[], repair=None)
    session.close()
    assert found == ("CPUExecutionProvider computes fp16 in fp32 here, and converts at the ends",)


def test_products_without_an_integer_kernel_and_pairs_that_were_not_fused_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slowness, "saturates", lambda: False)
    operators = {
        "QLinearConv": Operator(count=3, ns=10e3), "Conv": Operator(count=2, ns=40e3),
        "QuantizeLinear": Operator(count=4, ns=30e3), "DequantizeLinear": Operator(count=5, ns=20e3),
    }  # fmt: skip
    parent = {"FusedConv": Operator(count=5, ns=60e3)}
    found = reasons(side("onnx-int8", operators=operators), side("onnx-fp32", operators=parent), widths=[], repair=None)
    assert found == (
        "no integer kernel for 2 of 5 products: Conv (2)",
        "50% of the kernels' time goes to 5 DequantizeLinear and 4 QuantizeLinear left in the graph",
        "its kernels take 100 µs (Conv 40, QuantizeLinear 30), those of onnx-fp32 60 µs (FusedConv 60)",
    )


def test_nodes_that_fell_back_widths_and_repaired_layers_are_named() -> None:
    cuda = Placement(
        runtime="onnxruntime", device="cuda:0", provider="CUDAExecutionProvider", precision="int8", threads=1,
        nodes={"CUDAExecutionProvider": {"Conv": 2}, "CPUExecutionProvider": {"QLinearConv": 3, "Shape": 1}},
    )  # fmt: skip
    whole = replace(
        cuda, precision="fp32", nodes={"CUDAExecutionProvider": {"Conv": 5}, "CPUExecutionProvider": {"Shape": 1}}
    )
    layer = FloatLayer(name="a", operator="Conv", weights=1, alone_db=None, share=0.0)
    found = reasons(
        side("onnx-int8-pruned50", placement=cuda), side("onnx-int8", placement=whole), widths=[22, 32],
        repair=Repair(because="", layers=(layer,), of=7, float_share=0.1, tries=2),
    )  # fmt: skip
    assert found == (
        "4 nodes fell back from CUDAExecutionProvider, 1 of onnx-int8: QLinearConv (3), Shape (1)",
        "1 of 2 layers have a width that is no multiple of 8 (22)",
        "1 of 7 layers were returned to fp32",
    )


def test_a_cpu_without_vnni_is_why_int8_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slowness, "saturates", lambda: True)
    (found,) = reasons(side("onnx-int8"), side("onnx-fp32"), widths=[], repair=None)
    assert "no VNNI" in found


def test_only_layers_that_pruning_narrowed_count_among_the_widths() -> None:
    dense = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Linear(32, 10))
    pruned = nn.Sequential(nn.Conv2d(1, 22, 3), nn.ReLU(), nn.Linear(22, 10))
    assert narrowed_widths(pruned, dense) == [22]


def test_an_export_records_the_comparison_and_leaves_no_parent_behind(
    checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path, short: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"variants": ["onnx-int8wo"], "out": tmp_path, "model": small_net, "max_drop": 2.0}
    (made,) = export_variants(checkpoint, worth=True, **arguments)
    assert made.worth is not None
    assert made.worth.parent == "onnx-fp32"
    assert made.worth.size > 3
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["onnx-int8wo"]
    assert open_artifact(made.directory).worth == made.worth
    assert "as fast as onnx-fp32" in capsys.readouterr().err
    assert f"than {made.worth.parent}" in describe(made.directory).facts["Worth it"]
    # Not asked for, nothing is timed; it decides nothing, so what lies there is kept.
    assert export_variants(checkpoint, **arguments)[0].worth == made.worth


def test_the_parent_that_lies_there_is_taken_unless_it_is_another_checkpoints_or_damaged(
    checkpoint: Checkpoint, digits_model: nn.Module, save_digits_checkpoint, small_net: type[nn.Module], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seen: list[Artifact] = []

    def weighed(artifact: Artifact, parent: Artifact, feed: Feed, **_: object) -> Worth:
        seen.append(parent)
        return WORTH

    monkeypatch.setattr(making, "weigh", weighed)
    arguments = {"out": tmp_path, "model": small_net, "max_drop": 2.0, "worth": True, "force": True}
    (parent,) = export_variants(checkpoint, variants=["torchscript-fp32"], **arguments)
    assert parent.worth is None
    assert not seen
    export_variants(checkpoint, variants=["torchscript-bf16"], **arguments)
    assert seen.pop().directory == parent.directory
    other = save_digits_checkpoint(tmp_path / "runs" / "other", digits_model, seed=7)
    export_variants(other, variants=["torchscript-bf16"], **arguments)
    assert seen.pop().directory != parent.directory
    parent.path("model").write_bytes(b"")
    (made,) = export_variants(checkpoint, variants=["torchscript-bf16"], **arguments)
    assert seen.pop().directory != parent.directory
    assert "torchscript-fp32: passed over" in capsys.readouterr().err
    assert made.worth == WORTH


def test_a_comparison_that_fails_refuses_nothing_and_a_refused_variant_is_not_compared(
    checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked = []

    def failing(artifact: Artifact, *_: object, **__: object) -> Worth:
        asked.append(artifact.slug)
        raise CorruptError("it cannot be opened")

    monkeypatch.setattr(making, "weigh", failing)
    arguments = {"variants": ["torchscript-bf16"], "out": tmp_path, "model": small_net, "max_drop": 2.0, "worth": True}
    (made,) = export_variants(checkpoint, **arguments)
    assert made.worth is None
    assert "not compared with torchscript-fp32: it cannot be opened" in capsys.readouterr().err
    assert asked == ["torchscript-bf16"]
    monkeypatch.setattr(gates, "check_drop", _refuse)
    with pytest.raises(GateError, match="lost"):
        export_variants(checkpoint, **arguments, force=True)
    assert asked == ["torchscript-bf16"]


def _refuse(*_: object, **__: object) -> None:
    raise GateError("lost")
