"""Train a convolutional network to label images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator
from torch import nn

from dlops.checkpoint import NAME_PATTERN, Checkpoint, construct, load_checkpoint
from dlops.console import Bar, progress_bar, say
from dlops.errors import UsageError
from dlops.samples import MAX_SAMPLES, MAX_SAMPLES_BYTES
from dlops.train.batches import derived_seed, training_batches
from dlops.train.curves import open_curves
from dlops.train.data.source import open_data
from dlops.train.defaults import Plan, as_run, check_batch_size, plan_for
from dlops.train.devices import Accelerator, Precision, check_finite, launch, make_fabric, seed_all
from dlops.train.evaluation import validate
from dlops.train.finish import chosen_samples, write_checkpoint
from dlops.train.images import MIN_SIZE, Images, prepare
from dlops.train.initial import as_initial_knows, fine_tuning_rate, open_initial, with_dense_answers
from dlops.train.models.cnn import numbers_for
from dlops.train.optimizers import OptimizerName, build_optimizer, set_learning_rate
from dlops.train.qat import Rounding
from dlops.train.run import Run
from dlops.train.schedules import warmup_cosine

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Network = Literal["cnn", "resnet20", "resnet18"]
# Below it the last stage of resnet18, a 32nd of the size, would be a single pixel and its batch norm without a spread.
_RESNET18_MIN = 64


class Config(BaseModel):
    """The settings. What is null is chosen from the data (see defaults.py) and announced in the log."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    # The data. digits needs no download.
    data: str = Field("digits", min_length=1, description="digits, mnist, cifar10, cifar100, a folder or a .tar.gz")
    name: str | None = Field(None, pattern=NAME_PATTERN, description="the checkpoint's name; null: <data>-<network>")
    image_size: int | None = Field(None, ge=MIN_SIZE, le=1024, description="height and width; null: the images' own")
    channels: Literal[1, 3] | None = Field(None, description="1 grey, 3 colour; null: grey where every image is")
    skip_corrupt: bool = Field(False, description="leave out images that cannot be decoded instead of refusing")
    # Not the seed: runs with different seeds report on the same test images.
    split_seed: int = Field(0, ge=0, description="which images are split off as test and validation")

    # Fine-tuning: the network and its weights are the checkpoint's, pruned where that is.
    init: str | None = Field(None, min_length=1, description="a checkpoint to fine-tune; null: random weights")

    # The network. cnn has no branches, so that all of it can be pruned and quantized; resnet20 (He et al. 2016) is for
    # images of about 32 pixels, resnet18 (torchvision's) for photos of about 224, both from random weights.
    network: Network = Field("cnn", description="resnet20 suits small images, resnet18 photos")
    widths: tuple[Annotated[int, Field(ge=1, le=8192)], ...] | None = Field(
        None, min_length=1, max_length=8, description="of cnn: channels of each stage; null: by image size"
    )
    depth: int = Field(2, ge=1, le=8, description="of cnn: convolutions a stage")
    dropout: float = Field(0.0, ge=0, lt=1, description="of cnn: before the last layer")

    # The optimization. AdamW reaches its accuracy at one learning rate over all these data sets; SGD needs it tuned.
    epochs: int | None = Field(None, ge=1, le=10_000, description="passes over the training images")
    batch_size: int | None = Field(None, ge=2, le=65_536, description="images a step, all devices together")
    optimizer: OptimizerName = Field("adamw", description="what updates the weights; sgd is with Nesterov momentum")
    lr: float | None = Field(None, gt=0, description="the peak learning rate; null: by optimizer")
    weight_decay: float | None = Field(None, ge=0, description="of weights, not of biases; null: by optimizer")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD; the first beta of Adam and AdamW")
    # One epoch lets the batch norms settle before the rate is at its peak.
    warmup_epochs: float = Field(1.0, ge=0, description="the learning rate rises over these, then falls by a cosine")
    # Keeps logits finite on images that the network knows by heart.
    label_smoothing: float = Field(0.05, ge=0, lt=1, description="share of the target spread over all classes")
    # Above what sound steps have, so that it only catches the rare bad one.
    max_grad_norm: float | None = Field(5.0, gt=0, description="gradients are scaled down to this norm; null: never")
    # The cosine improves to its end: a shorter patience would stop runs that are about to get better.
    patience: int | None = Field(20, ge=1, description="stop after so many epochs without a better validation")

    # The augmentation.
    flip: bool | None = Field(None, description="mirror left and right; null: colour images only")
    crop: float = Field(0.125, ge=0, le=0.5, description="largest shift, as a fraction of the size")
    rotation: float | None = Field(None, ge=0, le=180, description="largest angle in degrees")
    zoom: float | None = Field(None, ge=0, le=1, description="largest change of scale, a fraction")

    # For int8: slower by the rounding, so only once the network has learned what there is to learn.
    qat: bool = Field(False, description="quantization-aware: the last epochs train with int8's rounding")
    qat_epochs: int | None = Field(None, ge=1, description="how many those are; null: a quarter of all")

    # Where it runs.
    seed: int = Field(0, ge=0, description="of the weights, the order, the augmentation and dropout")
    accelerator: Accelerator = Field("auto", description="auto takes a GPU where there is one")
    devices: int = Field(1, ge=1, le=64, description="processes, one device each")
    precision: Precision = Field("fp32", description="bf16 is mixed precision")
    # Decoded images lie in memory; workers pay off only where augmenting large ones takes longer than training.
    num_workers: int = Field(0, ge=0, le=64, description="processes that augment ahead of training")

    @field_validator("network", "widths", "depth", "dropout")
    @classmethod
    def _only_of_cnn(cls, value: object, info: ValidationInfo) -> object:
        network = info.data.get("network", "cnn")
        # A network that is named, as presets do, is compared with that of init once it is open.
        is_set = value != cls.model_fields[str(info.field_name)].default
        if info.data.get("init") and info.field_name != "network" and is_set:
            raise ValueError("the network is that of init: leave it out")
        if network != "cnn" and is_set:
            raise ValueError(f"{network} has its own; this is a setting of the network cnn")
        return value


