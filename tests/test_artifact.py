"""Variants and their slugs, and artifacts that open only whole. The JSON on disk is fixed by golden files."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from dlops.artifact import (
    PRECISIONS,
    Accuracy,
    Artifact,
    FloatLayer,
    OwnError,
    Parity,
    ParityCase,
    Provenance,
    Repair,
    Tolerance,
    Variant,
    Worth,
    check_sparsity,
    newest_artifact,
    open_artifact,
)  # fmt: skip
from dlops.catalog import FORMATS
from dlops.checkpoint import Checkpoint, ModelSpec, PruningRecord
from dlops.environment import Environment
from dlops.errors import CorruptError, UsageError
from dlops.manifest import Manifest, Payload, _digest
from dlops.preprocess import CenterCrop, Decode, Normalize, Preprocess, Resize, Scale, Utf8
from dlops.signature import DimRange, Signature, TensorSpec

GOLDEN = Path(__file__).parent / "golden"
ENVIRONMENT = Environment(
    system="Linux 6.1", machine="x86_64", cpu="A CPU", instruction_sets=("avx2", "avx512_vnni"), cores=2,
    memory_bytes=1024, python="3.11.7", gpus=("A GPU, 580.1, 1 MiB",), packages={"torch": "2.14.1"},
)  # fmt: skip
SIGNATURE = Signature(
    inputs=(TensorSpec(name="image", dtype="float32", shape=("batch", 3, 4, 4)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 2)),),
    dims={"batch": DimRange(min=1, max=8)},
)
PREPROCESS = Preprocess(
    input="image", shape=(3, 4, 4),
    steps=(
        Decode(), Resize(size=6), CenterCrop(size=(4, 4)), Scale(factor=0.5),
        Normalize(mean=(0.5, 0.25, 0.125), std=(1, 2, 4)),
    ),
)  # fmt: skip
CREATED = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def payload(name: str) -> Payload:
    return Payload(path=name, sha256="ab" * 32, bytes=7)


CHECKPOINT = Checkpoint(
    created=CREATED, dlops_version="0.1.0", name="digits", version="2",
    spec=ModelSpec(
        builder="cnn", source=None, kwargs={"width": 8}, task="classification", labels=("cat", "dog"),
        preprocess=PREPROCESS, pruning=PruningRecord(steps=(("body.0", True, (1, 3)),), macs_removed=0.5),
    ),
    signature=SIGNATURE, recipe="cnn", config={"epochs": 3, "lr": 0.1, "data": None}, metrics={"accuracy": 0.9375},
    seed=1, environment=ENVIRONMENT,
    files={
        "weights": payload("weights-0123456789abcdef.safetensors"),
        "evaluation": payload("evaluation-0123456789abcdef.safetensors"),
    },
)  # fmt: skip
ARTIFACT = Artifact(
    created=CREATED, name="digits", version="2", variant=Variant(format="onnx", precision="int8", sparsity="pruned50"),
    signature=SIGNATURE, preprocess=PREPROCESS, labels=("cat", "dog"), task="classification", requires=("onnxruntime",),
    parity=Parity(
        provider="CPUExecutionProvider", batches=(1, 2, 7), samples=32, max_abs=0.5, max_rel=0.25, sqnr_db=30.5,
        agreement=1.0, tolerance=Tolerance(max_abs=1.0, max_rel=2.0, min_sqnr_db=15.0, min_agreement=0.95, min_iou=0.5),
        cases=(
            ParityCase(
                name="black", samples=2, max_abs=0.25, max_rel=0.125, sqnr_db=20.5, agreement=0.5, held=False
            ),
        ),
        own_error=OwnError(samples=32, max_abs=0.25, max_rel=0.5),
    ),
    accuracy=Accuracy(
        metric="accuracy", samples=100, value=0.91, reference=0.92, drop_points=1.0, drop_low=-0.5, drop_high=2.5,
        flips=3, max_drop=1.0, strict=False,
    ),
    provenance=Provenance(
        checkpoint="digits", checkpoint_sha256="cd" * 32, dlops_version="0.1.0", environment=ENVIRONMENT,
        command=("dlops", "export"), notes={"opset": 18},
    ),
    repair=Repair(
        because="it lost", of=4, float_share=0.25, tries=3,
        layers=(FloatLayer(name="body.0", operator="Conv", weights=27, alone_db=9.5, share=0.75),),
    ),
    worth=Worth(
        parent="onnx-fp32", batch=1, speed=0.5, speed_low=0.25, speed_high=0.75, size=1.0, verdict="neither",
        reason="it",
    ),
    files={"model": payload("model-0123456789abcdef.onnx"), "samples": payload("samples-0123456789abcdef.safetensors")},
)  # fmt: skip


# Text has a step of its own, which stands beside no other.
TEXT = CHECKPOINT.model_copy(
    update={
        "spec": CHECKPOINT.spec.model_copy(
            update={
                "preprocess": Preprocess(
                    input="text", shape=(16,), dtype="int64", steps=(Utf8(offset=3, end=1, pad=2),)
                )
            }
        )
    }
)


# A field that is added, removed or renamed changes what older and newer versions read: then the golden file changes
# too, by hand and on purpose, and the schema number with it where an older version could not read the result.
@pytest.mark.parametrize(
    ("name", "manifest"), [("checkpoint", CHECKPOINT), ("checkpoint-text", TEXT), ("artifact", ARTIFACT)]
)
def test_a_manifest_is_written_exactly_as_the_golden_file_and_reads_back_equal(name: str, manifest: Manifest) -> None:
    golden = (GOLDEN / f"{name}.json").read_text()
    assert manifest.to_json() == golden
    assert type(manifest).model_validate_json(golden) == manifest.sealed()


def test_an_artifact_from_before_own_errors_were_recorded_opens(make_digits_artifact: object, tmp_path: Path) -> None:
    path = make_digits_artifact(tmp_path / "digits").directory / "artifact.json"
    document = json.loads(path.read_text())
    del document["parity"]["own_error"]
    document["sha256"] = _digest(document)
    path.write_text(json.dumps(document))
    assert open_artifact(path).parity.own_error is None


def field_names(document: object) -> set[str]:
    if isinstance(document, dict):
        return set(document).union(*(field_names(value) for value in document.values()))
    return set().union(*(field_names(value) for value in document)) if isinstance(document, list) else set()


@pytest.mark.parametrize("manifest", [CHECKPOINT, ARTIFACT])
def test_the_golden_files_hold_every_field_of_every_record(manifest: Manifest) -> None:
    names = field_names(json.loads(manifest.to_json())) | field_names(json.loads(TEXT.to_json()))
    schema = type(manifest).model_json_schema(by_alias=True)
    for record in (schema, *schema["$defs"].values()):
        assert names >= set(record.get("properties", {})), record["title"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sparsity", [None, "pruned50", "sparse90", "sparse24"])
def test_every_slug_is_parsed_back(form: str, precision: str, sparsity: str | None) -> None:
    variant = Variant(format=form, precision=precision, sparsity=sparsity)
    assert Variant.parse(variant.slug) == variant


def test_slugs_say_what_they_leave_out() -> None:
    assert Variant.parse("onnx") == Variant(format="onnx", precision="fp32")
    assert Variant.parse("onnx-int8-pruned30").pruned_fraction == 0.3
    assert Variant.parse("onnx-int8-sparse30").pruned_fraction == 0.0
    assert Variant.parse("onnx-int8").pruned_fraction == 0.0


@pytest.mark.parametrize(
    ("slug", "said"),
    [
        ("onx-fp32", "unknown format 'onx'"),
        ("", "unknown format ''"),
        ("onnx-int9", "unknown precision 'int9'"),
        ("onnx-", "unknown precision ''"),
        ("onnx-fp32-pruned", "unknown sparsity 'pruned'"),
        ("onnx-fp32-pruned00", "unknown sparsity 'pruned00'"),
        ("onnx-fp32-pruned100", "unknown sparsity"),
        ("onnx-fp32-pruned50\n", "unknown sparsity"),
        ("onnx-fp32-pruned50-more", "unknown sparsity 'pruned50-more'"),
        ("onnx-pruned50", "unknown precision 'pruned50'"),
    ],
)
def test_a_slug_that_is_none_names_the_wrong_part(slug: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        Variant.parse(slug)
    assert caught.value.hint


@pytest.mark.parametrize(
    "changes", [{"format": "../onnx"}, {"format": "a/b"}, {"sparsity": "/../.."}, {"precision": ".."}]
)
def test_a_variant_that_would_lead_its_folder_elsewhere_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Variant(**{"format": "onnx", **changes})


def test_sparsity_may_be_left_out() -> None:
    check_sparsity(None, where="here")


def test_an_artifact_opens_by_its_folder_or_its_manifest(digits_artifact: Artifact) -> None:
    by_folder = open_artifact(digits_artifact.directory)
    assert by_folder == open_artifact(digits_artifact.directory / "artifact.json") == digits_artifact
    assert by_folder.title == "digits/onnx-fp32"
    assert by_folder.model_bytes == by_folder.path("model").stat().st_size
    assert len(by_folder.samples()) == 16


def test_a_model_in_two_files_is_sized_as_one_and_samples_are_no_part_of_it() -> None:
    files = {
        "model": payload("model-0.onnx"),
        "weights": payload("weights-0.data"),
        "samples": payload("samples-0.bin"),
    }
    two = ARTIFACT.model_copy(update={"files": files})
    assert two.model_bytes == files["model"].bytes + files["weights"].bytes > ARTIFACT.model_bytes


def test_an_altered_model_does_not_open(make_digits_artifact: object, tmp_path: Path) -> None:
    artifact = make_digits_artifact(tmp_path / "digits")
    content = bytearray(artifact.path("model").read_bytes())
    content[len(content) // 2] ^= 1
    artifact.path("model").write_bytes(content)
    with pytest.raises(CorruptError, match="SHA-256 differs"):
        open_artifact(tmp_path / "digits")


def test_a_format_that_this_version_does_not_know_is_named(make_digits_artifact: object, tmp_path: Path) -> None:
    artifact = make_digits_artifact(tmp_path / "digits")
    path = artifact.directory / "artifact.json"
    path.write_text(artifact.model_copy(update={"variant": Variant(format="tflite")}).to_json())
    with pytest.raises(UsageError, match="unknown format 'tflite'"):
        open_artifact(path)


@pytest.mark.parametrize(
    "alter",
    [
        lambda document: document.update(labels=document["labels"][::-1]),
        lambda document: document["parity"].update(tolerance={}),
        lambda document: document["signature"]["dims"]["batch"].update(max=1),
    ],
)
def test_an_edited_manifest_does_not_open(make_digits_artifact: object, tmp_path: Path, alter: object) -> None:
    path = make_digits_artifact(tmp_path / "digits").directory / "artifact.json"
    document = json.loads(path.read_text())
    alter(document)
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptError, match="altered since it was written"):
        open_artifact(path)


def test_an_artifact_without_its_model_or_samples_does_not_open(make_digits_artifact: object, tmp_path: Path) -> None:
    artifact = make_digits_artifact(tmp_path / "digits")
    path = artifact.directory / "artifact.json"
    path.write_text(artifact.model_copy(update={"files": {"model": artifact.files["model"]}}).to_json())
    with pytest.raises(CorruptError, match="it names no samples file"):
        open_artifact(path)
    path.write_text(artifact.model_copy(update={"files": {}}).to_json())
    with pytest.raises(CorruptError, match="it names no model and no samples file"):
        open_artifact(path)


def test_the_newest_artifact_is_the_one_made_last_and_whole(make_digits_artifact: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no artifact under"):
        newest_artifact(tmp_path)
    for day, name in ((2, "newer"), (1, "older")):
        make_digits_artifact(tmp_path / name, name=name, created=CREATED.replace(day=day))
    assert newest_artifact(tmp_path).name == "newer"


def test_every_wrong_part_of_a_variant_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        Variant.parse("onx-int9-prune50")
    for said in ("unknown format 'onx'", "unknown precision 'int9'", "unknown sparsity 'prune50'"):
        assert said in caught.value.message
    assert "did you mean onnx" in str(caught.value.hint)
