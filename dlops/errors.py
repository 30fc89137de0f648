"""Every error that dlops raises on purpose.

    DlopsError                 message, hint, exit status
    ├── GateError         1    a check said no: a file that is not what was asked for, regression
    │   └── LossError          parity or accuracy: it computes too far from the original
    ├── UsageError        2    arguments and files: unknown names, bad values, missing paths
    │   ├── InputError         one request or sample does not fit the model: field, reason
    │   └── CorruptError       a file is not what its manifest says, or not ours
    ├── NoVerdictError    3    too little evidence, or the machine was not steady
    └── MachineError      4    port, disk, device or package

Anything else that reaches the command line is a bug of ours (exit status 70).
"""

from __future__ import annotations

import difflib
import errno
import shutil
from collections.abc import Iterable
from typing import ClassVar


class DlopsError(Exception):
    """What went wrong and where, with `hint` saying what to do next."""

    exit_status: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class GateError(DlopsError):
    exit_status = 1


class LossError(GateError):
    """Too far from the original in its outputs or its accuracy, which a milder variant may not be."""


class UsageError(DlopsError):
    exit_status = 2


class InputError(UsageError):
    """A request or sample that does not fit; `field` names the tensor or part at fault."""

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.field = field


class CorruptError(UsageError):
    pass


class NoVerdictError(DlopsError):
    exit_status = 3


class MachineError(DlopsError):
    exit_status = 4


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str | None = None) -> UsageError:
    """The error for a name that is not in a fixed table: the nearest right ones, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = (f"did you mean {' or '.join(near)}? " if near else "") + f"known: {', '.join(names)}"
    prefix = f"{where}: " if where else ""
    return UsageError(f"{prefix}unknown {kind} {name!r}", hint=hint)


# The extra that brings each optional package; pyproject.toml has the versions.
_EXTRAS = {
    "bentoml": "serve",
    "executorch": "executorch",
    "httpx": "bench",
    "lightning_fabric": "train",
    "onnx": "export",
    "onnxruntime": "cpu",
    "onnxscript": "export",
    "optuna": "optimize",
    "openvino": "openvino",
    "prometheus_client": "serve",
    "sklearn": "train",
    "tensorrt": "tensorrt",
    "tensorboard": "train",
    "torch": "export",
    "torch_pruning": "export",
    "torchao": "executorch",
    "torchvision": "export",
    "tritonclient": "triton",
}


def missing_package(package: str, *, needed_for: str, extra: str | None = None) -> MachineError:
    """The error for an optional package that is not installed, naming the extra that brings it."""
    extra = extra or _EXTRAS.get(package, "all")
    return MachineError(f"{needed_for} needs {package}, which is not installed", hint=f"pip install 'dlops[{extra}]'")


def from_os_error(error: OSError, *, doing: str) -> DlopsError:
    """The DlopsError that says what an operating-system error means to the user."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list) and error.args[0]:
        # Of a tree that could not be copied: what is wrong with each file, the first of which tells.
        source, target, reason = error.args[0][0]
        full = "No space left" in str(reason)
        return from_os_error(
            OSError(errno.ENOSPC if full else errno.EIO, str(reason), source, None, target), doing=doing
        )
    # Of a copy the second is what was written.
    at = error.filename2 or error.filename
    where = f": {at}" if at else ""
    # Libraries raise it without a number too, safetensors for one.
    match errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return MachineError(f"{doing}: the disk is full{where}", hint="free some space and run it again")
        case errno.EADDRINUSE:
            return MachineError(f"{doing}: the port is in use", hint="pass another --port, or 0 for a free one")
        case errno.ENOENT:
            return UsageError(f"{doing}: no such file or directory{where}")
        case errno.ENOTDIR | errno.EISDIR | errno.EEXIST:
            return UsageError(f"{doing}: {(error.strerror or str(error)).lower()}{where}")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return MachineError(f"{doing}: permission denied{where}")
        case _:
            return MachineError(f"{doing}: {error.strerror or error}{where}")


def first_line(error: BaseException) -> str:
    """Of another library's error: what fits into one of ours, cut at 300 characters; its kind where it says nothing."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
