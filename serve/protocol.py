"""The Open Inference Protocol v2 as bytes: decoding and encoding, no network.

JSON, and Triton's binary tensor extension: a JSON header of `Inference-Header-Content-Length` bytes, then the tensors'
little-endian bytes in the order of the header. Messages name the field at fault.
https://github.com/kserve/open-inference-protocol and Triton's extension_binary_data.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json, to_json

from dlops.datatypes import DATATYPES
from dlops.errors import InputError
from dlops.serve import classes
from dlops.serve.raws import RawInput
from dlops.signature import Array, Feed, Signature, TensorSpec, is_floating

SHARED_MEMORY = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")
# A number in JSON with its comma, brackets and the white space of somebody who formats it, and what stands around them.
_JSON_NUMBER_BYTES = 64
_JSON_BASE_BYTES = 64 * 1024
# A picture of 300 by 300 pixels with channels has 90,000, one that comes in rows of pixels.
MAX_JSON_LISTS = 100_000
# Of a client's waiting: as good as none, and what a clock can add.
_MAX_TIMEOUT_US = 86_400 * 1_000_000
# The kinds of Python number that JSON holds and a datatype takes: 1.5 is no INT64, true is no FP32.
_JSON_KINDS: Mapping[str, str] = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}


class SharedMemoryError(InputError):
    """Tensors in shared memory, which this server does not have: status 501."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An output to return. binary: as bytes after the JSON header. classes: so many of the strongest, in words, and
    not the values; 0 for those."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """feed: checked against the signature. rows: along the batch axis. timeout_us: None for no deadline. raws: a
    picture or text a row, of which the feed is still to be made; empty where it is there."""

    id: str | None
    feed: Feed
    rows: int
    outputs: tuple[Wanted, ...]
    timeout_us: int | None
    raws: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """json_bytes: length of the JSON at the start of `body`, or None where that is all of it."""

    body: bytes
    json_bytes: int | None


def decode_request(
    body: bytes, *, json_bytes: int | None, signature: Signature, raw_input: RawInput | None = None
) -> InferRequest:
    """An infer request. json_bytes: what Inference-Header-Content-Length said, None where it was absent. raw_input:
    what may come as BYTES or pixels.

    Raises InputError naming the field for whatever does not fit.
    """
    if json_bytes is not None and not 0 <= json_bytes <= len(body):
        raise InputError(
            f"Inference-Header-Content-Length is {json_bytes}, the body has {len(body)} bytes",
            field="Inference-Header-Content-Length",
        )
    if json_bytes == 0:
        return _raw_request(body, signature)
    limit = json_limit(signature)
    if (len(body) if json_bytes is None else json_bytes) > limit:
        raise InputError(f"more JSON than this model's inputs can need: at most {limit} bytes", field="body")
    document = read_json(body if json_bytes is None else body[:json_bytes])
    binary = memoryview(body)[json_bytes if json_bytes is not None else len(body) :]
    parameters = _mapping(document.get("parameters", {}), "parameters")
    identity = document.get("id")
    if identity is not None and not isinstance(identity, str):
        raise InputError("id must be a string", field="id")
    feed, raws, used = _decode_inputs(document, binary, signature, raw_input)
    if used != len(binary):
        raise InputError(f"{len(binary) - used} bytes follow the last input", field="inputs")
    if not raws:
        # Masks have infinities in them: what a model makes of such numbers is its affair.
        signature.check(feed, finite=False)
    return InferRequest(
        id=identity,
        feed=feed,
        rows=len(raws) or rows_of(feed, signature),
        outputs=_wanted(document, parameters, signature),
        timeout_us=timeout_us(parameters.get("timeout")),
        raws=tuple(raws),
    )


def _raw_request(body: bytes, signature: Signature) -> InferRequest:
    """The bytes of the one input and nothing else; all outputs are given back in the same way."""
    if len(signature.inputs) != 1:
        raise InputError("a request without JSON is for a model with one input", field="inputs")
    (spec,) = signature.inputs
    # How many rows they are follows from how many bytes; of two open sizes neither does.
    fixed = math.prod(dim for dim in spec.shape if not isinstance(dim, str)) * np.dtype(spec.dtype).itemsize
    open_dims = [dim for dim in spec.shape if isinstance(dim, str)]
    if len(open_dims) > 1 or not fixed or len(body) % fixed:
        raise InputError(
            f"{spec.name}: {len(body)} bytes do not tell a shape of {list(spec.shape)}", field=spec.name,
            hint="say it in JSON, with Inference-Header-Content-Length",
        )  # fmt: skip
    shape = tuple(len(body) // fixed if isinstance(dim, str) else dim for dim in spec.shape)
    signature.check_shape(spec, shape)
    feed = {spec.name: from_binary(memoryview(body), spec, shape)}
    signature.check(feed, finite=False)
    return InferRequest(
        id=None, feed=feed, rows=rows_of(feed, signature), timeout_us=None,
        outputs=tuple(Wanted(name=one.name, binary=True) for one in signature.outputs),
    )  # fmt: skip


def json_limit(signature: Signature) -> int:
    """More bytes than a request's JSON can need: reading more would hold up everything else for nothing."""
    numbers = 0
    for spec in signature.inputs:
        numbers += math.prod(signature.dims[dim].max if isinstance(dim, str) else dim for dim in spec.shape)
    return _JSON_BASE_BYTES + numbers * _JSON_NUMBER_BYTES


