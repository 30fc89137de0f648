"""From raw samples to what the loop eats: one preprocessing for all splits, and every image decoded once.

The preprocessing is the very one that the checkpoint records and the service runs. Its decoding, resizing and cropping
are applied here once, to uint8 pixels; augmentation works on those, and scaling and normalizing follow.
"""

from __future__ import annotations

import io
import statistics
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dlops.console import Bar, progress_bar, say
from dlops.environment import available_cores, describe_environment
from dlops.errors import CorruptError, InputError, MachineError, UsageError
from dlops.preprocess import IMAGE_FORMATS, CenterCrop, Decode, Normalize, Preprocess, Resize, Scale, Step
from dlops.signature import Array
from dlops.train.data.dataset import DataSet, Split, shown

# Photos of many sizes are brought to this unless `image_size` says otherwise: it trains in minutes on two cores.
DEFAULT_MAX_SIZE = 128
MIN_SIZE = 8
_CHUNK = 64
# Statistics of this many images are stable to the third digit.
_STATISTICS_IMAGES = 10_000

Mode = Literal["RGB", "L"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """pixels: (n, C, H, W) uint8, decoded, resized and cropped. targets: (n,) int64."""

    pixels: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """A data set ready for training: the raw samples stay for the checkpoint, the pixels feed the loop."""

    data: DataSet
    preprocess: Preprocess
    train: Pixels
    validation: Pixels
    test: Pixels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        channels, height, width = self.preprocess.shape
        return channels, height, width

    @property
    def classes(self) -> int:
        return len(self.data.labels)


def prepare(
    data: DataSet, *, image_size: int | None, channels: Literal[1, 3] | None, skip_corrupt: bool,
    like: Preprocess | None = None,
) -> Images:  # fmt: skip
    """Decode every image of `data`, in parallel.

    image_size: height and width; None takes the images' own size where all agree and it is at most 128, else
    min(128, their median shorter side). channels: 1 grey, 3 colour; None takes 1 where every image is grey. like: of
    which size and colour are taken where neither is given.
    Raises CorruptError naming the images that cannot be read or decoded, unless `skip_corrupt`: they are then left
    out, and the data set's `skipped` names them.
    """
    headers = {name: _headers(name, split) for name, split in _splits(data)}
    data, headers = _without_corrupt(data, headers, skip_corrupt)
    while True:
        seen = [header for split in headers.values() for header in split if header is not None]
        mode: Mode = "RGB" if channels == 3 or (channels is None and any(h.colour for h in seen)) else "L"
        sizes = Counter((h.height, h.width) for h in seen)
        if like is not None and like.input == "image" and image_size is None and channels is None:
            first, shape = spatial(like.steps), like.shape
        else:
            size, geometry = choose_geometry(sizes, image_size=image_size)
            first, shape = (Decode(mode=mode), *geometry), (3 if mode == "RGB" else 1, *size)
        _check_memory(sum(len(split) for _, split in _splits(data)), shape)
        # Scaled by 1 the tensor holds the pixel values themselves: the same code as in serving, before its last steps.
        decoding = Preprocess(input="image", shape=shape, steps=(*first, Scale(factor=1.0)))
        decoded, damaged = {}, {}
        for name, split in _splits(data):
            decoded[name], damaged[name] = _decode(name, split, decoding)
        if not any(damaged.values()):
            break
        # Once more without them: what a damaged image's header said of its size must not shape the others.
        data, kept = _drop(data, damaged, skip_corrupt)
        headers = {name: [headers[name][i] for i in kept[name]] for name in headers}
    _say_what_was_done(data, sizes, first, image_size)
    mean, std = _statistics(decoded["train"])
    preprocess = Preprocess(input="image", shape=shape, steps=(*first, Scale(), Normalize(mean=mean, std=std)))
    return Images(
        data=data,
        preprocess=preprocess,
        **{
            name: Pixels(pixels=torch.from_numpy(decoded[name]), targets=torch.from_numpy(split.targets))
            for name, split in _splits(data)
        },
    )


def spatial(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Those that make pixels of an image file, without what is done to their values."""
    return tuple(step for step in steps if not isinstance(step, (Scale, Normalize)))


@dataclass(frozen=True, slots=True)
class _Header:
    height: int
    width: int
    colour: bool


def choose_geometry(
    sizes: Counter[tuple[int, int]], *, image_size: int | None
) -> tuple[tuple[int, int], tuple[Step, ...]]:
    """((height, width), the steps that bring any image there), from how often each (height, width) occurs.

    The steps are there even where they change nothing yet: a service gets images of other sizes.
    """
    if len(sizes) == 1:
        ((height, width),) = sizes
        if image_size is None and max(height, width) <= DEFAULT_MAX_SIZE:
            size = (max(height, MIN_SIZE), max(width, MIN_SIZE))
            return size, (Resize(size=size),)
        if height == width:
            side = image_size or DEFAULT_MAX_SIZE
            return (side, side), (Resize(size=(side, side)),)
    side = image_size or max(MIN_SIZE, min(DEFAULT_MAX_SIZE, int(statistics.median(min(s) for s in sizes.elements()))))
    return (side, side), (Resize(size=side), CenterCrop(size=(side, side)))


def _say_what_was_done(
    data: DataSet, sizes: Counter[tuple[int, int]], geometry: Sequence[Step], image_size: int | None
) -> None:
    if data.skipped:
        total = sum(len(split) for _, split in _splits(data)) + len(data.skipped)
        say(
            f"{data.name}: left out {len(data.skipped)} of {total} images that cannot be read or decoded: "
            f"{shown(data.skipped)}"
        )
    cropping = next((step for step in geometry if isinstance(step, CenterCrop)), None)
    if cropping is not None and image_size is None:
        say(
            f"images of {len(sizes)} sizes: the shorter side is resized to {cropping.size[0]} px and the middle "
            "cropped (set image_size for another)"
        )


def normalized(pixels: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """What the preprocessing's last steps make of (n, C, H, W) pixels, uint8 or float: scale, then normalize."""
    scale, normalize = preprocess.steps[-2:]
    assert isinstance(scale, Scale)
    assert isinstance(normalize, Normalize)
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device)[:, None, None]
        for values in (normalize.mean, normalize.std)
    )
    return (pixels.to(torch.float32) * torch.tensor(scale.factor, dtype=torch.float32) - mean) / std


