"""JPEGs decoded by nvJPEG: within rounding of Pillow, and a service that answers with it as with Pillow."""

from __future__ import annotations

import io

import httpx
import numpy as np
import pytest
from PIL import Image

from dlops.artifact import Artifact
from dlops.preprocess import open_image
from dlops.serve.jpeg import JpegDecoder
from dlops.serve.launch import ServerProcess

from .test_serving import artifact

__all__ = ["artifact"]

pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed: pip install 'dlops[nvjpeg]'")


def test_its_pixels_pass_the_check_that_a_server_makes() -> None:
    JpegDecoder(0).check(())


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_photo_is_turned_as_pillow_turns_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((640, 427)).convert("RGB").save(buffer, "JPEG", exif=exif)
    found = JpegDecoder(0).pixels(buffer.getvalue())
    expected = np.asarray(open_image(buffer.getvalue(), mode="RGB"), int)
    assert found is not None
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 1


def test_the_service_answers_as_with_pillow(artifact: Artifact, digit_pngs: list[bytes]) -> None:
    jpegs = []
    for png in digit_pngs[:8]:
        buffer = io.BytesIO()
        open_image(png, mode="RGB").save(buffer, "JPEG", quality=95)
        jpegs.append(buffer.getvalue())
    found = {}
    for decoder in ("pillow", "nvjpeg"):
        with ServerProcess(artifact, device="cuda", env={"DLOPS_JPEG_DECODER": decoder}) as server:
            answers = [
                httpx.post(f"{server.url}/predict", content=one, headers={"Content-Type": "image/jpeg"})
                for one in jpegs
            ]
        found[decoder] = [answer.json()["predictions"][0]["top"][0]["label"] for answer in answers]
    assert found["nvjpeg"] == found["pillow"]