def encode_response(
    outputs: Feed, wanted: Sequence[Wanted], *, model: str, version: str, identity: str | None,
    labels: Sequence[str] = (), batched: bool = True,
) -> Encoded:  # fmt: skip
    """The response to an infer request with the wanted outputs in their order. labels: of classes, where they are asked
    for; batched: whether outputs have a row for each input."""
    described: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    for want in wanted:
        datatype, array = as_wanted(outputs[want.name], want, labels=labels, batched=batched)
        entry: dict[str, Any] = {"name": want.name, "datatype": datatype, "shape": list(array.shape)}
        if want.binary:
            chunks.append(raw_bytes(array))
            entry["parameters"] = {"binary_data_size": len(chunks[-1])}
        elif want.classes:
            entry["data"] = [text.decode() for text in array.reshape(-1).tolist()]
        else:
            entry["data"] = array.reshape(-1).tolist()
        described.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": described}
    if identity is not None:
        document["id"] = identity
    # NaN and infinity are not JSON; the constants are what Triton and Python's reader understand.
    header = to_json(document, inf_nan_mode="constants")
    if not chunks:
        return Encoded(body=header, json_bytes=None)
    return Encoded(body=b"".join([header, *chunks]), json_bytes=len(header))


def as_wanted(array: Array, want: Wanted, *, labels: Sequence[str], batched: bool) -> tuple[str, Array]:
    """The datatype and the values of an output as it was asked for."""
    if want.classes:
        return classes.DATATYPE, classes.strongest(array, want.classes, labels, batched=batched)
    return DATATYPES[array.dtype.name], array


