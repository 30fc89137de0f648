"""From a raw input to a tensor, as data: the one implementation that training, export, verify and serve share.

Numpy and Pillow only, so that an artifact is checked raw → tensor on a machine without torch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field, PositiveInt, model_validator

from dlops.errors import InputError
from dlops.jpeg_scans import MOST as MOST_SCANS
from dlops.jpeg_scans import count_scans
from dlops.manifest import Record
from dlops.signature import Array

Raw = bytes | str | Array | Sequence[object]
"""Encoded image bytes, uint8 pixels (H, W) or (H, W, C), numbers, or text, as it is or as UTF-8."""
Tensor = NDArray[np.float32] | NDArray[np.uint8] | NDArray[np.int64]

# A 64-megapixel image is 192 MB decoded: larger ones are refused from the header, before decoding.
MAX_PIXELS = 64_000_000
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# Pillow's modes of 16 and 32 bits begin so; converting them to 8 bits would clip most of their range away.
_DEEP_MODES = ("I", "F")


class Decode(Record):
    """Bytes or pixels to an 8-bit image, turned as its EXIF tag says; alpha is dropped."""

    kind: Literal["decode"] = "decode"
    mode: Literal["RGB", "L"] = "RGB"


class Resize(Record):
    """size: (height, width), or one int for the shorter side, the aspect ratio kept."""

    kind: Literal["resize"] = "resize"
    size: PositiveInt | tuple[PositiveInt, PositiveInt]
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"


class CenterCrop(Record):
    """size: (height, width); a smaller image is padded with zeros."""

    kind: Literal["center_crop"] = "center_crop"
    size: tuple[PositiveInt, PositiveInt]


class Scale(Record):
    """To float32, multiplied by `factor`; images turn from (H, W, C) to (C, H, W) here."""

    kind: Literal["scale"] = "scale"
    factor: float = 1 / 255


class Normalize(Record):
    """(x - mean) / std, one value a channel, or one a feature for numbers."""

    kind: Literal["normalize"] = "normalize"
    mean: tuple[float, ...] = Field(min_length=1)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _same_length(self) -> Normalize:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means but {len(self.std)} stds")
        return self


class Utf8(Record):
    """Text to the numbers of its UTF-8 bytes, as models read it that need no vocabulary (ByT5, CANINE).

    offset: added to each byte. end: what follows the last, None for nothing. pad: fills up to the tensor's length; of
    what is longer the rest is cut off, and `end` stands last.
    """

    kind: Literal["utf8"] = "utf8"
    offset: int = Field(0, ge=0)
    end: int | None = None
    pad: int = 0


Step = Annotated[Decode | Resize | CenterCrop | Scale | Normalize | Utf8, Field(discriminator="kind")]


class Preprocess(Record):
    """Ordered steps from one raw input to one tensor without a batch axis.

    input: "image" (encoded bytes or uint8 pixels, to (C, H, W)), "numbers" (of `shape`) or "text" (to (length,)
    of int64). dtype: "uint8" for a model that scales images itself: then the steps end before the scaling, and `shape`
    is (H, W, C).
    """

    input: Literal["image", "numbers", "text"]
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    steps: tuple[Step, ...] = ()
    dtype: Literal["float32", "uint8", "int64"] = "float32"

    @model_validator(mode="after")
    def _in_order(self) -> Preprocess:
        kinds = [step.kind for step in self.steps]
        if (self.input == "text") != (kinds == ["utf8"] and self.dtype == "int64"):
            raise ValueError("text, and only text, becomes int64 by one step, utf8")
        if self.input == "text":
            return self
        if self.input == "image":
            if kinds[:1] != ["decode"] or kinds.count("decode") != 1:
                raise ValueError("the steps for an image begin with one decode")
            if self.dtype == "uint8":
                if any(kind in ("scale", "normalize") for kind in kinds):
                    raise ValueError("pixels as uint8 are neither scaled nor normalized")
            elif kinds.count("scale") != 1 or any(
                k in ("resize", "center_crop") for k in kinds[kinds.index("scale") :]
            ):
                raise ValueError("the steps for an image hold one scale, after resize and crop")
        elif self.dtype == "uint8":
            raise ValueError("numbers become float32")
        elif any(kind not in ("scale", "normalize") for kind in kinds):
            raise ValueError("numbers can be scaled and normalized only")
        return self

    @model_validator(mode="after")
    def _fitting(self) -> Preprocess:
        if self.input == "text":
            if len(self.shape) != 1 or self.shape[0] < 1:
                raise ValueError(f"shape {list(self.shape)}, text gives [length]")
            return self
        if self.input == "image":
            channels = 3 if self.steps[0] == Decode(mode="RGB") else 1
            last = self.dtype == "uint8"
            if len(self.shape) != 3 or self.shape[-1 if last else 0] != channels:
                wanted = f"[height, width, {channels}]" if last else f"[{channels}, height, width]"
                raise ValueError(f"shape {list(self.shape)}, an image of this mode gives {wanted}")
        else:
            channels = self.shape[-1] if self.shape else 1
        for step in self.steps:
            if isinstance(step, Normalize) and len(step.mean) not in (1, channels):
                raise ValueError(f"{len(step.mean)} means and stds for {channels} channels or features")
        return self

    def apply(self, raw: Raw) -> Tensor:
        """The tensor, of `shape` and `dtype`. Raises InputError for what cannot be decoded or does not fit."""
        if self.input == "image":
            tensor = self._image(raw)
            self._check_shape(tensor)
            return tensor
        if self.input == "text":
            return self._ids(raw)
        # Before the steps: a single number would be stretched to as many features as there are means.
        numbers = _numbers(raw)
        self._check_shape(numbers)
        for step in self.steps:
            numbers = _rescale(numbers, step, channel_axes=0)
        return numbers

    def batch(self, raws: Iterable[Raw]) -> Tensor:
        """`apply` on each, stacked: (n, *shape)."""
        stacked: NDArray[Any] = np.stack([self.apply(raw) for raw in raws])
        return stacked

    def _check_shape(self, tensor: NDArray[np.float32] | NDArray[np.uint8]) -> None:
        if tensor.shape != self.shape:
            raise InputError(f"shape {list(tensor.shape)}, expected {list(self.shape)}", field="input")

    def _ids(self, raw: Raw) -> NDArray[np.int64]:
        (step,) = self.steps
        assert isinstance(step, Utf8)
        content = np.frombuffer(_utf8(raw), np.uint8).astype(np.int64) + step.offset
        ids = np.full(self.shape, step.pad, np.int64)
        room = self.shape[0] - (step.end is not None)
        count = min(len(content), room)
        ids[:count] = content[:count]
        if step.end is not None:
            ids[count] = step.end
        return ids

    def _image(self, raw: Raw) -> NDArray[np.float32] | NDArray[np.uint8]:
        decode, *rest = self.steps
        assert isinstance(decode, Decode)
        image = open_image(raw, mode=decode.mode)
        tensor: NDArray[np.float32] | None = None
        for step in rest:
            match step:
                case Resize():
                    image = _resized(image, step)
                case CenterCrop():
                    image = _cropped(image, step)
                case Scale():
                    pixels = np.asarray(image, dtype=np.float32)
                    chw = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
                    tensor = np.ascontiguousarray(chw) * np.float32(step.factor)
                case _:
                    assert tensor is not None
                    tensor = _rescale(tensor, step, channel_axes=2)
        if self.dtype == "uint8":
            return np.asarray(image, np.uint8).reshape(image.height, image.width, -1)
        assert tensor is not None
        return tensor


def open_image(raw: Raw, *, mode: Literal["RGB", "L"], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An 8-bit image from encoded bytes or uint8 pixels (H, W), (H, W, 1) or (H, W, 3).

    The header's size is checked before anything is decoded. Raises InputError.
    """
    if isinstance(raw, (bytes, bytearray, memoryview)):
        return _decoded(bytes(raw), mode, max_pixels)
    pixels = _as_array(raw, "pixels must be an array of whole numbers")
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind not in "iu" or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
            raise InputError("pixels must be whole numbers from 0 to 255", field="input")
        pixels = pixels.astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise InputError(f"pixels of shape {list(pixels.shape)}, expected [H, W] or [H, W, 3]", field="input")
    if pixels.shape[0] * pixels.shape[1] > max_pixels:
        raise InputError(f"{pixels.shape[1]}×{pixels.shape[0]} pixels, at most {max_pixels} allowed", field="input")
    return Image.fromarray(pixels).convert(mode)


