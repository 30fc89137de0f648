"""torch.export programs: what is written, and that reading one, ours or a crafted one, runs no code of the file's."""

from __future__ import annotations

import ast
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dlops.artifact import Artifact
from dlops.bench.profile import add_profiles
from dlops.bench.run import measure
from dlops.embedded import read_embedded
from dlops.errors import CorruptError, GateError, UsageError
from dlops.export.pipeline import export_variants
from dlops.export.to_torchexport import check_written
from dlops.program import read_program
from dlops.program_operators import find_operator
from dlops.runtimes import SessionOptions, open_session
from dlops.samples import Samples
from dlops.saving import save_checkpoint

CPU = SessionOptions(device="cpu", threads=1)
ROWS = 48


class Mixed(nn.Module):
    """A batch norm, a constant, a list of parts, a size of the input, several inputs and outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Sequential(nn.Conv1d(1, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(inplace=True))
        self.embed, self.mix = nn.Embedding(20, 6), nn.Linear(12, 4)

    def forward(self, signal: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.convolve(signal.reshape(signal.shape[0], 1, -1)).mean(2)
        first, second = self.embed(tokens).mean(1).chunk(2, dim=1)
        logits = self.mix(torch.cat([found, second, first], dim=1)) * torch.tensor([1.0, 2.0, 1.0, 0.5])
        return {"logits": logits, "best": logits.max(dim=1, keepdim=True).indices}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("torchexport")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    inputs = {"signal": rng.standard_normal((ROWS, 9), np.float32), "tokens": rng.integers(0, 20, (ROWS, 5))}
    checkpoint = save_checkpoint(
        Mixed(), folder / "run", name="mixed", max_batch=16, output_names=("logits", "best"),
        evaluation=Samples(raw=tuple(inputs["signal"]), inputs=inputs),
    )  # fmt: skip
    slugs = ("torchexport-fp32", "torchexport-bf16")
    made = export_variants(checkpoint, variants=slugs, model=Mixed, out=folder / "artifacts")
    return {artifact.slug: artifact for artifact in made}


def rewritten(path: Path, into: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive with its members, named without their folder, changed."""
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}
    change(members)
    with zipfile.ZipFile(into, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return into


def with_model(change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        document = json.loads(members["models/model.json"])
        change(document)
        members["models/model.json"] = json.dumps(document).encode()

    return apply


@pytest.mark.parametrize("slug", ["torchexport-fp32", "torchexport-bf16"])
def test_it_runs_in_its_own_dtypes_at_every_batch_and_says_what_it_is(exported: dict[str, Artifact], slug: str) -> None:
    artifact = exported[slug]
    assert artifact.parity.batches == (1, 2, 7, 16)
    session = open_session(artifact, CPU)
    outputs = session.run(artifact.samples().inputs)
    assert {name: array.dtype.name for name, array in outputs.items()} == {"logits": "float32", "best": "int64"}
    session.close()
    form, said = read_embedded(artifact.path("model"))
    assert (form, said.variant, said.signature) == ("torchexport", slug, artifact.signature)


def test_the_weights_are_stored_in_the_precision_and_the_batch_has_the_range(exported: dict[str, Artifact]) -> None:
    stored = {slug: read_program(artifact.path("model")) for slug, artifact in exported.items()}
    dtypes = {slug: {tensor.dtype for tensor in program.module.parameters()} for slug, program in stored.items()}
    assert dtypes == {"torchexport-fp32": {torch.float32}, "torchexport-bf16": {torch.bfloat16}}
    program = stored["torchexport-fp32"]
    (symbol,) = program.ranges
    assert program.ranges[symbol] == (1, 16)
    assert [given.shape for given in program.inputs] == [(symbol, 9), (symbol, 5)]


def test_torch_itself_reads_it_too_and_nothing_in_it_is_pickled(exported: dict[str, Artifact]) -> None:
    path = exported["torchexport-fp32"].path("model")
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    model = next(content for name, content in contents.items() if name.endswith("models/model.json"))
    assert not [key for node in json.loads(model)["graph_module"]["graph"]["nodes"] for key in node["metadata"]]
    samples = next(content for name, content in contents.items() if "sample_inputs" in name)
    assert not samples
    given = exported["torchexport-fp32"].samples()
    with warnings.catch_warnings(action="ignore"):
        module = torch.export.load(str(path)).module()
    logits, _ = module(*(torch.from_numpy(given.inputs[name][:5]) for name in ("signal", "tokens")))
    np.testing.assert_allclose(logits.detach().numpy(), given.outputs["logits"][:5], rtol=1e-4, atol=1e-5)


def test_a_file_other_than_asked_for_is_refused(exported: dict[str, Artifact]) -> None:
    artifact = exported["torchexport-fp32"]
    path, signature = artifact.path("model"), artifact.signature
    with pytest.raises(GateError, match="bf16 was asked for, 0% of the weights"):
        check_written(path, signature, precision="bf16", title="it")
    first, second = signature.inputs
    with pytest.raises(GateError, match="takes 2 inputs, the signature has 1"):
        check_written(path, signature.model_copy(update={"inputs": (first,)}), precision="fp32", title="it")
    with pytest.raises(GateError, match=r"input tokens is torch\.float32 of 2 dims"):
        check_written(path, signature.model_copy(update={"inputs": (second, first)}), precision="fp32", title="it")


class _Writes:
    """Unpickled, it leaves a folder behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def pickled_weights(trap: Path) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        name = "data/weights/model_weights_config.json"
        document = json.loads(members[name])
        entry = next(iter(document["config"].values()))
        entry["use_pickle"] = True
        members[f"data/weights/{entry['path_name']}"] = pickle.dumps(_Writes(trap))
        members[name] = json.dumps(document).encode()

    return apply


def legacy_weights(trap: Path) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({"data/weights/model.pt": pickle.dumps(_Writes(trap))})


def pickled_samples(trap: Path) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({"data/sample_inputs/model.pt": pickle.dumps(_Writes(trap))})


def expression(trap: Path) -> Callable[[dict[str, bytes]], None]:
    """torch gives the text to sympify, which evaluates it."""
    code = f"__import__('os').mkdir({str(trap)!r})"

    def change(document: Any) -> None:
        for meta in document["graph_module"]["graph"]["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code

    return with_model(change)


def names(trap: Path) -> Callable[[dict[str, bytes]], None]:
    """A module of torch.fx is made from source text, with the names of its values in it."""
    code = f"x = __import__('os').mkdir({str(trap)!r})"

    def change(document: Any) -> None:
        text = json.dumps(document).replace('"signal"', json.dumps(code)).replace('"inputs_0"', json.dumps(code))
        document.clear()
        document.update(json.loads(text))

    return with_model(change)


TRAPS = (pickled_weights, legacy_weights, pickled_samples, expression, names)


@pytest.mark.parametrize("craft", TRAPS, ids=lambda craft: craft.__name__)
def test_a_crafted_file_runs_no_code(
    exported: dict[str, Artifact], craft: Callable[[Path], Callable[[dict[str, bytes]], None]], tmp_path: Path
) -> None:
    trap = tmp_path / "trap"
    artifact = exported["torchexport-fp32"]
    path = rewritten(artifact.path("model"), tmp_path / "crafted.pt2", craft(trap))
    given = artifact.samples().inputs
    if craft is pickled_weights:
        with pytest.raises(UsageError, match="is stored pickled"):
            read_program(path)
    else:
        module = read_program(path).module
        module(*(torch.from_numpy(given[name][:2]) for name in ("signal", "tokens")))
    read_embedded(path)
    assert not trap.exists()


@pytest.mark.parametrize("craft", [legacy_weights, expression], ids=lambda craft: craft.__name__)
def test_the_traps_work_in_torchs_own_loader(
    exported: dict[str, Artifact], craft: Callable[[Path], Callable[[dict[str, bytes]], None]], tmp_path: Path
) -> None:
    """Or the test above would show nothing."""
    trap = tmp_path / "trap"
    path = rewritten(exported["torchexport-fp32"].path("model"), tmp_path / "crafted.pt2", craft(trap))
    with warnings.catch_warnings(action="ignore"), pytest.raises(Exception):  # noqa: B017, PT011 - its own affair
        torch.export.load(str(path))
    assert trap.exists()


def set_target(target: str) -> Callable[[dict[str, bytes]], None]:
    return with_model(lambda document: document["graph_module"]["graph"]["nodes"][0].update(target=target))


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default", "torch.ops.aten.save.default", "torch.ops.aten.__class__.mro", "os.system",
        "torch.hub.load", "torch.load", "torch.ops.higher_order.cond", "torch.ops.load_library",
        "_operator.methodcaller", "_operator.attrgetter", "torch.ops.aten.add.__call__", "torch.ops.aten.relu",
        "#extension", "",
    ],
)  # fmt: skip
def test_an_operator_that_does_more_than_compute_is_refused_by_name(
    exported: dict[str, Artifact], target: str, tmp_path: Path
) -> None:
    path = rewritten(exported["torchexport-fp32"].path("model"), tmp_path / "crafted.pt2", set_target(target))
    with pytest.raises(UsageError, match="not among the operators that compute"):
        read_program(path)


def test_no_operator_that_takes_a_path_or_an_object_is_among_the_allowed() -> None:
    allowed = []
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("aten::"):
            target = f"torch.ops.aten.{schema.name.removeprefix('aten::')}.{schema.overload_name or 'default'}"
            allowed += [schema] if find_operator(target) is not None else []
    assert len(allowed) > 1000
    kinds = {str(argument.type) for schema in allowed for argument in schema.arguments}
    assert not {kind for kind in kinds if any(word in kind for word in ("Storage", "Stream", "Any", "torch.classes"))}
    assert not [schema.name for schema in allowed if "file" in schema.name or schema.name == "aten::save"]
    texts = {argument.name for schema in allowed for argument in schema.arguments if "str" in str(argument.type)}
    assert "filename" not in texts
    assert "approximate" in texts


def truncated(members: dict[str, bytes]) -> None:
    members["data/weights/weight_0"] = members["data/weights/weight_0"][:8]


def beyond(members: dict[str, bytes]) -> None:
    name = "data/weights/model_weights_config.json"
    document = json.loads(members[name])
    next(iter(document["config"].values()))["tensor_meta"]["storage_offset"] = {"as_int": 10_000}
    members[name] = json.dumps(document).encode()


def no_model(members: dict[str, bytes]) -> None:
    del members["models/model.json"]


def nested(members: dict[str, bytes]) -> None:
    members["models/model.json"] = b"[" * 200_000


@pytest.mark.parametrize("damage", [truncated, beyond, no_model, nested], ids=lambda damage: damage.__name__)
def test_a_damaged_file_says_so_in_one_line(
    exported: dict[str, Artifact], damage: Callable[[dict[str, bytes]], None], tmp_path: Path
) -> None:
    path = rewritten(exported["torchexport-fp32"].path("model"), tmp_path / "damaged.pt2", damage)
    with pytest.raises(CorruptError, match="or damaged") as caught:
        read_program(path)
    assert "\n" not in caught.value.message


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # One way for small batches, another to the same answer for large ones.
        return self.linear(x) if x.shape[0] < 9 else self.linear(x * 2) - self.linear(x) + self.linear.bias


def test_a_module_that_branches_on_its_batch_is_refused(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).standard_normal((20, 4), np.float32)
    checkpoint = save_checkpoint(
        Branching(), tmp_path / "run", evaluation=Samples(raw=tuple(samples), inputs={"x": samples})
    )
    with pytest.raises(UsageError, match="cannot take this module"):
        export_variants(checkpoint, variants=["torchexport-fp32"], model=Branching, out=tmp_path / "out")


def test_the_dims_of_a_program_are_never_evaluated() -> None:
    tree = ast.parse(Path(read_program.__code__.co_filename).read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "compile", "__import__"}


def test_bench_measures_and_profiles_it_in_processes_of_their_own(exported: dict[str, Artifact]) -> None:
    artifact = exported["torchexport-fp32"]
    measured = measure([artifact], duration_s=0.1, device="cpu", threads=1)
    assert [row.runtime for row in measured.measurements] == ["torch.export"]
    options = SessionOptions(device="cpu", threads=1)
    (profile,) = add_profiles(measured, [artifact], checkpoint=None, options=options).report.profiles
    assert any(operator.op_type.startswith("aten::") for operator in profile.operators)
