"""A recipe's config from its defaults, a preset, a file and single settings, each lying over the one before."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dlops import catalog
from dlops.errors import UsageError, from_os_error, unknown_name

_MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigKey:
    """One setting. type: as a person writes it ("int or null"). default: None where the data decide."""

    name: str
    type: str
    default: Any
    description: str


@dataclass(frozen=True, slots=True)
class _Problem:
    key: str
    text: str


def configure(
    recipe: str, *, preset: str | None = None, config_file: Path | None = None, overrides: Sequence[str] = ()
) -> Any:
    """The recipe's Config: defaults, then the preset, then the file, then `key=value` overrides.

    Raises UsageError naming every unknown key, with the nearest right ones, and every bad value, with what is allowed.
    """
    config = config_class(recipe)
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if preset is not None:
        layers.append((f"preset {preset}", _read_preset(recipe, preset)))
    if config_file is not None:
        layers.append((str(config_file), _read_file(config_file)))
    given, problems = _parse_overrides(overrides, config)
    layers.append(("--set", given))

    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    for where, layer in layers:
        for key, value in layer.items():
            if key not in config.model_fields:
                problems.append(_Problem(key, f"{where}: {_unknown_key(key, config)}"))
                continue
            values[key], source[key] = value, where
    try:
        made = config.model_validate(values)
    except ValidationError as error:
        problems += _explained(error, source)
    if problems:
        raise _refusal(recipe, config, problems)
    return made


def presets(recipe: str) -> list[str]:
    """Names of the recipe's presets. Raises UsageError for an unknown recipe."""
    if recipe not in catalog.RECIPES:
        raise unknown_name("recipe", recipe, catalog.RECIPES)
    folder = resources.files("dlops.train") / "presets" / recipe
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def describe(recipe: str) -> str:
    """Every key with its default and meaning, as YAML that `--config` takes."""
    keys = config_keys(recipe)
    lines = [f"{key.name}: {yaml.safe_dump(key.default, default_flow_style=True).splitlines()[0]}" for key in keys]
    width = max(len(line) for line in lines) + 2
    return "\n".join(f"{line:<{width}}# {key.type}: {key.description}" for line, key in zip(lines, keys, strict=True))


def config_keys(recipe: str) -> list[ConfigKey]:
    """Every key of the recipe's config, in the order of its file."""
    config = config_class(recipe)
    hints, defaults = typing.get_type_hints(config), config().model_dump(mode="json")
    return [
        ConfigKey(name=name, type=_type_name(hints[name]), default=defaults[name], description=field.description or "")
        for name, field in config.model_fields.items()
    ]


def config_class(recipe: str) -> type[BaseModel]:
    """The recipe's Config. Raises UsageError for an unknown recipe."""
    config: type[BaseModel] = catalog.resolve(catalog.RECIPES, "recipe", recipe).Config
    return config


def _read_preset(recipe: str, preset: str) -> Mapping[str, Any]:
    if preset not in presets(recipe):
        raise unknown_name("preset", preset, presets(recipe), where=f"recipe {recipe}")
    text = (resources.files("dlops.train") / "presets" / recipe / f"{preset}.yaml").read_text()
    return _parse(text, f"preset {preset}")


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            # A device has no size and no end.
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise UsageError(f"{path}: too large for a config")
        return _parse(content.decode(), str(path))
    except OSError as error:
        raise from_os_error(error, doing="reading the config") from error
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file", hint="a config is YAML: one `key: value` a line") from None


def _parse(text: str, where: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{where}: not a table of keys", hint="a config is YAML: one `key: value` a line")
    return {str(key): value for key, value in content.items()}


def _parse_overrides(overrides: Sequence[str], config: type[BaseModel]) -> tuple[dict[str, Any], list[_Problem]]:
    values: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(_Problem(override, f"--set {override!r}: expected key=value"))
            continue
        try:
            values[key] = text if _is_text(config, key) and text != "null" else yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(_Problem(key, f"--set {key}: {text!r} cannot be read as a value"))
    return values, problems


def _is_text(config: type[BaseModel], key: str) -> bool:
    """Whether the setting is a string, so that a folder called 2024 or `no` stays one."""
    hint = typing.get_type_hints(config).get(key)
    return hint is str or str in typing.get_args(hint)


def _unknown_key(key: str, config: type[BaseModel]) -> str:
    near = difflib.get_close_matches(key, config.model_fields, n=3, cutoff=0.5)
    return f"unknown key {key!r}" + (f", did you mean {' or '.join(near)}?" if near else "")


def _explained(error: ValidationError, source: Mapping[str, str]) -> list[_Problem]:
    """One problem a setting: pydantic tells a union's members apart, which says nothing to the user."""
    problems: dict[str, list[str]] = {}
    inputs: dict[str, Any] = {}
    for found in error.errors(include_url=False):
        key = str(found["loc"][0]) if found["loc"] else "config"
        inputs.setdefault(key, found["input"])
        problems.setdefault(key, []).append(found["msg"].removeprefix("Value error, ").removeprefix("Input "))
    return [
        _Problem(key, f"{source.get(key, 'config')}: {key} = {inputs[key]!r}: {', or '.join(dict.fromkeys(texts))}")
        for key, texts in problems.items()
    ]


def _refusal(recipe: str, config: type[BaseModel], problems: Sequence[_Problem]) -> UsageError:
    known = f"keys of {recipe}: {', '.join(config.model_fields)}"
    if len(problems) == 1:
        return UsageError(problems[0].text, hint=known)
    return UsageError(f"{len(problems)} wrong settings: " + "; ".join(p.text for p in problems), hint=known)


def _type_name(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(argument) for argument in arguments)
    if type(None) in arguments:
        return " | ".join([*(_type_name(a) for a in arguments if a is not type(None)), "null"])
    if typing.get_origin(hint) is tuple:
        return f"list of {_type_name(arguments[0])}"
    return {str: "text", bool: "true | false"}.get(hint, getattr(hint, "__name__", str(hint)))
