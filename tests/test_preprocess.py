"""The tensors are torchvision's, on real photographs; what is no image, or too large, is refused by its header."""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from dlops.errors import InputError
from dlops.preprocess import MAX_PIXELS, CenterCrop, Decode, Normalize, Preprocess, Resize, Scale, Step, open_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    assert [image.shape for image in images] == [(427, 640, 3)] * 2
    return images


def encode(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def image_steps(*steps: Step, shape: tuple[int, int, int]) -> Preprocess:
    mode = "RGB" if shape[0] == 3 else "L"
    return Preprocess(input="image", shape=shape, steps=(Decode(mode=mode), *steps))


def to_pixels(raw: bytes | np.ndarray, mode: str = "RGB") -> np.ndarray:
    return np.asarray(open_image(raw, mode=mode))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "WEBP"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_a_photograph_becomes_torchvisions_tensor(photos: list[np.ndarray], form: str, interpolation: str) -> None:
    from torchvision import transforms

    theirs = transforms.Compose([
        transforms.Resize(256, interpolation=transforms.InterpolationMode(interpolation)),
        transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    ours = image_steps(
        Resize(size=256, interpolation=interpolation), CenterCrop(size=(224, 224)), Scale(),
        Normalize(mean=MEAN, std=STD), shape=(3, 224, 224),
    )  # fmt: skip
    for photo in photos:
        content = encode(photo, form)
        expected = theirs(Image.open(io.BytesIO(content)).convert("RGB")).numpy()
        np.testing.assert_allclose(ours.apply(content), expected, rtol=1e-6, atol=1e-6)
        assert ours.apply(content).dtype == np.float32


SIZES = [(1, 1), (2, 3), (5, 9), (7, 31), (8, 8), (31, 7), (33, 32), (64, 63), (100, 41), (427, 640)]


@pytest.mark.parametrize("height_width", SIZES)
@pytest.mark.parametrize("target", [1, 7, 32, 33])
def test_resizing_by_the_shorter_side_gives_torchvisions_pixels(
    photos: list[np.ndarray], height_width: tuple[int, int], target: int
) -> None:
    from torchvision import transforms

    height, width = height_width
    photo = np.ascontiguousarray(photos[0][:height, :width])
    expected = transforms.Resize(target)(Image.fromarray(photo))
    ours = image_steps(Resize(size=target), Scale(factor=1), shape=(3, expected.height, expected.width))
    np.testing.assert_array_equal(ours.apply(photo).transpose(1, 2, 0), np.asarray(expected))


@pytest.mark.parametrize("height_width", SIZES)
@pytest.mark.parametrize("crop", [(1, 1), (7, 8), (8, 7), (12, 12), (32, 33), (50, 64)])
def test_cropping_and_padding_give_torchvisions_pixels(
    photos: list[np.ndarray], height_width: tuple[int, int], crop: tuple[int, int]
) -> None:
    from torchvision import transforms

    height, width = height_width
    photo = np.ascontiguousarray(photos[1][:height, :width])
    expected = np.asarray(transforms.CenterCrop(crop)(Image.fromarray(photo)))
    ours = image_steps(CenterCrop(size=crop), Scale(factor=1), shape=(3, *crop))
    np.testing.assert_array_equal(ours.apply(photo).transpose(1, 2, 0), expected)


def test_digits_in_grey_become_torchvisions_tensor() -> None:
    from sklearn.datasets import load_digits
    from torchvision import transforms

    theirs = transforms.Compose([transforms.Resize((28, 20)), transforms.ToTensor(), transforms.Normalize(0.13, 0.31)])
    ours = image_steps(Resize(size=(28, 20)), Scale(), Normalize(mean=(0.13,), std=(0.31,)), shape=(1, 28, 20))
    images = [(image * 15).astype(np.uint8) for image in load_digits().images[:20]]
    expected = np.stack([theirs(Image.fromarray(image)).numpy() for image in images])
    np.testing.assert_allclose(ours.batch(images), expected, rtol=1e-6, atol=1e-6)
    encoded = ours.batch([encode(image, "PNG") for image in images])
    np.testing.assert_array_equal(encoded, ours.batch(images))
    np.testing.assert_array_equal(ours.batch([image[:, :, None] for image in images]), encoded)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_8_bit_mode_is_converted_as_pillow_converts_it(photos: list[np.ndarray], mode: str) -> None:
    image = Image.fromarray(photos[0][:50, :60]).convert("L" if mode in ("1", "LA") else "RGB").convert(mode)
    content = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(to_pixels(content), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_and_not_blended(photos: list[np.ndarray]) -> None:
    photo = photos[0][:20, :30]
    clear = np.dstack([photo, np.zeros((20, 30), np.uint8)])
    np.testing.assert_array_equal(to_pixels(encode(clear, "PNG")), photo)


def test_a_palette_with_transparent_colours_keeps_its_colours(photos: list[np.ndarray]) -> None:
    image = Image.fromarray(photos[0][:20, :30]).convert("P")
    content = encode(image, "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(to_pixels(content), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_exif_says(photos: list[np.ndarray], orientation: int) -> None:
    stored = photos[0][:40, :64]
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1), 7: np.rot90(stored, 2).transpose(1, 0, 2), 8: np.rot90(stored),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(to_pixels(encode(stored, "PNG", exif=exif)), upright[orientation])


def test_the_first_frame_of_an_animation_is_taken(photos: list[np.ndarray]) -> None:
    first, second = (Image.fromarray(photo[:32, :32]) for photo in photos)
    content = encode(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    np.testing.assert_array_equal(to_pixels(content), np.asarray(first))
    gif = encode(first.convert("P"), "GIF", save_all=True, append_images=[second.convert("P")])
    np.testing.assert_array_equal(to_pixels(gif), np.asarray(first.convert("P").convert("RGB")))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND", b"")


def test_sixteen_bits_of_grey_are_refused_instead_of_clipped(photos: list[np.ndarray]) -> None:
    deep = photos[0][:8, :9, 0].astype(np.uint16) * 256
    for content in (encode(deep, "PNG"), encode(deep, "TIFF"), encode(deep.astype(np.float32), "TIFF")):
        with pytest.raises(InputError, match="more than 8 bits a channel"):
            to_pixels(content)


def deep_png(colour: int, *, channels: int) -> bytes:
    rows = (b"\0" + np.arange(4 * channels, dtype=">u2").tobytes()) * 4
    return png(4, 4, depth=16, colour=colour, rows=rows)


def deep_tiff() -> bytes:
    """4×4 pixels of three channels of 16 bits, uncompressed."""
    entries = [
        (256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 3, 8 + 2 + 12 * 9 + 4), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 200), (277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 1, 96),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = struct.pack("<2sHI", b"II", 42, 8) + directory + b"\0" * 4 + struct.pack("<3H", 16, 16, 16)
    return head.ljust(200, b"\0") + np.arange(48, dtype="<u2").tobytes()


DEEP = {
    "48-bit PNG": deep_png(2, channels=3),
    "64-bit PNG with alpha": deep_png(6, channels=4),
    "32-bit grey PNG with alpha": deep_png(4, channels=2),
    "16-bit grey PNG": deep_png(0, channels=1),
    "48-bit TIFF": deep_tiff(),
    "48-bit PPM": b"P6 4 4 65535\n" + np.arange(48, dtype=">u2").tobytes(),
    "16-bit PGM": b"P5 4 4 65535\n" + np.arange(16, dtype=">u2").tobytes(),
    "plain 48-bit PPM": b"P3 1 1 65535\n1 2 3\n",
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", DEEP)
def test_files_of_more_than_8_bits_a_channel_are_refused(name: str, mode: str) -> None:
    with Image.open(io.BytesIO(DEEP[name])) as image:
        image.load()  # it is a whole file that Pillow reads
    with pytest.raises(InputError, match="more than 8 bits a channel"):
        open_image(DEEP[name], mode=mode)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "BMP", "GIF", "WEBP", "JPEG"])
@pytest.mark.parametrize("made", ["RGB", "L", "1", "P"])
def test_files_of_up_to_8_bits_are_read(form: str, made: str) -> None:
    buffer = io.BytesIO()
    mode = "RGB" if (form, made) in {("PPM", "P"), ("JPEG", "P"), ("JPEG", "1")} else made
    Image.new("RGB", (300, 2), (200, 30, 60)).convert(mode).save(buffer, form)
    assert open_image(buffer.getvalue(), mode="RGB").size == (300, 2)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.1])
def test_a_truncated_file_is_refused(photos: list[np.ndarray], form: str, kept: float) -> None:
    content = encode(Image.fromarray(photos[0]).convert("P") if form == "GIF" else photos[0], form)
    with pytest.raises(InputError) as caught:
        to_pixels(content[: int(len(content) * kept)])
    assert caught.value.field == "input"


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(InputError, match="not an image in a known format"):
        to_pixels(content)


@pytest.mark.parametrize("side", [8_001, 10_000, 14_000, 60_000])
def test_a_pixel_bomb_is_refused_by_its_header(side: int) -> None:
    # A few bytes that claim up to 3.6 gigapixels; nothing but the header is there to be decoded.
    with pytest.raises(InputError, match=f"pixels, at most {MAX_PIXELS} allowed"):
        to_pixels(png(side, side, depth=8, colour=2, rows=b""))


def test_the_limit_holds_for_pixels_and_can_be_lowered(photos: list[np.ndarray]) -> None:
    for raw in (photos[0], encode(photos[0], "PNG")):
        with pytest.raises(InputError, match="640×427 pixels, at most 1000 allowed"):
            open_image(raw, mode="RGB", max_pixels=1000)


def test_a_thin_image_that_resizing_would_blow_up_is_refused() -> None:
    line = np.zeros((1, 20_000, 3), np.uint8)
    with pytest.raises(InputError, match=r"resized to 4480000×224, at most"):
        image_steps(Resize(size=224), CenterCrop(size=(224, 224)), Scale(), shape=(3, 224, 224)).apply(line)


@pytest.mark.parametrize(
    "raw",
    [
        np.zeros((4, 4), np.float32), np.full((4, 4), 256), np.full((4, 4), -1), np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4), np.uint8), np.zeros(4, np.uint8), np.zeros((2, 4, 4, 3), np.uint8), [[1, 2], [3]], "text",
        None, [["a"]], [[2**70]], {},
    ],
)  # fmt: skip
def test_pixels_that_are_none_are_refused(raw: object) -> None:
    with pytest.raises(InputError) as caught:
        open_image(raw, mode="RGB")
    assert caught.value.field == "input"


