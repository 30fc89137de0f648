"""From a trained PyTorch model to a service: the Python API, each name loaded on first use."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime reports its use to Microsoft, from 1.31 on Linux too, where nobody says otherwise before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from dlops.artifact import Artifact, Variant, newest_artifact, open_artifact
    from dlops.bench.reanalysis import reanalyse
    from dlops.bench.run import measure
    from dlops.checkpoint import Checkpoint, load_checkpoint
    from dlops.errors import DlopsError
    from dlops.export.pipeline import export_variants, prune_to_latency, rank_variant
    from dlops.export.verify import verify_artifact
    from dlops.preprocess import Preprocess
    from dlops.report import Report, read_report
    from dlops.runtimes import open_session
    from dlops.samples import Samples
    from dlops.saving import save_checkpoint
    from dlops.signature import Signature, TensorSpec
    from dlops.version import __version__

_HOMES = {
    "Artifact": "dlops.artifact",
    "Checkpoint": "dlops.checkpoint",
    "DlopsError": "dlops.errors",
    "Preprocess": "dlops.preprocess",
    "Report": "dlops.report",
    "Samples": "dlops.samples",
    "Signature": "dlops.signature",
    "TensorSpec": "dlops.signature",
    "Variant": "dlops.artifact",
    "__version__": "dlops.version",
    "export_variants": "dlops.export.pipeline",
    "load_checkpoint": "dlops.checkpoint",
    "measure": "dlops.bench.run",
    "newest_artifact": "dlops.artifact",
    "open_artifact": "dlops.artifact",
    "open_session": "dlops.runtimes",
    "prune_to_latency": "dlops.export.pipeline",
    "rank_variant": "dlops.export.pipeline",
    "read_report": "dlops.report",
    "reanalyse": "dlops.bench.reanalysis",
    "save_checkpoint": "dlops.saving",
    "verify_artifact": "dlops.export.verify",
}

__all__ = [
    "Artifact",
    "Checkpoint",
    "DlopsError",
    "Preprocess",
    "Report",
    "Samples",
    "Signature",
    "TensorSpec",
    "Variant",
    "__version__",
    "export_variants",
    "load_checkpoint",
    "measure",
    "newest_artifact",
    "open_artifact",
    "open_session",
    "prune_to_latency",
    "rank_variant",
    "read_report",
    "reanalyse",
    "save_checkpoint",
    "verify_artifact",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'dlops' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
