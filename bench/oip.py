"""The client's side of the Open Inference Protocol over REST: metadata, and requests with binary tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from dlops.errors import MachineError, UsageError
from dlops.signature import Array, DimRange, DType, Feed, Signature, TensorSpec

_DATATYPES: Mapping[str, DType] = {
    "FP32": "float32", "FP16": "float16", "FP64": "float64", "INT64": "int64", "INT32": "int32", "INT16": "int16",
    "INT8": "int8", "UINT8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DATATYPES.items()}
# Metadata gives a free dim as -1 and no range.
_UNKNOWN_MAX = 1_000_000
_TIMEOUT_S = 10.0
_MODEL_PATH = "/v2/models/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model is served. signature: as its metadata gives it; base: scheme, host and port."""

    url: str
    base: str
    host: str
    port: int
    model: str
    version: str | None
    platform: str
    server: str
    signature: Signature

    @property
    def infer_path(self) -> str:
        return f"{_MODEL_PATH}{self.model}/infer"


def find_endpoint(url: str, *, model: str | None) -> Endpoint:
    """Ask the server at `url` what it serves.

    url: `http://HOST:PORT`, or with `/v2/models/NAME` behind it; model: the name where the URL has none; without
    either, the server's repository index decides. Raises UsageError for a URL that is none or a server that does not
    speak the protocol, MachineError where nothing answers.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise UsageError(f"target {url!r} is no http://HOST:PORT", hint="an artifact is named by its folder")
    try:
        port = parts.port or 80
    except ValueError:
        raise UsageError(f"target {url!r}: the port is no number from 0 to 65535") from None
    if parts.path.startswith(_MODEL_PATH):
        model = parts.path.removeprefix(_MODEL_PATH).split("/", 1)[0]
    elif parts.path not in ("", "/"):
        raise UsageError(f"target {url!r}: unknown path {parts.path}", hint=f"http://HOST:PORT[{_MODEL_PATH}NAME]")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    base = f"http://{host}:{port}"
    # Proxies of the environment would be measured instead of the server.
    with httpx.Client(base_url=base, timeout=_TIMEOUT_S, trust_env=False) as client:
        server = _get(client, "/v2", url)
        name = model or _only_model(client, url)
        metadata = _get(client, f"{_MODEL_PATH}{name}", url)
    try:
        signature = _signature(metadata)
        versions = metadata.get("versions") or [None]
        platform = str(metadata.get("platform") or "unknown")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{url}: metadata of model {name!r} is not the Open Inference Protocol's ({error})") from None
    return Endpoint(
        url=url, base=base, host=parts.hostname, port=port, model=name, version=versions[-1], platform=platform,
        server=f"{server.get('name', 'unknown')} {server.get('version', '')}".strip(), signature=signature,
    )  # fmt: skip


def encode_request(endpoint: Endpoint, feed: Feed) -> bytes:
    """One whole HTTP/1.1 request, head and body, with binary tensors in and out."""
    inputs, chunks = [], []
    for name, array in feed.items():
        chunks.append(np.ascontiguousarray(array).tobytes())
        inputs.append(
            {
                "name": name,
                "datatype": _NAMES[array.dtype.name],  # type: ignore[index]
                "shape": list(array.shape),
                "parameters": {"binary_data_size": len(chunks[-1])},
            }
        )
    header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    body = b"".join((header, *chunks))
    head = (
        f"POST {endpoint.infer_path} HTTP/1.1\r\n"
        f"Host: {endpoint.base.removeprefix('http://')}\r\n"
        "Content-Type: application/octet-stream\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def decode_outputs(body: bytes, header_length: int | None) -> dict[str, Array]:
    """The named outputs of an answer. Raises ValueError where it is none."""
    document = json.loads(body if header_length is None else body[:header_length])
    offset, outputs = header_length or 0, {}
    for entry in document["outputs"]:
        dtype, shape = np.dtype(_DATATYPES[entry["datatype"]]), [int(size) for size in entry["shape"]]
        size = entry.get("parameters", {}).get("binary_data_size")
        if size is None:
            outputs[entry["name"]] = np.array(entry["data"], dtype).reshape(shape)
            continue
        if offset + size > len(body) or size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"output {entry['name']}: {size} bytes for shape {shape}")
        outputs[entry["name"]] = np.frombuffer(body[offset : offset + size], dtype).reshape(shape)
        offset += size
    return outputs


def _get(client: httpx.Client, path: str, url: str) -> dict[str, Any]:
    try:
        response = client.get(path)
    except httpx.TransportError as error:
        raise MachineError(
            f"{url}: no answer ({error or type(error).__name__})", hint="is the service up? dlops serve ARTIFACT"
        ) from None
    hint = "it must speak the Open Inference Protocol (GET /v2/models/NAME), as dlops serve does"
    if response.status_code != 200:
        raise UsageError(f"{url}: GET {path} answered {response.status_code}: {response.text[:200].strip()}", hint=hint)
    try:
        document = response.json()
    except ValueError:
        raise UsageError(f"{url}: GET {path} answered no JSON", hint=hint) from None
    if not isinstance(document, dict):
        raise UsageError(f"{url}: GET {path} answered no JSON object", hint=hint)
    return document


def _only_model(client: httpx.Client, url: str) -> str:
    hint = f"say which: --payload ARTIFACT, or {url.rstrip('/')}{_MODEL_PATH}NAME"
    try:
        response = client.post("/v2/repository/index", json={})
        models = sorted({str(entry["name"]) for entry in response.json()}) if response.status_code == 200 else []
    except (httpx.TransportError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{url}: it does not list its models ({error})", hint=hint) from None
    if len(models) != 1:
        raise UsageError(f"{url}: it lists {', '.join(models) if models else 'no models'}", hint=hint)
    return models[0]


def _signature(metadata: dict[str, Any]) -> Signature:
    dims: dict[str, DimRange] = {}

    def spec(entry: dict[str, Any]) -> TensorSpec:
        shape: list[int | str] = []
        for axis, size in enumerate(int(size) for size in entry["shape"]):
            dim: int | str = size if size >= 0 else "batch" if axis == 0 else f"{entry['name']}.{axis}"
            if isinstance(dim, str):
                dims[dim] = DimRange(min=1, max=_UNKNOWN_MAX)
            shape.append(dim)
        return TensorSpec(name=entry["name"], dtype=_DATATYPES[entry["datatype"]], shape=tuple(shape))

    inputs = tuple(spec(entry) for entry in metadata["inputs"])
    outputs = tuple(spec(entry) for entry in metadata["outputs"])
    return Signature(inputs=inputs, outputs=outputs, dims=dims)
