from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from pydantic import BaseModel

from dlops.checkpoint import Checkpoint
from dlops.errors import CorruptError, MachineError, UsageError
from dlops.train import run as runs
from dlops.train.data.source import open_data
from dlops.train.images import prepare
from dlops.train.launch import configure, train_recipe
from dlops.train.models.mlp import mlp
from dlops.train.optimizers import build_optimizer
from dlops.train.recipes import cnn as cnn_recipe
from dlops.train.recipes import mlp as mlp_recipe

RECIPES = {"cnn": cnn_recipe, "mlp": mlp_recipe}
SHORT = ["epochs=3", "hidden=[32]", "warmup_epochs=0.5", "lr=0.01"]
# What a person's command does, killed the hard way in the middle of epoch 2: trained, not yet saved.
KILLED = """
import os, signal, sys
from pathlib import Path
from dlops.train.launch import configure, train_recipe
from dlops.train.recipes import cnn as recipe

real, calls = recipe.validate, []

def validate(*arguments):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

recipe.validate = validate
train_recipe("cnn", configure("cnn", overrides=sys.argv[2:]), run_dir=Path(sys.argv[1]))
"""
# Each process writes down its weights after each epoch, before the first one loads the best epoch's into its own. Where
# asked for, the second process alone then loses its weights.
WATCHED = """
import torch
from dlops.train.recipes import {recipe} as recipe

def fit(fabric, config, plan, images, run, *others):
    real, calls = recipe.validate, []

    def validate(fabric, network, images):
        calls.append(1)
        weights = {{name: tensor.detach().clone() for name, tensor in network.named_parameters()}}
        torch.save(weights, run.directory / f"rank{{fabric.global_rank}}-epoch{{len(calls)}}.pt")
        if {loses} and fabric.global_rank == 1:
            torch.nn.init.constant_(next(network.parameters()), float("nan"))
        return real(fabric, network, images)

    recipe.validate = validate
    recipe.fit(fabric, config, plan, images, run, *others)
"""
pytestmark = [
    # tensorboard and lightning on this Python and numpy; nothing that we call can be called otherwise.
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:tensorboard"),
    # torch's advice where there are more loader workers than cores.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return dict(checkpoint.build_module().state_dict())


def assert_same_weights(one: Checkpoint, other: Checkpoint) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert len(mine) > 4
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_cnn_learns_digits_and_its_checkpoint_holds_what_the_later_stages_need() -> None:
    checkpoint = train_recipe("cnn", configure("cnn", overrides=["epochs=8", "widths=[24, 48, 64]"]))
    assert checkpoint.directory.parent == Path("runs/cnn")
    assert checkpoint.name == "digits-cnn"
    assert (checkpoint.recipe, checkpoint.seed, checkpoint.spec.builder) == ("cnn", 0, "cnn")
    assert checkpoint.spec.labels == tuple("0123456789")
    assert checkpoint.config["batch_size"] == 32
    assert checkpoint.config["lr"] == 0.002
    # 98.1 and 98.6 % with two seeds.
    assert checkpoint.metrics["accuracy"] > 0.96
    assert checkpoint.metrics["test"]["classes"]["7"]["f1"] > 0.9
    assert checkpoint.metrics["duplicates_dropped"] == 0

    evaluation, calibration = checkpoint.samples("evaluation"), checkpoint.samples("calibration")
    assert (len(evaluation), len(calibration)) == (359, 1222)
    assert not set(evaluation.fingerprints()) & set(calibration.fingerprints())
    with torch.inference_mode():
        inputs = torch.from_numpy(checkpoint.spec.preprocess.batch(evaluation.raw))
        decided = checkpoint.build_module()(inputs).argmax(1).numpy()
    assert np.mean(decided == evaluation.targets) == pytest.approx(checkpoint.metrics["accuracy"], abs=1e-6)

    names = {path.name for path in checkpoint.directory.iterdir()}
    assert {"run.json", "tensorboard", "checkpoint.json"} <= names
    assert not any("resume" in name for name in names)


def test_a_resnet_trains_and_its_checkpoint_rebuilds_it() -> None:
    checkpoint = train_recipe("cnn", configure("cnn", overrides=["network=resnet20", "epochs=1", "batch_size=512"]))
    assert checkpoint.name == "digits-resnet20"
    assert (checkpoint.spec.builder, checkpoint.spec.kwargs["blocks"]) == ("resnet", [3, 3, 3])
    assert sum(type(layer) is torch.nn.Conv2d for layer in checkpoint.build_module().modules()) == 19 + 2


def test_torchvisions_resnet_is_built_for_photos_alone() -> None:
    def asked(*overrides: str) -> tuple[str, dict[str, object]]:
        config = configure("cnn", overrides=["network=resnet18", *overrides])
        assert isinstance(config, cnn_recipe.Config)
        images = prepare(
            open_data("digits", split_seed=0), image_size=config.image_size, channels=config.channels,
            skip_corrupt=False,
        )  # fmt: skip
        builder, kwargs = cnn_recipe.built(config, images)
        return builder, dict(kwargs)

    with pytest.raises(UsageError, match="resnet18 takes colour images"):
        asked("image_size=64")
    with pytest.raises(UsageError, match="nothing would be left of 8×8"):
        asked("channels=3")
    assert asked("channels=3", "image_size=64") == ("torchvision:resnet18", {"num_classes": 10})


def test_the_curves_are_there_for_tensorboard() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    checkpoint = train_recipe("mlp", configure("mlp", overrides=SHORT))
    events = EventAccumulator(str(checkpoint.directory / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "validation/loss", "validation/accuracy"}
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_weights_with_or_without_loader_workers() -> None:
    plain = train_recipe("mlp", configure("mlp", overrides=SHORT))
    assert_same_weights(plain, train_recipe("mlp", configure("mlp", overrides=[*SHORT, "num_workers=2"])))
    other = weights(train_recipe("mlp", configure("mlp", overrides=[*SHORT, "seed=1"])))
    assert not torch.equal(other["1.weight"], weights(plain)["1.weight"])


def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    settings = ["widths=[8, 16]", "dropout=0.2", "epochs=3", "batch_size=64"]
    killed, threads = tmp_path / "killed", torch.get_num_threads()
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(killed), *settings],
        # With as many threads as the runs that it is compared with.
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (killed / "checkpoint.json").exists()
    assert torch.load(killed / runs._STATE_FILE, weights_only=True)["epoch"] == 1
    torch.set_num_threads(threads + 1)  # the run's own number holds: another one sums in another order
    resumed = train_recipe("cnn", None, run_dir=killed, resume=True)
    assert torch.get_num_threads() == threads
    whole = train_recipe("cnn", configure("cnn", overrides=settings), run_dir=tmp_path / "whole")
    assert_same_weights(resumed, whole)
    assert resumed.metrics == whole.metrics


@pytest.mark.parametrize("stop_in", [1, 2, 4])
def test_an_interrupted_run_says_how_to_go_on_and_does_so_bit_for_bit(
    stop_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("mlp", overrides=["epochs=4", "dropout=0.3", "optimizer=sgd"])
    directory = tmp_path / "stopped"
    real, calls = mlp_recipe.validate, []

    def interrupted(*arguments: Any) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == stop_in:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mlp_recipe, "validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_recipe("mlp", config, run_dir=directory)
    assert f"to go on: dlops train mlp --resume --run-dir {directory}" in capsys.readouterr().err
    assert (directory / runs._STATE_FILE).exists() == (stop_in > 1)
    resumed = train_recipe("mlp", run_dir=directory, resume=True)
    assert_same_weights(resumed, train_recipe("mlp", config))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "settings",
    [["data=nowhere"], ["lr=1e30", "optimizer=sgd", "max_grad_norm=null", "warmup_epochs=0"]],
)
def test_a_run_that_fails_before_its_first_state_leaves_nothing(
    settings: list[str], named: bool, tmp_path: Path
) -> None:
    directory = tmp_path / "new" / "run" if named else None
    with pytest.raises(UsageError):
        train_recipe("mlp", configure("mlp", overrides=settings), run_dir=directory)
    assert not (tmp_path / "new").exists()
    assert not Path("runs").exists()
    with pytest.raises(UsageError, match="no unfinished run"):
        train_recipe("mlp", resume=True)
    # The same place is free for a run with the right settings.
    checkpoint = train_recipe("mlp", configure("mlp", overrides=SHORT), run_dir=directory)
    assert checkpoint.metrics["epochs"] == 3


def test_a_run_that_fails_leaves_a_persons_own_files(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    for name in ("notes.txt", "tensorboard/mine"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="unknown data set"):
        train_recipe("mlp", configure("mlp", overrides=["data=nowhere"]), run_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["mine", "notes.txt"]


def test_a_run_that_fails_after_its_first_state_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure("mlp", overrides=SHORT)
    real, calls = mlp_recipe.validate, []

    def failing(*arguments: Any) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 2:
            raise MachineError("out of memory")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mlp_recipe, "validate", failing)
        with pytest.raises(MachineError):
            train_recipe("mlp", config, run_dir=tmp_path / "run")
    assert_same_weights(train_recipe("mlp", run_dir=tmp_path / "run", resume=True), train_recipe("mlp", config))


def test_a_run_killed_before_its_first_epoch_ended_starts_over(tmp_path: Path) -> None:
    directory = tmp_path / "early"
    config = configure("mlp", overrides=SHORT)
    with runs.begin("mlp", config.model_dump(mode="json"), directory=directory):
        pass
    resumed = train_recipe("mlp", run_dir=directory, resume=True)
    assert_same_weights(resumed, train_recipe("mlp", config))


def test_a_kill_while_the_state_is_written_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.Run(tmp_path, "mlp", threads=1, resume=True)
    run.save_state(runs.State(data_digest="d", epoch=1, best_weights={"a": torch.ones(3)}))

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save_state(runs.State(data_digest="d", epoch=2))
    state = run.load_state(data_digest="d")
    assert (state.epoch, state.best_weights["a"].tolist()) == (1, [1, 1, 1])


def test_a_resume_takes_the_newest_unfinished_run_and_only_its_own_config(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configure("mlp", overrides=SHORT)
    for _ in range(2):
        with runs.begin("mlp", config.model_dump(mode="json"), directory=None) as run:
            newest = run.directory
    with pytest.raises(UsageError, match=r"another config.*epochs: the run has 3, asked for 9; lr: the run has 0.01"):
        train_recipe("mlp", configure("mlp", overrides=["epochs=9", "lr=0.5", "hidden=[32]"]), resume=True)
    checkpoint = train_recipe("mlp", configure("mlp", overrides=["epochs=3"]), resume=True)
    assert checkpoint.directory == newest
    assert checkpoint.config["hidden"] == [32]

    again = train_recipe("mlp", config, run_dir=newest, resume=True)
    assert again == checkpoint
    assert "finished already" in capsys.readouterr().err


def test_a_resume_without_anything_to_resume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no unfinished run under runs/cnn"):
        train_recipe("cnn", resume=True)
    with pytest.raises(UsageError, match=r"no run\.json there"):
        train_recipe("cnn", resume=True, run_dir=tmp_path)
    with runs.begin("mlp", {}, directory=tmp_path / "mlp"):
        pass
    with pytest.raises(UsageError, match="a run of the recipe 'mlp', not 'cnn'"):
        train_recipe("cnn", resume=True, run_dir=tmp_path / "mlp")


def test_a_run_is_not_written_over_nor_by_two_at_once(tmp_path: Path) -> None:
    config = configure("mlp", overrides=SHORT)
    with (
        runs.begin("mlp", config.model_dump(mode="json"), directory=tmp_path / "a"),
        pytest.raises(MachineError, match="another process is training there"),
    ):
        train_recipe("mlp", run_dir=tmp_path / "a", resume=True)
    with pytest.raises(UsageError, match="there is a run already"):
        train_recipe("mlp", config, run_dir=tmp_path / "a")


def test_of_two_that_begin_in_one_directory_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runs.write_json

    def slow(path: Path, text: str) -> None:
        # Now, before the first one's record is there, the second one begins.
        monkeypatch.setattr(runs, "write_json", real)
        with pytest.raises(MachineError, match="another process is training there"), begin_in(tmp_path / "run"):
            pytest.fail("two runs in one directory")
        real(path, text)

    monkeypatch.setattr(runs, "write_json", slow)
    with begin_in(tmp_path / "run"):
        pass
    assert runs.find_run("mlp", directory=tmp_path / "run").config == {}


def test_a_lock_on_a_directory_that_a_failed_run_took_away_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runs.fcntl.flock

    def removed_before(file: Any, operation: int) -> None:
        (tmp_path / "run" / runs._LOCK_FILE).unlink()
        real(file, operation)

    monkeypatch.setattr(runs.fcntl, "flock", removed_before)
    with pytest.raises(MachineError, match="another process is training there"), begin_in(tmp_path / "run"):
        pytest.fail("the lock is on a file that is gone")


def begin_in(directory: Path) -> AbstractContextManager[runs.Run]:
    return runs.begin("mlp", {}, directory=directory)


def a_state_of(run_dir: Path, **changes: object) -> None:
    """Replace parts of the saved state; a part that is None is left out."""
    path = run_dir / runs._STATE_FILE
    content = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)


@pytest.mark.parametrize("other", ["weights", "best_weights", "optimizer", "momentum"])
def test_a_state_of_another_network_is_refused(other: str, tmp_path: Path) -> None:
    config = configure("mlp", overrides=[*SHORT, "hidden=[16]"])
    with runs.begin("mlp", config.model_dump(mode="json"), directory=tmp_path / "run") as run:
        mine = mlp(shape=(1, 8, 8), classes=10, hidden=(16,))
        strange = mlp(shape=(1, 8, 8), classes=10, hidden=(8,))
        digest = prepare(
            open_data("digits", split_seed=0), image_size=None, channels=None, skip_corrupt=False
        ).data.digest()
        state = runs.State(data_digest=digest)

        def build(network: torch.nn.Module, *, stepped: bool = False) -> torch.optim.Optimizer:
            optimizer = build_optimizer("adamw", network, lr=0.1, weight_decay=0.1, momentum=0.9)
            if stepped:
                network(torch.rand(4, 1, 8, 8)).sum().backward()
                optimizer.step()
            return optimizer

        state.end_epoch(accuracy=0.5, loss=1.0, network=mine, optimizer=build(mine))
        if other == "weights":
            state.model = strange.state_dict()
        elif other == "best_weights":
            state.best_weights = dict(strange.state_dict())
        elif other == "optimizer":
            state.optimizer = torch.optim.SGD(mine.parameters()).state_dict()
        else:
            state.optimizer = build(strange, stepped=True).state_dict()
        run.save_state(state)
    with pytest.raises(CorruptError, match="not a state that dlops can go on from"):
        train_recipe("mlp", resume=True, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"best_weights": None}, "it holds best_epoch"),
        ({"stopped_early": None}, "it holds best_epoch"),
        ({"surprise": 1}, "surprise"),
        ({"epoch": "3"}, "epoch is a str"),
        ({"epoch": True}, "epoch is a bool"),
        ({"best_rank": (1.0,)}, "best_rank is"),
        ({"best_epoch": 9}, "best_epoch is 9 of 1"),
    ],
)
def test_a_state_without_all_its_parts_is_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    run = runs.Run(tmp_path, "mlp", threads=1, resume=True)
    run.save_state(runs.State(data_digest="one", epoch=1))
    a_state_of(tmp_path, **changes)
    with pytest.raises(CorruptError, match=f"not a state that dlops can go on from .*{said}"):
        run.load_state(data_digest="one")


