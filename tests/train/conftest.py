from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

Writer = Callable[..., Path]


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs and downloads go to the working folder: each test gets its own."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def write_digits(tmp_path: Path) -> Writer:
    """`write("train", "3", count=5, start=0)` saves real digits as PNG files in <root>/<parts>/ and returns root."""
    digits = load_digits()
    root = tmp_path / "images"

    def write(*parts: str, count: int, start: int = 0, digit: int | None = None, suffix: str = "png") -> Path:
        wanted = int(parts[-1]) if digit is None else digit
        images = digits.images[digits.target == wanted][start : start + count]
        folder = root.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images, start=start):
            pixels = np.round(image * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:04d}.{suffix}")
        return root

    return write
