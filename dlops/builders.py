"""Networks of other packages by name, "torchvision:NAME" and "timm:NAME": built untrained, with the preprocessing that
their published weights were trained with.

Building downloads nothing: a checkpoint from a stranger must not make us fetch what it names. Only
`published_weights` does, for a person who asks for it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dlops.errors import MachineError, UsageError, missing_package, unknown_name
from dlops.preprocess import CenterCrop, Decode, Normalize, Preprocess, Resize, Scale, Step

if TYPE_CHECKING:
    import torch
    from torch import nn

FAMILIES = ("torchvision", "timm")
_QUANTIZED = "quantized_"
# Height and width of the images that detectors are given.
_DETECTED = (640, 640)
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Weights as their authors publish them. labels: in the order of the outputs, empty where they name none."""

    weights: Mapping[str, torch.Tensor]
    labels: tuple[str, ...]
    preprocess: Preprocess


def is_family(builder: str) -> bool:
    """Whether it names a network of another package."""
    return builder.partition(":")[0] in FAMILIES and ":" in builder


def find_builder(builder: str, kwargs: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """What builds "torchvision:NAME" or "timm:NAME" untrained.

    Raises UsageError for an unknown name, and for arguments that would make it load weights.
    """
    family, _, name = builder.partition(":")
    # "pretrained" is torchvision's older spelling, which still works, and timm's present one.
    loading = [
        key for key, value in kwargs.items() if key.startswith(("weights", "pretrained", "checkpoint")) and value
    ]
    if loading:
        raise UsageError(
            f"{builder}: {', '.join(sorted(loading))} in its arguments would download weights",
            hint="a checkpoint brings its own: pass the arguments without them",
        )
    return _torchvision(name) if family == "torchvision" else _timm(name)


def published_preprocess(builder: str) -> Preprocess | None:
    """From an image to what the published weights of that network take; None where it has none for images."""
    family, _, name = builder.partition(":")
    if family == "torchvision":
        entry = _torchvision_weights(name)
        default = getattr(entry, "DEFAULT", None) if entry is not None else None
        return None if default is None else _of_transforms(default.transforms())
    timm = _import_timm()
    config = timm.get_pretrained_cfg(name)
    return None if config is None else _of_timm(timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))


def published_labels(builder: str) -> tuple[str, ...]:
    """What the classes are called that a network tells apart as its authors built it; empty where they do not say."""
    family, _, name = builder.partition(":")
    if family == "torchvision":
        entry = _torchvision_weights(name)
        default = getattr(entry, "DEFAULT", None) if entry is not None else None
        return () if default is None else tuple(default.meta.get("categories", ()))
    timm = _import_timm()
    subset = timm.data.infer_imagenet_subset(timm.get_pretrained_cfg(name) or {})
    if subset is None:
        return ()
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.index_to_description(place) for place in range(info.num_classes()))


def published_weights(builder: str, which: str) -> Published:
    """Download what `which` names: for torchvision a member such as "IMAGENET1K_V1" or "DEFAULT", for timm a tag, or
    "DEFAULT". Nothing in it is unpickled but tensors.

    Raises UsageError for a name that there is not, MachineError where it cannot be fetched.
    """
    family, _, name = builder.partition(":")
    return _published_torchvision(name, which) if family == "torchvision" else _published_timm(name, which)


def _torchvision(name: str) -> Callable[..., nn.Module]:
    models = _import_torchvision(name)
    if name.startswith(_QUANTIZED):
        raise UsageError(
            f"torchvision:{name} is quantized already, by torch's own kernels",
            hint=f"export torchvision:{name.removeprefix(_QUANTIZED)} with --precision int8",
        )
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    # A detector's backbone has weights by default.
    untrained = {key: None for key in parameters if key.startswith("weights")}

    def build(**kwargs: Any) -> nn.Module:
        from dlops.adapters import adapted

        return adapted(models.get_model(name, **(untrained | kwargs)))

    return build


def builder_task(builder: str) -> str:
    """What a network of another package is for, as the name of a task of ours."""
    family, _, name = builder.partition(":")
    if family != "torchvision":
        return "classification"
    kind = _import_torchvision(name).get_model_builder(name).__module__.split(".")[2]
    return {"detection": "detection", "segmentation": "segmentation", "optical_flow": "regression"}.get(
        kind, "classification"
    )


def _import_torchvision(name: str) -> Any:
    try:
        from torchvision import models
    except ModuleNotFoundError:
        raise missing_package("torchvision", needed_for=f"building torchvision:{name}") from None
    if name not in models.list_models():
        raise unknown_name("torchvision model", name, models.list_models())
    return models


