"""A torch.export program (.pt2), on the CPU or CUDA; read without torch's own loader, which unpickles."""

from __future__ import annotations

from dlops.artifact import Artifact
from dlops.errors import CorruptError
from dlops.program import read_program
from dlops.runtimes.eager import ModuleSession, choose_device
from dlops.runtimes.session import SessionOptions
from dlops.runtimes.torchscript import computed_precision


def open_session(artifact: Artifact, options: SessionOptions) -> ModuleSession:
    device = choose_device(options)
    program = read_program(artifact.path("model"), device=device)
    if len(program.inputs) != len(artifact.signature.inputs):
        raise CorruptError(
            f"{artifact.title}: its program takes {len(program.inputs)} inputs, its manifest names "
            f"{len(artifact.signature.inputs)}"
        )
    return ModuleSession(
        program.module, signature=artifact.signature, runtime="torch.export",
        precision=computed_precision(artifact.variant.precision, device), device=device, options=options,
    )  # fmt: skip