class Built(NamedTuple):
    """A network by its builder's name and arguments, as a checkpoint records it."""

    builder: str
    kwargs: dict[str, JsonValue]


def built(config: Config, images: Images) -> Built:
    """What the config and the data ask for. Raises UsageError where the network does not take such images."""
    channels, height, width = images.shape
    match config.network:
        case "cnn":
            numbers = numbers_for(height, width)
            kwargs: dict[str, JsonValue] = {
                "in_channels": channels,
                "classes": images.classes,
                "widths": list(config.widths or numbers.widths),
                "depth": config.depth,
                "first_stride": numbers.first_stride,
                "dropout": config.dropout,
            }
            return Built("cnn", kwargs)
        case "resnet20":
            return Built("resnet", {"in_channels": channels, "classes": images.classes, "blocks": [3, 3, 3]})
        case "resnet18":
            if channels != 3:
                raise UsageError("resnet18 takes colour images, and these are grey", hint="add --set channels=3")
            if min(height, width) < _RESNET18_MIN:
                raise UsageError(
                    f"resnet18 takes a 32nd of the size: nothing would be left of {height}×{width} pixels",
                    hint="take network=resnet20, or larger images: --set image_size=224",
                )
            return Built("torchvision:resnet18", {"num_classes": images.classes})


def train(config: Config, run: Run) -> Checkpoint:
    """Train, in as many processes as the config asks for; the checkpoint lies in the run's directory."""
    # Before the data is read: a missing device should not take a minute to be noticed.
    check_batch_size(config.batch_size, devices=config.devices)
    fabric = make_fabric(accelerator=config.accelerator, devices=config.devices, precision=config.precision)
    initial = None if config.init is None else open_initial(config.init)
    images = prepare(
        open_data(config.data, split_seed=config.split_seed),
        image_size=config.image_size,
        channels=config.channels,
        skip_corrupt=config.skip_corrupt,
        like=None if initial is None else initial.spec.preprocess,
    )
    if initial is not None:
        images = as_initial_knows(initial, images)
        if config.network != "cnn" and built(config, images) != (initial.spec.builder, initial.spec.kwargs):
            raise UsageError(
                f"{config.init}: {initial.name} is no {config.network}",
                hint="leave network out, or out of the preset: it is that of init",
            )
        # Before training: what it cannot be judged by should not be found out at its end.
        with_dense_answers(chosen_samples(images.data.test, MAX_SAMPLES, MAX_SAMPLES_BYTES), initial)
    plan = plan_for(
        images,
        epochs=config.epochs,
        batch_size=config.batch_size,
        devices=config.devices,
        optimizer=config.optimizer,
        lr=fine_tuning_rate(config.optimizer) if config.lr is None and initial is not None else config.lr,
        weight_decay=config.weight_decay,
        flip=config.flip,
        crop=config.crop,
        rotation=config.rotation,
        zoom=config.zoom,
    )
    launch(fabric, fit, config, plan, images, run, initial)
    return load_checkpoint(run.directory)


