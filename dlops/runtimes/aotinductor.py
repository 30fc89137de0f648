"""An AOTInductor package: native code for the processor or GPU that it was compiled on, loaded into this process."""

from __future__ import annotations

import warnings

import torch

from dlops.artifact import Artifact
from dlops.environment import describe_environment
from dlops.errors import CorruptError, MachineError
from dlops.runtimes.eager import ModuleSession, choose_device
from dlops.runtimes.session import SessionOptions
from dlops.runtimes.torchscript import computed_precision
from dlops.trust import trusted_model


def open_session(artifact: Artifact, options: SessionOptions) -> ModuleSession:
    """Raises UsageError where the package was not made here and is not trusted, MachineError where it is for another
    kind of processor or device than this session's.
    """
    device = choose_device(options)
    with trusted_model(artifact, options) as path:
        _check_machine(artifact, device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                # The loader unpacks it elsewhere, and the library stays mapped once the copy is gone.
                package = torch._inductor.aoti_load_package(str(path))
        except RuntimeError as error:
            raise CorruptError(
                f"{artifact.title}: torch {torch.__version__} cannot load it: {str(error).splitlines()[0][:300]}",
                hint="it was compiled with torch "
                f"{artifact.provenance.environment.packages.get('torch', 'unknown')}: export it again here",
            ) from error
    return ModuleSession(
        package, signature=artifact.signature, runtime="aotinductor",
        precision=computed_precision(artifact.variant.precision, device), device=device, options=options,
    )  # fmt: skip


def _check_machine(artifact: Artifact, device: torch.device) -> None:
    """An instruction that the processor lacks would end the process, so that is found first."""
    wanted = str(artifact.provenance.notes.get("compiled_for", ""))
    if wanted != device.type:
        raise MachineError(
            f"{artifact.title}: it was compiled for {wanted or 'an unknown device'}, and this session runs on "
            f"{device.type}",
            hint=f"--device {wanted}, or export it again with --device {device.type}",
        )
    made, here = artifact.provenance.environment, describe_environment()
    lacking = sorted(set(made.instruction_sets) - set(here.instruction_sets))
    if made.machine != here.machine or lacking:
        needs = made.machine if made.machine != here.machine else ", ".join(lacking)
        raise MachineError(
            f"{artifact.title}: it was compiled on a processor with {needs}, which this one has not",
            hint="export it again on this machine, or take torchexport",
        )
