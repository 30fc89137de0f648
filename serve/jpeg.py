"""JPEGs decoded on the GPU by nvJPEG, through NVIDIA's nvImageCodec; what it does not take is left to Pillow.

nvJPEG rounds otherwise than the libjpeg of Pillow, with which models are trained, proved and checked: so a decoder is
compared with Pillow before it is used.
"""

from __future__ import annotations

import importlib
import io
import os
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dlops.artifact import Artifact
from dlops.console import say
from dlops.errors import GateError, InputError, MachineError, UsageError
from dlops.jpeg_scans import MOST as MOST_SCANS
from dlops.jpeg_scans import count_scans
from dlops.preprocess import MAX_PIXELS, Raw, open_image

Pixels = NDArray[np.uint8]
# Of 255. Two exact decoders differ by one or two in places, and a little more along edges between colours, which each
# smooths in its own way; one that turns, swaps or shifts anything is far beyond.
_MEAN_LEVELS, _MOST_LEVELS, _SHARE_WITHIN = 1.0, 8, 0.99
_CHECKED_SAMPLES = 8
# Colours at full and at quarter resolution, and in several passes.
_KINDS: tuple[dict[str, Any], ...] = ({"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True})


class JpegDecoder:
    """nvImageCodec on one GPU, or on the CPU, where it has libjpeg-turbo. Any thread may call it.

    gpu: its number in this process; None for the CPU. Raises MachineError where the package or the GPU is missing.
    """

    def __init__(self, gpu: int | None) -> None:
        # What it writes to stderr of each file that it cannot read is the client's affair and not the log's.
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
        try:
            self._codec: Any = importlib.import_module("nvidia.nvimgcodec")
        except ImportError as error:
            raise MachineError(
                f"nvJPEG: the package nvidia-nvimgcodec cannot be loaded ({error})", hint="pip install 'dlops[nvjpeg]'"
            ) from None
        self._gpu = gpu
        # Pillow turns the picture, which knows more places where its orientation may stand.
        self._parameters = self._codec.DecodeParams(apply_exif_orientation=False)
        # A decoder is one thread's.
        self._threads = threading.local()
        self._has_said = False
        self.open_here()

    def pixels(self, content: bytes) -> Pixels | None:
        """(height, width, 3), turned as its EXIF tag says; None for what Pillow is to decode or to refuse."""
        try:
            with Image.open(io.BytesIO(content), formats=("JPEG",)) as header:
                if header.mode not in ("RGB", "L") or header.width * header.height > MAX_PIXELS or _holds_rgb(header):
                    return None
                size = header.size
                about: dict[str | tuple[int, int], Any] = {
                    key: value for key, value in header.info.items() if key in ("exif", "xmp")
                }
        except Exception:  # noqa: BLE001 - Pillow's readers raise OSError, SyntaxError, struct.error and others
            return None
        scans = count_scans(content)
        if scans.scans > MOST_SCANS or not scans.ended:
            # A decoder may fill up what is missing, where Pillow refuses.
            return None
        found = self._decoded(content)
        if found is None or found.shape != (size[1], size[0], 3):
            self._tell_once(content)
            return None
        if not about:
            return found
        picture = Image.fromarray(found)
        picture.info |= about
        return np.asarray(ImageOps.exif_transpose(picture))

    def open_here(self) -> None:
        """Open this thread's decoder, which takes time and memory of the GPU. Raises MachineError."""
        self._own()

    def check(self, raws: Iterable[Raw]) -> None:
        """Compare it with Pillow on the first of these pictures as JPEGs, and on one that is made here.

        Raises GateError where they differ by more than rounding.
        """
        pictures = [_made()]
        for raw, _ in zip(raws, range(_CHECKED_SAMPLES), strict=False):
            pictures.append(open_image(raw, mode="RGB"))
        for picture in pictures:
            for kind in _KINDS:
                for mode in ("RGB", "L"):
                    buffer = io.BytesIO()
                    picture.convert(mode).save(buffer, "JPEG", quality=90, **kind)
                    with Image.open(buffer) as opened:
                        expected = np.asarray(opened.convert("RGB"), np.int16)
                    _compare(self._decoded(buffer.getvalue()), expected, {"mode": mode, **kind})

    def _decoded(self, content: bytes) -> Pixels | None:
        try:
            image = self._own().decode(content, params=self._parameters)
            return None if image is None else np.asarray(image.cpu())
        except Exception as error:  # noqa: BLE001 - whatever the GPU or its library raises: Pillow answers, and it is said
            self._tell(f"nvJPEG failed ({type(error).__name__}: {error})")
            return None

    def _own(self) -> Any:
        """This thread's decoder."""
        found = getattr(self._threads, "decoder", None)
        if found is None:
            found = self._threads.decoder = self._opened()
        return found

    def _opened(self) -> Any:
        codec = self._codec
        kinds = [codec.HW_GPU_ONLY, codec.GPU_ONLY, codec.HYBRID_CPU_GPU] if self._gpu is not None else [codec.CPU_ONLY]
        place = codec.NVIMGCODEC_DEVICE_CPU_ONLY if self._gpu is None else self._gpu
        try:
            return codec.Decoder(
                device_id=place, max_num_cpu_threads=1, backends=[codec.Backend(kind) for kind in kinds],
                # As libjpeg does where colours have fewer pixels than brightness.
                options=":fancy_upsampling=1",
            )  # fmt: skip
        except RuntimeError as error:
            raise MachineError(
                f"nvJPEG cannot be opened on GPU {self._gpu} ({error})",
                hint="DLOPS_JPEG_DECODER=pillow decodes on the CPU",
            ) from None

    def _tell_once(self, content: bytes) -> None:
        """A file that is damaged is refused and no news; one that Pillow takes is."""
        if self._has_said:
            return
        try:
            open_image(content, mode="RGB")
        except InputError:
            return
        self._tell("nvJPEG does not decode a JPEG that Pillow does")

    def _tell(self, what: str) -> None:
        if not self._has_said:
            self._has_said = True
            say(f"{what}; Pillow answers in its place (this is said once)")


def jpeg_decoder(artifact: Artifact, *, device: str) -> JpegDecoder | None:
    """What decodes the artifact's JPEGs on the GPU that its model runs on; None where it takes no pictures.

    device: as Placement has it. Raises UsageError where that is no GPU, MachineError and GateError as JpegDecoder does.
    """
    if artifact.preprocess is None or artifact.preprocess.input != "image":
        return None
    kind, _, number = device.partition(":")
    if kind != "cuda":
        raise UsageError(
            f"DLOPS_JPEG_DECODER=nvjpeg needs a GPU, and {artifact.title} runs on {device}",
            hint="DLOPS_JPEG_DECODER=pillow, or --device cuda",
        )
    decoder = JpegDecoder(int(number or 0))
    samples = artifact.samples()
    decoder.check(samples.raw or ())
    return decoder


def _holds_rgb(header: Image.Image) -> bool:
    """Whether its colours are kept as they are, and not as brightness and two differences: decoders guess otherwise."""
    ids = [layer[0] for layer in getattr(header, "layer", ())]
    return header.info.get("adobe_transform") == 0 or ids == list(b"RGB")


def _compare(found: Pixels | None, expected: NDArray[np.int16], kind: dict[str, Any]) -> None:
    how = ", ".join(f"{name}={value}" for name, value in kind.items())
    if found is None or found.shape != expected.shape:
        what = "cannot be decoded" if found is None else f"comes as {list(found.shape)} for {list(expected.shape)}"
        raise GateError(f"nvJPEG: a JPEG ({how}) {what}", hint="DLOPS_JPEG_DECODER=pillow decodes on the CPU")
    apart = np.abs(found.astype(np.int16) - expected)
    mean, within = float(apart.mean()), float((apart <= _MOST_LEVELS).mean())
    if mean > _MEAN_LEVELS or within < _SHARE_WITHIN:
        raise GateError(
            f"nvJPEG's pixels of a JPEG ({how}) are not Pillow's: {mean:.2f} levels of 255 apart on average (at most "
            f"{_MEAN_LEVELS:g}), {within:.1%} within {_MOST_LEVELS} (at least {_SHARE_WITHIN:.0%})",
            hint="DLOPS_JPEG_DECODER=pillow decodes on the CPU",
        )


def _made() -> Image.Image:
    """Slopes in each colour, edges and a little noise, of sizes that no block divides."""
    height, width = 211, 333
    rows, columns = np.mgrid[0:height, 0:width]
    slopes = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) * 255 / (height + width)], axis=-1)
    slopes[60:120, 80:200] = (200, 40, 90)
    noise = np.random.default_rng(0).normal(0, 4, slopes.shape)
    return Image.fromarray(np.clip(slopes + noise, 0, 255).astype(np.uint8))
