"""A written TorchScript file: what it must not hold, and that each kind of wrong file is refused."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dlops.artifact import Artifact
from dlops.errors import GateError
from dlops.export.pipeline import export_variants
from dlops.export.to_torchscript import check_written
from dlops.samples import Samples
from dlops.saving import save_checkpoint


def two_inputs(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return image.flatten(1)[:, :10] + other


def fixed_batch(image: torch.Tensor) -> torch.Tensor:
    return image.reshape(3, 64)[:, :10]


def other_classes(image: torch.Tensor) -> torch.Tensor:
    return image.flatten(1)[:, :9]


def other_dtype(image: torch.Tensor) -> torch.Tensor:
    return image.flatten(1)[:, :10].half()


def two_outputs(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return image.flatten(1)[:, :10], image.flatten(1)[:, :10] + 1


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (two_inputs, "takes 2 inputs, the signature has 1"),
        (fixed_batch, "does not run at batch 1"),
        (other_classes, r"output logits at batch 1 is float32\[1, 9\], asked for was float32\[1, 10\]"),
        (other_dtype, r"float16\[1, 10\], asked for was float32\[1, 10\]"),
        (two_outputs, "it gives 2 outputs, the signature has 1"),
    ],
)
def test_a_file_other_than_asked_for_is_refused(
    exported_dense: dict[str, Artifact], function: Callable[..., object], said: str, tmp_path: Path
) -> None:
    artifact = exported_dense["torchscript-fp32"]
    check_written(artifact.path("model"), artifact.signature, precision="fp32", title="it")
    examples = (torch.zeros(3, 1, 8, 8), torch.zeros(3, 10))[: function.__code__.co_argcount]
    with warnings.catch_warnings(action="ignore"):  # torch announces TorchScript's retirement
        torch.jit.trace(function, examples).save(str(tmp_path / "it.pt"))
    with pytest.raises(GateError, match=said):
        check_written(tmp_path / "it.pt", artifact.signature, precision="fp32", title="it")


def test_a_written_file_has_no_source_locations_and_aligned_tensors(exported_dense: dict[str, Artifact]) -> None:
    path = exported_dense["torchscript-fp32"].path("model")
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        names = archive.namelist()
        assert not [name for name in names if "debug_pkl" in name]
        tensors = [entry for entry in archive.infolist() if "/constants/" in entry.filename]
        assert tensors
        for entry in tensors:
            file.seek(entry.header_offset + 26)
            lengths = file.read(4)
            start = (
                entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            )
            assert start % 64 == 0


class _Sized(nn.Module):
    """Compares sizes, which a trace takes for tensors, and computes with what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * int(2 * max(x.shape[1], x.shape[1] - 1))


class _Reads(_Sized):
    """A number read out of a tensor: 1 for every sample here, and not for others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * int(x.abs().amax() < 100)


def _exported(model: nn.Module, folder: Path) -> Artifact:
    x = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
    checkpoint = save_checkpoint(
        model.eval(), folder / "run", evaluation=Samples(raw=tuple(x), inputs={"x": x}), name="net", max_batch=8
    )
    [made] = export_variants(checkpoint, variants=["torchscript-fp32"], model=model, out=folder / "artifacts")
    return made


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
def test_what_follows_from_sizes_may_become_a_number_in_the_trace(tmp_path: Path) -> None:
    with pytest.warns(torch.jit.TracerWarning, match="Python (boolean|integer)") as recorded:
        torch.jit.trace(_Sized().eval(), torch.zeros(2, 6), check_trace=False)
    assert recorded
    assert _exported(_Sized(), tmp_path).parity.batches == (1, 2, 7, 8)


def test_what_is_read_out_of_a_tensor_may_not(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="tracing would bake in"):
        _exported(_Reads(), tmp_path)
