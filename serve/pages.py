"""The pages for people: the one at / with its files, what is served, samples to try and the load, and the API's."""

from __future__ import annotations

import asyncio
import functools
import io
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from dlops.artifact import Artifact
from dlops.serve.answers import json_response
from dlops.serve.guard import Guard
from dlops.serve.metrics import Metrics
from dlops.serve.models import Models
from dlops.serve.openapi import PAGE, PAGE_POLICY, openapi_document
from dlops.signature import Array

if TYPE_CHECKING:
    from dlops.serve.model import ServedModel

Handler = Callable[[Request], Awaitable[Response]]
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Of those that travel with an artifact: enough to see that it works.
_SAMPLES = 8
_DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A real input as it is sent. kind: its media type."""

    content: bytes
    kind: str


class Pages:
    """Their routes."""

    def __init__(self, models: Models, metrics: Metrics, guard: Guard) -> None:
        self._models = models
        self._metrics = metrics
        self._guard = guard

    def table(self) -> list[tuple[str, str, Handler]]:
        """Method, path and handler."""
        return [
            ("GET", "/docs.json", self._openapi),
            ("GET", "/docs", self._docs),
            ("GET", "/", self._page),
            ("GET", "/ui/page.css", self._file),
            ("GET", "/ui/page.js", self._file),
            ("GET", "/ui/model.json", self._model),
            ("GET", "/ui/live.json", self._live),
            ("GET", "/ui/samples/{number}", self._sample),
        ]

    async def _openapi(self, request: Request) -> Response:
        return json_response(openapi_document(list(self._models)))

    async def _docs(self, request: Request) -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})

    async def _page(self, request: Request) -> Response:
        return file_response("page.html")

    async def _file(self, request: Request) -> Response:
        return file_response(request.url.path.rpartition("/")[2])

    async def _model(self, request: Request) -> Response:
        document = await asyncio.to_thread(model_document, self._shown(request))
        return json_response(document | {"models": self._models.names, "token": not self._guard.is_open})

    async def _live(self, request: Request) -> Response:
        self._metrics.show_load(self._models)
        return json_response(live_document(self._metrics))

    async def _sample(self, request: Request) -> Response:
        number = request.path_params["number"]
        # Starlette's own "int" takes any number of digits, and Python then refuses to read them.
        if not (number.isascii() and number.isdigit() and len(number) <= _DIGITS):
            raise HTTPException(404, "no such sample")
        found = await asyncio.to_thread(sample, self._shown(request).artifact, int(number))
        if found is None:
            raise HTTPException(404, "no such sample")
        return Response(found.content, media_type=found.kind)

    def _shown(self, request: Request) -> ServedModel:
        """The model that the address names, or the first."""
        self._models.check_loaded()
        if self._models.first is None:
            raise HTTPException(404, "no model is served")
        return self._models.find(request.query_params.get("model", self._models.first.name))


def file_response(name: str) -> Response:
    """One of the page's own files. Another version of this package may have others, so a browser asks each time."""
    return Response(_file(name), media_type=_KINDS[Path(name).suffix], headers={"Cache-Control": "no-cache"})


@functools.cache
def _file(name: str) -> bytes:
    return (Path(__file__).parent / "ui" / name).read_bytes()


def model_document(model: ServedModel) -> dict[str, Any]:
    """What is served, and what one input of it is: image, numbers, text, or null where it takes several tensors."""
    artifact, preprocess = model.artifact, model.artifact.preprocess
    kind: str | None
    shape: Sequence[int | str]
    if preprocess is not None:
        kind, shape = preprocess.input, preprocess.shape
    elif len(artifact.signature.inputs) == 1:
        kind, shape = "numbers", artifact.signature.inputs[0].shape[1:]
    else:
        kind, shape = None, ()
    return {
        "name": model.name,
        "title": f"{model.name}/{artifact.slug}",
        "version": model.version,
        "task": artifact.task,
        "provider": model.placement.provider,
        "device": model.placement.device,
        "precision": model.placement.precision,
        "instances": len(model.instances),
        "max_batch": model.max_batch,
        "input": kind,
        "shape": shape,
        "samples": 0 if kind is None else min(_SAMPLES, len(artifact.samples())),
    }


def live_document(metrics: Metrics) -> dict[str, Any]:
    """What waits and runs now, and the latencies of all requests so far, counted by bounds."""
    workers = list(metrics.cells.workers())
    counts = [0] * (len(metrics.seconds.bounds) + 1)
    for (_, _, part), cells in metrics.seconds.summed(workers).items():
        if part == "total":
            counts = [a + b for a, b in zip(counts, cells[:-1], strict=True)]
    return {
        "queue_rows": sum(cells[0] for cells in metrics.queue_rows.summed(workers).values()),
        "busy_instances": sum(cells[0] for cells in metrics.busy_instances.summed(workers).values()),
        "requests": sum(counts),
        "bounds_ms": [bound / 1e6 for bound in metrics.seconds.bounds],
        "counts": counts,
    }


def sample(artifact: Artifact, number: int) -> Sample | None:
    """One of the samples that travel with the artifact; None where there are not so many."""
    raws = artifact.samples().raw
    if not 0 <= number < min(_SAMPLES, len(raws)):
        return None
    raw = raws[number]
    if isinstance(raw, bytes) and artifact.preprocess is not None and artifact.preprocess.input == "text":
        return Sample(content=raw, kind="text/plain; charset=utf-8")
    if isinstance(raw, bytes):
        with Image.open(io.BytesIO(raw)) as image:
            return Sample(content=raw, kind=Image.MIME.get(image.format or "", "application/octet-stream"))
    if artifact.preprocess is not None and artifact.preprocess.input == "image":
        return Sample(content=_png(raw), kind="image/png")
    return Sample(content=to_json(raw.tolist()), kind="application/json")


def _png(pixels: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
