"""Models that were not trained here: built by name or by a function, checked on real samples, exported."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_weights
from torch import nn
from torchvision import models

from dlops.artifact import open_artifact
from dlops.builders import published_preprocess
from dlops.checkpoint import load_checkpoint
from dlops.cli import run
from dlops.errors import CorruptError, MachineError, UsageError
from dlops.workflows.source_weights import read_weights
from dlops.workflows.source_words import parse_input
from dlops.workflows.sources import adopt

SMALL = {
    "input": "image",
    "shape": [3, 32, 32],
    "steps": [
        {"kind": "decode", "mode": "RGB"},
        {"kind": "resize", "size": [32, 32]},
        {"kind": "scale"},
        {"kind": "normalize", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    ],
}
OWN = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(12, 3)

    def forward(self, tokens, numbers):
        joined = torch.cat([self.table(tokens).mean(dim=1), numbers], dim=1)
        return {"logits": self.head(joined), "norm": joined.norm(dim=1, keepdim=True)}

def make():
    torch.manual_seed(1)
    return Two()

def wide(hidden=4):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, hidden), nn.Linear(hidden, 5))

def bad():
    made = wide()
    made[1].weight.data[0, 0] = float("nan")
    return made

class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 4)

    def forward(self, source, labels):
        return (self.table(source) + self.table(labels)).mean(dim=1)

def labelled():
    return Labelled()

def broken():
    raise RuntimeError("no such file of mine")

number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    (tmp_path / "own_module.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    return tmp_path


@pytest.fixture
def photos(here: Path) -> Path:
    """Class folders of small images; "tench" and "7" are ways to name two of ImageNet's classes."""
    draw = np.random.default_rng(0)
    for label, bright in (("tench", 60), ("7", 160)):
        for number in range(12):
            folder = here / "photos" / label
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(bright, bright + 60, (40, 48, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return here / "photos"


def two_inputs(path: Path, count: int = 40) -> Path:
    draw = np.random.default_rng(0)
    save_file(
        {
            "tokens": draw.integers(0, 50, (count, 6)), "numbers": draw.normal(size=(count, 4)).astype(np.float32),
            "targets": draw.integers(0, 3, count),
        },
        path,
    )  # fmt: skip
    return path


TWO_INPUTS = ["--input", "tokens:int64[batch,6]", "--input", "numbers:float32[batch,4]"]


def test_a_network_of_torchvision_is_exported_by_name(here: Path, photos: Path, capsys) -> None:
    options = ["--weights", "random", "--samples", str(photos), "--preprocess", "small.json", "--name", "little"]
    assert run(["export", "torchvision:squeezenet1_1", *options, "--format", "onnx", "--format", "torchscript"]) == 0
    assert capsys.readouterr().out.split() == ["artifacts/little/onnx-fp32", "artifacts/little/torchscript-fp32"]
    artifact = open_artifact("artifacts/little/onnx-fp32")
    assert artifact.labels == ("7", "tench")
    assert artifact.signature.outputs[0].shape == ("batch", 2)
    assert artifact.accuracy is not None
    (folder,) = Path("runs/little").iterdir()
    checkpoint = load_checkpoint(folder)
    assert checkpoint.spec.builder == "torchvision:squeezenet1_1"
    assert checkpoint.spec.kwargs == {"num_classes": 2}
    # The checkpoint rebuilds by itself.
    assert len(list(checkpoint.build_module().parameters())) > 10


def test_the_same_again_is_the_checkpoint_that_was_there(here: Path, photos: Path) -> None:
    options = {"samples": str(photos), "weights": "random", "preprocess": "small.json"}
    one, other = (adopt("torchvision:squeezenet1_1", **options).checkpoint for _ in range(2))
    # Random weights, too, are the same every time.
    assert one == other
    assert list(Path("runs/squeezenet1_1").iterdir()) == [one.directory]
    third = adopt("torchvision:squeezenet1_1", **options, arguments={"dropout": 0.25}).checkpoint
    assert third.directory != one.directory
    with pytest.raises(UsageError, match="the class '7' is none of the model's 3 "):
        adopt("torchvision:squeezenet1_1", **options, arguments={"num_classes": 3})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file_decide_how_many_classes_there_are(here: Path, photos: Path, suffix: str) -> None:
    torch.manual_seed(5)
    whole = models.squeezenet1_1(num_classes=2).eval()
    path = here / f"mine{suffix}"
    if suffix == ".pth":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in whole.state_dict().items()}}, path)
    else:
        save_weights(whole.state_dict(), path)
    found = adopt("torchvision:squeezenet1_1", samples=str(photos), weights=str(path), preprocess="small.json")
    rebuilt = found.checkpoint.build_module()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(image), whole(image), rtol=0, atol=0)


