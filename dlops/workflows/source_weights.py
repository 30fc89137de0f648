"""Weights that were trained elsewhere, read from a file without unpickling anything but tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlops.errors import CorruptError, first_line, from_os_error

if TYPE_CHECKING:
    import torch


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a .safetensors, .pth or .pt file; of a training checkpoint the part that is one.

    Raises CorruptError where it holds something else, or would have to be unpickled.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded: Any = (
            load_file(path) if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )  # fmt: skip
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    except (SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise CorruptError(f"{path}: no weights in it: {first_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - torch raises pickle's own error for what weights_only refuses
        raise CorruptError(
            f"{path}: not read, because it holds more than tensors: {first_line(error)}",
            hint="save its state_dict() alone, best as safetensors",
        ) from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CorruptError(f"{path}: no state dict in it", hint="save the module's state_dict()")
    # Wrapped for several devices, or compiled.
    names = {key: str(key).removeprefix("module.").removeprefix("_orig_mod.") for key in loaded}
    return {names[key]: value for key, value in loaded.items()}