def raw_bytes(array: Array) -> bytes:
    """A tensor as it is sent."""
    if array.dtype == np.object_:
        return classes.to_bytes(array)
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def rows_of(feed: Feed, signature: Signature) -> int:
    """Rows along the batch axis, 1 where there is none."""
    first = signature.inputs[0]
    return int(feed[first.name].shape[0]) if first.is_batched else 1


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises InputError."""
    # A list takes twenty times as much memory as its two brackets, and reading them holds up everything else.
    if body.count(b"[") + body.count(b"{") > MAX_JSON_LISTS:
        raise InputError(
            f"more than {MAX_JSON_LISTS:,} lists and objects in the JSON", field="body",
            hint="send tensors flat or as bytes, images as files",
        )  # fmt: skip
    try:
        document = from_json(body)
    except ValueError as error:
        raise InputError(f"the body is not JSON: {error}", field="body") from None
    if not isinstance(document, dict):
        raise InputError("the body is not a JSON object", field="body")
    return document


def _decode_inputs(
    document: dict[str, Any], binary: memoryview, signature: Signature, raw_input: RawInput | None
) -> tuple[Feed, list[Any], int]:
    """The tensors, or the rows that they are to be made of, and how many of the bytes they took."""
    entries = document.get("inputs")
    if not isinstance(entries, list) or not entries:
        raise InputError("inputs must be a list of tensors", field="inputs")
    specs = {spec.name: spec for spec in signature.inputs}
    feed: dict[str, Array] = {}
    offset = 0
    for index, value in enumerate(entries):
        entry = _mapping(value, f"inputs[{index}]")
        if raw_input is not None and raw_input.is_meant(name=entry.get("name"), datatype=entry.get("datatype")):
            if len(entries) > 1:
                raise InputError(f"input {raw_input.name!r} is given twice", field=raw_input.name)
            shape, size = _shape(entry, raw_input.name), _binary_size(entry, raw_input.name)
            if size is None:
                return feed, raw_input.from_json(entry.get("data"), shape, entry["datatype"]), 0
            _check_left(raw_input.name, size, len(binary))
            return feed, raw_input.from_binary(binary[:size], shape, entry["datatype"]), size
        spec = spec_of(entry, specs, f"inputs[{index}]")
        if spec.name in feed:
            raise InputError(f"input {spec.name!r} is given twice", field=spec.name)
        # Before anything is made in that shape: the sizes in it may be any numbers at all.
        shape = _shape(entry, spec.name)
        signature.check_shape(spec, shape)
        size = _binary_size(entry, spec.name)
        if size is None:
            feed[spec.name] = _from_json_data(entry, spec, shape)
            continue
        _check_left(spec.name, size, len(binary) - offset)
        feed[spec.name] = from_binary(binary[offset : offset + size], spec, shape)
        offset += size
    return feed, [], offset


def _check_left(name: str, size: int, left: int) -> None:
    if size > left:
        raise InputError(f"{name}: binary_data_size is {size}, but {left} bytes are left", field=name)


def spec_of(entry: dict[str, Any], specs: dict[str, TensorSpec], where: str) -> TensorSpec:
    """The input that an entry's name and datatype mean. Raises InputError."""
    name = entry.get("name")
    if not isinstance(name, str):
        raise InputError(f"{where}.name must be a string", field=where)
    if name not in specs:
        raise InputError(f"unknown input {name!r}, the model takes {', '.join(sorted(specs))}", field=name)
    expected = DATATYPES[specs[name].dtype]
    if entry.get("datatype") != expected:
        raise InputError(f"{name}: datatype {entry.get('datatype')!r}, expected {expected}", field=name)
    return specs[name]


def _shape(entry: dict[str, Any], name: str) -> tuple[int, ...]:
    shape = entry.get("shape")
    # type() and not isinstance: true is an int to Python, and no dimension.
    if not isinstance(shape, list) or len(shape) > 32 or not all(type(dim) is int and dim >= 0 for dim in shape):
        raise InputError(f"{name}: shape must be a list of whole numbers", field=name)
    return tuple(shape)


def _binary_size(entry: dict[str, Any], name: str) -> int | None:
    parameters = _mapping(entry.get("parameters", {}), f"{name}.parameters")
    if any(key in parameters for key in SHARED_MEMORY):
        raise SharedMemoryError(
            f"{name}: shared memory is not supported", field=name, hint="send the tensor in the body"
        )
    size = parameters.get("binary_data_size")
    if size is None:
        return None
    if type(size) is not int or size < 0:
        raise InputError(f"{name}: binary_data_size must be a whole number", field=name)
    if "data" in entry:
        raise InputError(f"{name}: both data and binary_data_size are given", field=name)
    return size


