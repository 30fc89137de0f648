"""`dlops prune`: a checkpoint with channels removed, to be fine-tuned by its recipe."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from dlops.cli_common import find_checkpoint, print_result


def prune(
    checkpoint: Annotated[Path | None, typer.Argument(help="A run folder; the newest if left out.")] = None,
    sparsity: Annotated[str, typer.Option(help="prunedNN, NN % of the MACs removed.")] = "pruned50",
    model: Annotated[str | None, typer.Option(help="python:package.module:function that makes the module.")] = None,
    out: Annotated[Path | None, typer.Option(help="The new checkpoint's folder; default: runs/pruned/<time>.")] = None,
) -> None:
    """Cut channels out of a checkpoint and write what is left as another one.

    Fine-tune that with dlops train RECIPE --init FOLDER, then export it as its prunedNN variant.
    """
    # Before PyTorch is imported, which takes seconds: a missing checkpoint, or a folder that has one, is said at once.
    found = find_checkpoint(checkpoint)
    from dlops.checkpoint import check_vacant, import_model_source

    folder = out or Path("runs") / "pruned" / datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    check_vacant(folder)
    from dlops.export.prune_checkpoint import prune_checkpoint

    source = import_model_source(model) if model else None
    print_result(prune_checkpoint(found, folder, sparsity=sparsity, model=source).directory)