def test_published_weights_bring_their_labels_and_their_preprocessing(here: Path, photos: Path, monkeypatch) -> None:
    asked = []

    def fetched(url: str, **options: object) -> dict[str, torch.Tensor]:
        asked.append(options)
        return models.squeezenet1_1(weights=None).state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched)
    found = adopt("torchvision:squeezenet1_1", samples=str(photos), weights="IMAGENET1K_V1").checkpoint
    assert asked[0]["weights_only"] is True
    assert asked[0]["check_hash"] is True
    assert len(found.spec.labels) == 1000
    assert found.spec.preprocess is not None
    assert found.spec.preprocess.shape == (3, 224, 224)
    samples = found.samples("evaluation")
    assert samples is not None
    # "tench" is the first of ImageNet's classes, and the folder "7" is a number of one.
    assert set(samples.targets.tolist()) == {0, 7}


def test_published_weights_that_cannot_be_fetched_are_one_line(here: Path, photos: Path, monkeypatch) -> None:
    def fail(url: str, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(MachineError, match="the weights of torchvision:squeezenet1_1 cannot be fetched from https"):
        adopt("torchvision:squeezenet1_1", samples=str(photos), weights="DEFAULT")


def test_a_network_of_timm_is_exported_by_name(here: Path, photos: Path) -> None:
    options = ["--weights", "random", "--samples", str(photos), "--preprocess", "small.json"]
    assert run(["export", "timm:test_resnet", *options, "--format", "onnx"]) == 0
    artifact = open_artifact("artifacts/test_resnet/onnx-fp32")
    assert artifact.labels == ("7", "tench")
    (folder,) = Path("runs/test_resnet").iterdir()
    assert load_checkpoint(folder).spec.builder == "timm:test_resnet"


def test_published_weights_of_timm_are_read_as_safetensors(here: Path, photos: Path, monkeypatch) -> None:
    import timm

    whole = timm.create_model("mobilenetv3_small_050", pretrained=False)
    asked = []

    def fetched(repository: str, name: str) -> str:
        asked.append((repository, name))
        save_weights(whole.state_dict(), here / "fetched.safetensors")
        return str(here / "fetched.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    found = adopt("timm:mobilenetv3_small_050", samples=str(photos), weights="DEFAULT").checkpoint
    assert asked == [("timm/mobilenetv3_small_050.lamb_in1k", "model.safetensors")]
    samples = found.samples("evaluation")
    assert samples is not None
    assert set(samples.targets.tolist()) == {0, 7}
    assert found.spec.preprocess == published_preprocess("timm:mobilenetv3_small_050")
    with pytest.raises(UsageError, match="unknown weights of timm:mobilenetv3_small_050"):
        adopt("timm:mobilenetv3_small_050", samples=str(photos), weights="lamb_in2k")


def test_several_inputs_and_named_outputs_of_a_function(here: Path, capsys) -> None:
    two_inputs(here / "samples.safetensors")
    options = ["--samples", "samples.safetensors", *TWO_INPUTS, "--format", "onnx", "--format", "torchscript"]
    assert run(["export", "python:own_module:make", *options]) == 0
    for slug in ("onnx-fp32", "torchscript-fp32"):
        artifact = open_artifact(Path("artifacts/make", slug))
        assert [spec.name for spec in artifact.signature.inputs] == ["tokens", "numbers"]
        assert [spec.name for spec in artifact.signature.outputs] == ["logits", "norm"]
        assert artifact.signature.inputs[0].dtype == "int64"
        assert run(["verify", str(artifact.directory)]) == 0


def test_the_layers_of_a_named_model_are_explained(here: Path, capsys) -> None:
    two_inputs(here / "samples.safetensors")
    options = ["--samples", "samples.safetensors", *TWO_INPUTS, "--out", "pages"]
    assert run(["export", "python:own_module:make", *options, "--explain", "onnx-int8"]) == 0
    assert "Gemm" in capsys.readouterr().out
    assert [path.name for path in Path("pages").iterdir()] == ["make-onnx-int8-layers.html"]
    assert not Path("artifacts").exists()


def test_images_for_a_function_follow_its_input(here: Path, photos: Path) -> None:
    (here / "images_module.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(256, 2))\n"
    )
    found = adopt("python:images_module:make", samples=str(photos), inputs=["x:float32[batch,1,16,16]"]).checkpoint
    assert found.spec.preprocess is not None
    assert found.spec.preprocess.shape == (1, 16, 16)
    assert found.spec.labels == ("7", "tench")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["torchvision:squeezenet1_1", "--samples", "photos"], "which weights?"),
        (["torchvision:squeezenet1_1", "--weights", "random"], "nothing to check it on"),
        (["torchvision:squeezenet9", "--weights", "random", "--samples", "photos"], "unknown torchvision model"),
        (["timm:squeezenet9", "--weights", "random", "--samples", "photos"], "unknown timm model"),
        (["torchvision:squeezenet1_1", "--weights", "IMAGENET9", "--samples", "photos"], "unknown weights of torch"),
        (["torchvision:squeezenet1_1", "--weights", "no.pth", "--samples", "photos"], "no.pth"),
        (["python:own_module:make", "--samples", "two.safetensors"], "in which order"),
        (["python:own_module:broken", "--samples", "two.safetensors", *TWO_INPUTS], "no such file of mine"),
        (["python:own_module:number", "--samples", "two.safetensors", *TWO_INPUTS], "TypeError"),
        (["python:own_module:make", "--samples", "photos"], "nothing says what it makes of them"),
        (["python:own_module:make", "--weights", "random2", "--samples", "two.safetensors"], "no file of weights"),
        (["python:own_module:make", "--model", "python:a:b", "--samples", "photos"], "--model builds a checkpoint's"),
        (["runs/none", "--weights", "random"], "--weights is for torchvision:"),
        (["python:own_module:make", "--samples", "two.safetensors", "--set", "x"], "expected KEY=VALUE"),
        (["python:own_module:wide", "--samples", "x.safetensors", "--set", "depth=2"], "unexpected keyword argument"),
        (["python:own_module:wide", "--samples", "x.safetensors", "--preprocess", "imagenet"], "holds tensors"),
        (["python:own_module:wide", "--samples", "x.safetensors", *["--input", "x:float32[batch,6]"] * 2], "x: given"),
        (["python:own_module:wide", "--samples", "x.safetensors", *["--output", "a"] * 2], "a: given twice"),
        (["python:own_module:wide", "--samples", "nowhere"], "unknown data set 'nowhere'"),
        (["python:own_module:wide", "--samples", "x.safetensors", "--name", "a b"], "--name 'a b': letters"),
        (["python:own_module:nothing", "--samples", "x.safetensors"], "python:own_module:nothing: own_module has no"),
        (["python:own_module:bad", "--samples", "x.safetensors"], "NaN or infinity in 1.weight"),
        (["python:own_module:wide", "--samples", "x.safetensors", "--dim", "h=8:4"], "from 8 to 4 there is nothing"),
        (
            ["python:own_module:make", "--samples", "two.safetensors", *TWO_INPUTS, "--output", "a", "--output", "b"],
            "the model itself names its outputs logits, norm",
        ),
        (["torchvision:mnasnet0_5", "--weights", "random", "--samples", "x.safetensors"], "does not run on the sam"),
        (["python:own_module:wide", "--samples", "x.safetensors", "--max-drop", "a lot"], "not percentage points"),
    ],
)
def test_what_does_not_fit_together_is_one_line(here: Path, photos: Path, options, said, capsys) -> None:
    two_inputs(here / "two.safetensors")
    save_file({"x": np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)}, here / "x.safetensors")
    assert run(["export", *options]) in (2, 4)
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not Path("artifacts").exists()
    assert not list(Path().glob("runs/*/*/checkpoint.json"))