def _splits(data: DataSet) -> tuple[tuple[str, Split], ...]:
    return ("train", data.train), ("validation", data.validation), ("test", data.test)


def _headers(title: str, split: Split) -> list[_Header | None]:
    """Size and colour of each image, None where there is no telling."""
    with progress_bar(f"looking at {title} images", total=len(split)) as bar:
        return _in_parallel(split.raw, _header, bar)


def _header(raw: bytes | Array) -> _Header | None:
    if not isinstance(raw, bytes):
        return _Header(raw.shape[0], raw.shape[1], colour=raw.ndim == 3 and raw.shape[2] == 3)
    try:
        with Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            # Turned by 90 degrees as a camera writes it: what counts is the size that decoding gives. Of TIFF Pillow
            # turns it by itself. Other formats keep the tag behind the pixels, and would be decoded to find it.
            if image.format in ("JPEG", "MPO", "WEBP") and image.getexif().get(0x0112, 1) >= 5:
                width, height = height, width
            return _Header(height, width, colour=image.mode not in ("1", "L", "LA"))
    except Exception:  # noqa: BLE001 - Pillow's readers raise many kinds; all mean that this is no image
        return None


def _decode(title: str, split: Split, decoding: Preprocess) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """((n, C, H, W) pixels, what is wrong with those that cannot be decoded by their place)."""
    pixels = np.zeros((len(split), *decoding.shape), dtype=np.uint8)
    damaged: dict[int, str] = {}

    def one(place: int) -> None:
        try:
            pixels[place] = decoding.apply(split.raw[place])
        except InputError as error:
            damaged[place] = error.message

    with progress_bar(f"decoding {title} images", total=len(split)) as bar:
        _in_parallel(range(len(split)), one, bar)
    return pixels, damaged


