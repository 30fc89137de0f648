from __future__ import annotations

import pytest
import torch
from torch import nn

from dlops import catalog
from dlops.train.models.cnn import cnn, cnn_medium, cnn_photo, cnn_small
from dlops.train.models.mlp import mlp, mlp_small
from dlops.train.models.resnet import resnet, resnet20

MODELS = [
    pytest.param(cnn_small(in_channels=1, classes=10), (1, 8, 8), id="cnn-digits"),
    pytest.param(cnn_medium(in_channels=3, classes=10), (3, 32, 32), id="cnn-cifar"),
    pytest.param(cnn_photo(in_channels=3, classes=2), (3, 128, 128), id="cnn-photo"),
    pytest.param(cnn(in_channels=3, classes=5, widths=(8, 16), dropout=0.5), (3, 9, 15), id="cnn-odd-size"),
    pytest.param(resnet20(in_channels=3, classes=10), (3, 32, 32), id="resnet20"),
    pytest.param(resnet(in_channels=1, classes=3, blocks=(1, 2), widths=(8, 16)), (1, 9, 15), id="resnet-odd-size"),
    pytest.param(mlp_small(shape=(1, 8, 8), classes=10), (1, 8, 8), id="mlp"),
    pytest.param(mlp(shape=(3, 4, 5), classes=7, hidden=(8,), dropout=0.1), (3, 4, 5), id="mlp-dropout"),
]


@pytest.mark.parametrize(("model", "shape"), MODELS)
def test_a_model_is_the_same_function_after_torch_export_with_a_dynamic_batch(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    model.eval()
    program = torch.export.export(
        model, (torch.randn(2, *shape),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    ).module()
    inputs = torch.randn(5, *shape)
    with torch.inference_mode():
        torch.testing.assert_close(program(inputs), model(inputs))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(("model", "shape"), MODELS)
def test_a_model_can_be_scripted(model: nn.Module, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(3, *shape)
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(torch.jit.script(model)(inputs), model(inputs))


def test_a_cnn_takes_any_image_of_8_pixels_or_more() -> None:
    for model in (
        cnn_small(in_channels=1, classes=4),
        cnn_medium(in_channels=1, classes=4),
        cnn_photo(in_channels=1, classes=4),
    ):
        model.eval()
        for size in ((8, 8), (8, 31), (57, 40)):
            assert model(torch.randn(1, 1, *size)).shape == (1, 4)


def test_torch_pruning_can_take_half_the_channels_of_a_cnn() -> None:
    torch_pruning = pytest.importorskip("torch_pruning")
    model, example = cnn_small(in_channels=3, classes=10).eval(), torch.randn(1, 3, 32, 32)
    before, _ = torch_pruning.utils.count_ops_and_params(model, example)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.head],
        round_to=8,
    )
    pruner.step()
    after, _ = torch_pruning.utils.count_ops_and_params(model, example)
    assert after < 0.35 * before
    assert model(example).shape == (1, 10)


def test_resnet20_is_the_papers_network_with_projections_in_place_of_padding() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = resnet20(in_channels=3, classes=10).eval()
    # He et al. 2016, table 6: 0.27 million weights in 19 3×3 convolutions and a linear layer; ours has 2 projections.
    weights = (
        3 * 9 * 16 + 6 * 9 * 16 * 16 + 9 * 16 * 32 + 5 * 9 * 32 * 32 + 9 * 32 * 64 + 5 * 9 * 64 * 64 + 64 * 10 + 10
    )
    projections = 16 * 32 + 32 * 64
    norms = 2 * (7 * 16 + 7 * 32 + 7 * 64)
    assert sum(p.numel() for p in model.parameters()) == weights + projections + norms
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        model(torch.randn(1, 3, 32, 32))
    assert 0.0405e9 < counted.get_total_flops() / 2 < 0.0415e9


def test_torch_pruning_can_thin_the_stages_of_a_resnet() -> None:
    torch_pruning = pytest.importorskip("torch_pruning")
    model, example = resnet(in_channels=3, classes=10, blocks=(1, 1), widths=(16, 32)).eval(), torch.randn(1, 3, 8, 8)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.head],
    )
    pruner.step()
    # Through the shortcuts as well: the last block's projection lost outputs, and inputs where the stem lost outputs.
    assert model.stage2[0].shortcut[0].weight.shape == (16, 8, 1, 1)
    assert model(example).shape == (1, 10)


def test_the_catalog_names_every_model_family_and_recipe_in_the_folder() -> None:
    from importlib import resources

    stage = resources.files("dlops.train")

    def modules(folder: str) -> set[str]:
        found = {entry.name.removesuffix(".py") for entry in (stage / folder).iterdir() if entry.name.endswith(".py")}
        return found - {"__init__"}

    assert modules("models") == set(catalog.BUILDERS) == {"mlp", "cnn", "resnet"}
    assert modules("recipes") == set(catalog.RECIPES) == {"mlp", "cnn"}
    for table in (catalog.BUILDERS, catalog.RECIPES, catalog.DATASETS):
        for name in table:
            assert catalog.resolve(table, "entry", name)