def from_binary(data: memoryview, spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    """A tensor of its little-endian bytes, without a copy where that is possible. Raises InputError."""
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    wanted = math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise InputError(
            f"{spec.name}: {len(data)} bytes, but shape {list(shape)} of {DATATYPES[spec.dtype]} takes {wanted}",
            field=spec.name,
        )
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    if spec.dtype == "bool" and array.size and array.view(np.uint8).max() > 1:
        raise InputError(f"{spec.name}: a BOOL is the byte 0 or 1", field=spec.name)
    return array.astype(spec.dtype, copy=False)


def _from_json_data(entry: dict[str, Any], spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    if not isinstance(entry.get("data"), list):
        raise InputError(f"{spec.name}: data must be a list", field=spec.name)
    return from_numbers(entry["data"], spec, shape)


def from_numbers(data: list[Any], spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    """A tensor of its numbers in a list. Raises InputError."""
    wanted = math.prod(shape)
    # Before anything is made of them: a nested list is no longer than what it holds.
    if len(data) > wanted:
        raise InputError(f"{spec.name}: {len(data)} values, shape {list(shape)} takes {wanted}", field=spec.name)
    array = number_array(data, spec.dtype, field=spec.name)
    if array.size != wanted:
        raise InputError(f"{spec.name}: {array.size} values, shape {list(shape)} takes {wanted}", field=spec.name)
    return array.reshape(shape)


def number_array(data: object, dtype: str, *, field: str) -> Array:
    """Nested lists of JSON numbers as an array of `dtype`. Raises InputError for raggedness, text, or lost values."""
    target = np.dtype(dtype)
    try:
        array = np.asarray(data)
    except ValueError:
        raise InputError(f"{field}: rows of different lengths", field=field) from None
    if target == np.uint64 and array.dtype == np.float64:
        # numpy has no type for whole numbers on both sides of 2**63 and makes fractions of them, which loses digits.
        array = _whole(np.asarray(data, object), array)
    if array.size and array.dtype.kind not in _JSON_KINDS["f" if is_floating(target) else target.kind]:
        raise InputError(f"{field}: values are not all {DATATYPES[dtype]}", field=field)
    if target.kind in "iu" and array.size:
        limits = np.iinfo(target)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise InputError(f"{field}: values outside of {limits.min} to {limits.max}", field=field)
    with np.errstate(over="ignore"):
        found = array.astype(target)
    if is_floating(target) and (np.isinf(found) & np.isfinite(array)).any():
        raise InputError(f"{field}: values too large for {DATATYPES[dtype]}", field=field)
    return found


def _whole(values: NDArray[np.object_], otherwise: Array) -> Array:
    """Python's whole numbers as UINT64; `otherwise` where they are not, or do not fit it."""
    numbers: list[object] = values.ravel().tolist()
    if any(type(value) is not int or not 0 <= value < 2**64 for value in numbers):
        return otherwise
    return values.astype(np.uint64)


def _wanted(document: dict[str, Any], parameters: dict[str, Any], signature: Signature) -> tuple[Wanted, ...]:
    specs = {spec.name: spec for spec in signature.outputs}
    names = list(specs)
    binary = _flag(parameters, "binary_data_output", "parameters")
    entries = document.get("outputs")
    if not entries:
        if entries not in (None, []):
            raise InputError("outputs must be a list", field="outputs")
        return tuple(Wanted(name=name, binary=binary) for name in names)
    if not isinstance(entries, list):
        raise InputError("outputs must be a list", field="outputs")
    wanted = []
    for index, value in enumerate(entries):
        entry = _mapping(value, f"outputs[{index}]")
        name = entry.get("name")
        if name not in names:
            raise InputError(f"unknown output {name!r}, the model gives {', '.join(names)}", field=f"outputs[{index}]")
        field = f"outputs[{index}].parameters"
        options = _mapping(entry.get("parameters", {}), field)
        for key in SHARED_MEMORY:
            if options.get(key):
                raise SharedMemoryError(f"{name}: {key} is not supported", field=field)
        count = classes.check_classes(specs[str(name)], options.get("classification", 0), field=field)
        own = _flag(options, "binary_data", str(name)) if "binary_data" in options else binary
        wanted.append(Wanted(name=str(name), binary=own, classes=count))
    if len({want.name for want in wanted}) != len(wanted):
        raise InputError("an output is asked for twice", field="outputs")
    return tuple(wanted)


def timeout_us(timeout: object) -> int | None:
    """What a request's parameter of this name says; None for no deadline, as 0 does. Raises InputError."""
    if timeout is None:
        return None
    if type(timeout) is not int or timeout < 0:
        raise InputError("timeout must be a whole number of microseconds", field="parameters")
    return min(timeout, _MAX_TIMEOUT_US) or None


def _flag(parameters: dict[str, Any], key: str, where: str) -> bool:
    value = parameters.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"{where}: {key} must be true or false", field=where)
    return value


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object", field=where)
    return value