def test_images_that_cannot_be_decoded_are_named_and_counted(here: Path, photos: Path, capsys) -> None:
    first, second = sorted(photos.rglob("*.png"))[:2]
    first.write_bytes(first.read_bytes()[:2000])
    second.unlink()
    second.symlink_to("nowhere")
    command = ["export", "torchvision:squeezenet1_1", "--weights", "random", "--samples", str(photos)]
    assert run([*command, "--input", "x:float32[batch,3,64,64]"]) == 2
    error = capsys.readouterr().err
    # Of the 24, three are for validation, which nothing here is made of.
    assert "2 of 21 images cannot be read or decoded: " in error
    for path in (first, second):
        assert path.relative_to(photos).as_posix() in error
    assert "Traceback" not in error
    assert not Path("artifacts").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pixels", "expected name:dtype"), ("x:float31[batch,3]", "float31 is not one of"),
        ("x:float32[3,batch]", "the first dim is the batch"), ("x:float32[batch,-3]", "'-3' is no size"),
    ],
)  # fmt: skip
def test_an_input_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_input(text)


def test_samples_that_do_not_fit_the_inputs_are_refused(here: Path) -> None:
    two_inputs(here / "two.safetensors")
    with pytest.raises(UsageError, match=r"numbers: dtype float32, expected float64"):
        adopt(
            "python:own_module:make", samples="two.safetensors",
            inputs=["tokens:int64[batch,6]", "numbers:float64[batch,4]"],
        )  # fmt: skip
    with pytest.raises(UsageError, match="no tensor 'words' in it"):
        adopt("python:own_module:make", samples="two.safetensors", inputs=["words:int64[batch,6]"])


