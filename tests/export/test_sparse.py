from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from dlops.artifact import Artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import GateError, UsageError
from dlops.export import recover as recovery
from dlops.export import zeros
from dlops.export.pipeline import export_variants
from dlops.export.zeros import check_zeros
from dlops.sparsity import SparsityRecord, apply_sparsity, magnitude_masks, record_of, zero_out

from .conftest import SmallNet

SLUGS = (
    "onnx-fp32-sparse80", "onnx-fp16-sparse80", "onnx-int8-sparse80", "onnx-int8dyn-sparse80",
    "torchscript-bf16-sparse80", "onnx-fp32-sparse24", "onnx-int8wo-sparse24", "torchscript-fp32-sparse24",
)  # fmt: skip


@pytest.fixture(scope="module")
def sparse(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "EPOCHS", 6)
        patch.setattr(recovery, "MIN_STEPS", 0)
        made = export_variants(
            checkpoint, variants=SLUGS, out=tmp_path_factory.mktemp("artifacts"), model=SmallNet, max_drop=2.0
        )
    return {artifact.slug: artifact for artifact in made}


def record_in(artifact: Artifact) -> SparsityRecord:
    return SparsityRecord.model_validate_json(artifact.path("sparsity").read_text())


@pytest.mark.parametrize("slug", [slug for slug in SLUGS if "80" in slug])
def test_the_written_file_has_the_share_of_zeros_that_was_asked_for(sparse: dict[str, Artifact], slug: str) -> None:
    artifact, record = sparse[slug], record_in(sparse[slug])
    weights = 9 * 32 + 9 * 32 * 64 + 9 * 64 * 64 + 64 * 10
    assert (record.elements, record.zeros) == (weights, round(0.8 * weights))
    notes = artifact.provenance.notes
    assert notes["sparse_weights"] == weights
    # Narrower numbers may round more to zero, never less.
    assert notes["sparse_zeros"] == record.zeros if "fp32" in slug else notes["sparse_zeros"] >= record.zeros
    assert artifact.accuracy is not None
    assert artifact.accuracy.drop_points <= 2.0


def test_of_every_four_weights_along_the_inputs_two_are_zero_in_the_file(sparse: dict[str, Artifact]) -> None:
    graph = onnx.load(sparse["onnx-fp32-sparse24"].path("model")).graph
    weights = [numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) > 1]
    # The first convolution has one input channel, so it has no fours and stays as it is.
    assert sorted(w.shape for w in weights) == [(10, 64), (32, 1, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3)]
    for weight in weights:
        if weight.shape[1] > 1:
            groups = np.moveaxis(weight, 1, -1).reshape(-1, 4)
            assert ((groups == 0).sum(axis=1) == 2).all()
    assert [layer.name for layer in record_in(sparse["onnx-fp32-sparse24"]).layers] == [
        "features.3.weight", "features.7.weight", "classify.weight",
    ]  # fmt: skip


def test_the_record_finds_the_same_zeros_in_the_dense_weights_alone(
    sparse: dict[str, Artifact], checkpoint: Checkpoint
) -> None:
    record = record_in(sparse["onnx-fp32-sparse80"])
    dense = checkpoint.build_module(SmallNet)
    masks = apply_sparsity(dense, record)
    written = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load(sparse["onnx-fp32-sparse80"].path("model")).graph.initializer
    ]
    for name, mask in masks.items():
        assert torch.equal(dense.get_parameter(name) == 0, ~mask)
        assert any(w.shape == tuple(mask.shape) and ((w == 0) == ~mask.numpy()).all() for w in written)
    with pytest.raises(UsageError, match="other zeros than the recorded"):
        apply_sparsity(SmallNet(), record)


def test_a_file_that_lost_one_of_the_zeros_is_refused(sparse: dict[str, Artifact], tmp_path: Path) -> None:
    model = onnx.load(sparse["onnx-fp32-sparse24"].path("model"))
    masks = {"classify.weight": torch.from_numpy(numpy_helper.to_array(_named(model, (10, 64))) != 0)}
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert check_zeros(path, "onnx", masks, title="it") == {"sparse_weights": 640, "sparse_zeros": 320}
    # A product with the transposed weight is the same layer.
    turned = {"classify.weight": masks["classify.weight"].T.contiguous()}
    assert check_zeros(path, "onnx", turned, title="it")["sparse_zeros"] == 320

    tensor = _named(model, (10, 64))
    values = numpy_helper.to_array(tensor).copy()
    values[tuple(np.argwhere(values == 0)[0])] = 1e-3
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    with pytest.raises(GateError, match=r"320 of the 640 weights of classify\.weight were set to zero"):
        check_zeros(path, "onnx", masks, title="it")


def _named(model: onnx.ModelProto, shape: tuple[int, ...]) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tuple(tensor.dims) == shape)


def test_the_smallest_weights_of_all_layers_together_go_first_and_exactly_as_many_as_asked() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.arange(1.0, 17).view(4, 4))
        module[1].weight.copy_(-100 * torch.arange(1.0, 17).view(4, 4))
    masks = magnitude_masks(module, "sparse50", title="it")
    assert not masks["0.weight"].any()
    assert masks["1.weight"].all()
    with torch.no_grad():
        for layer in module:
            layer.weight.fill_(0.5)
    # Of equal weights the first ones go, every time.
    record = record_of(magnitude_masks(module, "sparse25", title="it"), "sparse25")
    assert [(layer.name, layer.zeros) for layer in record.layers] == [("0.weight", 8), ("1.weight", 0)]


def test_two_of_four_is_along_the_inputs_of_transposed_convolutions_too_and_tied_weights_count_once() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(8, 3, 2)
    mask = magnitude_masks(layer, "sparse24", title="it")["weight"]
    assert (mask.movedim(0, -1).reshape(-1, 4).sum(1) == 2).all()
    kept = layer.weight.detach().abs()[mask].sum()
    zero_out(layer, {"weight": mask})
    assert float(layer.weight.detach().abs().sum()) == pytest.approx(float(kept))

    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert list(magnitude_masks(tied, "sparse50", title="it")) == ["0.weight"]
    with pytest.raises(UsageError, match="none of its 1 convolutions and linear layers can be made sparse24"):
        magnitude_masks(nn.Linear(6, 8), "sparse24", title="it")
    with pytest.raises(UsageError, match="none of its 0"):
        magnitude_masks(nn.ReLU(), "sparse50", title="it")


def test_every_format_of_the_catalog_that_can_be_sparse_has_a_reader_of_zeros() -> None:
    from dlops import catalog

    assert set(zeros.FORMATS) <= set(catalog.FORMATS)
