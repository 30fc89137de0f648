"""What ONNX Runtime's TensorRT provider needs: its libraries, its options, and engines that are kept with the artifact.

TensorRT builds an engine for one GPU, which takes seconds to minutes; a kept one loads at once. An engine is native
code, so those in the artifact's folder are used only where they were made here, or where the artifact is trusted (see
dlops.trust): the provider is given a private folder with copies of these, and what it builds there is copied back.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
from contextlib import suppress
from importlib import util
from pathlib import Path
from typing import Literal

from dlops.artifact import Artifact
from dlops.console import say
from dlops.environment import describe_environment
from dlops.errors import MachineError, from_os_error
from dlops.manifest import sha256_of
from dlops.runtimes.session import SessionOptions
from dlops.signature import Signature
from dlops.trust import note_made_here, was_made_here

PROVIDER = "TensorrtExecutionProvider"
# Beside the manifest, which does not name it: an artifact is the same with its engines and without.
FOLDER = "tensorrt"
# In the order in which they need one another.
_LIBRARIES = ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10")
# The wheels tensorrt-cu12-libs and tensorrt-cu13-libs have the libraries in a package of this name.
_PACKAGE = "tensorrt_libs"
_KEPT = (".engine", ".profile", ".timing")
# Kernels are chosen for the shape in the middle: larger than one, so that neither single items nor full batches suffer.
_USUAL_BATCH = 8
_DIGEST_CHARS = 12
Which = Literal["min", "opt", "max"]
_PART = re.compile(r"[^A-Za-z0-9.]+")


def load_libraries() -> None:
    """Load TensorRT from its wheel, or from where the system finds it.

    Raises MachineError where it is neither installed nor loads.
    """
    spec = util.find_spec(_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for name in _LIBRARIES:
        path = next((str(Path(folder, name)) for folder in folders if Path(folder, name).is_file()), name)
        try:
            # Globally: the provider's own library looks for their symbols.
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise MachineError(
                f"TensorRT was asked for, and {name} does not load: {error}",
                hint="pip install 'tensorrt-cu13-libs<11', the major version that ONNX Runtime was built with",
            ) from None


def version() -> str:
    """Of the TensorRT that was loaded: "10.13.0"."""
    number = int(ctypes.CDLL(_LIBRARIES[0]).getInferLibVersion())
    # 10.13.0 is 101300, and before 10 it was 8601 for 8.6.1.
    major, rest = divmod(number, 10_000) if number >= 100_000 else divmod(number, 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def engine_key(gpu: str, tensorrt: str, onnxruntime: str) -> str:
    """The name of a folder of engines: an engine is for one kind of GPU, driver, TensorRT and provider.

    gpu: as `describe_environment` has it, "NVIDIA H100, 580.1, 81559 MiB".
    """
    name, driver = (part.strip() for part in [*gpu.split(","), ""][:2])
    parts = (name, f"driver {driver}", f"tensorrt {tensorrt}", f"onnxruntime {onnxruntime}")
    return "_".join(_PART.sub("-", part).strip("-") for part in parts)


class Engines:
    """The engines of one artifact on this machine's GPU. `path` is the folder that the provider reads and writes."""

    def __init__(self, artifact: Artifact, options: SessionOptions, *, key: str) -> None:
        """Copies into `path` what is kept and may be used; says so where something may not."""
        self._title = artifact.title
        # The provider names an engine by its graph and not by the weights in it.
        self._kept = artifact.directory / FOLDER / key / artifact.files["model"].sha256[:_DIGEST_CHARS]
        self._temporary = tempfile.TemporaryDirectory(prefix="dlops-tensorrt-")
        self.path = Path(self._temporary.name)
        self._digests: dict[str, str] = {}
        refused = 0
        for source in sorted(self._kept.iterdir()) if self._kept.is_dir() else ():
            if source.suffix not in _KEPT:
                continue
            copy = self.path / source.name
            shutil.copyfile(source, copy)
            # Of the copy: the file itself could be replaced between this and its use.
            digest = sha256_of(copy)
            if options.trust or was_made_here(digest):
                self._digests[source.name] = digest
            else:
                copy.unlink()
                refused += 1
        if refused:
            say(
                f"{self._title}: {refused} files in {self._kept} were not made by you on this machine. Engines are "
                "native code, so they are built anew; --trust uses them"
            )

    @property
    def is_empty(self) -> bool:
        """Whether the provider has to build what it needs."""
        return not any(Path(name).suffix == ".engine" for name in self._digests)

    def keep(self) -> None:
        """Copy what was built since into the artifact's folder, each file whole or not at all.

        A folder that cannot be written keeps nothing, which is said: the session works all the same.
        """
        for source in sorted(self.path.iterdir()):
            if source.suffix not in _KEPT or (digest := sha256_of(source)) == self._digests.get(source.name):
                continue
            target = self._kept / source.name
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                self._kept.mkdir(parents=True, exist_ok=True)
                note_made_here(digest)
                shutil.copyfile(source, temporary)
                temporary.replace(target)
            except OSError as error:
                say(f"{self._title}: engines are not kept: {from_os_error(error, doing=f'writing {target}')}")
                return
            except MachineError as error:
                say(f"{self._title}: engines are not kept: {error}")
                return
            finally:
                # Gone where it became `target`, and absent where its folder could not be made.
                with suppress(FileNotFoundError, NotADirectoryError):
                    temporary.unlink()
            self._digests[source.name] = digest

    def close(self) -> None:
        """Keep what the last runs built, then drop the private folder."""
        try:
            self.keep()
        finally:
            self._temporary.cleanup()