def test_a_resume_on_changed_data_or_from_a_damaged_state_is_refused(write_digits, tmp_path: Path) -> None:
    run = runs.Run(tmp_path, "mlp", threads=1, resume=True)
    run.save_state(runs.State(data_digest="one", epoch=1))
    with pytest.raises(UsageError, match="the data have changed"):
        run.load_state(data_digest="another")
    path = tmp_path / runs._STATE_FILE
    for content in (path.read_bytes()[:200], b"", b"\x80\x02cos\nsystem\n(S'false'\ntR."):
        path.write_bytes(content)
        with pytest.raises(CorruptError, match="not a state that dlops can go on from"):
            run.load_state(data_digest="one")


@pytest.fixture
def watched(write_digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BaseModel]:
    """`watched("cnn", ...)` has that recipe write down its weights; the config is for two processes and few images."""

    def watch(recipe: str, *settings: str, loses: bool = False) -> BaseModel:
        for digit in ("0", "1", "2"):
            root = write_digits(digit, count=40)
        # A module of its own, since the spawned processes import it by name.
        (tmp_path / f"watched_{recipe}.py").write_text(WATCHED.format(recipe=recipe, loses=loses))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(RECIPES[recipe], "fit", importlib.import_module(f"watched_{recipe}").fit)
        shared = [f"data={root}", "epochs=2", "devices=2", "accelerator=cpu", "batch_size=16", "dropout=0.2"]
        return configure(recipe, overrides=[*shared, *settings])

    return watch


