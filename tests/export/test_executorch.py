"""ExecuTorch's programs: they have room for every batch that is allowed, and say what XNNPACK took of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dlops import catalog
from dlops.artifact import Artifact, Variant, open_artifact
from dlops.bench.run import measure
from dlops.checkpoint import Checkpoint
from dlops.embedded import read_embedded
from dlops.errors import CorruptError, GateError, LossError, MachineError, UsageError
from dlops.export.formats import ExportRequest
from dlops.export.pipeline import export_variants, rank_variant
from dlops.manifest import Payload
from dlops.runtimes import SessionOptions, open_session
from dlops.signature import DimRange, Signature, TensorSpec

from .conftest import PREPROCESS, SmallNet, split

OPTIONS = SessionOptions(device="cpu", threads=1)
IMAGE = TensorSpec(name="x", dtype="float32", shape=("batch", 1, 8, 8))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)
    )


@pytest.fixture(scope="module")
def small(save_digits_checkpoint: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.manual_seed(0)
    train, model = split()[0], network()
    inputs, targets = torch.from_numpy(PREPROCESS.batch(train.raw)), torch.from_numpy(train.targets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(4):
        for rows in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    return save_digits_checkpoint(tmp_path_factory.mktemp("small") / "run", model.eval())


@pytest.fixture(scope="module")
def made(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    variants = ["executorch-fp32", "executorch-int8"]
    found = export_variants(small, variants=variants, out=tmp_path_factory.mktemp("out"), model=network, max_drop=2.0)
    return {artifact.variant.precision: open_artifact(artifact.directory) for artifact in found}


def request(
    module: nn.Module, folder: Path, signature: Signature, precision: str = "fp32", **changes: Any
) -> ExportRequest:
    return ExportRequest(
        module=module.eval(), signature=signature, variant=Variant(format="executorch", precision=precision),
        into=folder / "model.pte", title="it", **changes,
    )  # fmt: skip


def signature_of(outputs: tuple[TensorSpec, ...], inputs: tuple[TensorSpec, ...] = (IMAGE,)) -> Signature:
    return Signature(inputs=inputs, outputs=outputs, dims={"batch": DimRange(max=32)})


def test_the_gates_pass_and_int8_is_smaller(made: Mapping[str, Artifact]) -> None:
    fp32, int8 = made["fp32"], made["int8"]
    assert fp32.parity.provider == int8.parity.provider == "XnnpackBackend"
    assert fp32.parity.batches == int8.parity.batches == (1, 2, 7, 32)
    assert fp32.parity.sqnr_db > 100 > int8.parity.sqnr_db > 25
    assert int8.accuracy is not None
    assert int8.accuracy.drop_points <= 2.0
    assert int8.model_bytes < 0.5 * fp32.model_bytes
    notes = int8.provenance.notes
    assert (notes["calibration_samples"], notes["calibration_method"]) == (400, "minmax")
    assert int8.requires == ("executorch", "torch")


def test_bench_measures_it_in_a_process_of_its_own(made: Mapping[str, Artifact]) -> None:
    (row,) = measure([made["int8"]], duration_s=0.1, device="cpu", threads=1).measurements
    assert (row.runtime, row.provider) == ("executorch", "XnnpackBackend")


def test_every_batch_that_is_allowed_runs_and_no_larger_one(made: Mapping[str, Artifact], small: Checkpoint) -> None:
    session = open_session(made["fp32"], OPTIONS)
    images = made["fp32"].samples().inputs["input"]
    module = small.build_module(network)
    for batch in range(1, 33):
        found = session.run({"input": images[:batch]})["logits"]
        with torch.no_grad():
            np.testing.assert_allclose(found, module(torch.from_numpy(images[:batch])).numpy(), atol=1e-3)
    with pytest.raises(RuntimeError, match="set_inputs"):
        session.run({"input": np.zeros((33, 1, 8, 8), np.float32)})
    session.close()


def test_the_placement_says_which_operators_xnnpack_took(made: Mapping[str, Artifact]) -> None:
    session = open_session(made["int8"], OPTIONS)
    placement = session.placement
    assert (placement.runtime, placement.device, placement.precision, placement.threads) == (
        "executorch", "cpu", "int8", 1,
    )  # fmt: skip
    assert placement.nodes["XnnpackBackend"]["convolution"] == placement.nodes["XnnpackBackend"]["linear"] == 1
    taken = sum(placement.nodes["XnnpackBackend"].values())
    total = sum(sum(counts.values()) for counts in placement.nodes.values())
    assert made["int8"].provenance.notes["delegated"] == f"{taken} of {total} operators to XNNPACK"
    session.close()


def test_bound_calls_give_what_the_session_gives(made: Mapping[str, Artifact]) -> None:
    session = open_session(made["fp32"], OPTIONS)
    images = made["fp32"].samples().inputs["input"]
    first, second = images[:4].copy(), images[4:8].copy()
    second.flags.writeable = False
    bound = session.bind({"input": first})
    before = bound.copy_out()["logits"]
    bound.copy_in({"input": second})
    bound.run()
    bound.synchronize()
    np.testing.assert_array_equal(before, session.run({"input": first})["logits"])
    np.testing.assert_array_equal(bound.copy_out()["logits"], session.run({"input": second})["logits"])
    with pytest.raises(ValueError, match=r"float64\[4, 1, 8, 8\] given"):
        bound.copy_in({"input": np.zeros((4, 1, 8, 8))})
    session.close()


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.classify = nn.Linear(16, 4)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.classify((self.embed(tokens) * mask[..., None]).sum(1))
        return {"best": logits.argmax(1), "logits": logits}


def test_several_inputs_and_outputs_stand_in_the_signatures_order(made: Mapping[str, Artifact], tmp_path: Path) -> None:
    # Here and below: to import it takes four seconds, in every process that collects this file.
    from dlops.export import to_executorch

    torch.manual_seed(0)
    rng, module = np.random.default_rng(0), Several().eval()
    signature = signature_of(
        (
            TensorSpec(name="logits", dtype="float32", shape=("batch", 4)),
            TensorSpec(name="best", dtype="int64", shape=("batch",)),
        ),
        (
            TensorSpec(name="tokens", dtype="int64", shape=("batch", 7)),
            TensorSpec(name="mask", dtype="float32", shape=("batch", 7)),
        ),
    )
    exported = to_executorch.export(request(module, tmp_path, signature))
    files = {"model": Payload(path=exported.path.name, sha256="0" * 64, bytes=0)}
    artifact = made["fp32"].model_copy(update={"signature": signature, "files": files}).located_at(tmp_path)
    session = open_session(artifact, OPTIONS)
    for batch in (1, 5, 32):
        feed = {"tokens": rng.integers(0, 50, (batch, 7)), "mask": rng.random((batch, 7)).astype(np.float32)}
        found = session.run(feed)
        with torch.no_grad():
            expected = module(*map(torch.from_numpy, feed.values()))
        np.testing.assert_allclose(found["logits"], expected["logits"].numpy(), atol=1e-5)
        np.testing.assert_array_equal(found["best"], expected["best"].numpy())
    session.close()


class Determinant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(x[:, 0]).reshape(-1, 1)


ONE = signature_of((TensorSpec(name="y", dtype="float32", shape=("batch", 1)),))


def test_an_operator_that_executorch_lacks_is_named(tmp_path: Path) -> None:
    from dlops.export import to_executorch

    with pytest.raises(UsageError, match=r"ExecuTorch has no form of the operator aten\._linalg_det"):
        to_executorch.export(request(Determinant(), tmp_path, ONE))


def test_weights_that_int8_does_not_reach_are_refused_by_operator(tmp_path: Path) -> None:
    from dlops.export import to_executorch

    module = nn.Sequential(nn.Flatten(2), nn.Linear(64, 4), nn.Flatten(1))

    def unquantized(request: ExportRequest) -> tuple[nn.Module, int]:
        return to_executorch._InOrder(request.module, request.signature).eval(), 1

    asked = request(
        module, tmp_path, signature_of((TensorSpec(name="y", dtype="float32", shape=("batch", 4)),)), "int8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_executorch, "calibrated", unquantized)
        patch.setattr(to_executorch, "converted", lambda prepared: prepared)
        with pytest.raises(GateError, match=r"int8 was asked for, 0% of the weights are in it; left over: .*linear"):
            to_executorch.export(asked)


def test_a_file_without_room_for_the_largest_batch_is_refused(made: Mapping[str, Artifact], tmp_path: Path) -> None:
    from dlops.export import to_executorch

    artifact = made["fp32"]
    larger = artifact.signature.model_copy(update={"dims": {"batch": DimRange(max=64)}})
    asked = replace(request(network(), tmp_path, larger), into=artifact.path("model"))
    with pytest.raises(GateError, match=r"input has room for \[32, 1, 8, 8\], the signature allows \[64, 1, 8, 8\]"):
        to_executorch._check_written(asked)


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lambda content: b"x" * len(content), "is not an ExecuTorch program"),
        (lambda content: content[: len(content) // 2], "ExecuTorch cannot load it"),
    ],
)
def test_damaged_files_are_named_where_digests_match(
    made: Mapping[str, Artifact], tmp_path: Path, alter: Callable[[bytes], bytes], said: str
) -> None:
    (tmp_path / "model.pte").write_bytes(alter(made["fp32"].path("model").read_bytes()))
    files = {"model": Payload(path="model.pte", sha256="0" * 64, bytes=0)}
    artifact = made["fp32"].model_copy(update={"files": files}).located_at(tmp_path)
    with pytest.raises(CorruptError, match=said):
        open_session(artifact, OPTIONS)


def test_the_file_alone_says_that_it_says_nothing(made: Mapping[str, Artifact]) -> None:
    with pytest.raises(UsageError, match="an ExecuTorch program that does not say what it is"):
        read_embedded(made["fp32"].path("model"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (SessionOptions(device="cuda"), "CUDA was asked for, which ExecuTorch's XNNPACK does not run on"),
        (SessionOptions(device="cpu", cuda_graph=True), "this would run on the CPU"),
    ],
)
def test_what_it_cannot_run_on_is_refused(made: Mapping[str, Artifact], options: SessionOptions, said: str) -> None:
    with pytest.raises(MachineError, match=said):
        open_session(made["fp32"], options)


def test_other_ranges_are_refused_before_any_work(small: Checkpoint) -> None:
    with pytest.raises(UsageError, match="executorch-int8 has ranges by minmax alone"):
        export_variants(small, variants=["executorch-int8"], model=network, calibration_method="entropy")


@pytest.fixture(scope="module")
def unequal(
    small: Checkpoint, save_digits_checkpoint: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """The same function with one channel so wide that the others are left no step of 256."""
    model = small.build_module(network)
    with torch.no_grad():
        model[1].weight[5] *= 1000
        model[1].bias[5] *= 1000
        model[4].weight[:, 5 * 36 : 6 * 36] /= 1000
    return save_digits_checkpoint(tmp_path_factory.mktemp("unequal") / "run", model.eval())


def test_layers_at_fault_are_ranked_and_returned_to_fp32(unequal: Checkpoint, tmp_path: Path) -> None:
    slug = "executorch-int8"
    with pytest.raises(LossError, match="int8"):
        export_variants(unequal, variants=[slug], out=tmp_path, model=network, repair=False)
    ranking = rank_variant(unequal, variant=slug, model=network)
    found = {error.layer.name: error for error in ranking.layers}
    assert set(found) == {"0", "4"}
    assert (found["0"].layer.operator, found["0"].layer.kind, found["0"].layer.weights) == ("conv2d", "3×3", 144)
    assert (found["4"].layer.operator, found["4"].layer.kind, found["4"].layer.weights) == ("linear", "10×576", 5760)
    assert sum(error.share for error in ranking.layers) == pytest.approx(1)
    assert ranking.output_db is not None
    # What comes out of the wide channel's layer is right by its own measure, and useless to the next.
    assert found["0"].local_db is not None
    assert found["0"].local_db > 20 > ranking.output_db


def test_as_few_layers_stay_in_fp32_as_pass(
    digits_model: nn.Module, save_digits_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    model = copy.deepcopy(digits_model)
    with torch.no_grad():
        model.features[1].weight[5] *= 1000
        model.features[1].bias[5] *= 1000
        model.features[3].weight[:, 5] /= 1000
    run = save_digits_checkpoint(tmp_path / "run", model)
    ranking = rank_variant(run, variant="executorch-int8", model=SmallNet)
    # Quantized alone, only the two that the scaled channel is between do harm.
    harm = {error.layer.name: error for error in ranking.layers}
    assert harm["features.0"].share + harm["features.3"].share > 0.9
    assert min(one.alone_db for name, one in harm.items() if not name.startswith("features")) > 20
    (made,) = export_variants(run, variants=["executorch-int8"], out=tmp_path / "out", model=SmallNet)
    assert made.repair is not None
    assert {layer.name for layer in made.repair.layers} <= {"features.0", "features.3"}
    assert made.repair.of == 4
    assert made.files["model"].bytes < 0.9 * run.files["weights"].bytes
    assert made.accuracy is not None
    assert made.accuracy.drop_points <= 1.0
    assert open_artifact(made.directory).repair == made.repair


@pytest.mark.parametrize("table", ["RUNTIMES", "FORMATS"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "executorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "executorch", None)
    for name in ("dlops.runtimes.executorch", "dlops.export.to_executorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MachineError, match="needs executorch, which is not installed") as caught:
        catalog.resolve(getattr(catalog, table), "format", "executorch")
    assert caught.value.hint == "pip install 'dlops[executorch]'"