def test_an_input_may_be_called_what_targets_are(here: Path) -> None:
    draw = np.random.default_rng(0)
    save_file({name: draw.integers(0, 50, (40, 6)) for name in ("source", "labels")}, here / "pairs.safetensors")
    found = adopt(
        "python:own_module:labelled", samples="pairs.safetensors",
        inputs=["source:int64[batch,6]", "labels:int64[batch,6]"],
    ).checkpoint  # fmt: skip
    assert [spec.name for spec in found.signature.inputs] == ["source", "labels"]
    samples = found.samples("evaluation")
    assert samples is not None
    assert samples.targets is None


def test_arguments_of_a_function_are_passed_and_made_again_with(here: Path, capsys) -> None:
    save_file({"x": np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)}, here / "x.safetensors")
    command = ["export", "python:own_module:wide", "--samples", "x.safetensors", "--set", "hidden=7"]
    assert run([*command, "--max-batch", "9", "--max-drop", "0.5%", "--no-worth"]) == 0
    (folder,) = Path("runs/wide").iterdir()
    found = load_checkpoint(folder)
    assert found.spec.kwargs == {"hidden": 7}
    assert found.signature.max_batch == 9
    again = ["export", "python:own_module:wide", "--reproduce", "artifacts/wide/onnx-fp32"]
    assert run(again) == 0
    assert "byte for byte the same" in capsys.readouterr().out


def test_a_head_of_zeros_is_drawn_where_weights_are_random(here: Path) -> None:
    save_file({"x": np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)}, here / "x.safetensors")
    (here / "zeros_module.py").write_text(
        "from torch import nn\n\n"
        "def make():\n    made = nn.Linear(6, 3)\n    nn.init.zeros_(made.weight)\n    return made\n"
    )
    for weights, drawn in (("random", True), (None, False)):
        name = f"weights-{weights}"
        found = adopt("python:zeros_module:make", samples="x.safetensors", weights=weights, name=name).checkpoint
        assert bool(load_file(found.path("weights"))["weight"].any()) is drawn


def test_another_model_of_that_name_is_refused(here: Path, capsys) -> None:
    save_file({"x": np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)}, here / "x.safetensors")
    (here / "other_module.py").write_text("from own_module import wide\n")
    options = ["--samples", "x.safetensors", "--no-worth"]
    assert run(["export", "python:own_module:wide", *options]) == 0
    before = open_artifact("artifacts/wide/onnx-fp32").sha256
    assert run(["export", "python:other_module:wide", *options]) == 2
    assert "runs/wide holds python:own_module:wide, another model" in capsys.readouterr().err
    assert open_artifact("artifacts/wide/onnx-fp32").sha256 == before
    assert run(["export", "python:other_module:wide", *options, "--name", "other"]) == 0
    # The same source again is no other.
    assert run(["export", "python:own_module:wide", *options]) == 0


def test_class_folders_may_be_numbers_of_a_functions_classes(here: Path) -> None:
    draw = np.random.default_rng(0)
    for label in ("0", "3"):
        for number in range(12):
            folder = here / "numbered" / label
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (2, 1, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    found = adopt(
        "python:own_module:wide", samples=str(here / "numbered"), inputs=["x:float32[batch,3,2,1]"]
    ).checkpoint
    assert found.spec.labels == ("0", "1", "2", "3", "4")
    samples = found.samples("evaluation")
    assert samples is not None
    assert samples.targets is not None
    assert set(samples.targets.tolist()) == {0, 3}


class Harmful:
    def __reduce__(self):
        return (print, ("was run",))


def test_a_pickle_is_not_read(tmp_path: Path, capsys) -> None:
    with (tmp_path / "bad.pth").open("wb") as file:
        pickle.dump({"weight": Harmful()}, file)
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("bad.pth", "module.pth"):
        with pytest.raises(CorruptError, match=name):
            read_weights(tmp_path / name)
    assert "was run" not in capsys.readouterr().out


def test_weights_that_do_not_fit_are_named(here: Path, photos: Path) -> None:
    save_weights({"weight": torch.zeros(2)}, here / "other.safetensors")
    with pytest.raises(UsageError, match=r"do not fit: .*classifier\.1\.bias is missing"):
        adopt(
            "torchvision:squeezenet1_1", samples=str(photos), weights=str(here / "other.safetensors"),
            preprocess="small.json",
        )  # fmt: skip
