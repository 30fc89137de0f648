from __future__ import annotations

from pathlib import Path

import pytest

from dlops import catalog
from dlops.errors import UsageError
from dlops.train.launch import config_keys, configure, describe, presets


def test_settings_lie_over_the_file_which_lies_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\nlr: 1e-2\n")
    config = configure("cnn", preset="digits", config_file=file, overrides=["lr=0.5", "widths=[8, 16]"])
    assert (config.data, config.epochs, config.lr, config.widths) == ("digits", 7, 0.5, (8, 16))
    assert configure("cnn", preset="digits").epochs == 30
    assert configure("cnn").epochs is None


def test_every_wrong_key_and_value_is_named_at_once_with_what_would_be_right(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("momentun: 0.9\nbatch_size: -4\n")
    with pytest.raises(UsageError) as caught:
        configure("cnn", config_file=file, overrides=["epochz=3", "optimizer=adamx", "lr=fast", "noequals"])
    text = str(caught.value)
    for part in (
        "6 wrong settings", "'momentun', did you mean momentum", "batch_size = -4", "'epochz', did you mean epochs",
        "optimizer = 'adamx'", "'adamw'", "lr = 'fast'", "'noequals': expected key=value", str(file),
        "keys of cnn: data",
    ):  # fmt: skip
        assert part in text, part


def test_a_setting_of_the_plain_cnn_is_refused_with_another_network() -> None:
    with pytest.raises(UsageError, match=r"2 wrong settings.*widths = .*resnet20 has its own.*depth = 3: resnet20"):
        configure("cnn", overrides=["network=resnet20", "widths=[8]", "depth=3"])
    assert configure("cnn", preset="resnet20-cifar10").network == "resnet20"


def test_a_single_wrong_setting_names_the_allowed_values() -> None:
    with pytest.raises(UsageError, match=r"precision = 'fp8'.*'fp32' or 'bf16'"):
        configure("mlp", overrides=["precision=fp8"])
    with pytest.raises(UsageError, match="lr = nan"):
        configure("mlp", overrides=["lr=.nan"])


def test_a_text_setting_stays_text_whatever_it_looks_like() -> None:
    config = configure("cnn", overrides=["data=2024", "name=no"])
    assert (config.data, config.name) == ("2024", "no")
    assert configure("cnn", overrides=["name=null", "flip=false"]).name is None


@pytest.mark.parametrize(
    ("content", "message"), [("- a\n", "not a table"), ("a: [1", "not YAML"), (b"\xff\xfe\x00", "not a text file")]
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        configure("cnn", config_file=file)


def test_unknown_recipes_presets_and_files_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown recipe 'cn'.*did you mean cnn"):
        configure("cn")
    with pytest.raises(UsageError, match=r"recipe cnn: unknown preset 'digit'.*digits"):
        configure("cnn", preset="digit")
    with pytest.raises(UsageError, match="no such file"):
        configure("cnn", config_file=tmp_path / "absent.yaml")


def test_every_preset_is_a_valid_config_that_changes_something() -> None:
    found = [(recipe, preset) for recipe in catalog.RECIPES for preset in presets(recipe)]
    assert ("cnn", "digits") in found
    assert len(found) >= 4
    for recipe, preset in found:
        assert configure(recipe, preset=preset) != configure(recipe), (recipe, preset)


@pytest.mark.parametrize("recipe", sorted(catalog.RECIPES))
def test_every_setting_is_described(recipe: str) -> None:
    keys = {key.name: key for key in config_keys(recipe)}
    assert list(keys) == list(type(configure(recipe)).model_fields)
    assert all(key.description and key.type for key in keys.values())
    assert keys["epochs"].type == "int | null"
    assert keys["precision"].type == "fp32 | bf16"
    assert keys["data"].default == "digits"


@pytest.mark.parametrize("recipe", sorted(catalog.RECIPES))
def test_the_description_is_a_config_file_that_changes_nothing(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(describe(recipe))
    assert configure(recipe, config_file=file) == configure(recipe)
