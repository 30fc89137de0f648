"""The client's side of the Open Inference Protocol: what a server serves, and the words around the tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from dlops.bench.server_time import Counts
from dlops.bench.transport import Answer, Transport
from dlops.datatypes import DTYPES
from dlops.errors import UsageError
from dlops.signature import DimRange, Feed, Signature, TensorSpec

ASK_TIMEOUT_S = 10.0
MODEL_PATH = "/v2/models/"
# Metadata gives a free dim as -1 and no range.
_UNKNOWN_MAX = 1_000_000
_SCHEMES = {"http": "REST", "oip+http": "REST", "oip+grpc": "gRPC"}
_VERSION = re.compile("versions/([^/]+)")
_FORMS = "http://HOST:PORT, oip+http://HOST:PORT or oip+grpc://HOST:PORT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A target's URL in parts. model, version: None where the URL names none."""

    url: str
    host: str
    port: int
    model: str | None
    version: str | None


class Client(Protocol):
    """One model of one server, over REST or gRPC."""

    binary: bool
    """Whether tensors go as bytes, and not as numbers in JSON."""

    @property
    def transport(self) -> Transport: ...

    def encode(self, feed: Feed) -> bytes:
        """One whole request as the transport sends it, with raw tensors in and, where the server can, out."""
        ...

    def decode(self, answer: Answer) -> Feed:
        """The named outputs of a successful answer. Raises KeyError, TypeError or ValueError where it is none."""
        ...

    def statistics(self) -> Counts:
        """What the server has counted of this model since it started. Raises NoStatisticsError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a server says of itself. server: its name and version, "" without. metadata: the model's, as REST words
    it."""

    client: Client
    model: str
    server: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model is served. server: its name and version, "" without. signature: as its metadata gives it."""

    url: str
    host: str
    port: int
    model: str
    version: str | None
    platform: str
    server: str
    signature: Signature
    client: Client


def find_endpoint(url: str, *, model: str | None) -> Endpoint:
    """Ask the server at `url` what it serves.

    url: `http://HOST:PORT` or `oip+http://HOST:PORT`, or with `/v2/models/NAME` behind it; `oip+grpc://HOST:PORT`, or
    with `/NAME`; behind NAME may stand `/versions/VERSION`. model: the name where the URL has none; without either, the
    server's repository index decides. Raises UsageError for a URL that is none or a server that does not speak the
    protocol, MachineError where nothing answers or a package is missing.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError as error:
        raise UsageError(f"target {url!r} is no {_FORMS}: {error}") from None
    if _SCHEMES.get(scheme) == "gRPC":
        from dlops.bench.oip_grpc import describe as describe_over_grpc

        address = _parse(url, prefix="/", default_port=None)
        described = describe_over_grpc(address, model=address.model or model)
    elif _SCHEMES.get(scheme) == "REST":
        from dlops.bench.oip_rest import describe as describe_over_rest

        address = _parse(url, prefix=MODEL_PATH, default_port=80)
        described = describe_over_rest(address, model=address.model or model)
    else:
        raise UsageError(f"target {url!r} is no {_FORMS}", hint="an artifact is named by its folder")
    metadata, name = described.metadata, described.model
    try:
        signature = _signature(metadata)
        versions = metadata.get("versions") or [None]
        platform = str(metadata.get("platform") or "unknown")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{url}: metadata of model {name!r} is not the Open Inference Protocol's ({error})") from None
    return Endpoint(
        url=url, host=address.host, port=address.port, model=name, version=address.version or versions[-1],
        platform=platform,
        server=described.server, signature=signature, client=described.client,
    )  # fmt: skip


def encode_request(endpoint: Endpoint, feed: Feed) -> bytes:
    """One whole request, as the endpoint's transport sends it."""
    return endpoint.client.encode(feed)


def only_model(url: str, names: list[str], *, form: str) -> str:
    """The one that a server lists. Raises UsageError for none and for several. form: a URL that says which."""
    if len(set(names)) != 1:
        listed = ", ".join(sorted(set(names))) or "no models"
        raise UsageError(f"{url}: it lists {listed}", hint=f"say which: --payload ARTIFACT, or {form}")
    return names[0]


def _parse(url: str, *, prefix: str, default_port: int | None) -> Address:
    """prefix: what stands before the model's name in the path."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise UsageError(f"target {url!r} is no {_FORMS}", hint="an artifact is named by its folder")
    if parts.username is not None or parts.query or parts.fragment:
        # Not shown: it may be a secret, and would be kept in the report.
        raise UsageError(
            f"a target at {parts.hostname} has a user, a ?query or a #fragment beside address and model",
            hint="what a server wants to know beside that cannot be sent to it",
        )
    try:
        port = default_port if parts.port is None else parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise UsageError(f"target {url!r}: the port is no number from 1 to 65535")
    if port is None:
        raise UsageError(f"target {url!r} has no port", hint="Triton's port for gRPC is 8001")
    try:
        parts.hostname.encode("idna")
    except UnicodeError as error:
        raise UsageError(f"target {url!r}: {parts.hostname!r} is no host name ({error})") from None
    model = version = None
    if parts.path not in ("", "/"):
        model, _, rest = parts.path.rstrip("/").removeprefix(prefix).partition("/")
        named = _VERSION.fullmatch(rest)
        if not parts.path.startswith(prefix) or not model or (rest and not named):
            form = f"{parts.scheme}://HOST:PORT[{prefix}NAME[/versions/VERSION]]"
            raise UsageError(f"target {url!r}: unknown path {parts.path}", hint=form)
        version = named[1] if named else None
    return Address(url=url, host=parts.hostname, port=port, model=model, version=version)


def _signature(metadata: dict[str, Any]) -> Signature:
    dims: dict[str, DimRange] = {}

    def spec(entry: dict[str, Any]) -> TensorSpec:
        shape: list[int | str] = []
        for axis, size in enumerate(int(size) for size in entry["shape"]):
            dim: int | str = size if size >= 0 else "batch" if axis == 0 else f"{entry['name']}.{axis}"
            if isinstance(dim, str):
                dims[dim] = DimRange(min=1, max=_UNKNOWN_MAX)
            shape.append(dim)
        return TensorSpec(name=entry["name"], dtype=DTYPES[entry["datatype"]], shape=tuple(shape))

    inputs = tuple(spec(entry) for entry in metadata["inputs"])
    outputs = tuple(spec(entry) for entry in metadata["outputs"])
    return Signature(inputs=inputs, outputs=outputs, dims=dims)
