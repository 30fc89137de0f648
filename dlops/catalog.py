"""The fixed tables of what dlops knows by name: each name to "module:attribute", imported on first use.

A manifest holds names from these tables and never a module path, so reading one cannot import code of its choosing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from dlops.errors import DlopsError, MachineError, missing_package, unknown_name

BUILDERS: Mapping[str, str] = {
    "mlp": "dlops.train.models.mlp:mlp",
    "cnn": "dlops.train.models.cnn:cnn",
    "resnet": "dlops.train.models.resnet:resnet",
}
RECIPES: Mapping[str, str] = {
    "mlp": "dlops.train.recipes.mlp",
    "cnn": "dlops.train.recipes.cnn",
}
DATASETS: Mapping[str, str] = {
    "digits": "dlops.train.data.digits:load",
    "mnist": "dlops.train.data.mnist:load",
    "cifar10": "dlops.train.data.cifar:load_cifar10",
    "cifar100": "dlops.train.data.cifar:load_cifar100",
}
FORMATS: Mapping[str, str] = {
    "torchscript": "dlops.export.to_torchscript:export",
    "onnx": "dlops.export.to_onnx:export",
    "torchexport": "dlops.export.to_torchexport:export",
    "aotinductor": "dlops.export.to_aotinductor:export",
    "openvino": "dlops.export.to_openvino:export",
    "executorch": "dlops.export.to_executorch:export",
    "tensorrt": "dlops.export.to_tensorrt:export",
}
RUNTIMES: Mapping[str, str] = {
    "torchscript": "dlops.runtimes.torchscript:open_session",
    "onnx": "dlops.runtimes.onnxruntime:open_session",
    "torchexport": "dlops.runtimes.torchexport:open_session",
    "aotinductor": "dlops.runtimes.aotinductor:open_session",
    "openvino": "dlops.runtimes.openvino:open_session",
    "executorch": "dlops.runtimes.executorch:open_session",
    "tensorrt": "dlops.runtimes.tensorrt:open_session",
}
TASKS: Mapping[str, str] = {
    "classification": "dlops.tasks.classification:Classification",
    "detection": "dlops.tasks.detection:Detection",
    "generation": "dlops.tasks.generation:Generation",
    "regression": "dlops.tasks.regression:Regression",
    "segmentation": "dlops.tasks.segmentation:Segmentation",
}
# What must be importable to run an artifact of a format, and the extra that brings it.
REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    # Without torchvision: detectors alone call its operators, and their artifacts name it, too.
    "torchscript": ("torch",),
    "onnx": ("onnxruntime",),
    "torchexport": ("torch",),
    "aotinductor": ("torch",),
    "openvino": ("openvino",),
    # Its Python bindings load torch's libraries.
    "executorch": ("executorch", "torch"),
    "tensorrt": ("tensorrt",),
}


def check(table: Mapping[str, str], kind: str, name: str) -> None:
    """Raise UsageError for a name that is not in the table; nothing is imported."""
    if name not in table:
        raise unknown_name(kind, name, table)


def resolve(table: Mapping[str, str], kind: str, name: str) -> Any:
    """The object (or module, where the entry has no attribute) behind a name.

    Raises UsageError for an unknown name and MachineError for a package that is not installed.
    """
    check(table, kind, name)
    module_name, _, attribute = table[name].partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "dlops"):
            raise DlopsError(f"the {kind} {name!r} is in the catalog but not in the package: {error}") from error
        raise missing_package(package, needed_for=f"{kind} {name}") from None
    except ImportError as error:
        raise MachineError(
            f"{kind} {name}: a package that it needs is installed and does not import: {error}",
            hint="dlops doctor shows what works here",
        ) from error
    return getattr(module, attribute) if attribute else module