def _decoded(content: bytes, mode: Literal["RGB", "L"], max_pixels: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            if math.prod(image.size) > max_pixels:
                raise InputError(f"{image.width}×{image.height} pixels, at most {max_pixels} allowed", field="input")
            if image.format in ("JPEG", "MPO") and count_scans(content).scans > MOST_SCANS:
                raise InputError(f"a JPEG of over {MOST_SCANS} scans: no photo has so many", field="input")
            if _is_deep(image):
                raise InputError(f"image of mode {image.mode}: more than 8 bits a channel", field="input")
            image.load()
            # Dropped, as alpha is: Pillow would blend or warn, by the mode.
            image.info.pop("transparency", None)
            return ImageOps.exif_transpose(image).convert(mode)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow refuses far larger ones by itself, in `open`.
        raise InputError(f"too many pixels, at most {max_pixels} allowed", field="input") from None
    except UnidentifiedImageError:
        raise InputError(f"not an image in a known format ({', '.join(IMAGE_FORMATS)})", field="input") from None
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise OSError, SyntaxError, struct.error and others
        raise InputError(f"damaged image: {error}", field="input") from None


def _is_deep(image: Image.Image) -> bool:
    """Whether the file holds more than 8 bits a channel. Before decoding: Pillow drops the rest of colour images."""
    if image.mode.startswith(_DEEP_MODES):
        return True
    if image.format == "TIFF":
        bits_per_sample: tuple[int, ...] = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]
        return max(bits_per_sample) > 8
    # How the bytes in the file are to be unpacked: "RGB;16B" in PNG, ("RGB", 65535) in PPM.
    tiles = image.tile  # type: ignore[attr-defined]
    details = [part for tile in tiles for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    if image.format == "PPM":
        return any(isinstance(part, int) and part > 255 for part in details)
    return image.format == "PNG" and any(isinstance(part, str) and ";16" in part for part in details)


def resized_size(step: Resize, width: int, height: int) -> tuple[int, int]:
    """(width, height) after it, of an image of that width and height."""
    if not isinstance(step.size, int):
        return step.size[1], step.size[0]
    # The longer side is truncated, as in torchvision.transforms.Resize.
    short, long = sorted((width, height))
    longer = int(step.size * long / short)
    return (step.size, longer) if width <= height else (longer, step.size)


def _resized(image: Image.Image, step: Resize) -> Image.Image:
    size = resized_size(step, *image.size)
    if math.prod(size) > MAX_PIXELS:
        # A line of pixels is small in the file and huge once its shorter side is a few hundred.
        raise InputError(
            f"{image.width}×{image.height} pixels resized to {size[0]}×{size[1]}, at most {MAX_PIXELS} allowed",
            field="input",
        )
    return image if size == image.size else image.resize(size, _RESAMPLING[step.interpolation])


def _cropped(image: Image.Image, step: CenterCrop) -> Image.Image:
    height, width = step.size
    left, top = crop_start(image.width, width), crop_start(image.height, height)
    return image.crop((left, top, left + width, top + height))


def crop_start(size: int, cropped: int) -> int:
    """Where a centred crop begins, negative where the image is padded; rounded as torchvision's CenterCrop does."""
    return -((cropped - size) // 2) if size < cropped else round((size - cropped) / 2)


def _utf8(raw: Raw) -> bytes:
    """The bytes of a text. Raises InputError for what is none."""
    try:
        if isinstance(raw, (bytes, bytearray, memoryview)):
            return str(bytes(raw), "utf-8").encode()
        if isinstance(raw, str):
            return raw.encode()
    except UnicodeError as error:
        raise InputError(f"no UTF-8 text: {error}", field="input") from None
    raise InputError("this model takes text", field="input")


def _numbers(raw: Raw) -> NDArray[np.float32]:
    if isinstance(raw, (bytes, bytearray, memoryview)):
        raise InputError("this model takes numbers, not a file", field="input")
    numbers = _as_array(raw, "not an array of numbers")
    if numbers.dtype.kind not in "fiub":
        raise InputError("not an array of numbers", field="input")
    # What float32 cannot hold becomes infinity here, which the next line refuses.
    with np.errstate(over="ignore"):
        array = numbers.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError("NaN or infinity in it", field="input")
    return array


def _as_array(raw: Array | Sequence[object], problem: str) -> Array:
    try:
        return np.asarray(raw)
    except (TypeError, ValueError, OverflowError):  # rows of different lengths, say
        raise InputError(problem, field="input") from None


def _rescale(tensor: NDArray[np.float32], step: Step, *, channel_axes: int) -> NDArray[np.float32]:
    if isinstance(step, Scale):
        return tensor * np.float32(step.factor)
    assert isinstance(step, Normalize)
    trailing = (slice(None), *[None] * channel_axes)
    mean, std = np.array(step.mean, np.float32)[trailing], np.array(step.std, np.float32)[trailing]
    return (tensor - mean) / std