def _in_parallel(items: Sequence[Any], work: Any, bar: Bar) -> list[Any]:
    """`work` on each, in order, on threads: Pillow decodes and resizes without the interpreter's lock."""

    def chunk(start: int) -> list[Any]:
        return [work(items[i]) for i in range(start, min(start + _CHUNK, len(items)))]

    results: list[Any] = []
    with ThreadPoolExecutor(max_workers=available_cores()) as pool:
        for part in pool.map(chunk, range(0, len(items), _CHUNK)):
            results += part
            bar.advance(len(part))
    return results


def _without_corrupt(
    data: DataSet, headers: dict[str, list[_Header | None]], skip: bool
) -> tuple[DataSet, dict[str, list[_Header | None]]]:
    bad = {
        name: {i: "not an image" for i, header in enumerate(headers[name]) if header is None}
        for name, _ in _splits(data)
    }
    if not any(bad.values()) and not data.unreadable:
        return data, headers
    if not skip:
        # Decoding finds the truncated ones too; looked for now, so that one message names them all.
        for name, split in _splits(data):
            bad[name] = undecodable(name, split) | bad[name]
    data, kept = _drop(data, bad, skip)
    return data, {name: [headers[name][i] for i in kept[name]] for name in headers}


def undecodable(title: str, split: Split) -> dict[int, str]:
    """What is wrong with the images that cannot be decoded, by their place. title: of the split, for the bar."""
    small = Preprocess(input="image", shape=(1, 8, 8), steps=(Decode(mode="L"), Resize(size=(8, 8)), Scale()))
    return _decode(title, split, small)[1]


def _drop(data: DataSet, bad: dict[str, dict[int, str]], skip: bool) -> tuple[DataSet, dict[str, list[int]]]:
    """(the data set without them, the places kept by split). Raises CorruptError unless `skip`."""
    described = [*data.unreadable]
    described += [
        f"{split.names[i]} ({reason})" for name, split in _splits(data) for i, reason in sorted(bad[name].items())
    ]
    total = sum(len(split) for _, split in _splits(data)) + len(data.unreadable)
    if not skip:
        raise CorruptError(
            f"{data.name}: {len(described)} of {total} images cannot be read or decoded: {shown(described)}",
            hint="repair or remove them, or leave them out with --set skip_corrupt=true",
        )
    kept = {name: [i for i in range(len(split)) if i not in bad[name]] for name, split in _splits(data)}
    for name, split in _splits(data):
        missing = set(range(len(data.labels))) - set(split.take(kept[name]).targets.tolist()) if name == "train" else ()
        if missing or not kept[name]:
            gone = ", ".join(repr(data.labels[i]) for i in sorted(missing)) or "every class"
            raise UsageError(f"{data.name}: no readable image of {gone} is left in {name}", hint="add some that decode")
    data = replace(
        data,
        **{name: split.take(kept[name]) for name, split in _splits(data)},  # type: ignore[arg-type]
        unreadable=(),
        skipped=(*data.skipped, *described),
    )
    return data, kept


def _check_memory(images: int, shape: tuple[int, ...]) -> None:
    needed, memory = images * int(np.prod(shape)), describe_environment().memory_bytes
    if needed > memory // 2:
        raise MachineError(
            f"{images} decoded images of {list(shape)} take {needed >> 20} MB, over half of the memory "
            f"({memory >> 20} MB)",
            hint="set a smaller image_size",
        )


def _statistics(pixels: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over train, of pixels scaled to [0, 1]."""
    step = max(1, len(pixels) // _STATISTICS_IMAGES)
    sample = pixels[::step].astype(np.float64) / 255
    mean, std = sample.mean(axis=(0, 2, 3)), sample.std(axis=(0, 2, 3))
    # A channel that never varies carries nothing; dividing by its zero would make it NaN.
    return tuple(round(float(m), 4) for m in mean), tuple(round(max(float(s), 1e-3), 4) for s in std)
