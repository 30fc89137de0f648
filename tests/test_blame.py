"""Errors name the line of the model's code, and a module that changes its input is found out before it harms data."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import dlops
from dlops import blame
from dlops.errors import GateError, UsageError
from dlops.unchanged import run_on_copies

OWN = """
import torch
from torch import nn

class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        strange = torch.special.i1(x.flatten(1))
        return self.linear(strange)

class Branching(Strange):
    def forward(self, x):
        flat = x.flatten(1)
        if flat.sum() > 0:
            flat = -flat
        return self.linear(flat)

class InPlace(Strange):
    def forward(self, x):
        flat = x.flatten(1)
        flat[:, 3] = 0
        return self.linear(flat)

class Clipping(Strange):
    def forward(self, x):
        return self.linear(x.clone().clamp_(0, 1).flatten(1))

class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), torch.ao.nn.quantized.dynamic.Linear(64, 10))

    def forward(self, x):
        return self.body(x)
"""
BESSEL = "own_model.py, line 11: strange = torch.special.i1"
BRANCH = "own_model.py, line 17: if flat.sum() > 0:"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A person's module in the folder where they work."""
    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    import own_model

    return own_model


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((16, 1, 8, 8), np.float32)


def exported(module: type[nn.Module], variant: str) -> None:
    torch.manual_seed(0)
    checkpoint = dlops.save_checkpoint(
        module(), "run", evaluation=(images(), np.arange(16) % 10), name="own", max_batch=4
    )
    dlops.export_variants(checkpoint, variants=[variant], model=module, out="artifacts")


@pytest.mark.parametrize(
    ("module", "variant", "line"),
    [
        ("Strange", "onnx-fp32", BESSEL), ("Strange", "openvino-fp32", BESSEL), ("Strange", "executorch-fp32", BESSEL),
        ("Branching", "onnx-fp32", BRANCH), ("Branching", "torchscript-fp32", BRANCH),
        ("Branching", "torchexport-fp32", BRANCH), ("Branching", "executorch-fp32", BRANCH),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_named_with_its_line(own, module: str, variant: str, line: str) -> None:
    with pytest.raises((UsageError, GateError)) as refused:
        exported(getattr(own, module), variant)
    assert f"({line}" in refused.value.message
    assert not Path("artifacts").exists()


def test_a_module_that_changes_its_input_is_refused_and_the_data_stay(own) -> None:
    x = images()
    with pytest.raises(UsageError, match=r"changes its input input in place \(own_model.py, line 24: flat\[:, 3\] = 0"):
        dlops.save_checkpoint(own.InPlace(), "run", evaluation=(x, np.arange(16) % 10))
    np.testing.assert_array_equal(x, images())
    assert not Path("run").exists()


def test_a_module_that_changes_a_copy_is_fine(own) -> None:
    exported(own.Clipping, "onnx-fp32")
    assert Path("artifacts/own/onnx-fp32/artifact.json").exists()


def test_an_input_with_nan_is_not_taken_for_a_changed_one() -> None:
    x = np.array([[1, np.nan], [0, 2]], np.float32)
    result = run_on_copies(nn.Identity(), {"x": x}, title="identity")
    np.testing.assert_array_equal(result.numpy(), x)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_module_that_is_quantized_already_is_refused_by_name(own) -> None:
    with pytest.raises(UsageError, match=r"Quantized: body\.1 is quantized already, .*dynamic.*Linear"):
        dlops.save_checkpoint(own.Quantized(), "run", evaluation=(images(), np.arange(16) % 10))
    assert not Path("run").exists()


def test_a_librarys_model_is_blamed_and_its_tools_are_not() -> None:
    """torchvision's code is the model's; torch's and ours is not."""
    torchvision, tool = Path(nn.__file__).parents[2] / "torchvision/models/resnet.py", nn.__file__
    places = [(tool, 1), (str(torchvision), 5), (tool, 9), (str(Path(blame.__file__)), 3), ("<eval_with_key>.1", 2)]
    found = blame.last_line(places)
    assert found is not None
    assert "torchvision/models/resnet.py, line 5" in found
    assert blame.last_line([(tool, 1)]) is None
    assert blame.code_line(ValueError("nothing of a line")) is None
