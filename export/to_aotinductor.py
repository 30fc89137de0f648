"""AOTInductor: the captured program compiled to native code for the processor or GPU of this machine."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dlops.checkpoint import example_inputs
from dlops.embedded import EXTRA_FILE
from dlops.errors import GateError, MachineError
from dlops.export.capture import capture
from dlops.export.formats import EXAMPLE_BATCH, Exported, ExportRequest, check_embedded, machine_paths
from dlops.manifest import sha256_of
from dlops.runtimes.eager import choose_device
from dlops.runtimes.session import SessionOptions
from dlops.trust import note_made_here

# What torch's writer adds by itself.
_WRITTEN_BY_TORCH = ("version", ".data/serialization_id", "byteorder", ".data/version")


def check_compiler() -> None:
    """Raise MachineError where there is no C++ compiler, which writes the code around the kernels."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise MachineError(
            f"aotinductor compiles C++, and there is no {compiler} here",
            hint="apt install g++, or name a compiler in the variable CXX; torchexport needs none",
        )


def export(request: ExportRequest) -> Exported:
    """Write the compiled package to `request.into`, and note that it was made here: only such are loaded without trust.

    Raises UsageError where torch.export cannot take the module, GateError where it cannot be compiled, MachineError
    where there is no compiler.
    """
    check_compiler()
    device = choose_device(SessionOptions(device=request.device))
    program = capture(request, device=device)
    package = request.into.with_name("compiled.pt2")
    example = example_inputs(request.signature, batch=min(EXAMPLE_BATCH, request.signature.max_batch))
    program.example_inputs = (tuple(tensor.to(device) for tensor in example), {})
    try:
        with warnings.catch_warnings(), _without_notices():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(package),
                # Else the number of threads of this process is compiled in.
                inductor_configs={"cpp.dynamic_threads": True},
            )  # fmt: skip
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise GateError(
            f"{request.title}: AOTInductor cannot compile it: {' '.join(lines[:2])[:400] or type(error).__name__}"
        ) from error
    embedded = None if request.embedded is None else request.embedded.to_json().encode()
    request.into.write_bytes(cleaned(package, embedded))
    package.unlink()
    check_embedded(request)
    compiled_for = read_target(request.into, title=request.title)
    note_made_here(sha256_of(request.into))
    return Exported(path=request.into, notes={"torch": torch.__version__, **compiled_for})


@contextmanager
def _without_notices() -> Iterator[None]:
    """torch says at every compilation that there is no CUDA toolkit, which a CPU does not need."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def cleaned(package: Path, embedded: bytes | None) -> bytes:
    """The package without its C++ sources and, in the compiled code, without the folders of this machine.

    Those stand in debug information and messages; each is overwritten in its length, so that nothing moves.
    """
    reader = torch._C.PyTorchFileReader(str(package))
    made = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(made)
    for name in reader.get_all_records():
        if name in _WRITTEN_BY_TORCH or name.endswith(".cpp"):
            continue
        content = reader.get_record(name)
        for path in machine_paths():
            content = content.replace(path, b"-" * len(path))
        writer.write_record(name, content, len(content))
    if embedded is not None:
        writer.write_record(f"extra/{EXTRA_FILE}", embedded, len(embedded))
    writer.write_end_of_file()
    return made.getvalue()


def read_target(package: Path, *, title: str) -> dict[str, str | int | float | bool]:
    """What the package was compiled for, as notes. Raises GateError where it does not say."""
    with zipfile.ZipFile(package) as archive:
        names = [name for name in archive.namelist() if name.endswith("_metadata.json")]
        said = [json.loads(archive.read(name)) for name in names]
    if not said or "AOTI_DEVICE_KEY" not in said[0]:
        raise GateError(f"{title}: the written package does not say what it was compiled for")
    device = str(said[0]["AOTI_DEVICE_KEY"])
    detail = said[0].get("AOTI_CPU_ISA") if device == "cpu" else said[0].get("AOTI_COMPUTE_CAPABILITY")
    return {"compiled_for": device, "compiled_for_architecture": str(detail or "")}
