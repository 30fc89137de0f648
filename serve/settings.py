"""How the service is told what to do: environment variables, because `bentoml serve` starts the workers itself."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from dlops.errors import UsageError
from dlops.manifest import Record, explain_validation
from dlops.preprocess import MAX_PIXELS
from dlops.runtimes.session import Device

_PREFIX = "DLOPS_"
# Of the letters that are the same in both. The server's own variables that are no settings are far from all of them.
_NEXT_TO = 0.88
ModelControl = Literal["none", "explicit"]


class Settings(Record):
    """artifact: a folder with one or with many below it, or `bentoml:<tag>` for one in BentoML's model store; as a
    variable one of them, or a JSON list. None at all is the newest under ./artifacts. versions: how many of a model's
    newest numbered ones in a folder are served, 0 for all. model_control: explicit where clients may load and unload.
    trust: run native code that was made elsewhere. threads: for one operator; None for this worker's share of the
    cores. workers: processes. instances: sessions a worker, each with a thread of its own; None for two on a GPU and
    one on a CPU. cuda_graphs: batches are padded to sizes whose graphs were captured at the start; needs a GPU.
    max_queue_rows, max_queue_bytes: that may wait before requests are turned away; of rows None stands for as many as
    64 of the largest requests have, and 1024 at least. max_wait_s: likewise, for requests without a deadline, as the
    pace of the last runs says; those with one are turned away where they would miss it.
    queue_delay_us: that an instance waits for more rows after the first. max_batch: rows in one run, cut to what the
    artifact allows. max_body_bytes: of one request, as sent and as decompressed. max_response_bytes: of one answer.
    max_pending_bytes: of all bodies held at once. max_pixels: of all pictures of one request together; four times
    as many may wait to be decoded. jpeg_decoder: nvjpeg decodes JPEGs on the GPU that the model runs on.
    drain_delay_s: between SIGTERM, when readiness ends, and no longer accepting. token:
    that requests must bear, but for health; None where anybody may ask. receive_timeout_s: in which a request must have
    come whole, and the first on a new connection begun. max_connections: of a worker, over HTTP and gRPC each; beyond
    it over HTTP the one gives way whose client has been waited for the longest. None stands for as many as its file
    descriptors allow, and 10,000 at most. send_timeout_s: in which a client must take some of what it is sent.
    tls_cert, tls_key: PEM files of a certificate and its key, with which both ports are encrypted. tls_client_ca:
    PEM file of who signs the certificates that clients must have, where they must. log: lines for people, or one JSON
    object a line. access_log: a line for each request that was answered. trace_sample: fraction of the requests that
    are traced. grpc_port: on which the protocol is spoken over gRPC too, 0 for a free one; None for not at all.
    grpc_host: for it.
    """

    artifact: tuple[str, ...] = ()
    versions: int = Field(1, ge=0)
    model_control: ModelControl = "none"
    device: Device = "auto"
    trust: bool = False
    threads: int | None = Field(None, ge=1)
    workers: int = Field(1, ge=1, le=256)
    instances: int | None = Field(None, ge=1, le=64)
    cuda_graphs: bool = False
    max_queue_rows: int | None = Field(None, ge=1)
    max_queue_bytes: int = Field(256 * 1024 * 1024, ge=1)
    max_wait_s: float = Field(30.0, gt=0, allow_inf_nan=False)
    queue_delay_us: int = Field(0, ge=0, le=10_000_000)
    max_batch: int = Field(32, ge=1)
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1)
    max_response_bytes: int = Field(256 * 1024 * 1024, ge=1)
    max_pending_bytes: int = Field(256 * 1024 * 1024, ge=1)
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    jpeg_decoder: Literal["pillow", "nvjpeg"] = "pillow"
    max_connections: int | None = Field(None, ge=1)
    receive_timeout_s: float = Field(30.0, gt=0, allow_inf_nan=False)
    send_timeout_s: float = Field(30.0, gt=0, allow_inf_nan=False)
    grpc_port: int | None = Field(None, ge=0, le=65535)
    grpc_host: str = "127.0.0.1"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    log: Literal["text", "json"] = "text"
    access_log: bool = False
    trace_sample: float = Field(0.0, ge=0, le=1)
    token: SecretStr | None = Field(None, min_length=16)
    drain_delay_s: float = Field(0.0, ge=0, le=3600)

    @field_validator("token", mode="before")
    @classmethod
    def _can_be_sent(cls, token: object) -> object:
        """Files and shells end a secret with a line's end; what is no ASCII can stand in no header."""
        if not isinstance(token, str):
            return token
        if not token.strip():
            raise ValueError("is empty; unset it where anybody may ask")
        if not token.strip().isascii() or not token.strip().isprintable():
            raise ValueError("must be printable ASCII, to be sent in a header")
        return token.strip()

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None) or (self.tls_client_ca and not self.tls_cert):
            raise ValueError("tls_cert and tls_key go together, and tls_client_ca with them")
        return self

    @field_validator("artifact", mode="before")
    @classmethod
    def _one_or_a_list(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if not value.startswith("["):
            return (value,)
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"must be a folder or a JSON list of them: {error}") from None

    @classmethod
    def of(cls, **given: object) -> Self:
        """From arguments; None stands for one that was not given. Raises UsageError naming every one that is wrong."""
        try:
            return cls.model_validate({name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            raise UsageError(explain_validation(error)) from None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Read `DLOPS_ARTIFACT`, `DLOPS_DEVICE`, ... Raises UsageError naming every variable with a bad value."""
        environment = os.environ if environment is None else environment
        _check_names(environment, [variable(name) for name in cls.model_fields])
        given = {name: environment.get(variable(name)) for name in cls.model_fields}
        # Empty is as good as not set, but for what guards the server: a secret that is missing must not open it.
        told = {name: value for name, value in given.items() if value or (name == "token" and value is not None)}
        try:
            return cls.model_validate(told)
        except ValidationError as error:
            raise UsageError(f"{_PREFIX}* environment variables: {explain_validation(error)}") from None

    def to_environment(self) -> dict[str, str]:
        """The variables that `from_environment` reads, for a child process; what was not given leaves what is set there
        alone."""
        values = self.model_dump(exclude_unset=True)
        return {variable(name): _text(value) for name, value in values.items()}


def _check_names(environment: Mapping[str, str], known: Sequence[str]) -> None:
    """Raise UsageError for one that is next to a setting's name: passed over, a token leaves the server open."""
    for name in environment:
        if not name.startswith(_PREFIX) or name in known:
            continue
        if near := difflib.get_close_matches(name, known, n=1, cutoff=_NEXT_TO):
            raise UsageError(f"{name} is no setting", hint=f"did you mean {near[0]}?")


def _text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return json.dumps(value) if isinstance(value, tuple) else str(value)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return _PREFIX + name.upper()
