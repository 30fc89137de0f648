"""What `POST /predict` takes: image bytes, a form with image files, text, or numbers as JSON; one input or several."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from dlops.artifact import Artifact
from dlops.errors import InputError
from dlops.framing import Framing, picture_size
from dlops.preprocess import Decode
from dlops.serve.protocol import json_limit, number_array, read_json
from dlops.signature import Array, Feed

if TYPE_CHECKING:
    from dlops.serve.jpeg import JpegDecoder
    from dlops.serve.model import ServedModel

# It warns of every malformed form, which is the client's affair and not the log's.
logging.getLogger("python_multipart").setLevel(logging.ERROR)
_FIELDS = ("image", "file")
_FORM = "multipart/form-data"
_JSON = "application/json"
_PNG = "image/png"
# Of pictures as numbers, and of texts: whoever has more sends files.
_MAX_JSON_BYTES = 4 * 1024 * 1024
_TEXT = "text/plain"
# Tasks whose answers are pictures, or about places in one.
_PICTURED = frozenset(("detection", "generation", "segmentation"))
_NOT_UTF8 = re.compile(r";\s*charset\s*=\s*(?!\s*\"?utf-?8\b)", re.IGNORECASE)


class MediaTypeError(InputError):
    """The Content-Type is none that /predict takes: status 415."""


class _InMemoryParser(MultiPartParser):
    # The body is held whole and bounded already; spooling to disk would only add a copy.
    spool_max_size = 2**62
    is_whole = False

    def on_end(self) -> None:
        """Called at the closing boundary, without which a form cut short would pass for one with fewer files."""
        self.is_whole = True


async def read_inputs(
    body: bytes, content_type: str, artifact: Artifact, *, offload: Callable[[Callable[[], Any]], Awaitable[Any]]
) -> list[Any]:
    """The raw inputs in a body, one or more, not decoded yet. Raises InputError naming the field.

    offload: makes a call in another thread, for JSON that would hold the event loop up.
    """
    kind = content_type.partition(";")[0].strip().lower()
    takes_text = artifact.preprocess is not None and artifact.preprocess.input == "text"
    if not body:
        raise InputError("the body is empty", field="body")
    if takes_text and kind == _TEXT:
        if not _NOT_UTF8.search(content_type):
            return [body]
        raise MediaTypeError(f"Content-Type {content_type!r}: send {_TEXT} as UTF-8", field="Content-Type")
    if takes_text and kind not in ("", _JSON) and not kind.endswith("+json"):
        raise MediaTypeError(f"Content-Type {kind!r}: this model takes {_TEXT} or {_JSON}", field="Content-Type")
    if kind == _FORM:
        raws: list[Any] = await _read_form(body, content_type, max_files=artifact.signature.max_batch)
    elif kind == _JSON or kind.endswith("+json") or not kind:
        raws = await offload(lambda: _read_numbers(body, artifact))
    elif kind.startswith("image/") or kind == "application/octet-stream":
        raws = [body]
    else:
        raise MediaTypeError(
            f"Content-Type {kind!r}: send image/*, application/octet-stream, {_FORM} or {_JSON}", field="Content-Type"
        )
    largest = artifact.signature.max_batch
    if len(raws) > largest:
        raise InputError(f"{len(raws)} inputs, at most {largest} in one request", field="inputs")
    return raws


def to_feed(
    artifact: Artifact, raws: list[Any], *, check: Callable[[], None] = lambda: None, jpeg: JpegDecoder | None = None
) -> Feed:
    """Raw inputs, preprocessed and stacked as the model's input. Raises InputError naming the input at fault.

    check: called before each input; what it raises ends the work. jpeg: decodes JPEGs, if given.
    """
    spec = artifact.signature.inputs[0]
    if artifact.preprocess is None:
        if any(isinstance(raw, bytes) for raw in raws):
            raise InputError("this artifact has no preprocessing, so it takes numbers as JSON", field="body")
        tensors = [number_array(raw, spec.dtype, field=f"inputs[{i}]") for i, raw in enumerate(raws)]
    else:
        tensors = []
        for index, raw in enumerate(raws):
            check()
            tensors.append(_preprocessed(artifact, raw, index, jpeg))
    try:
        stacked = np.stack(tensors)
    except ValueError:
        raise InputError("the inputs have different shapes", field="inputs") from None
    feed: Feed = {spec.name: stacked.astype(spec.dtype, copy=False)}
    artifact.signature.check(feed)
    return feed


def wants_picture(artifact: Artifact, accept: str, count: int) -> bool:
    """Whether the answer is to be a PNG and no JSON. Raises InputError where several inputs cannot have one."""
    if artifact.task != "generation" or _PNG not in accept:
        return False
    if count > 1:
        raise InputError(f"{count} inputs, and {_PNG} holds one picture", field="Accept", hint="application/json")
    return True


async def described(model: ServedModel, raws: list[Any], outputs: Feed) -> list[dict[str, Any]]:
    """One prediction an input, as the task puts it, places in a picture in that picture's pixels."""
    if model.artifact.task not in _PICTURED:
        return model.answers(outputs)
    # Pictures are packed and headers read again, which is no work for the event loop.
    return await model.decoder.offload(lambda: framed(model.artifact, raws, model.answers(outputs)))