def assert_one_model(directory: Path, epoch: int) -> dict[str, torch.Tensor]:
    """Each process sees other images, augmented otherwise: only shared gradients keep the two at the same weights."""
    first, second = (torch.load(directory / f"rank{rank}-epoch{epoch}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert len(first) > 4
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    return first


def test_two_processes_train_one_model(watched, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Of the program that trains, and none of training's affair.
    stranger = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    stranger.start()
    try:
        checkpoint = train_recipe("cnn", watched("cnn", "widths=[8, 16]"), run_dir=tmp_path / "run")
        assert stranger.is_alive()
    finally:
        stranger.kill()
        stranger.join()
    assert capfd.readouterr().err.count("test accuracy") == 1
    assert checkpoint.config["devices"] == 2
    before, after = (assert_one_model(tmp_path / "run", epoch) for epoch in (1, 2))
    assert all(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_an_error_in_one_of_two_processes_stops_both_and_comes_out_as_itself(watched, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training diverged: the loss is nan in epoch 2"):
        train_recipe("mlp", watched("mlp", "hidden=[32]", loses=True), run_dir=tmp_path / "run")
    assert_one_model(tmp_path / "run", 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_first_of_two_processes_ends_both(tmp_path: Path, number: signal.Signals) -> None:
    """As `kill` and batch systems send it. What trained on would write beside whoever goes on with the run."""
    settings = ["epochs=900", "patience=900", "devices=2", "accelerator=cpu", "hidden=[16]"]
    command = [sys.executable, "-m", "dlops", "train", "mlp", "--run-dir", "run"]
    command += [word for setting in settings for word in ("--set", setting)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next((line for line in process.stderr if "epoch" in line and "validation" in line), "")
        assert said, "it never trained"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        # Python's own helper looks after itself.
        trainers = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        assert len(trainers) == 2
        for child in trainers if Path("/proc/self/status").exists() else ():
            # A terminal's Ctrl-C reaches all; only the first process is to answer it.
            blocked = re.search(r"SigBlk:\t(\w+)", Path(f"/proc/{child.pid}/status").read_text())
            assert blocked is not None
            assert int(blocked[1], 16) & 1 << (signal.SIGINT - 1), child.cmdline()
        process.send_signal(number)
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 128 + number
    assert "to go on: dlops train mlp --resume" in errors
    assert "Traceback" not in errors
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_a_batch_that_leaves_a_process_with_one_image_is_refused_before_any_work(tmp_path: Path) -> None:
    for recipe in ("cnn", "mlp"):
        with pytest.raises(UsageError, match="a batch of 2 is too small for 2 processes"):
            train_recipe(recipe, configure(recipe, overrides=["batch_size=2", "devices=2", "accelerator=cpu"]))
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_loss_that_is_no_longer_a_number_stops_training_with_the_epoch_and_the_rate() -> None:
    settings = ["epochs=2", "lr=1e30", "optimizer=sgd", "max_grad_norm=null", "warmup_epochs=0"]
    with pytest.raises(UsageError, match=r"training diverged: the loss is nan in epoch 1.*lower lr"):
        train_recipe("mlp", configure("mlp", overrides=settings))


def test_training_stops_early_and_keeps_the_best_epoch() -> None:
    settings = ["epochs=30", "patience=2", "lr=0.02", "hidden=[64]", "seed=3"]
    checkpoint = train_recipe("mlp", configure("mlp", overrides=settings))
    assert checkpoint.metrics["stopped_early"] is True
    assert checkpoint.metrics["epochs"] == checkpoint.metrics["best_epoch"] + 2 < 30


def test_of_epochs_with_one_accuracy_the_one_with_the_lower_loss_is_kept() -> None:
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters())
    state = runs.State(data_digest="d")
    for accuracy, loss in ((0.5, 1.0), (0.7, 0.9), (0.7, 0.4), (0.7, 0.6), (0.6, 0.1)):
        torch.nn.init.constant_(network.weight, loss)
        state.end_epoch(accuracy=accuracy, loss=loss, network=network, optimizer=optimizer)
    assert (state.best_epoch, state.best_rank, state.epochs_since_best) == (3, (0.7, -0.4), 2)
    assert state.best_weights["weight"].item() == pytest.approx(0.4)


def test_a_folder_of_images_trains_from_its_path_alone(write_digits, capsys: pytest.CaptureFixture[str]) -> None:
    for digit in ("0", "1"):
        write_digits("train", digit, count=60)
        root = write_digits("test", digit, count=30, start=100)
    checkpoint = train_recipe("cnn", configure("cnn", overrides=[f"data={root}", "epochs=4", "widths=[8, 16]"]))
    assert checkpoint.name == "images-cnn"
    assert checkpoint.spec.labels == ("0", "1")
    assert checkpoint.metrics["accuracy"] > 0.9
    assert isinstance(checkpoint.samples("evaluation").raw[0], bytes)
    assert "102 training, 18 validation, 60 test images of 1×8×8 in 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "used"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_training_computes_in_the_precision_asked_for_and_the_rest_is_fp32(
    precision: str, used: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = mlp_recipe.mlp, set()

    def watched(**settings: Any) -> torch.nn.Module:
        network = real(**settings)
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda layer, _, output: seen.add((layer.training, output.dtype)))
        return network

    monkeypatch.setattr(mlp_recipe, "mlp", watched)
    checkpoint = train_recipe("mlp", configure("mlp", overrides=[*SHORT, f"precision={precision}", "accelerator=cpu"]))
    assert seen == {(True, used), (False, torch.float32)}
    assert {tensor.dtype for tensor in weights(checkpoint).values() if tensor.is_floating_point()} == {torch.float32}
    assert checkpoint.metrics["accuracy"] > 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_missing_device_is_noticed_before_anything_is_read() -> None:
    with pytest.raises(MachineError, match="1 cuda devices asked for, 0 present"):
        train_recipe("mlp", configure("mlp", overrides=["accelerator=cuda", "data=mnist"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cnn_trains_on_a_gpu(precision: str) -> None:
    settings = ["accelerator=cuda", f"precision={precision}", "epochs=8", "num_workers=2"]
    assert train_recipe("cnn", configure("cnn", overrides=settings)).metrics["accuracy"] > 0.95


def test_gradients_are_clipped_to_the_norm_that_is_set(tmp_path: Path) -> None:
    settings = ["data=digits", "epochs=1", "optimizer=sgd", "momentum=0", "lr=0.5", "weight_decay=0", "warmup_epochs=0"]

    def trained_with(limit: str) -> dict[str, torch.Tensor]:
        config = configure("mlp", overrides=[*settings, f"max_grad_norm={limit}"])
        return weights(train_recipe("mlp", config, run_dir=tmp_path / limit))

    untrained = trained_with("1e-9")

    def moved(limit: str) -> float:
        trained = trained_with(limit)
        # The batch norms' running statistics move without gradients.
        names = [name for name in trained if name.endswith(("weight", "bias"))]
        return float(sum((trained[name] - untrained[name]).norm() ** 2 for name in names) ** 0.5)

    # 38 steps of a rate of at most 0.5 move the weights no further than the sum of the clipped gradients.
    assert 0 < moved("0.001") <= 38 * 0.5 * 0.0011
    assert moved("null") > 0.5