def test_whole_numbers_in_lists_are_pixels() -> None:
    np.testing.assert_array_equal(to_pixels([[0, 255], [7, 8]], "L"), [[0, 255], [7, 8]])


NUMBERS = Preprocess(
    input="numbers", shape=(3,), steps=(Scale(factor=2), Normalize(mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0)))
)


def test_numbers_are_scaled_and_normalized_by_feature() -> None:
    result = NUMBERS.apply([1, 2, 3])
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.float32([1, 1, 0.75]))
    np.testing.assert_array_equal(NUMBERS.batch([[1, 2, 3], [1, 2, 3]]), np.stack([result, result]))


@pytest.mark.parametrize(
    "raw",
    [
        [1, 2], [1], 1, [[1, 2, 3]], [1, 2, math.nan], [1, 2, math.inf], [1, 2, 1e300], [1, 2, None], ["1", "2", "3"],
        "123", b"123", [1, [2], 3], [1, 2, 3j], [1, 2, 10**400], {"a": 1},
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(raw: object) -> None:
    with pytest.raises(InputError) as caught:
        NUMBERS.apply(raw)
    assert caught.value.field == "input"


def test_an_image_of_another_size_is_refused_where_nothing_resizes_it() -> None:
    with pytest.raises(InputError, match=r"shape \[1, 4, 5\], expected \[1, 4, 4\]"):
        image_steps(Scale(), shape=(1, 4, 4)).apply(np.zeros((4, 5), np.uint8))


DECODE, SCALE, RESIZE = {"kind": "decode"}, {"kind": "scale"}, {"kind": "resize", "size": 4}


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "begin with one decode"),
        ([SCALE, DECODE], "begin with one decode"),
        ([DECODE], "hold one scale"),
        ([DECODE, SCALE, RESIZE], "hold one scale"),
        ([DECODE, {"kind": "resize", "size": 0}, SCALE], "greater than 0"),
        ([DECODE, {"kind": "center_crop", "size": [4, -4]}, SCALE], "greater than 0"),
        ([DECODE, SCALE, {"kind": "normalize", "mean": [0, 0], "std": [1, 1]}], "2 means and stds for 3 channels"),
        ([DECODE, SCALE, {"kind": "normalize", "mean": [0, 0, 0], "std": [1, 1]}], "3 means but 2 stds"),
        ([DECODE, SCALE, {"kind": "normalize", "mean": [0], "std": [0]}], "greater than 0"),
        ([{"kind": "decode", "mode": "L"}, SCALE], r"gives \[1, height, width\]"),
        ([DECODE, SCALE, {"kind": "exec"}], "exec"),
    ],
)
def test_steps_that_make_no_sense_are_refused(steps: list[dict[str, object]], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Preprocess.model_validate({"input": "image", "shape": [3, 4, 4], "steps": steps})


def test_preprocessing_survives_json() -> None:
    original = image_steps(
        Resize(size=(5, 6)), CenterCrop(size=(4, 4)), Scale(), Normalize(mean=MEAN, std=STD), shape=(3, 4, 4)
    )
    assert Preprocess.model_validate_json(original.model_dump_json()) == original
