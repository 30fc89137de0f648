"""As test_compare, over artifacts as people have them, by what `dlops compare` does: several processes of each side.

The runs go side by side, one on each core: a run takes a minute, most of it starting processes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dlops.artifact import Artifact, open_artifact
from dlops.bench.compare import FALSE_ALARMS, Comparison, compare_turns
from dlops.bench.run import measure
from dlops.export.pipeline import export_variants
from dlops.report import Measurement
from dlops.samples import Samples
from dlops.saving import save_checkpoint
from dlops.workflows.compare import DURATION_S, PROCESSES

from .test_compare import MARGIN, QUANTITIES, count

RUNS, RUNS_SMALL = 100, 40
# Alike, so that each costs what the next one costs: 21 are 5 % more work than 20.
LAYERS, CHANNELS, SIDE = 20, 24, 24
# A model of microseconds: there a process matters most.
FEATURES, HIDDEN = 16, 32
_DEFAULT_MARGIN = 0.05


def _save(module: nn.Module, shape: tuple[int, ...], name: str, folder: Path) -> Artifact:
    x = np.random.default_rng(0).standard_normal((32, *shape), np.float32)
    checkpoint = save_checkpoint(
        module, folder / "run", evaluation=Samples(raw=tuple(x), inputs={"x": x}), name=name, task="regression",
        max_batch=8,
    )  # fmt: skip
    [artifact] = export_variants(
        checkpoint, variants=["onnx-fp32"], out=folder / "artifacts", model=lambda: module, worth=False
    )
    return artifact


def convolutions(layers: int, folder: Path) -> Artifact:
    torch.manual_seed(0)
    made = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(layers))
    module = nn.Sequential(*(part for layer in made for part in (layer, nn.LeakyReLU())))
    return _save(module, (CHANNELS, SIDE, SIDE), f"layers{layers}", folder)


def _small(folder: Path) -> Artifact:
    torch.manual_seed(0)
    return _save(nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU()), (FEATURES,), "small", folder)


def _keep_to_a_core(cores: multiprocessing.Queue[int]) -> None:
    os.sched_setaffinity(0, {cores.get()})


@contextmanager
def a_core_each() -> Iterator[ProcessPoolExecutor]:
    """A process on each core, and on no other."""
    cores = sorted(os.sched_getaffinity(0))
    spawning = multiprocessing.get_context("spawn")
    free: multiprocessing.Queue[int] = spawning.Queue()
    for core in cores:
        free.put(core)
    with ProcessPoolExecutor(len(cores), spawning, initializer=_keep_to_a_core, initargs=(free,)) as pool:
        yield pool


def _one_run(folders: Sequence[Path]) -> list[list[Comparison]]:
    """Each of the others against the first, by both margins."""
    measured = measure(
        [open_artifact(folder) for folder in folders], duration_s=DURATION_S, processes=PROCESSES, threads=1
    )
    first, *others = measured.measurements

    def against(other: Measurement, margin: float) -> Comparison:
        pair = replace(measured, report=measured.report.model_copy(update={"measurements": (first, other)}))
        return compare_turns(pair, base="base", new="new", margin=margin)

    return [[against(other, margin) for margin in (MARGIN, _DEFAULT_MARGIN)] for other in others]


def _runs(artifacts: Sequence[Artifact], number: int) -> list[list[list[Comparison]]]:
    """What `_one_run` found, so many times."""
    with a_core_each() as pool:
        waiting = [pool.submit(_one_run, [one.directory for one in artifacts]) for _ in range(number)]
        for done, _ in enumerate(as_completed(waiting), start=1):
            print(f"{done} of {number}", flush=True)
        return [one.result() for one in waiting]


@pytest.mark.timeout(3 * 3600)
def test_two_of_one_artifact_are_the_same_and_five_per_cent_is_found(
    write_page: Callable[..., Path], tmp_path: Path
) -> None:
    base, same = (convolutions(LAYERS, tmp_path / name) for name in ("base", "same"))
    slower = convolutions(LAYERS + 1, tmp_path / "slower")
    runs = _runs([base, same, slower], RUNS)
    usual, planted = ([run[place][0] for run in runs] for place in (0, 1))
    default = [run[0][1] for run in runs]
    small = [run[0] for run in _runs([_small(tmp_path / name) for name in ("small", "again")], RUNS_SMALL)]
    alarms = [regressed(judged) for judged in (default, usual)]
    small_alarms = [regressed([run[place] for run in small]) for place in (1, 0)]
    found = count(planted, "REGRESSED")
    equal, slow, tiny = (per_cents(judged) for judged in (usual, planted, [run[0] for run in small]))
    microseconds = np.median([run[0].rows[0].judged[0].base or np.nan for run in small]) / 1e3
    write_page(
        "compare-processes",
        title="`dlops compare` over artifacts, several processes of each side",
        says=(
            f"{RUNS} runs of three ONNX artifacts, {PROCESSES} fresh processes of each and {DURATION_S:g} s a row as "
            f"`dlops compare` takes by default, one thread, batch 1, a run on each core at a time: {LAYERS} "
            f"convolutions of {CHANNELS} channels at {SIDE}×{SIDE}, the same once more in another folder, and "
            f"{LAYERS + 1} of them, which is 5 % more work. Of the same, p50 differed by {equal[0]:+.1f} % to "
            f"{equal[2]:+.1f} % in nine of ten runs (median {equal[1]:+.1f} %); {LAYERS + 1} were {slow[0]:.1f} % to "
            f"{slow[2]:.1f} % slower (median {slow[1]:.1f} %). {RUNS_SMALL} runs of a model of {microseconds:.0f} µs "
            f"against itself, where processes differ most: {tiny[0]:+.1f} % to {tiny[2]:+.1f} % (median {tiny[1]:+.1f} "
            f"%). By the stated rate {FALSE_ALARMS:.0%} of runs may say REGRESSED of the same."
        ),
        header=["NEW is", "margin", "what was said", "of runs"],
        rows=[
            ["the same", f"{_DEFAULT_MARGIN:.0%} (default)", "any quantity REGRESSED", f"{alarms[0]} of {RUNS}"],
            ["the same", f"{MARGIN:.0%}", "any quantity REGRESSED", f"{alarms[1]} of {RUNS}"],
            *_rows("the same", "REGRESSED or IMPROVED", count(usual, "REGRESSED", "IMPROVED")),
            *_rows("the same", "SAME", count(usual, "SAME")),
            ["5 % more work", f"{MARGIN:.0%}", "any quantity REGRESSED", f"{regressed(planted)} of {RUNS}"],
            *_rows("5 % more work", "REGRESSED", found),
            [
                "the same small model", f"{_DEFAULT_MARGIN:.0%} (default)", "any quantity REGRESSED",
                f"{small_alarms[0]} of {RUNS_SMALL}",
            ],
            ["the same small model", f"{MARGIN:.0%}", "any quantity REGRESSED", f"{small_alarms[1]} of {RUNS_SMALL}"],
        ],
    )  # fmt: skip
    assert max(alarms) <= allowed(RUNS)
    assert max(small_alarms) <= allowed(RUNS_SMALL)
    assert found[0] >= 0.95 * RUNS


def allowed(runs: int) -> float:
    """The stated rate, and three standard errors of it in so many runs."""
    return runs * FALSE_ALARMS + 3 * math.sqrt(runs * FALSE_ALARMS * (1 - FALSE_ALARMS))


def regressed(comparisons: Sequence[Comparison]) -> int:
    return sum(each.verdict == "REGRESSED" for each in comparisons)


def _rows(what: str, word: str, counts: list[int]) -> list[list[str]]:
    return [
        [what, f"{MARGIN:.0%}", f"{quantity} {word}", f"{number} of {RUNS}"]
        for quantity, number in zip(QUANTITIES, counts, strict=True)
    ]


def per_cents(comparisons: Sequence[Comparison]) -> tuple[float, float, float]:
    """By how much the median was slower: the 5th, 50th and 95th percentile over the runs."""
    ratios = [each.rows[0].judged[0].ratio for each in comparisons]
    changes = [100 * (ratio.value - 1) for ratio in ratios if ratio is not None]
    low, middle, high = np.quantile(changes, [0.05, 0.5, 0.95])
    return float(low), float(middle), float(high)