def fit(
    fabric: Fabric, config: Config, plan: Plan, images: Images, run: Run, initial: Checkpoint | None = None
) -> None:
    """The loop, in each process: train an epoch, validate, keep the best weights, save the state."""
    run.set_threads(processes=fabric.world_size)
    if initial is None:
        builder, kwargs = built(config, images)
        name = config.name or f"{images.data.name}-{config.network}"
    else:
        assert initial.spec.builder is not None
        builder, kwargs = initial.spec.builder, initial.spec.kwargs
        # The same name: what is exported of it lies beside what is exported of the one it was made from.
        name = config.name or initial.name
    seed_all(derived_seed(config.seed))
    # Channels last is the layout that convolutions want, on CPUs and GPUs alike.
    network = construct(builder, kwargs) if initial is None else initial.build_module()
    network.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(
        config.optimizer, network, lr=plan.lr, weight_decay=plan.weight_decay, momentum=config.momentum
    )
    state = run.load_state(data_digest=images.data.digest())
    run.restore(state, network, optimizer)
    model, optimizer = fabric.setup(network, optimizer)

    rounding = Rounding.in_last(config.qat_epochs, of=plan.epochs, enabled=config.qat)
    first = fabric.is_global_zero
    steps = plan.steps_per_epoch(len(images.train))
    with (
        progress_bar(f"training {name}", total=plan.epochs * steps, shown=first) as bar,
        open_curves(run.directory, from_epoch=state.epoch, enabled=first) as curves,
    ):
        bar.advance(state.epoch * steps)
        while not state.is_over(plan.epochs):
            with rounding.next_epoch(state, network):
                train_loss = train_epoch(fabric, config, plan, images, model, optimizer, bar, state.epoch + 1)
                accuracy, loss = validate(fabric, network, images)
            state.end_epoch(accuracy=accuracy, loss=loss, network=network, optimizer=optimizer)
            state.stopped_early = rounding.stops(state, patience=config.patience)
            curves.add(state.epoch, train_loss=train_loss, validation_loss=loss, validation_accuracy=accuracy)
            if first:
                run.save_state(state)
                bar.advance(0, note=f"epoch {state.epoch}/{plan.epochs}, validation {accuracy:.2%}")
    if state.stopped_early and first:
        say(f"stopped after epoch {state.epoch}: no better validation for {config.patience} epochs")
    if first:
        write_checkpoint(
            network,
            images=images,
            state=state,
            run=run,
            device=fabric.device,
            name=name,
            builder=builder,
            kwargs=kwargs,
            config=as_run(config.model_dump(mode="json"), plan),
            seed=config.seed,
            initial=initial,
        )


def train_epoch(
    fabric: Fabric,
    config: Config,
    plan: Plan,
    images: Images,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    bar: Bar,
    epoch: int,
) -> float:
    """One pass over this process's share of the training images. Returns the mean loss over all processes."""
    seed_all(derived_seed(config.seed, epoch, fabric.global_rank))
    batches = training_batches(
        images.train,
        plan=plan,
        preprocess=images.preprocess,
        seed=config.seed,
        epoch=epoch,
        fabric=fabric,
        num_workers=config.num_workers,
    )
    steps = len(batches)
    total = torch.zeros((), device=fabric.device)
    model.train()
    for number, (inputs, targets) in enumerate(batches, start=1):
        step = (epoch - 1) * steps + number - 1
        factor = warmup_cosine(step, steps=plan.epochs * steps, warmup_steps=round(config.warmup_epochs * steps))
        set_learning_rate(optimizer, plan.lr * factor)

        logits = model(inputs.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        fabric.backward(loss)
        if config.max_grad_norm is not None:
            fabric.clip_gradients(model, optimizer, max_norm=config.max_grad_norm, error_if_nonfinite=False)
        optimizer.step()

        total += loss.detach()
        # Reading the loss waits for the device, so not at every step; a NaN stays in the sum until it is read.
        if number % 10 == 0 or number == steps:
            check_finite(fabric, total, epoch=epoch, lr=plan.lr * factor)
        bar.advance()
    return check_finite(fabric, total / steps, epoch=epoch, lr=plan.lr)
