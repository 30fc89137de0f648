"""What each precision does to a small and a ResNet-18-sized network, a transformer and an MLP: size, error, latency."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dlops.artifact import Artifact
from dlops.checkpoint import Checkpoint
from dlops.export.pipeline import export_each
from dlops.runtimes import SessionOptions, open_session
from dlops.runtimes.torchscript import computed_precision
from dlops.timing import interleave
from dlops.train.launch import configure, train_recipe

from .precisions_models import NETWORKS, make_checkpoint

SLUGS = (
    "torchscript-fp32", "torchscript-bf16", "onnx-fp32", "onnx-fp16", "onnx-int8", "onnx-int8dyn", "onnx-int8wo",
)  # fmt: skip
BATCHES = (1, 8)
BUDGET_S = 20.0


def test_precisions(write_page: Callable[..., Path], tmp_path: Path) -> None:
    rows: list[list[str]] = []
    sizes: dict[tuple[str, str], int] = {}
    for name in ("digits-cnn", *NETWORKS):
        checkpoint, model = _checkpoint(name, tmp_path)
        made: dict[str, Artifact] = {}
        refused: dict[str, str] = {}
        for variant, result in export_each(
            checkpoint, variants=_slugs(name), out=tmp_path / "artifacts", model=model, max_drop=100.0
        ):
            if isinstance(result, Artifact):
                made[variant.slug] = result
                sizes[name, variant.slug] = result.model_bytes
            else:
                refused[variant.slug] = result.message
        latency = [_medians_ms(made, checkpoint, batch) for batch in BATCHES]
        for slug in _slugs(name):
            rows.append(_row(name, slug, made.get(slug), refused.get(slug, ""), [of.get(slug) for of in latency]))
    write_page(
        "precisions",
        title="What each precision does",
        says=(
            "File size; error against eager fp32 on held-out samples, the worst over the batches that parity is shown "
            "at: signal-to-quantization-noise ratio, largest error over the largest output, decisions that stay; what "
            "the kernels compute in; median latency at batch 1 and 8, one thread, the variants of a network in turns. "
            "`digits-cnn` is the quickstart's model, trained for 3 epochs. The others "
            "(`tests/benchmarks/precisions_models.py`) have random weights, batch norms settled on photos and a fitted "
            "last layer: `resnet18` is torchvision's at 224×224, `transformer` has 4 layers of width 256 over 64 "
            "tokens, `perceptron` 3 layers of width 2048."
        ),
        header=["network", "variant", "MB", "SQNR", "largest error", "decisions", "computes in", "batch 1", "batch 8"],
        rows=rows,
    )
    for (name, slug), size in sizes.items():
        if slug in ("onnx-int8dyn", "onnx-int8wo"):
            assert size < 0.4 * sizes[name, "onnx-fp32"]
    assert {slug for name, slug in sizes if name == "digits-cnn"} == set(SLUGS)


def _slugs(name: str) -> list[str]:
    """All of them but one that takes minutes where the CPU has no instructions for it."""
    slow = name == "resnet18" and computed_precision("bf16", torch.device("cpu")) != "bf16"
    return [slug for slug in SLUGS if not (slow and slug == "torchscript-bf16")]


def _checkpoint(name: str, folder: Path) -> tuple[Checkpoint, Callable[[], object] | None]:
    if name == "digits-cnn":
        config = configure("cnn", preset="digits", overrides=["epochs=3"])
        return train_recipe("cnn", config, run_dir=folder / "run"), None
    large = name == "resnet18"
    checkpoint = make_checkpoint(name, folder / name, evaluation=48 if large else 400, training=96 if large else 800)
    return checkpoint, NETWORKS[name][0]


def _medians_ms(made: dict[str, Artifact], checkpoint: Checkpoint, batch: int) -> dict[str, tuple[float, str]]:
    """By slug: the median latency of a batch, and what the kernels compute in."""
    evaluation = checkpoint.samples("evaluation")
    assert evaluation is not None
    name = checkpoint.signature.inputs[0].name
    feed = evaluation.take(range(batch)).feed(checkpoint.spec.preprocess, name)
    sessions = {
        slug: open_session(artifact, SessionOptions(device="cpu", threads=1)) for slug, artifact in made.items()
    }
    timed = interleave(
        {slug: lambda session=session: session.run(feed) for slug, session in sessions.items()}, budget_s=BUDGET_S
    )
    found = {
        slug: (float(np.median(timed.runs[slug].latencies_ns)) / 1e6, session.placement.precision)
        for slug, session in sessions.items()
    }
    for session in sessions.values():
        session.close()
    return found


def _row(
    name: str, slug: str, artifact: Artifact | None, refused: str, latency: list[tuple[float, str] | None]
) -> list[str]:
    if artifact is None:
        return [name, slug, "refused", refused, *[""] * 5]
    parity, (first, second) = artifact.parity, latency
    assert first is not None
    assert second is not None
    return [
        name, slug, f"{artifact.model_bytes / 1e6:.3g}",
        "exact" if parity.sqnr_db is None else f"{parity.sqnr_db:.1f} dB", f"{parity.max_rel:.1e}",
        f"{parity.agreement:.1%}", first[1], f"{first[0]:.3g} ms", f"{second[0]:.3g} ms",
    ]  # fmt: skip