def framed(artifact: Artifact, raws: list[Any], predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The predictions with what lies in a picture in that picture's pixels, as it was sent; of a mask its `area`."""
    preprocess = artifact.preprocess
    if preprocess is None or preprocess.input != "image":
        return predictions
    for raw, prediction in zip(raws, predictions, strict=True):
        framing = Framing.of(preprocess, *picture_size(raw))
        for one in prediction.get("detections", ()):
            one["box"] = framing.in_picture(one["box"])
        if "mask" in prediction:
            prediction["area"] = framing.area
    return predictions


def _preprocessed(artifact: Artifact, raw: Any, index: int, jpeg: JpegDecoder | None) -> Array:
    assert artifact.preprocess is not None
    try:
        if artifact.preprocess.input == "image":
            if not isinstance(raw, bytes):
                raw = _pixels(raw)
            elif jpeg is not None and (decoded := jpeg.pixels(raw)) is not None:
                raw = decoded
        return artifact.preprocess.apply(raw)
    except InputError as error:
        raise InputError(f"inputs[{index}]: {error.message}", field=f"inputs[{index}]", hint=error.hint) from None


def _pixels(raw: Any) -> Array:
    try:
        return np.asarray(raw)
    except ValueError:
        raise InputError("rows of different lengths") from None


async def _read_form(body: bytes, content_type: str, *, max_files: int) -> list[bytes]:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = _InMemoryParser(
        Headers({"content-type": content_type}), cast("Any", stream()), max_files=max_files, max_fields=16,
        max_part_size=64 * 1024,
    )  # fmt: skip
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, LookupError, UnicodeError) as error:
        # Which raises what it does for a charset that is none, and for bytes that are not in it.
        message = getattr(error, "message", "Content-Type has no boundary, or no charset of this form")
        raise InputError(f"the form cannot be read: {message}", field="body") from None
    if not parser.is_whole:
        await form.close()
        raise InputError("the form is cut short: its closing boundary is missing", field="body")
    try:
        files = [value for name, value in form.multi_items() if name in _FIELDS and isinstance(value, UploadFile)]
        if not files:
            raise InputError("the form has no file in a field named image or file", field="image")
        contents = [await file.read() for file in files]
    finally:
        await form.close()
    if not all(contents):
        raise InputError("a file in the form is empty", field="image")
    return contents


def _read_numbers(body: bytes, artifact: Artifact) -> list[Any]:
    preprocess = artifact.preprocess
    if preprocess is not None and preprocess.input != "numbers":
        limit = _MAX_JSON_BYTES
    else:
        limit = json_limit(artifact.signature)
    if len(body) > limit:
        raise InputError(
            f"more JSON than this model's inputs can need: at most {limit} bytes", field="body",
            hint="images come as files" if preprocess is not None and preprocess.input == "image" else None,
        )  # fmt: skip
    document = read_json(body)
    unknown = sorted(set(document) - {"inputs"})
    if unknown or "inputs" not in document:
        raise InputError('expected {"inputs": [...]}', field=unknown[0] if unknown else "inputs")
    if len(artifact.signature.inputs) > 1:
        where = f"POST /v2/models/{artifact.name}/infer"
        raise InputError("this model takes several inputs", field="inputs", hint=where)
    inputs = document["inputs"]
    if artifact.preprocess is not None and artifact.preprocess.input == "text":
        return _texts(inputs)
    if not isinstance(inputs, list) or not inputs:
        raise InputError("inputs must be a list of numbers, or of lists of them", field="inputs")
    return inputs if _depth(inputs) > _depth_of_one(artifact, inputs) else [inputs]


def _texts(inputs: Any) -> list[str]:
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError("inputs must be a text, or a list of them", field="inputs")
    return texts


def _depth_of_one(artifact: Artifact, inputs: list[Any]) -> int:
    """How many lists deep one input of this model is."""
    preprocess = artifact.preprocess
    if preprocess is None:
        return len(artifact.signature.inputs[0].shape) - 1
    if preprocess.input == "numbers":
        return len(preprocess.shape)
    assert isinstance(preprocess.steps[0], Decode)
    if _depth(inputs) != 3:
        return 2 if _depth(inputs) < 3 else 3
    # Three deep is one image with channels, or several without: the innermost length tells which.
    return 3 if _innermost_length(inputs) in (1, 3) else 2


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list) and value:
        value, depth = value[0], depth + 1
    return depth


def _innermost_length(value: list[Any]) -> int:
    while isinstance(value[0], list) and value[0]:
        value = value[0]
    return len(value)
