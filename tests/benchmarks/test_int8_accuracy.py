"""What int8 costs the quickstart's model, over several trainings: accuracy, its interval, and answers that flip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dlops.export.pipeline import export_variants
from dlops.train.launch import configure, train_recipe

SEEDS = range(5)
VARIANTS = ("onnx-fp32", "onnx-int8")
LIMIT_POINTS = 0.5


def test_int8_keeps_the_accuracy_of_the_digits_within_half_a_point(
    write_page: Callable[..., Path], tmp_path: Path
) -> None:
    rows: list[list[str]] = []
    int8_drops = []
    for seed in SEEDS:
        config = configure("cnn", preset="digits", overrides=[f"seed={seed}"])
        checkpoint = train_recipe("cnn", config, run_dir=tmp_path / f"run{seed}")
        for artifact in export_variants(checkpoint, variants=VARIANTS, out=tmp_path / f"out{seed}", max_drop=2.0):
            found = artifact.accuracy
            assert found is not None
            if artifact.slug == "onnx-int8":
                int8_drops.append(found.drop_points)
            rows.append(
                [
                    str(seed), artifact.slug, f"{found.reference:.2%}", f"{found.value:.2%}",
                    f"{found.drop_points:+.2f} ({found.drop_low:+.2f} to {found.drop_high:+.2f})",
                    f"{found.flips} of {found.samples}",
                ]
            )  # fmt: skip
    write_page(
        "int8-accuracy",
        title="What int8 costs on the digits",
        says=(
            f"The quickstart's model (`cnn`, preset `digits`) trained with {len(SEEDS)} seeds. Points lost are paired "
            "on the same held-out images, with their 95 % interval; flips are answers that differ from eager fp32's, "
            "for better or worse."
        ),
        header=["seed", "variant", "eager fp32", "variant's accuracy", "points lost", "flips"],
        rows=rows,
    )
    assert max(int8_drops) <= LIMIT_POINTS
