"""Checkpoints from a person's own script: written in a line, read by safetensors only, rebuilt or refused by name."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dlops import load_checkpoint, save_checkpoint
from dlops.checkpoint import Checkpoint, PruningRecord, fill, import_model_source, newest_checkpoint
from dlops.errors import CorruptError, UsageError
from dlops.preprocess import Decode, Preprocess, Scale
from dlops.samples import Samples

INPUTS = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
TARGETS = np.arange(6) % 3
WITH_NAN = INPUTS.copy()
WITH_NAN[-1, -1] = np.nan


class Net(nn.Module):
    def __init__(self, features: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, features), nn.BatchNorm1d(features), nn.Dropout(0.5))
        self.head = nn.Linear(features, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Returning(nn.Module):
    """Gives what `make` makes of its input."""

    def __init__(self, make: object) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.make = make

    def forward(self, x: torch.Tensor) -> object:
        return self.make(self.layer(x))


def save(model: nn.Module, directory: Path, **settings: object) -> Checkpoint:
    return save_checkpoint(model, directory, **{"evaluation": (INPUTS, TARGETS), **settings})


def answers(module: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return module(torch.from_numpy(INPUTS))


def test_three_lines_of_a_persons_own_script_write_what_loads_and_computes_the_same(tmp_path: Path) -> None:
    model = Net().eval()
    save_checkpoint(model, tmp_path / "mine", evaluation=(INPUTS, TARGETS))
    checkpoint = load_checkpoint(tmp_path / "mine")

    assert checkpoint.name == "mine"
    assert checkpoint.spec.builder is None
    assert checkpoint.spec.source == f"{Net.__module__}:Net"
    rebuilt = checkpoint.build_module(model=Net)
    assert not rebuilt.training
    torch.testing.assert_close(answers(rebuilt), answers(model), rtol=0, atol=0)
    assert [spec.model_dump() for spec in checkpoint.signature.inputs] == [
        {"name": "input", "dtype": "float32", "shape": ("batch", 4)}
    ]
    assert [spec.name for spec in checkpoint.signature.outputs] == ["logits"]
    samples = checkpoint.samples("evaluation")
    assert samples is not None
    np.testing.assert_array_equal(samples.inputs["input"], INPUTS)
    np.testing.assert_array_equal(samples.targets, TARGETS)
    assert checkpoint.samples("calibration") is None
    assert load_checkpoint(tmp_path / "mine" / "checkpoint.json") == checkpoint


def test_tensors_that_need_gradients_and_lists_are_taken(tmp_path: Path) -> None:
    inputs = torch.from_numpy(INPUTS).requires_grad_()
    checkpoint = save(Net(), tmp_path / "run", evaluation=(inputs, TARGETS.tolist()), calibration=(inputs, TARGETS))
    assert checkpoint.samples("calibration").fingerprints() == checkpoint.samples("evaluation").fingerprints()


def test_without_its_code_the_error_names_the_module_and_asks_for_it(tmp_path: Path) -> None:
    checkpoint = save(Net(), tmp_path / "run")
    with pytest.raises(UsageError, match=r":Net, not its code") as caught:
        checkpoint.build_module()
    assert "--model python:" in str(caught.value.hint)


def test_the_wrong_module_is_refused_and_the_tensors_are_named(tmp_path: Path) -> None:
    checkpoint = save(Net(), tmp_path / "run")
    with pytest.raises(CorruptError, match=r"body\.0\.weight is \[5, 4\], the module has \[7, 4\];.*and 2 more"):
        checkpoint.build_module(model=Net(features=7))
    with pytest.raises(CorruptError, match=r"weight is missing.*body\.0\.bias is unknown"):
        checkpoint.build_module(model=nn.Linear(4, 3))
    with pytest.raises(UsageError, match=r"is of type int, not a torch\.nn\.Module"):
        checkpoint.build_module(model=lambda: 3)
    with pytest.raises(UsageError, match="making the model given failed: ZeroDivisionError"):
        checkpoint.build_module(model=lambda: 1 / 0)


def test_a_torchvision_builder_is_rebuilt_by_name(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    model = resnet18(num_classes=3).eval()
    images = torch.rand(2, 3, 32, 32)
    checkpoint = save(
        model, tmp_path / "run", evaluation=(images, [0, 1]), builder="torchvision:resnet18", kwargs={"num_classes": 3}
    )
    with torch.inference_mode():
        torch.testing.assert_close(load_checkpoint(checkpoint.directory).build_module()(images), model(images))


@pytest.mark.parametrize(
    ("builder", "kwargs", "said"),
    [
        ("torchvision:resnet18", {}, r"does not rebuild this model:.* fc\.weight is \[3, 512\].*1000"),
        ("torchvision:resnet18", {"classes": 3}, "building torchvision:resnet18 with .* failed: TypeError"),
        ("torchvision:resnet81", {"num_classes": 3}, "unknown torchvision model 'resnet81'"),
        ("os:system", {}, "unknown model builder 'os:system'"),
    ],
)
def test_a_builder_that_does_not_rebuild_the_model_is_refused_when_it_is_saved(
    tmp_path: Path, builder: str, kwargs: dict[str, object], said: str
) -> None:
    from torchvision.models import resnet18

    with pytest.raises(UsageError, match=said):
        save(
            resnet18(num_classes=3), tmp_path / "run", evaluation=(torch.rand(2, 3, 32, 32), [0, 1]), builder=builder,
            kwargs=kwargs,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"weights": "DEFAULT"}),
        ("resnet18", {"weights": "IMAGENET1K_V1", "num_classes": 1000}),
        ("resnet18", {"pretrained": True}),
        ("fcn_resnet50", {"weights_backbone": "DEFAULT"}),
        ("fcn_resnet50", {"pretrained_backbone": True}),
    ],
)
def test_a_checkpoint_cannot_make_torchvision_download_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kwargs: dict[str, object]
) -> None:
    checkpoint = without_a_network(monkeypatch, save(Net(), tmp_path / "run"), name, kwargs)
    with pytest.raises(UsageError, match=f"torchvision:{name}: {next(iter(kwargs))} in its arguments would download"):
        checkpoint.build_untrained()


@pytest.mark.parametrize(("name", "kwargs"), [("resnet18", {"weights": None}), ("fcn_resnet50", {})])
def test_a_torchvision_model_is_built_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kwargs: dict[str, object]
) -> None:
    checkpoint = without_a_network(monkeypatch, save(Net(), tmp_path / "run"), name, kwargs)
    assert sum(parameter.numel() for parameter in checkpoint.build_untrained().parameters()) > 1_000_000


def without_a_network(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, name: str, kwargs: dict[str, object]
) -> Checkpoint:
    """That checkpoint with a torchvision builder, as a stranger may have written it; a download fails the test."""
    from torchvision.models import _api

    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *_, **__: pytest.fail("it downloads weights"))
    spec = checkpoint.spec.model_copy(update={"builder": f"torchvision:{name}", "kwargs": kwargs})
    return checkpoint.model_copy(update={"spec": spec})


def test_saving_with_a_builder_leaves_the_random_numbers_of_training_alone(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    model, images = resnet18(num_classes=3), torch.rand(2, 3, 32, 32)
    state = torch.get_rng_state()
    save(model, tmp_path / "run", evaluation=(images, [0, 1]), builder="torchvision:resnet18",
         kwargs={"num_classes": 3})  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_weights_come_back(tmp_path: Path) -> None:
    model = Tied().eval()
    rebuilt = save(model, tmp_path / "run").build_module(model=Tied)
    torch.testing.assert_close(answers(rebuilt), answers(model), rtol=0, atol=0)
    assert rebuilt.second.weight is rebuilt.first.weight


def test_every_layer_keeps_its_own_mode(tmp_path: Path) -> None:
    model = Net().train()
    model.body[1].eval()  # frozen batch norm
    modes = {name: module.training for name, module in model.named_modules()}
    statistics = model.body[1].running_mean.clone()
    save(model, tmp_path / "run")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(model.body[1].running_mean, statistics)


def test_outputs_of_a_dict_keep_their_names_and_order(tmp_path: Path) -> None:
    model = Returning(lambda y: {"scores": y, "best": y.argmax(1)})
    outputs = save(model, tmp_path / "run").signature.outputs
    assert [(spec.name, spec.dtype, spec.shape) for spec in outputs] == [
        ("scores", "float32", ("batch", 3)),
        ("best", "int64", ("batch",)),
    ]


def test_outputs_of_a_tuple_take_the_names_given(tmp_path: Path) -> None:
    model = Returning(lambda y: (y, y * 2))
    names = ("logits", "twice")
    assert [spec.name for spec in save(model, tmp_path / "run", output_names=names).signature.outputs] == list(names)
    with pytest.raises(UsageError, match="2 outputs, and names are given for 1"):
        save(model, tmp_path / "other")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda y: y.sum(), "no batch axis"),
        (lambda y: y.to(torch.complex64), "logits: complex64 is not a dtype"),
        (lambda y: 3, "logits, which are not tensors"),
        (lambda y: {"a": y, "b": None}, "b, which are not tensors"),
        (lambda y: [][0], "evaluation samples failed .*: IndexError"),
    ],
)
def test_outputs_that_cannot_be_served_are_refused(tmp_path: Path, make: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        save(Returning(make), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"evaluation": (INPUTS[:0], TARGETS[:0])}, "evaluation samples are empty"),
        ({"evaluation": (INPUTS, TARGETS[:2])}, "evaluation: 6 raw samples beside tensors of"),
        ({"evaluation": INPUTS}, "evaluation: too many values"),
        ({"evaluation": ([[1, 2], [3]], [0, 1])}, "evaluation: "),
        ({"calibration": 3}, "calibration: "),
        ({"evaluation": (INPUTS.astype(np.float64), TARGETS)}, "evaluation samples failed .*: RuntimeError"),
        ({"labels": ["a", "b"]}, "2 labels, and logits tells 3 classes apart"),
        ({"labels": ["a", "b", "c", "d"]}, "4 labels, and logits tells 3 classes apart"),
        ({"evaluation": Samples(raw=tuple(INPUTS), targets=TARGETS)}, "raw samples without a preprocessing"),
        ({"calibration": (INPUTS.astype(np.float64), TARGETS)}, "calibration: input: dtype float64, expected float32"),
        ({"calibration": (INPUTS[:, :3], TARGETS)}, r"calibration: input: shape \[6, 3\], expected \[batch, 4\]"),
        ({"calibration": (WITH_NAN, TARGETS)}, "calibration: input: NaN or infinity in it"),
        ({"evaluation": (WITH_NAN, TARGETS), "max_batch": 2}, "evaluation: input: NaN or infinity in it"),
        ({"evaluation": (INPUTS, TARGETS + 1)}, "evaluation: 2 targets are outside 0 to 2, 3 among them"),
        ({"calibration": (INPUTS, TARGETS - 1)}, "calibration: 2 targets are outside 0 to 2, -1 among them"),
        ({"evaluation": (INPUTS, TARGETS.astype(np.float64))}, r"evaluation: targets of shape \[6\] and dtype float64"),
        ({"calibration": (INPUTS, np.eye(3)[TARGETS])}, r"calibration: targets of shape \[6, 3\]"),
        ({"calibration": (INPUTS, np.eye(3, dtype=int)[TARGETS])}, r"calibration: targets of shape \[6, 3\]"),
        ({"task": "clasification"}, "unknown task 'clasification'"),
        ({"name": "my run"}, "name: "),
        ({"metrics": {"loss": object()}}, "metrics"),
    ],
)
def test_what_does_not_fit_together_is_refused_and_nothing_is_left(
    tmp_path: Path, settings: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        save(Net(), tmp_path / "run", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_preprocessing_that_does_not_make_the_tensors_passed_in_is_refused(tmp_path: Path) -> None:
    pixels = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2)
    preprocess = Preprocess(input="image", shape=(1, 2, 2), steps=(Decode(mode="L"), Scale()))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    raw = Samples(raw=tuple(pixels), targets=TARGETS)
    checkpoint = save(model, tmp_path / "run", evaluation=raw, preprocess=preprocess)
    assert checkpoint.signature.inputs[0].shape == ("batch", 1, 2, 2)
    tensors = preprocess.batch(pixels)
    with pytest.raises(UsageError, match="evaluation: the preprocessing does not fit the samples") as caught:
        save(model, tmp_path / "other", evaluation=(tensors, TARGETS), preprocess=preprocess)
    assert "Samples(raw=" in str(caught.value.hint)
    # The first sample may well be right where another is not.
    for place in (0, 5):
        altered = tensors.copy()
        altered[place] *= 2
        altered[place] += 1
        wrong = Samples(raw=tuple(pixels), inputs={"input": altered}, targets=TARGETS)
        with pytest.raises(
            UsageError, match=rf"calibration: .* does not fit.* sample {place}: it gives another tensor"
        ):
            save(model, tmp_path / "other", evaluation=raw, calibration=wrong, preprocess=preprocess)
    unreadable = Samples(raw=(*tuple(pixels[:5]), np.zeros((2, 2, 7), np.uint8)), targets=TARGETS)
    with pytest.raises(UsageError, match=r"calibration: .* does not fit.* sample 5: pixels of shape \[2, 2, 7\]"):
        save(model, tmp_path / "other", evaluation=raw, calibration=unreadable, preprocess=preprocess)


def test_a_checkpoint_without_weights_or_evaluation_samples_does_not_load(tmp_path: Path) -> None:
    checkpoint = save(Net(), tmp_path / "run")
    for role in ("weights", "evaluation"):
        files = {name: payload for name, payload in checkpoint.files.items() if name != role}
        (tmp_path / "run" / "checkpoint.json").write_text(checkpoint.model_copy(update={"files": files}).to_json())
        with pytest.raises(CorruptError, match=f"it names no {role} file"):
            load_checkpoint(tmp_path / "run")


def test_weights_are_read_as_safetensors_and_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, ("raise SystemExit('unpickled')",)

    checkpoint = save(Net(), tmp_path / "run")
    for content in (pickle.dumps(Trap()), b"", b"\0" * 100):
        checkpoint.path("weights").write_bytes(content)
        with pytest.raises(CorruptError, match="not a safetensors file"):
            checkpoint.build_module(model=Net)
        with pytest.raises(CorruptError, match="bytes where the manifest says"):
            load_checkpoint(checkpoint.directory)


def test_a_pruned_module_is_pruned_the_same_way_again(tmp_path: Path) -> None:
    import torch_pruning

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip

    images = torch.rand(4, 3, 8, 8)
    model = build().eval()
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=images)
    graph.get_pruning_group(model[0], torch_pruning.prune_conv_out_channels, idxs=[1, 4, 9]).prune()
    graph.get_pruning_group(model[3], torch_pruning.prune_conv_out_channels, idxs=[0]).prune()
    steps = tuple((name, is_out, tuple(channels)) for name, is_out, channels in graph.pruning_history())
    record = PruningRecord(steps=steps, macs_removed=0.2)
    save_checkpoint(model, tmp_path / "run", evaluation=(images, [0, 1, 2, 0]), pruning=record)
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.spec.pruning == record
    rebuilt = checkpoint.build_module(model=build)
    assert rebuilt[0].weight.shape == (13, 3, 3, 3)
    with torch.inference_mode():
        torch.testing.assert_close(rebuilt(images), model(images), rtol=0, atol=0)


def test_the_newest_checkpoint_is_the_one_made_last(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint under"):
        newest_checkpoint(tmp_path)
    for name in ("b", "a"):
        save(Net(), tmp_path / name)
    assert newest_checkpoint(tmp_path).name == "a"


def test_example_inputs_fit_the_signature(tmp_path: Path) -> None:
    (example,) = save(Net(), tmp_path / "run").example(batch=3)
    assert example.shape == (3, 4)
    assert example.dtype == torch.float32


def test_a_model_source_is_imported_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "persons_net.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n")
    before = list(sys.path)
    assert import_model_source("python:persons_net:make")().weight.shape == (2, 2)
    assert sys.path == before
    with pytest.raises(UsageError, match="persons_net has no 'build'"):
        import_model_source("python:persons_net:build")


@pytest.mark.parametrize(
    ("content", "said"),
    [("1 / 0", "ZeroDivisionError"), ("def", "SyntaxError"), ("import absent_thing", "absent_thing")],
)
def test_a_model_source_that_fails_is_the_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_net.py").write_text(content)
    with pytest.raises(UsageError, match=said):
        import_model_source("python:broken_net:make")


@pytest.mark.parametrize("name", ["net:make", "python:net", "python::make", "file:net:make", ""])
def test_a_model_source_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"expected python:package\.module:function"):
        import_model_source(name)


def test_weights_of_a_module_that_asks_for_their_version_are_loaded() -> None:
    from torchvision.models import mnasnet0_5

    torch.manual_seed(0)
    trained, other = mnasnet0_5(), mnasnet0_5()
    fill(other, {name: tensor.clone() for name, tensor in trained.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), other.parameters(), strict=True))