def _torchvision_weights(name: str) -> Any:
    """The enumeration of a network's published weights; None where it has none."""
    models = _import_torchvision(name)
    try:
        return models.get_model_weights(name)
    except (ValueError, RuntimeError):  # it says so of the few without any
        return None


def _published_torchvision(name: str, which: str) -> Published:
    entry = _torchvision_weights(name)
    names = [] if entry is None else [member.name for member in entry]
    if which != "DEFAULT" and which not in names:
        raise unknown_name(f"weights of torchvision:{name}", which, names or ["random"])
    if entry is None or not names:
        raise UsageError(f"torchvision:{name} has no published weights", hint="--weights random, or a file")
    member = entry[which] if which in names else entry.DEFAULT
    preprocess = _of_transforms(member.transforms())
    if preprocess is None:
        raise UsageError(
            f"torchvision:{name}: its weights {member.name} take no single image", hint="--weights FILE and --input"
        )
    try:
        weights = member.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise _not_fetched(f"torchvision:{name}", member.url, error) from error
    return Published(weights=weights, labels=tuple(member.meta.get("categories", ())), preprocess=preprocess)


def _of_transforms(transforms: Any) -> Preprocess | None:
    """Of torchvision's presets for images; None for those of videos and pairs of images.

    Detectors resize inside, and segmentation takes any size: both get images of one size here, stretched, so that they
    can be batched.
    """
    match type(transforms).__name__:
        case "ObjectDetection":
            return Preprocess(
                input="image", shape=(3, *_DETECTED),
                steps=(Decode(mode="RGB"), Resize(size=_DETECTED), Scale()),
            )  # fmt: skip
        case "SemanticSegmentation":
            side = transforms.resize_size[0]
            return Preprocess(
                input="image", shape=(3, side, side),
                steps=(
                    Decode(mode="RGB"), Resize(size=(side, side)), Scale(),
                    Normalize(mean=tuple(transforms.mean), std=tuple(transforms.std)),
                ),
            )  # fmt: skip
        case "ImageClassification":
            pass
        case _:
            return None
    (crop,) = transforms.crop_size
    return _for_images(
        resize=transforms.resize_size[0], crop=(crop, crop), interpolation=transforms.interpolation.value,
        mean=transforms.mean, std=transforms.std,
    )  # fmt: skip


def _timm(name: str) -> Callable[..., nn.Module]:
    timm = _import_timm()
    plain = name.partition(".")[0]
    if plain not in timm.list_models():
        raise unknown_name("timm model", name, timm.list_models())
    return partial(timm.create_model, plain, pretrained=False)


def _import_timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError:
        raise missing_package("timm", extra="timm", needed_for="building networks of timm") from None
    return timm


def _of_timm(config: Mapping[str, Any]) -> Preprocess:
    """timm scales the shorter side to the crop over `crop_pct`, rounded down, and cuts the middle out."""
    _, height, width = config["input_size"]
    return _for_images(
        resize=math.floor(min(height, width) / config["crop_pct"]), crop=(height, width),
        interpolation=config["interpolation"], mean=config["mean"], std=config["std"],
    )  # fmt: skip


def _published_timm(name: str, which: str) -> Published:
    timm = _import_timm()
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    plain, _, tag = name.partition(".")
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{plain}.*")]
    wanted = tag if which == "DEFAULT" else which
    if (wanted and wanted not in tags) or not tags:
        raise unknown_name(f"weights of timm:{plain}", wanted or which, tags or ["random"])
    config = timm.get_pretrained_cfg(f"{plain}.{wanted}" if wanted else plain)
    repository = config.hf_hub_id
    if repository.endswith("/"):
        repository += f"{config.architecture}.{config.tag}"
    try:
        # Beside it there may be a pickle, which is not what we read.
        weights = load_file(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:
        raise _not_fetched(f"timm:{name}", repository, error) from error
    preprocess = _of_timm(timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))
    return Published(weights=weights, labels=published_labels(f"timm:{name}"), preprocess=preprocess)


def _for_images(
    *, resize: int, crop: tuple[int, int], interpolation: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> Preprocess:
    if interpolation not in _INTERPOLATIONS:
        raise UsageError(
            f"images resized by {interpolation!r}: {', '.join(_INTERPOLATIONS)} are what preprocessing has"
        )
    steps: tuple[Step, ...] = (
        Decode(mode="RGB"), Resize.model_validate({"size": resize, "interpolation": interpolation}),
        CenterCrop(size=crop), Scale(), Normalize(mean=tuple(mean), std=tuple(std)),
    )  # fmt: skip
    return Preprocess(input="image", shape=(3, *crop), steps=steps)


def _not_fetched(what: str, where: str, error: Exception) -> MachineError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return MachineError(
        f"the weights of {what} cannot be fetched from {where}: {first}",
        hint="fetch them elsewhere and name the file: --weights FILE",
    )
