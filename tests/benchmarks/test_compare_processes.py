"""As test_compare, over artifacts as people have them: each side a process of its own, by `dlops compare`'s own run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dlops.artifact import Artifact
from dlops.bench.compare import FALSE_ALARMS, Comparison, compare_turns
from dlops.bench.run import measure
from dlops.export.pipeline import export_variants
from dlops.report import Measurement
from dlops.samples import Samples
from dlops.saving import save_checkpoint
from dlops.workflows.compare import DURATION_S

from .test_compare import MARGIN, QUANTITIES, count

RUNS = 100
# Alike, so that each costs what the next one costs: 21 are 5 % more work than 20.
LAYERS, CHANNELS, SIDE = 20, 24, 24
_DEFAULT_MARGIN = 0.05


def _artifact(layers: int, folder: Path) -> Artifact:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(layers))
    module = nn.Sequential(*(part for layer in convolutions for part in (layer, nn.LeakyReLU())))
    x = np.random.default_rng(0).standard_normal((32, CHANNELS, SIDE, SIDE), np.float32)
    checkpoint = save_checkpoint(
        module, folder / "run", evaluation=Samples(raw=tuple(x), inputs={"x": x}), name=f"layers{layers}",
        task="regression", max_batch=8,
    )  # fmt: skip
    [artifact] = export_variants(
        checkpoint, variants=["onnx-fp32"], out=folder / "artifacts", model=lambda: module, worth=False
    )
    return artifact


def _one_run(base: Artifact, same: Artifact, slower: Artifact) -> list[Comparison]:
    """The same against the same by two margins, then 5 % more work against it."""
    measured = measure([base, same, slower], duration_s=DURATION_S, threads=1)
    first, second, third = measured.measurements

    def against(other: Measurement, margin: float) -> Comparison:
        pair = replace(measured, report=measured.report.model_copy(update={"measurements": (first, other)}))
        return compare_turns(pair, base="base", new="new", margin=margin)

    return [against(second, MARGIN), against(second, _DEFAULT_MARGIN), against(third, MARGIN)]


@pytest.mark.timeout(7200)
def test_two_processes_of_one_artifact_are_the_same_and_five_per_cent_is_found(
    write_page: Callable[..., Path], tmp_path: Path
) -> None:
    base, same = (_artifact(LAYERS, tmp_path / name) for name in ("base", "same"))
    slower = _artifact(LAYERS + 1, tmp_path / "slower")
    runs = []
    for number in range(RUNS):
        runs.append(_one_run(base, same, slower))
        print(f"{number + 1} of {RUNS}", flush=True)
    usual, default, planted = zip(*runs, strict=True)
    alarms = [sum(each.verdict == "REGRESSED" for each in judged) for judged in (usual, default)]
    changed, found = count(usual, "REGRESSED", "IMPROVED"), count(planted, "REGRESSED")
    equal, slow = (_per_cents(judged) for judged in (usual, planted))
    write_page(
        "compare-processes",
        title="`dlops compare` over artifacts, each side a process of its own",
        says=(
            f"{RUNS} runs of three ONNX artifacts in turns, {DURATION_S:g} s a row as `dlops compare` takes by "
            f"default, one thread, batch 1, each artifact in a fresh process: {LAYERS} convolutions of {CHANNELS} "
            f"channels at {SIDE}×{SIDE}, the same once more in another folder, and {LAYERS + 1} of them, which is 5 % "
            f"more work. Two processes of one artifact differed at the median by {equal[0]:+.1f} % to {equal[2]:+.1f} "
            f"% in nine of ten runs (median {equal[1]:+.1f} %); {LAYERS + 1} were {slow[0]:.1f} % to {slow[2]:.1f} % "
            f"slower (median {slow[1]:.1f} %). By the stated rate {FALSE_ALARMS:.0%} of runs may say REGRESSED of the "
            "same."
        ),
        header=["NEW is", "margin", "what was said", f"of {RUNS} runs"],
        rows=[
            ["the same", f"{_DEFAULT_MARGIN:.0%} (default)", "any quantity REGRESSED", str(alarms[1])],
            ["the same", f"{MARGIN:.0%}", "any quantity REGRESSED", str(alarms[0])],
            *_rows("the same", "REGRESSED or IMPROVED", changed),
            *_rows("5 % more work", "REGRESSED", found),
        ],
    )
    allowed = RUNS * FALSE_ALARMS + 3 * math.sqrt(RUNS * FALSE_ALARMS * (1 - FALSE_ALARMS))
    assert max(alarms) <= allowed


def _rows(what: str, word: str, counts: list[int]) -> list[list[str]]:
    return [
        [what, f"{MARGIN:.0%}", f"{quantity} {word}", str(number)]
        for quantity, number in zip(QUANTITIES, counts, strict=True)
    ]


def _per_cents(comparisons: tuple[Comparison, ...]) -> tuple[float, float, float]:
    """By how much the median was slower: the 5th, 50th and 95th percentile over the runs."""
    ratios = [each.rows[0].judged[0].ratio for each in comparisons]
    changes = [100 * (ratio.value - 1) for ratio in ratios if ratio is not None]
    low, middle, high = np.quantile(changes, [0.05, 0.5, 0.95])
    return float(low), float(middle), float(high)
