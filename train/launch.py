"""The stage's door: configure a recipe, run it, go on with a run that was cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dlops import catalog
from dlops.checkpoint import Checkpoint, load_checkpoint
from dlops.console import say
from dlops.errors import UsageError
from dlops.train.configuration import ConfigKey, config_class, config_keys, configure, describe, presets
from dlops.train.run import Run, RunRecord, begin, differing_keys, find_run
from dlops.train.run import resume as held_again

__all__ = ["ConfigKey", "config_keys", "configure", "describe", "presets", "train_recipe"]


def train_recipe(
    recipe: str, config: BaseModel | None = None, *, run_dir: Path | None = None, resume: bool = False
) -> Checkpoint:
    """Train, and return the checkpoint that lies in the run's directory, runs/<recipe>/<time> unless named.

    resume: go on with the run in `run_dir`, else with the recipe's newest unfinished one, to the same weights as if it
    had never stopped. Its own config holds; what `config` sets explicitly must agree with it. A finished run is
    returned as it is. Raises DlopsError; on KeyboardInterrupt the log says how to go on.
    """
    module = catalog.resolve(catalog.RECIPES, "recipe", recipe)
    if resume:
        return _go_on(module, recipe, config, run_dir)
    config = config or module.Config()
    with begin(recipe, config.model_dump(mode="json"), directory=run_dir) as run:
        return _train(module, config, run)


def _go_on(module: Any, recipe: str, config: BaseModel | None, run_dir: Path | None) -> Checkpoint:
    record = find_run(recipe, directory=run_dir)
    explicit = {} if config is None else config.model_dump(mode="json", include=config.model_fields_set)
    if differing := differing_keys(explicit, record.config):
        raise UsageError(
            f"{record.directory}: another config than the run began with: {'; '.join(differing)}",
            hint="--resume alone takes the run's own config; for another one start a new run",
        )
    with held_again(record) as run:
        if run.is_finished:
            say(f"{run.directory}: this run is finished already")
            run.drop_state()
            return load_checkpoint(run.directory)
        say(f"going on with {run.directory}")
        return _train(module, _recorded_config(record), run)


def _recorded_config(record: RunRecord) -> BaseModel:
    try:
        return config_class(record.recipe).model_validate(record.config)
    except ValueError as error:
        raise UsageError(
            f"{record.directory}: this version of the recipe does not know the run's config any more ({error})",
            hint=f"finish it with dlops {record.dlops_version}, or start a new run",
        ) from None


def _train(module: Any, config: BaseModel, run: Run) -> Checkpoint:
    try:
        checkpoint: Checkpoint = module.train(config, run)
    except KeyboardInterrupt:
        say(f"interrupted; to go on: dlops train {run.recipe} --resume --run-dir {run.directory}")
        raise
    return checkpoint
