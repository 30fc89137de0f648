"""JPEGs through nvImageCodec, with its decoder for the CPU: Pillow's pixels, and Pillow for what it does not take."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dlops.environment import available_cores
from dlops.errors import GateError, InputError, MachineError, UsageError
from dlops.preprocess import open_image
from dlops.serve import jpeg
from dlops.serve.decoding import Decoder
from dlops.serve.jpeg import JpegDecoder, jpeg_decoder
from dlops.serve.predict import to_feed
from dlops.serve.settings import Settings

pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec has no wheel for this system")


@pytest.fixture(scope="module")
def decoder() -> JpegDecoder:
    return JpegDecoder(None)


def encoded(picture: Image.Image, **how: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **how)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


HOW: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "all colours": {"subsampling": 0},
    "half the colours": {"subsampling": 1},
    "poor": {"quality": 20},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    **{f"orientation {number}": {"exif": turned(number)} for number in range(1, 9)},
}


@pytest.mark.parametrize("how", HOW.values(), ids=list(HOW))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_pixels_are_pillows(mode: str, how: dict[str, Any], decoder: JpegDecoder) -> None:
    content = encoded(jpeg._made().convert(mode), **how)
    found = decoder.pixels(content)
    assert found is not None
    for wanted in ("RGB", "L"):
        ours, theirs = (np.asarray(open_image(raw, mode=wanted)) for raw in (found, content))
        np.testing.assert_array_equal(ours, theirs)


def test_an_orientation_that_stands_in_xmp_is_kept(decoder: JpegDecoder) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    content = encoded(jpeg._made(), xmp=xmp)
    found = decoder.pixels(content)
    assert found is not None
    np.testing.assert_array_equal(found, np.asarray(open_image(content, mode="RGB")))
    assert found.shape == (333, 211, 3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        encoded(jpeg._made())[:200],
        encoded(jpeg._made())[:5000],
        encoded(jpeg._made().convert("CMYK")),
        encoded(jpeg._made(), keep_rgb=True),
    ],
    ids=["empty", "no picture", "header", "cut short", "CMYK", "kept as RGB"],
)
def test_the_rest_is_for_pillow(content: bytes, decoder: JpegDecoder) -> None:
    assert decoder.pixels(content) is None


def test_a_clients_damaged_file_is_nothing_for_the_log(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(encoded(jpeg._made())[:5000])
    code = (
        "import sys; from pathlib import Path; from dlops.serve.jpeg import JpegDecoder\n"
        "decoder = JpegDecoder(None); sys.stderr.write('opened')\n"
        "assert decoder.pixels(Path(sys.argv[1]).read_bytes()) is None"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cut.jpg")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr.partition("opened")[2]
    assert "[" not in said


def test_another_format_is_for_pillow(digit_pngs: list[bytes], decoder: JpegDecoder) -> None:
    assert decoder.pixels(digit_pngs[0]) is None


def test_every_thread_may_decode(decoder: JpegDecoder) -> None:
    content, wrong = encoded(jpeg._made()), []
    expected = np.asarray(open_image(content, mode="RGB"))

    def work() -> None:
        for _ in range(50):
            found = decoder.pixels(content)
            if found is None or not np.array_equal(found, expected):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert wrong == []


def test_a_request_gets_the_tensor_that_pillow_would_give(digits_artifact, decoder, digit_pngs) -> None:
    pictures = [encoded(open_image(png, mode="RGB"), quality=95) for png in digit_pngs[:3]]
    ours = to_feed(digits_artifact, [*pictures, digit_pngs[0]], jpeg=decoder)
    theirs = to_feed(digits_artifact, [*pictures, digit_pngs[0]])
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    with pytest.raises(InputError, match=r"inputs\[1\]: damaged image"):
        to_feed(digits_artifact, [pictures[0], pictures[1][: len(pictures[1]) // 2]], jpeg=decoder)


def test_it_is_checked_against_pillow_on_the_artifacts_pictures(digits_artifact, decoder) -> None:
    decoder.check(digits_artifact.samples().raw)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda pixels: pixels[..., ::-1], "levels of 255 apart on average"),
        (lambda pixels: np.roll(pixels, 1, axis=1), "levels of 255 apart on average"),
        (lambda pixels: pixels // 2 * 2 + 4, "levels of 255 apart on average"),
        (lambda pixels: pixels.transpose(1, 0, 2), r"comes as \[333, 211, 3\] for \[211, 333, 3\]"),
        (lambda pixels: None, "cannot be decoded"),
    ],
    ids=["colours swapped", "shifted", "brighter", "turned", "nothing"],
)
def test_what_gives_other_pixels_is_not_used(wrong, said, monkeypatch) -> None:
    decoder = JpegDecoder(None)
    real = decoder._decoded
    monkeypatch.setattr(decoder, "_decoded", lambda content: wrong(real(content)))
    with pytest.raises(GateError, match=said):
        decoder.check(())


def test_rounding_is_let_pass(monkeypatch) -> None:
    decoder, draw = JpegDecoder(None), np.random.default_rng(0)
    real = decoder._decoded

    def rounded(content: bytes) -> Any:
        pixels = real(content)
        assert pixels is not None
        return pixels ^ draw.integers(0, 1, pixels.shape, np.uint8, endpoint=True)

    monkeypatch.setattr(decoder, "_decoded", rounded)
    decoder.check(())


def test_what_only_pillow_decodes_is_said_once(monkeypatch, capsys) -> None:
    decoder, content = JpegDecoder(None), encoded(jpeg._made())
    monkeypatch.setattr(decoder, "_decoded", lambda content: None)
    assert decoder.pixels(content[:5000]) is None
    assert capsys.readouterr().err == ""
    assert [decoder.pixels(content) for _ in range(2)] == [None, None]
    assert capsys.readouterr().err.count("nvJPEG does not decode a JPEG that Pillow does") == 1


def test_without_a_gpu_the_server_does_not_start(digits_artifact) -> None:
    with pytest.raises(UsageError, match=r"DLOPS_JPEG_DECODER=nvjpeg needs a GPU, and .* runs on cpu"):
        jpeg_decoder(digits_artifact, device="cpu")


def test_a_gpu_that_is_not_there_is_one_line() -> None:
    # Far more than any machine has.
    with pytest.raises(MachineError, match="nvJPEG cannot be opened on GPU 4096"):
        JpegDecoder(4096)


def test_a_package_that_is_missing_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(MachineError, match="nvidia-nvimgcodec cannot be loaded") as caught:
        JpegDecoder(None)
    assert caught.value.hint == "pip install 'dlops[nvjpeg]'"


def test_a_model_without_pictures_needs_none() -> None:
    numbers: Any = SimpleNamespace(preprocess=None, title="numbers")
    assert jpeg_decoder(numbers, device="cpu") is None


def test_the_setting_is_one_of_two() -> None:
    assert Settings.from_environment({"DLOPS_JPEG_DECODER": "nvjpeg"}).jpeg_decoder == "nvjpeg"
    with pytest.raises(UsageError, match="jpeg_decoder: input should be"):
        Settings.from_environment({"DLOPS_JPEG_DECODER": "turbo"})


def test_whatever_the_library_raises_pillow_answers_and_it_is_said(monkeypatch, capsys) -> None:
    decoder, content = JpegDecoder(None), encoded(jpeg._made())

    def fail() -> Any:
        raise MachineError("no memory is left on the GPU")

    monkeypatch.setattr(decoder, "_own", fail)
    assert [decoder.pixels(content) for _ in range(2)] == [None, None]
    assert capsys.readouterr().err.count("no memory is left on the GPU") == 1


def test_a_decoder_that_fills_up_what_is_missing_is_not_asked(monkeypatch) -> None:
    decoder, content = JpegDecoder(None), encoded(jpeg._made())
    whole = decoder.pixels(content)
    monkeypatch.setattr(decoder, "_decoded", lambda content: whole)
    assert decoder.pixels(content) is not None
    assert decoder.pixels(content[:-2000]) is None


def test_every_decoding_thread_has_opened_its_decoder_before_the_first_request(digits_artifact, monkeypatch) -> None:
    opened = set()
    monkeypatch.setattr(JpegDecoder, "open_here", lambda self: opened.add(threading.get_ident()))
    decoder = Decoder(digits_artifact, max_pixels=1_000_000, jpeg=JpegDecoder(None))
    try:
        # One is this thread's, when the decoder was made.
        assert len(opened - {threading.get_ident()}) == available_cores()
    finally:
        decoder.close()
