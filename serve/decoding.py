"""Raw inputs to tensors in threads of their own, within bounds.

A picture of a few kilobytes can hold 64 million pixels. So pixels are counted from the headers, before anything is
decoded: those of one request, and those of all that wait. And work that nobody wants any more ends at the next picture.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from dlops.artifact import Artifact
from dlops.environment import available_cores
from dlops.errors import InputError
from dlops.preprocess import IMAGE_FORMATS, Preprocess, Resize
from dlops.serve.jpeg import JpegDecoder
from dlops.serve.outcome import DeadlineError, OverloadedError
from dlops.serve.predict import to_feed
from dlops.signature import Feed

T = TypeVar("T")
# Of the pixels that one request may have: a few seconds of decoding at most lie between a request and its turn.
_PENDING_REQUESTS = 4
# What opening any picture costs, however small, in pixels that could be decoded meanwhile.
_PIXELS_A_PICTURE = 4096
# Headers of so little are read on the event loop: a thread would cost more.
_INLINE_BYTES = 16 * 1024
_INLINE_PICTURES = 4
_START_S = 60.0


class _UnwantedError(Exception):
    """The request was given up; nobody sees this."""


class Decoder:
    """One artifact's preprocessing. max_pixels: of all pictures of one request together. jpeg: decodes JPEGs; Pillow
    where there is none."""

    def __init__(self, artifact: Artifact, *, max_pixels: int, jpeg: JpegDecoder | None = None) -> None:
        self._artifact = artifact
        self._jpeg = jpeg
        self._max_pixels = max_pixels
        self._pending_pixels = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=available_cores(), thread_name_prefix="dlops-decode")
        if jpeg is not None:
            # Before the first request, all at once so that each takes a thread of its own.
            together = threading.Barrier(available_cores())
            for opened in [self._threads.submit(_open, jpeg, together) for _ in range(available_cores())]:
                opened.result()

    async def offload(self, call: Callable[[], T]) -> T:
        """The result of a call that takes too long for the event loop, made in one of the decoding threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def decode(self, raws: list[Any], *, deadline_ns: int | None = None) -> Feed:
        """The model's input. Cancelling it ends the work at the next picture; `raws` is then emptied.

        deadline_ns: on time.perf_counter_ns's clock. Raises InputError for what does not fit or has too many pixels,
        OverloadedError where too many wait, and DeadlineError.
        """
        pixels = await self._counted(raws)
        self._hold(pixels)
        unwanted = threading.Event()

        def check() -> None:
            if unwanted.is_set():
                raise _UnwantedError
            if deadline_ns is not None and time.perf_counter_ns() > deadline_ns:
                raise _late()

        def release(job: Future[Feed]) -> None:
            with self._lock:
                self._pending_pixels -= pixels

        job = self._threads.submit(to_feed, self._artifact, raws, check=check, jpeg=self._jpeg)
        job.add_done_callback(release)
        left_s = None if deadline_ns is None else (deadline_ns - time.perf_counter_ns()) / 1e9
        try:
            # Whoever is late hears of it then, and not when a thread comes by.
            async with asyncio.timeout(left_s):
                return await asyncio.wrap_future(job)
        except TimeoutError:
            raise _late() from None
        finally:
            unwanted.set()
            # A thread has yet to come by what was given up before it began; the bytes are not counted any more.
            if job.cancelled():
                raws.clear()

    def close(self) -> None:
        self._threads.shutdown()

    async def _counted(self, raws: list[Any]) -> int:
        preprocess = self._artifact.preprocess
        if preprocess is None or preprocess.input != "image":
            return 0
        size = sum(len(raw) for raw in raws if isinstance(raw, bytes))
        if size <= _INLINE_BYTES and len(raws) <= _INLINE_PICTURES:
            return count_pixels(preprocess, raws, limit=self._max_pixels)
        # Not in the decoding threads: there it would wait behind what it is to keep out.
        return await asyncio.to_thread(count_pixels, preprocess, raws, limit=self._max_pixels)

    def _hold(self, pixels: int) -> None:
        with self._lock:
            # One request is always taken: its own limit is what bounds it.
            if self._pending_pixels and self._pending_pixels + pixels > _PENDING_REQUESTS * self._max_pixels:
                raise OverloadedError("too many pictures wait to be decoded", hint="try again")
            self._pending_pixels += pixels


def _open(jpeg: JpegDecoder, together: threading.Barrier) -> None:
    together.wait(_START_S)
    jpeg.open_here()


def _late() -> DeadlineError:
    return DeadlineError("the deadline passed while the request was decoded")


def count_pixels(preprocess: Preprocess, raws: list[Any], *, limit: int) -> int:
    """What decoding will take, in pixels, from the headers alone; each picture counts for some thousands at least.

    Raises InputError, naming the picture at which it happens, where all together have more than `limit`.
    """
    total, cost = 0, 0
    for index, raw in enumerate(raws):
        pixels = _pixels(preprocess, *_size(raw))
        total += pixels
        cost += max(pixels, _PIXELS_A_PICTURE)
        if total > limit:
            raise InputError(
                f"inputs[{index}]: {total} pixels up to here, at most {limit} allowed in one request",
                field=f"inputs[{index}]",
            )
    return cost


def _pixels(preprocess: Preprocess, width: int, height: int) -> int:
    """The most that the picture has on its way: a line of pixels is small until its shorter side is resized."""
    most = width * height
    first = next((step for step in preprocess.steps if isinstance(step, Resize)), None)
    if first is not None and isinstance(first.size, int) and most:
        most = max(most, first.size * int(first.size * max(width, height) / min(width, height)))
    return most


def _size(raw: Any) -> tuple[int, int]:
    """Width and height; zeros for what is no picture, which decoding refuses with its reason."""
    if isinstance(raw, bytes):
        try:
            with Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS) as image:
                return image.size
        except Exception:  # noqa: BLE001 - Pillow's readers raise OSError, SyntaxError, struct.error and others
            return 0, 0
    if isinstance(raw, np.ndarray):
        return raw.shape[1], raw.shape[0]
    if isinstance(raw, list) and raw and isinstance(raw[0], list):
        return len(raw[0]), len(raw)
    return 0, 0
