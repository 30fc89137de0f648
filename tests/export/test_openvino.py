"""OpenVINO's files: what they hold is what was asked for, and nothing of OpenVINO's reports that they were made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as opset
from torch import nn

from dlops.artifact import Artifact, Variant
from dlops.checkpoint import Checkpoint
from dlops.errors import GateError, UsageError
from dlops.export import to_openvino
from dlops.export.formats import ExportRequest
from dlops.export.pipeline import export_variants, rank_variant
from dlops.export.reproduce import reproduce_artifact
from dlops.manifest import Payload
from dlops.runtimes import SessionOptions, open_session
from dlops.signature import DimRange, Signature, TensorSpec

from .conftest import SmallNet
from .test_repair import widened

OPTIONS = SessionOptions(device="cpu", threads=1)
IMAGE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 1, 8, 8)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 1)),), dims={"batch": DimRange(max=4)},
)  # fmt: skip


def read(artifact: Artifact) -> ov.Model:
    return ov.Core().read_model(artifact.path("model"))


def request(module: nn.Module, folder: Path, signature: Signature, precision: str = "fp32") -> ExportRequest:
    return ExportRequest(
        module=module.eval(), signature=signature, variant=Variant(format="openvino", precision=precision),
        into=folder / "model.xml", title="it",
    )  # fmt: skip


def test_named_dims_have_the_ranges_of_the_signature_and_others_are_refused(
    exported_dense: dict[str, Artifact],
) -> None:
    artifact = exported_dense["openvino-fp32"]
    (taken,), (given,) = read(artifact).inputs, read(artifact).outputs
    assert (taken.any_name, str(taken.partial_shape)) == ("input", "[1..32,1,8,8]")
    assert (given.any_name, str(given.partial_shape)) == ("logits", "[1..32,10]")
    session = open_session(artifact, OPTIONS)
    with pytest.raises(RuntimeError, match="incompatible"):
        session.run({"input": np.zeros((33, 1, 8, 8), np.float32)})


def test_openvino_reads_what_the_file_says_of_itself(exported_dense: dict[str, Artifact]) -> None:
    model = read(exported_dense["openvino-int8"])
    assert model.get_rt_info(["dlops", "variant"]).astype(str) == "openvino-int8"
    assert model.get_rt_info(["dlops", "labels"]).astype(str).startswith('["0", "1"')


@pytest.mark.parametrize(
    ("slug", "stored", "computed"),
    [
        ("openvino-fp32", "f32", {"fp32"}), ("openvino-fp16", "f16", {"fp32", "fp16"}),
        ("openvino-bf16", "bf16", {"fp32", "bf16"}), ("openvino-int8", "i8", {"int8"}),
    ],
)  # fmt: skip
def test_weights_are_stored_as_asked_for_and_the_placement_says_what_computes(
    exported_dense: dict[str, Artifact], slug: str, stored: str, computed: set[str]
) -> None:
    artifact = exported_dense[slug]
    kinds = {
        node.get_output_element_type(0).get_type_name()
        for node in read(artifact).get_ops()
        if node.get_type_name() == "Constant" and np.prod(node.get_output_shape(0)) >= 10 * 64
    }
    assert kinds == {stored}
    session = open_session(artifact, OPTIONS)
    assert session.placement.precision in computed
    session.close()


@pytest.mark.parametrize("asked", ["fp32", "fp16", "bf16", "int8"])
def test_a_file_in_another_precision_is_refused(exported_dense: dict[str, Artifact], asked: str) -> None:
    for given in {"fp32", "fp16", "bf16", "int8"} - {asked}:
        artifact = exported_dense[f"openvino-{given}"]
        with pytest.raises(GateError, match=rf"{asked} was asked for, \d+% of the weights .* left over: Convolution"):
            to_openvino.check_written(read(artifact), artifact.signature, precision=asked, title="it")


def renamed(model: ov.Model) -> None:
    model.outputs[0].set_names({"scores"})


def fixed(model: ov.Model) -> None:
    model.reshape([8, 1, 8, 8])


def unbounded(model: ov.Model) -> None:
    model.reshape([-1, 1, 8, 8])


def doubled(model: ov.Model) -> None:
    model.add_outputs(model.get_ordered_ops()[-3].output(0))


def halved(model: ov.Model) -> None:
    (result,) = model.get_results()
    result.input(0).replace_source_output(opset.convert(result.input_value(0), "f16").output(0))
    model.validate_nodes_and_infer_types()
    model.outputs[0].set_names({"logits"})


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (renamed, r"output logits: float32\[batch, 10\] was asked for, the written file has scores"),
        (fixed, r"input input: float32\[batch, 1, 8, 8\] was asked for, .*\[8,1,8,8\]"),
        (unbounded, r"input input: .*\[\?,1,8,8\]"),
        (doubled, "1 outputs asked for, the written file has 2"),
        (halved, r"output logits: float32.* logits: float16"),
    ],
)
def test_a_file_other_than_asked_for_is_refused(
    exported_dense: dict[str, Artifact], alter: Callable[[ov.Model], None], said: str
) -> None:
    artifact = exported_dense["openvino-fp32"]
    model = read(artifact)
    to_openvino.check_written(model, artifact.signature, precision="fp32", title="it")
    alter(model)
    with pytest.raises(GateError, match=said):
        to_openvino.check_written(model, artifact.signature, precision="fp32", title="it")


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.classify = nn.Linear(16, 4)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.classify((self.embed(tokens) * mask[..., None]).sum(1))
        return {"logits": logits, "best": logits.argmax(1)}


def test_several_inputs_and_outputs_keep_names_dtypes_and_dims(
    exported_dense: dict[str, Artifact], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    module = Tokens().eval()
    signature = Signature(
        inputs=(
            TensorSpec(name="tokens", dtype="int64", shape=("batch", "length")),
            TensorSpec(name="mask", dtype="float32", shape=("batch", "length")),
        ),
        outputs=(
            TensorSpec(name="logits", dtype="float32", shape=("batch", 4)),
            TensorSpec(name="best", dtype="int64", shape=("batch",)),
        ),
        dims={"batch": DimRange(max=8), "length": DimRange(min=2, max=16)},
    )
    made = to_openvino.export(request(module, tmp_path, signature))
    model = ov.Core().read_model(made.path)
    shapes = {port.any_name: str(port.partial_shape) for port in (*model.inputs, *model.outputs)}
    assert shapes == {"tokens": "[1..8,2..16]", "mask": "[1..8,2..16]", "logits": "[1..8,4]", "best": "[1..8]"}

    files = {role: Payload(path=path.name, sha256="0" * 64, bytes=0) for role, path in made.files.items()}
    like = exported_dense["openvino-fp32"]
    artifact = like.model_copy(update={"signature": signature, "files": files}).located_at(tmp_path)
    session = open_session(artifact, OPTIONS)
    for batch, length in ((1, 2), (5, 11), (8, 16)):
        feed = {
            "tokens": rng.integers(0, 50, (batch, length)), "mask": rng.random((batch, length)).astype(np.float32)
        }  # fmt: skip
        found = session.run(feed)
        with torch.no_grad():
            expected = module(*map(torch.from_numpy, feed.values()))
        np.testing.assert_allclose(found["logits"], expected["logits"].numpy(), atol=1e-5)
        np.testing.assert_array_equal(found["best"], expected["best"].numpy())
    session.close()


class Determinant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(x[:, 0]).reshape(-1, 1)


def test_an_operator_that_openvino_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"OpenVINO has no form of the operator Det-20 in this module"):
        to_openvino.export(request(Determinant(), tmp_path, IMAGE))


def test_a_weight_beyond_half_precision_is_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with torch.no_grad():
        module[1].weight[0, 3] = 7e4
    with pytest.raises(GateError, match=r"a weight does not fit half precision: 7e\+04"):
        to_openvino.export(request(module, tmp_path, IMAGE, "fp16"))


def test_nothing_is_reported_to_anyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino_telemetry

    def report(*_: object, **__: object) -> None:
        pytest.fail("OpenVINO's telemetry was started")

    monkeypatch.setattr(openvino_telemetry.Telemetry, "__init__", report)
    monkeypatch.setattr(openvino_telemetry.Telemetry, "send_event", report)
    to_openvino.export(request(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), tmp_path, IMAGE))
    assert (tmp_path / "model.xml").is_file()
    with pytest.raises(pytest.fail.Exception, match="telemetry was started"):
        ov.convert_model(nn.Linear(2, 2), example_input=torch.zeros(1, 2))


def test_int8_that_loses_too_much_is_repaired_by_the_ranking_of_the_same_ranges(
    digits_model: nn.Module, save_digits_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    unequal = save_digits_checkpoint(tmp_path / "run", widened(digits_model, 1))
    (made,) = export_variants(unequal, variants=["openvino-int8"], out=tmp_path / "out", model=SmallNet)
    ranking = rank_variant(unequal, variant="openvino-int8", model=SmallNet)
    assert made.repair is not None
    assert [layer.name for layer in made.repair.layers] == [error.layer.name for error in ranking.layers[:2]]
    kinds = {
        tuple(node.get_output_shape(0)): node.get_output_element_type(0).get_type_name()
        for node in read(made).get_ops()
        if node.get_type_name() == "Constant"
        and len(node.get_output_shape(0)) == 4
        and node.get_output_shape(0)[2] == 3
    }
    assert kinds == {(32, 1, 3, 3): "f32", (64, 32, 3, 3): "f32", (64, 64, 3, 3): "i8"}


@pytest.mark.usefixtures("captured_anew")
def test_it_is_made_again_byte_for_byte_and_other_weights_are_told(
    exported_dense: dict[str, Artifact], checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = exported_dense["openvino-fp32"]
    assert reproduce_artifact(artifact, checkpoint, model=SmallNet).same == "file"
    files = dict(artifact.files)
    files["weights"] = files["weights"].model_copy(update={"sha256": "0" * 64})
    monkeypatch.setattr("dlops.export.reproduce.open_artifact", lambda _: artifact.model_copy(update={"files": files}))
    found = reproduce_artifact(artifact, checkpoint, model=SmallNet)
    assert (found.same, found.sha256, found.again) == ("nothing", "0" * 64, artifact.files["weights"].sha256)
