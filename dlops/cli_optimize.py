"""`dlops optimize`: its options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from dlops.cli_common import Device, command_line, find_checkpoint, points, print_result, usage

_LATENCY = {"p50": "--latency-p50", "p90": "--latency-p90", "p99": "--latency-p99"}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def optimize(
    checkpoint: Annotated[Path | None, typer.Argument(help="A run folder; the newest if left out.")] = None,
    max_drop: Annotated[str, typer.Option(help="Points of the task's metric that may be lost: 0.5%.")] = "1%",
    latency_p99: Annotated[
        str | None, typer.Option("--latency-p99", help="What p99 of a call has to keep: 5ms.")
    ] = None,
    latency_p90: Annotated[str | None, typer.Option("--latency-p90", help="The same of p90.")] = None,
    latency_p50: Annotated[str | None, typer.Option("--latency-p50", help="The same of p50.")] = None,
    device: Device = "auto",
    budget: Annotated[str, typer.Option(help="After which no trial begins: 90s, 10m, 1h.")] = "10m",
    batch: Annotated[int, typer.Option(min=1, help="Items a call.")] = 1,
    variant: Annotated[list[str] | None, typer.Option(help="To choose from; repeatable. All that can be made.")] = None,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="To choose from; repeatable. Powers of two up to all cores.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where artifacts go.")] = Path("artifacts"),
    report: Annotated[Path | None, typer.Option(help="The report's folder: reports/optimize-NAME.")] = None,
    model: Annotated[str | None, typer.Option(help="python:package.module:function that makes the module.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is proposed.")] = 0,
) -> int:
    """Find the variant and threads that keep an accuracy and a latency.

    Each trial is exported and measured. The same command goes on where it was stopped.
    """
    asked = {"p99": latency_p99, "p90": latency_p90, "p50": latency_p50}
    limits = {quantile: text for quantile, text in asked.items() if text is not None}
    if len(limits) != 1:
        usage(f"one latency is to be kept, {len(limits) or 'none'} was given", "--latency-p99 5ms")
    (quantile, limit), *_ = limits.items()
    drop = points(max_drop)
    spent = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget.strip())
    if spent is None:
        usage(f"--budget {budget!r}: not a time", "--budget 10m")
    # Before PyTorch is imported, which takes seconds: a missing checkpoint is said at once.
    found = find_checkpoint(checkpoint)
    from dlops.bench.slo import parse_objective
    from dlops.checkpoint import import_model_source
    from dlops.errors import UsageError
    from dlops.workflows.optimize import PAGE
    from dlops.workflows.optimize import optimize as search

    try:
        objective = parse_objective(f"{quantile}={limit}")
    except UsageError:
        usage(f"{_LATENCY[quantile]} {limit!r}: not a time", f"{_LATENCY[quantile]} 5ms, 500us or 1s")
    outcome = search(
        found,
        objective=objective,
        max_drop=drop,
        device=device,
        budget_s=float(spent[1]) * _SECONDS[spent[2]],
        batch=batch,
        variants=variant,
        threads=threads,
        out=out,
        report=report,
        model=import_model_source(model) if model else None,
        seed=seed,
        command=command_line(),
    )
    print_result(outcome.result.because)
    if outcome.artifact is not None and outcome.result.winner is not None:
        print_result(outcome.artifact.directory)
        count = outcome.result.winner.threads
        print_result(f"dlops serve {outcome.artifact.directory}{f' --threads {count}' if count else ''}")
    print_result(f"report: {outcome.directory / PAGE}")
    return outcome.status
