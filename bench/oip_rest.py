"""The Open Inference Protocol over REST: metadata, requests with binary tensors, statistics."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from dlops.bench.http import HttpTransport
from dlops.bench.oip import ASK_TIMEOUT_S, MODEL_PATH, Address, Described, only_model
from dlops.bench.server_time import STATISTICS_TIMEOUT_S, Counts, NoStatisticsError
from dlops.bench.transport import Answer
from dlops.datatypes import DATATYPES, DTYPES
from dlops.errors import MachineError, UsageError, missing_package
from dlops.signature import Array, Feed

try:
    import httpx
except ModuleNotFoundError as error:
    if error.name != "httpx":
        raise
    raise missing_package("httpx", extra="bench", needed_for="measuring a URL") from None


# What a server lists that takes tensors as bytes after the JSON; one that does not is sent numbers.
_BINARY = "binary_tensor_data"


class RestClient:
    """base: scheme, host and port. path: of the model, or of one version of it. binary: whether tensors go, and come,
    as bytes and not as numbers in JSON."""

    def __init__(self, *, base: str, path: str, binary: bool = True) -> None:
        self._base, self._path, self.binary = base, path, binary
        self.transport = HttpTransport()

    def encode(self, feed: Feed) -> bytes:
        inputs: list[dict[str, Any]] = []
        chunks = []
        for name, array in feed.items():
            entry = {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": list(array.shape)}
            if self.binary:
                chunks.append(np.ascontiguousarray(array).tobytes())
                inputs.append(entry | {"parameters": {"binary_data_size": len(chunks[-1])}})
            else:
                inputs.append(entry | {"data": array.ravel().tolist()})
        parameters = {"parameters": {"binary_data_output": True}} if self.binary else {}
        header = json.dumps({"inputs": inputs} | parameters).encode()
        body = b"".join((header, *chunks))
        kind = "application/octet-stream" if self.binary else "application/json"
        length = f"Inference-Header-Content-Length: {len(header)}\r\n" if self.binary else ""
        head = (
            f"POST {self._path}/infer HTTP/1.1\r\n"
            f"Host: {self._base.removeprefix('http://')}\r\n"
            f"Content-Type: {kind}\r\n{length}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def decode(self, answer: Answer) -> Feed:
        length = answer.headers.get("inference-header-content-length")
        return decode_outputs(answer.body, None if length is None else int(length))

    def statistics(self) -> Counts:
        path = f"{self._path}/stats"
        try:
            with _client(self._base, timeout_s=STATISTICS_TIMEOUT_S) as client:
                response = client.get(path)
            if response.status_code != 200:
                raise NoStatisticsError(f"GET {path} answered {response.status_code}")
            return Counts.of(response.json()["model_stats"])
        except httpx.TransportError as error:
            raise NoStatisticsError(f"GET {path}: {error or type(error).__name__}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise NoStatisticsError(f"GET {path} answered no statistics ({error})") from None


def describe(address: Address, *, model: str | None) -> Described:
    """What is served there; model: its name, where it is known."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    base = f"http://{host}:{address.port}"
    with _client(base, timeout_s=ASK_TIMEOUT_S) as client:
        server = _get(client, "/v2", address.url)
        name = model or _only_model(client, address.url)
        path = f"{MODEL_PATH}{name}" + (f"/versions/{address.version}" if address.version else "")
        metadata = _get(client, path, address.url)
    extensions = server.get("extensions")
    binary = isinstance(extensions, list) and _BINARY in extensions
    return Described(
        client=RestClient(base=base, path=path, binary=binary), model=name, metadata=metadata,
        server=f"{server.get('name') or ''} {server.get('version') or ''}".strip(),
    )  # fmt: skip


def decode_outputs(body: bytes, header_length: int | None) -> dict[str, Array]:
    """The named outputs of an answer. Raises ValueError where it is none."""
    document = json.loads(body if header_length is None else body[:header_length])
    offset, outputs = header_length or 0, {}
    for entry in document["outputs"]:
        dtype, shape = np.dtype(DTYPES[entry["datatype"]]), [int(size) for size in entry["shape"]]
        size = (entry.get("parameters") or {}).get("binary_data_size")
        if size is None:
            outputs[entry["name"]] = np.array(entry["data"], dtype).reshape(shape)
            continue
        if offset + size > len(body) or size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"output {entry['name']}: {size} bytes for shape {shape}")
        outputs[entry["name"]] = np.frombuffer(body[offset : offset + size], dtype).reshape(shape)
        offset += size
    return outputs


def _client(base: str, *, timeout_s: float) -> httpx.Client:
    # Proxies of the environment would be measured instead of the server.
    return httpx.Client(base_url=base, timeout=timeout_s, trust_env=False)


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
    form = f"{url.rstrip('/')}{MODEL_PATH}NAME"
    try:
        response = client.post("/v2/repository/index", json={})
        names = [str(entry["name"]) for entry in response.json()] if response.status_code == 200 else []
    except (httpx.TransportError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{url}: it does not list its models ({error})", hint=f"say which: --payload ARTIFACT, or {form}"
        ) from None
    return only_model(url, names, form=form)
