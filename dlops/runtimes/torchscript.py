"""TorchScript through torch.jit: the module frozen, on the CPU or CUDA.

Such a file is a program with torch's operators, some of which open files: it is run as it is, and only files from a
source that one trusts should be.
"""

from __future__ import annotations

import numpy as np
import torch

from dlops.artifact import Artifact
from dlops.environment import describe_environment
from dlops.errors import CorruptError, missing_package
from dlops.runtimes.eager import ModuleSession, choose_device
from dlops.runtimes.session import SessionOptions

# What multiplies bfloat16. Other CPUs widen it to fp32 and round the results.
_BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def open_session(artifact: Artifact, options: SessionOptions) -> ModuleSession:
    import warnings

    device = choose_device(options)
    if "torchvision" in artifact.requires:
        _register_operators(artifact.title)
    try:
        with warnings.catch_warnings():
            # torch announces TorchScript's retirement at every load; the format was the user's choice.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(artifact.path("model")), map_location=device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise CorruptError(f"{artifact.title}: torch cannot load it: {str(error).splitlines()[0][:300]}") from error
    session = ModuleSession(
        module, signature=artifact.signature, runtime="torchscript",
        precision=computed_precision(artifact.variant.precision, device), device=device, options=options,
    )  # fmt: skip
    _settle(session)
    return session


def computed_precision(precision: str, device: torch.device) -> str:
    """What the kernels on `device` compute in, for weights stored in `precision`."""
    widened = device.type == "cpu" and not _BF16_INSTRUCTIONS & set(describe_environment().instruction_sets)
    return "fp32" if precision == "bf16" and widened else precision


def _register_operators(title: str) -> None:
    """Detectors call torchvision's own operators, which importing it registers."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        raise missing_package("torchvision", extra="export", needed_for=f"running {title}") from None


def _settle(session: ModuleSession) -> None:
    """Run twice at batch 1: the profiling executor records on the first run and recompiles on the second."""
    feed = {
        spec.name: np.zeros(
            [session.signature.dims[dim].min if isinstance(dim, str) else dim for dim in spec.shape], dtype=spec.dtype
        )
        for spec in session.signature.inputs
    }
    for _ in range(2):
        session.run(feed)