def open_engines(artifact: Artifact, options: SessionOptions, *, onnxruntime: str) -> Engines:
    """For the GPU that this process would take. onnxruntime: its version."""
    gpu = next(iter(describe_environment().gpus), "unknown GPU")
    return Engines(artifact, options, key=engine_key(gpu, version(), onnxruntime))


def provider_options(signature: Signature, precision: str, *, folder: Path | None) -> dict[str, str]:
    """As ONNX Runtime's documentation has them. folder: for engines; None keeps none.

    The shapes that an engine is for are given, all that the signature allows: else it would be built anew, in the
    middle of a request, whenever a batch is larger than those before it. Raises MachineError for fp8, of which the
    provider has no option.
    """
    if precision == "fp8":
        raise MachineError(
            "ONNX Runtime's TensorRT provider cannot be told to compute in fp8",
            hint="tensorrt-fp8 is an engine that does; --device cuda computes it in fp32",
        )
    options: dict[str, str] = {}
    if folder is not None:
        options = {
            "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(folder),
        }  # fmt: skip
    if precision == "fp16":
        options["trt_fp16_enable"] = "1"
    elif precision in ("int8", "int8wo"):
        # The scales are in the graph: no calibration table is read.
        options["trt_int8_enable"] = "1"
    return options | _profile(signature)


def profile_shapes(signature: Signature) -> dict[str, dict[Which, tuple[int, ...]]]:
    """Of each input with a named dim the shapes that an engine is for: the least, the usual, and the largest."""
    whiches: tuple[Which, ...] = ("min", "opt", "max")
    return {
        spec.name: {
            which: tuple(dim if isinstance(dim, int) else _size(signature, dim, which) for dim in spec.shape)
            for which in whiches
        }
        for spec in signature.inputs
        if any(isinstance(dim, str) for dim in spec.shape)
    }


def _profile(signature: Signature) -> dict[str, str]:
    shapes = profile_shapes(signature)
    if not shapes:
        return {}
    whiches: tuple[Which, ...] = ("min", "opt", "max")
    return {
        f"trt_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, sizes[which]))}" for name, sizes in shapes.items()
        )
        for which in whiches
    }


def _size(signature: Signature, dim: str, which: Which) -> int:
    limits = signature.dims[dim]
    if which != "opt":
        return limits.min if which == "min" else limits.max
    return min(limits.max, max(limits.min, _USUAL_BATCH)) if dim == "batch" else limits.max
