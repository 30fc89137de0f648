"""Int8 that loses too much: the layers at fault are found and returned to fp32, and what nothing helps is refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from dlops import cli
from dlops.artifact import Artifact, Variant, open_artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import GateError, LossError, UsageError
from dlops.export import making, reduce, to_onnx
from dlops.export.explain import write_page
from dlops.export.formats import ExportRequest
from dlops.export.layers import LayerError, Ranking, find_layers, rank_layers
from dlops.export.pipeline import export_variants, rank_variant
from dlops.export.precision import stored_weights
from dlops.export.recover import Recovery
from dlops.export.repair import fewest
from dlops.export.reproduce import reproduce_artifact
from dlops.inspect import describe
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, open_session
from dlops.saving import save_checkpoint
from dlops.signature import Feed, Signature

from .conftest import PREPROCESS, SmallNet, split

SaveDigits = Callable[..., Checkpoint]
# A channel so much wider than the others leaves them no step of 256.
WIDER = 1000.0


def widened(model: nn.Module, *norms: int) -> nn.Module:
    """The same function with one channel after each of these batch norms 1000 times as large.

    ReLU passes the factor on, and the layer behind divides by it (Nagel et al. 2019 even such channels out).
    """
    model = copy.deepcopy(model)
    readers = {1: model.features[3], 4: model.features[7], 8: model.classify}
    with torch.no_grad():
        for place in norms:
            model.features[place].weight[5] *= WIDER
            model.features[place].bias[5] *= WIDER
            readers[place].weight[:, 5] /= WIDER
    return model


@pytest.fixture(scope="module")
def unequal(
    digits_model: nn.Module, save_digits_checkpoint: SaveDigits, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """Digits with one wide channel between the first and the second convolution."""
    return save_digits_checkpoint(tmp_path_factory.mktemp("unequal") / "run", widened(digits_model, 1))


@pytest.fixture(scope="module")
def ranking(unequal: Checkpoint) -> Ranking:
    return rank_variant(unequal, variant="onnx-int8", model=SmallNet)


@pytest.fixture(scope="module")
def repaired(unequal: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    (made,) = export_variants(unequal, variants=["onnx-int8"], out=tmp_path_factory.mktemp("repaired"), model=SmallNet)
    return made


def names(ranking: Ranking) -> list[str]:
    return [error.layer.name for error in ranking.layers]


def test_the_two_layers_around_a_wide_channel_add_the_most_error(ranking: Ranking) -> None:
    assert set(names(ranking)[:2]) == {"features.0", "features.3"}
    assert len(names(ranking)) == 4
    assert sum(error.share for error in ranking.layers[:2]) > 0.9
    assert sum(error.share for error in ranking.layers) == pytest.approx(1)
    worst, best = ranking.layers[0], ranking.layers[-1]
    assert worst.alone_db is not None
    assert best.alone_db is not None
    assert worst.alone_db < 10 < 25 < best.alone_db
    assert [error.share for error in ranking.layers] == sorted((error.share for error in ranking.layers), reverse=True)


def test_a_layer_is_described_by_its_module_operator_and_weights(ranking: Ranking) -> None:
    found = {error.layer.name: error.layer for error in ranking.layers}
    assert (found["features.3"].operator, found["features.3"].kind) == ("Conv", "3×3")
    assert found["features.3"].weights == 64 * 32 * 9
    # Its activation and the pooling go with it: alone they would still be quantized.
    assert len(found["features.3"].nodes) == 3
    assert found["classify"].weights == 640


def test_the_sqnr_of_a_layers_own_output_holds_the_error_that_came_in(ranking: Ranking) -> None:
    """Why the order is not by it: layers that add next to nothing look as bad as those at fault."""
    innocent = next(error for error in ranking.layers if error.layer.name == "features.7")
    assert innocent.local_db is not None
    assert innocent.alone_db is not None
    assert innocent.local_db < 10 < 25 < innocent.alone_db


@pytest.mark.parametrize("precision", ["int8dyn", "int8wo"])
def test_layers_that_are_quantized_without_ranges_are_ranked_and_returned(
    unequal: Checkpoint, small_net: type[nn.Module], tmp_path: Path, precision: str
) -> None:
    slug = f"onnx-{precision}"
    with pytest.raises(LossError):
        export_variants(unequal, variants=[slug], out=tmp_path, model=small_net, repair=False)
    ranking = rank_variant(unequal, variant=slug, model=small_net)
    # The convolution that reads the wide channel; weights before it have a scale a channel.
    assert names(ranking)[0] == "features.3"
    assert set(names(ranking)) == {"features.0", "features.3", "features.7", "classify"}
    assert all(error.layer.weights for error in ranking.layers)
    (made,) = export_variants(unequal, variants=[slug], out=tmp_path, model=small_net)
    assert made.repair is not None
    assert made.repair.layers[0].name == "features.3"
    assert len(made.repair.layers) <= 2
    left = {layer.name for layer in made.repair.layers}
    floats = {
        one.name.removesuffix(".weight")
        for one in onnx.load(made.path("model")).graph.initializer
        if one.data_type == onnx.TensorProto.FLOAT and one.name.endswith(".weight") and len(one.dims) > 1
    }
    assert floats == left
    assert made.accuracy is not None
    assert made.accuracy.drop_points <= 1
    assert reproduce_artifact(made, unequal, model=small_net).same == "file"


def test_without_calibration_samples_layers_at_fault_are_not_looked_for(
    digits_model: nn.Module, save_digits_checkpoint: SaveDigits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_digits_checkpoint(tmp_path / "run", widened(digits_model, 1), calibration=None)
    with pytest.raises(UsageError, match="ranked on calibration samples, and checkpoint 'digits' has none"):
        rank_variant(run, variant="onnx-int8wo", model=SmallNet)
    with pytest.raises(LossError):
        export_variants(run, variants=["onnx-int8wo"], out=tmp_path / "out", model=SmallNet)
    assert "no calibration samples in the checkpoint" in capsys.readouterr().err


def test_without_repair_it_is_refused(
    unequal: Checkpoint, small_net: type[nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LossError, match="outputs differ from the reference"):
        export_variants(unequal, variants=["onnx-int8"], out=tmp_path, model=small_net, repair=False)
    assert "in fp32" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_repaired_artifact_passes_and_says_which_layers_stayed_in_fp32(
    repaired: Artifact, ranking: Ranking
) -> None:
    artifact = open_artifact(repaired.directory)
    record = artifact.repair
    assert record is not None
    assert [layer.name for layer in record.layers] == names(ranking)[:2]
    assert [layer.share for layer in record.layers] == [error.share for error in ranking.layers[:2]]
    assert (record.of, record.tries) == (len(ranking.layers), 3)
    assert "SQNR" in record.because
    assert record.float_share == pytest.approx((288 + 64 * 32 * 9) / ranking.weights)
    assert artifact.parity.sqnr_db is not None
    assert artifact.parity.sqnr_db > 20
    session = open_session(artifact, SessionOptions(device="cpu", threads=1))
    assert self_test(artifact, session).samples == 32
    session.close()


def test_the_layers_are_fp32_in_the_file_and_the_others_int8(repaired: Artifact, unequal: Checkpoint) -> None:
    weights = stored_weights(onnx.load(repaired.path("model")))
    assert weights.users["FLOAT", "Conv"] == 288 + 64 * 32 * 9 + 32 + 64
    assert weights.elements["INT8"] == 64 * 64 * 9 + 640
    assert repaired.model_bytes < 0.75 * unequal.files["weights"].bytes


@pytest.mark.usefixtures("captured_anew")
def test_a_repaired_artifact_is_kept_while_nothing_changed_and_comes_out_again_byte_for_byte(
    repaired: Artifact, unequal: Checkpoint, small_net: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reproduce_artifact(repaired, unequal, model=small_net)
    assert (found.same, found.differences) == ("file", ())
    out = repaired.directory.parents[1]
    # That it was repaired is a setting: without it the artifact would not be there.
    with pytest.raises(LossError):
        export_variants(unequal, variants=["onnx-int8"], out=out, model=small_net, repair=False)
    monkeypatch.setattr(making, "repair_layers", lambda *_, **__: pytest.fail("it was made again"))
    (kept,) = export_variants(unequal, variants=["onnx-int8"], out=out, model=small_net)
    assert (kept.created, kept.repair) == (repaired.created, repaired.repair)


def test_repair_goes_by_the_ranges_of_the_method_that_was_asked_for(
    unequal: Checkpoint, small_net: type[nn.Module], tmp_path: Path
) -> None:
    ranking = rank_variant(unequal, variant="onnx-int8", model=small_net, calibration_method="percentile")
    (made,) = export_variants(
        unequal, variants=["onnx-int8"], out=tmp_path, model=small_net, calibration_method="percentile"
    )
    assert made.repair is not None
    assert made.provenance.notes["calibration_method"] == "percentile"
    shares = [(layer.name, layer.share) for layer in made.repair.layers]
    assert shares == [(error.layer.name, error.share) for error in ranking.layers[: len(shares)]]


def test_inspect_shows_the_repair(repaired: Artifact, ranking: Ranking) -> None:
    facts = describe(repaired.directory).facts["Layers in fp32"]
    assert facts["kept"].startswith(f"2 of {len(ranking.layers)} layers")
    assert facts["tries"].startswith("3 ")
    assert any("features.3" in name and "dB" in text for name, text in facts.items())


def test_a_model_that_int8_does_not_hurt_is_left_whole(exported_dense: dict[str, Artifact]) -> None:
    assert exported_dense["onnx-int8"].repair is None
    assert "Layers in fp32" not in describe(exported_dense["onnx-int8"].directory).facts


def test_what_no_allowed_number_of_layers_helps_is_refused_naming_those_tried(
    digits_model: nn.Module, save_digits_checkpoint: SaveDigits, small_net: type[nn.Module], tmp_path: Path
) -> None:
    checkpoint = save_digits_checkpoint(tmp_path / "run", widened(digits_model, 1, 4, 8))
    with pytest.raises(LossError, match=r"did not help: 1, 2 of 4 were tried, 2 at most \((features|classify).* dB"):
        export_variants(checkpoint, variants=["onnx-int8"], out=tmp_path / "out", model=small_net)
    assert not (tmp_path / "out").exists()


class _Masked(nn.Module):
    """One more class, masked by a large negative bias: its logit takes all 256 steps."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_a_masked_class_breaks_the_last_layer_alone(save_digits_checkpoint: SaveDigits, tmp_path: Path) -> None:
    torch.manual_seed(0)
    train = split()[0]
    model = _Masked()
    inputs, targets = torch.from_numpy(PREPROCESS.batch(train.raw)), torch.from_numpy(train.targets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.net[3].bias[10] = -3e4
    labels = (*"0123456789", "none")
    checkpoint = save_digits_checkpoint(tmp_path / "run", model, labels=labels)
    (made,) = export_variants(checkpoint, variants=["onnx-int8"], out=tmp_path / "out", model=_Masked)
    assert made.repair is not None
    assert [layer.name for layer in made.repair.layers] == ["net.3"]
    # The masked class makes the signal, so its ratio to the noise is no warning; the decisions are.
    assert "decisions differ" in made.repair.because
    assert made.accuracy is not None
    assert made.accuracy.drop_points <= 1


def test_layers_are_ranked_on_calibration_samples_alone(
    unequal: Checkpoint, small_net: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Feed] = []

    def watched(calibrated: object, feed: Feed, signature: Signature) -> Ranking:
        seen.append(feed)
        return rank_layers(calibrated, feed, signature)  # type: ignore[arg-type]

    monkeypatch.setattr(making, "rank_layers", watched)
    rank_variant(unequal, variant="onnx-int8", model=small_net)
    calibration = unequal.samples("calibration")
    assert calibration is not None
    (feed,) = seen
    assert np.array_equal(
        next(iter(feed.values())), next(iter(calibration.feed(unequal.spec.preprocess, "x").values()))
    )


def test_where_pruning_lost_the_accuracy_no_layer_is_blamed(
    checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(reduce, "recover", lambda *_, **__: Recovery(
        samples=0, epochs=0, loss_before=0.0, loss_after=0.0, ended="epochs"
    ))  # fmt: skip
    with pytest.raises(LossError, match=r"points lost .* above the 1 allowed \(allow more with"):
        export_variants(checkpoint, variants=["onnx-int8-pruned50"], out=tmp_path, model=small_net)
    assert "the same in fp32 is refused, too" in capsys.readouterr().err


def _tiny(folder: Path) -> ExportRequest:
    """An int8 export of a network whose graph outweighs its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    inputs = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    checkpoint = save_checkpoint(
        model, folder / "run", evaluation=(inputs[:8], np.arange(8)), calibration=(inputs[8:], np.arange(8))
    )
    return ExportRequest(
        module=model, signature=checkpoint.signature, variant=Variant(format="onnx", precision="int8"),
        into=folder / "model.onnx", title="it", calibration={checkpoint.signature.inputs[0].name: inputs[8:]},
    )  # fmt: skip


def test_a_file_that_is_int8_in_name_only_is_refused_for_its_weights_or_its_size(tmp_path: Path) -> None:
    request = _tiny(tmp_path)
    calibrated = to_onnx.calibrated(request)
    first, second = find_layers(calibrated, calibrated.quantize())
    assert (first.weights, second.weights) == (32, 64)
    with pytest.raises(GateError, match=r"int8 was asked for, \d\d% of the weights") as light:
        to_onnx.export(replace(request, excluded=second.nodes))
    with pytest.raises(GateError, match=r"the file has \d+ bytes.*int8 in name only") as large:
        to_onnx.export(replace(request, excluded=first.nodes))
    # Neither is a loss that more layers in fp32 could make good.
    assert not isinstance(light.value, LossError)
    assert not isinstance(large.value, LossError)


@pytest.mark.parametrize("limit", [1, 2, 5, 64])
@pytest.mark.parametrize("enough", [1, 2, 3, 33, 64])
def test_the_fewest_layers_that_pass_are_found_in_few_questions(limit: int, enough: int) -> None:
    asked: list[int] = []

    def ask(count: int) -> str:
        asked.append(count)
        if count < enough:
            raise LossError("lost")
        return f"with {count}"

    assert fewest(limit, ask) == ((enough, f"with {enough}") if enough <= limit else None)
    assert len(asked) == len(set(asked)) <= 2 * max(1, limit).bit_length()
    assert max(asked) <= limit


def test_too_many_layers_are_halved_again() -> None:
    def ask(count: int) -> int:
        if count < 5:
            raise LossError("lost")
        if count > 6:
            raise GateError("int8 in name only")
        return count

    assert fewest(64, ask) == (5, 5)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [str(value) for name, value in attrs if name in ("src", "href") and value != "data:,"]


def test_explain_prints_the_table_and_writes_a_page_and_exports_nothing(
    unequal: Checkpoint, small_net: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    own = ModuleType("own_net")
    own.make = small_net  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_net", own)
    monkeypatch.chdir(tmp_path)
    status = cli.run(["export", "--explain", "onnx-int8", str(unequal.directory), "--model", "python:own_net:make"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    lines = [line.strip() for line in shown.out.splitlines() if line.strip().startswith(("features", "classify"))]
    assert len(lines) == 4
    assert {line.split()[0] for line in lines[:2]} == {"features.0", "features.3"}
    assert "18,432" in next(line for line in lines if line.startswith("features.3"))
    assert [path.name for path in tmp_path.iterdir()] == ["reports"]
    (path,) = (tmp_path / "reports").iterdir()
    assert path.name == "digits-onnx-int8-layers.html"
    assert f"page: reports/{path.name}" in shown.err
    page = _Page()
    page.feed(text := path.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 2
    # The other two add less than can be drawn.
    assert page.tags.count("rect") == 2 * 2
    assert "script" not in page.tags
    assert page.outside == []
    assert text.count("features.3") >= 3


def test_only_int8_can_be_explained(unequal: Checkpoint, small_net: type[nn.Module]) -> None:
    with pytest.raises(UsageError, match="onnx-fp16: none of its layers is quantized"):
        rank_variant(unequal, variant="onnx-fp16", model=small_net)


def test_names_of_layers_are_text_on_the_page(ranking: Ranking, tmp_path: Path) -> None:
    error: LayerError = ranking.layers[0]
    strange = replace(error, layer=replace(error.layer, name="<script>alert(1)</script>"))
    path = write_page(replace(ranking, layers=(strange,)), tmp_path)
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
