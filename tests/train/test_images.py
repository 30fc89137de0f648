from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dlops.errors import CorruptError, UsageError
from dlops.preprocess import CenterCrop, Resize
from dlops.train.data.folder import load_folder
from dlops.train.data.source import open_data
from dlops.train.images import Images, choose_geometry, normalized, prepare


def prepared(root: Path | str, **settings: object) -> Images:
    settings = {"image_size": None, "channels": None, "skip_corrupt": False} | settings
    data = open_data("digits", split_seed=0) if root == "digits" else load_folder(Path(root), split_seed=0)
    return prepare(data, **settings)


def photo(path: Path, size: tuple[int, int], seed: int, *, exif_turn: bool = False) -> None:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if exif_turn:
        exif[0x0112] = 6
    image.save(path, exif=exif)


def test_training_sees_exactly_the_tensors_that_the_recorded_preprocessing_makes(tmp_path: Path) -> None:
    for number in range(12):
        photo(tmp_path / "ab"[number % 2] / f"{number}.jpg", (40 + number, 30 + 2 * number), number)
    for images in (prepared("digits"), prepared(tmp_path), prepared(tmp_path, image_size=20, channels=1)):
        for name in ("train", "validation", "test"):
            pixels, split = getattr(images, name), getattr(images.data, name)
            mine = normalized(pixels.pixels, images.preprocess).numpy()
            np.testing.assert_array_equal(mine, images.preprocess.batch(split.raw))
            assert pixels.targets.tolist() == split.targets.tolist()


def test_size_and_channels_are_those_of_the_images(write_digits, tmp_path: Path) -> None:
    assert prepared("digits").shape == (1, 8, 8)
    root = write_digits("0", count=5)
    write_digits("1", count=5)
    assert prepared(root).shape == (1, 8, 8)
    assert prepared(root, channels=3, image_size=16).shape == (3, 16, 16)
    photo(root / "1" / "colour.png", (8, 8), 0)
    assert prepared(root).shape == (3, 8, 8)


def test_images_of_many_sizes_are_resized_and_cropped_to_at_most_128() -> None:
    few: Counter[tuple[int, int]] = Counter({(100, 60): 3, (50, 90): 1})
    assert choose_geometry(few, image_size=None) == ((60, 60), (Resize(size=60), CenterCrop(size=(60, 60))))
    many: Counter[tuple[int, int]] = Counter({(500, 400): 3, (600, 300): 2})
    assert choose_geometry(many, image_size=None)[0] == (128, 128)
    assert choose_geometry(many, image_size=224)[0] == (224, 224)
    assert choose_geometry(Counter({(32, 48): 9}), image_size=None) == ((32, 48), (Resize(size=(32, 48)),))
    assert choose_geometry(Counter({(4, 4): 9}), image_size=None)[0] == (8, 8)
    assert choose_geometry(Counter({(500, 500): 9}), image_size=None) == ((128, 128), (Resize(size=(128, 128)),))


def test_a_photo_turned_by_its_exif_tag_counts_with_the_size_that_it_is_shown_in(tmp_path: Path) -> None:
    for number in range(10):
        photo(tmp_path / "ab"[number % 2] / f"{number}.jpg", (48, 32), number, exif_turn=True)
    assert prepared(tmp_path).shape == (3, 48, 32)


@pytest.fixture
def damaged(write_digits, tmp_path: Path) -> Path:
    """Digits with one text file and one truncated image among them, in different splits' folders."""
    for digit in ("0", "1"):
        write_digits("train", digit, count=10)
        root = write_digits("test", digit, count=4, start=20)
    (root / "train" / "0" / "text.png").write_text("hello")
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    (root / "test" / "1" / "cut.png").write_bytes(buffer.getvalue()[:3000])
    return root


def test_corrupt_images_are_refused_all_by_name(damaged: Path) -> None:
    with pytest.raises(CorruptError, match=r"2 of 30 images cannot be read or decoded") as caught:
        prepared(damaged)
    assert "train/0/text.png (not an image" in caught.value.message
    assert "test/1/cut.png (damaged image" in caught.value.message
    assert "skip_corrupt=true" in str(caught.value.hint)


def test_corrupt_images_are_left_out_and_counted_where_that_is_asked_for(damaged: Path) -> None:
    images = prepared(damaged, skip_corrupt=True)
    assert len(images.data.skipped) == 2
    assert len(images.train) + len(images.validation) == 20
    assert len(images.test) == len(images.data.test) == 8


def test_a_damaged_image_that_is_left_out_does_not_shape_the_others(tmp_path: Path, capsys) -> None:
    def write(root: Path, count: int = 12) -> Path:
        for number in range(count):
            path = root / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = np.random.default_rng(number).integers(0, 256, (20, 30), dtype=np.uint8)
            Image.fromarray(grey).save(path)
        return root

    whole, spoilt = write(tmp_path / "whole"), write(tmp_path / "spoilt")
    # Large and in colour by its header, and cut off behind it.
    photo(spoilt / "a" / "cut.jpg", (200, 300), 99)
    (spoilt / "a" / "cut.jpg").write_bytes((spoilt / "a" / "cut.jpg").read_bytes()[:2000])
    (spoilt / "b" / "text.png").write_text("hello")
    images = prepared(spoilt, skip_corrupt=True)
    assert images.shape == prepared(whole).shape == (1, 20, 30)
    # All but the last step, whose mean is that of the images that fell into train.
    assert images.preprocess.steps[:-1] == prepared(whole).preprocess.steps[:-1]
    said = capsys.readouterr().err
    assert "left out 2 of 14 images" in " ".join(said.split())
    assert "cropped" not in said


def test_what_cannot_be_read_counts_as_corrupt(damaged: Path) -> None:
    (damaged / "train" / "0" / "broken.png").symlink_to("/nowhere")
    os.mkfifo(damaged / "test" / "1" / "pipe.png")
    with pytest.raises(CorruptError, match=r"4 of 32 images cannot be read or decoded") as caught:
        prepared(damaged)
    for said in ("train/0/broken.png (a link to nowhere)", "test/1/pipe.png (neither a file", "train/0/text.png (not"):
        assert said in caught.value.message
    images = prepared(damaged, skip_corrupt=True)
    assert len(images.data.skipped) == 4
    assert len(images.train) + len(images.validation) + len(images.test) == 28


def test_unreadable_files_alone_are_refused_too(write_digits) -> None:
    for digit in ("0", "1"):
        root = write_digits(digit, count=10)
    (root / "1" / "loop.png").symlink_to("loop.png")
    with pytest.raises(CorruptError, match=r"1 of 21 images .*1/loop\.png \(too many levels of symbolic links"):
        prepared(root)
    assert prepared(root, skip_corrupt=True).data.skipped == ("1/loop.png (too many levels of symbolic links)",)


def test_a_class_with_no_readable_image_is_refused_even_then(write_digits) -> None:
    for digit in ("0", "1"):
        write_digits("test", digit, count=4, start=20)
        root = write_digits("train", digit, count=10)
    for path in (root / "train" / "1").iterdir():
        # Different from one another, or all but one would be dropped as duplicates.
        path.write_text(path.name)
    with pytest.raises(UsageError, match="no readable image of '1' is left in train"):
        prepared(root, skip_corrupt=True)


def test_a_channel_that_never_varies_is_not_divided_by_zero(tmp_path: Path) -> None:
    for number in range(10):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[..., 0] = number * 20
        Image.fromarray(pixels).save(path)
    images = prepared(tmp_path)
    assert torch.isfinite(normalized(images.train.pixels, images.preprocess)).all()
