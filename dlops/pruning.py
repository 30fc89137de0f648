"""Apply a pruning record to a dense module, so that pruned weights fit it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlops.errors import missing_package

if TYPE_CHECKING:
    import torch

    from dlops.checkpoint import PruningRecord


def apply_pruning(
    module: torch.nn.Module, record: PruningRecord, *, example: tuple[torch.Tensor, ...]
) -> torch.nn.Module:
    """Cut the recorded channels out of `module`, in place, and return it. example: inputs that it runs on."""
    try:
        import torch_pruning
    except ModuleNotFoundError:
        raise missing_package("torch-pruning", extra="export", needed_for="a pruned model") from None

    graph = torch_pruning.DependencyGraph().build_dependency(module, example_inputs=example)
    graph.load_pruning_history([(name, is_out, list(channels)) for name, is_out, channels in record.steps])
    return module
