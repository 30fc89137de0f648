"""Requests and answers of one model in the binary protocol, at the speed of a copy where they repeat themselves.

A client in a loop sends the same JSON header before every tensor. What it means is worked out once and kept under its
bytes, and so is the header of the answer. Everything else goes through `dlops.serve.protocol`, which is what the kept
ones came from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dlops.errors import InputError
from dlops.serve import protocol
from dlops.serve.protocol import Encoded, InferRequest, Wanted
from dlops.serve.raws import RawInput
from dlops.signature import Array, Feed, Signature, is_floating

# Of a header that is worth keeping, and how many are kept: a client that sends ever new ones fills no memory.
_HEADER_BYTES = 4096
_KEPT = 256
# Bytes of a number in JSON: 0.1234567890, and its comma.
_TEXT = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class _Input:
    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a header says whose tensors all follow it. heads: lines and JSON of answers, by the outputs' shapes."""

    inputs: tuple[_Input, ...]
    tensor_bytes: int
    rows: int
    outputs: tuple[Wanted, ...]
    timeout_us: int | None
    heads: dict[tuple[tuple[int, ...], ...], tuple[bytes, bytes]] = field(default_factory=dict)


class Codec:
    """Of one model; used by one thread at a time."""

    def __init__(
        self, signature: Signature, *, name: str, version: str, labels: Sequence[str] = (),
        max_bytes: int = 2**62, raw_input: RawInput | None = None,
    ) -> None:  # fmt: skip
        """labels: of classes, where they are asked for. max_bytes: of an answer. raw_input: what may come as BYTES or
        pixels."""
        self._raw_input = raw_input
        self._signature = signature
        self._max_bytes = max_bytes
        self._labels = labels
        self._name = name
        self._version = version
        self._plans: dict[bytes, Plan] = {}

    def decode(self, body: bytes, *, json_bytes: int) -> tuple[InferRequest, Plan | None]:
        """The request, and what `encode` is to be given with it. Raises InputError naming the field."""
        plan = self._plans.get(body[:json_bytes]) if json_bytes <= _HEADER_BYTES else None
        feed = None if plan is None else _tensors(plan, body, json_bytes)
        if plan is not None and feed is not None:
            known = InferRequest(
                id=None, feed=feed, rows=plan.rows, outputs=plan.outputs, timeout_us=plan.timeout_us
            )  # fmt: skip
            return known, plan
        request = self.decoded(body, json_bytes=json_bytes)
        return request, self._learnt(body, json_bytes, request)

    def decoded(self, body: bytes, *, json_bytes: int | None) -> InferRequest:
        """The request, worked out anew. Raises InputError naming the field."""
        return protocol.decode_request(
            body, json_bytes=json_bytes, signature=self._signature, raw_input=self._raw_input
        )

    def encode(self, outputs: Feed, request: InferRequest, plan: Plan | None) -> tuple[bytes, list[bytes]]:
        """The answer's own header lines, each with its end, and its body in parts."""
        if plan is None:
            return self._encoded(outputs, request)
        self.check_size(outputs, plan.outputs)
        arrays = [outputs[want.name] for want in plan.outputs]
        shapes = tuple([array.shape for array in arrays])
        head = plan.heads.get(shapes)
        if head is None:
            lines, (body,) = self._encoded(outputs, request)
            if len(plan.heads) < _KEPT:
                plan.heads[shapes] = lines, body[: len(body) - sum(array.nbytes for array in arrays)]
            return lines, [body]
        return head[0], [head[1], *[array.tobytes() for array in arrays]]

    def encoded(self, outputs: Feed, request: InferRequest) -> Encoded:
        """The answer, worked out anew."""
        self.check_size(outputs, request.outputs)
        return protocol.encode_response(
            outputs, request.outputs, model=self._name, version=self._version, identity=request.id, labels=self._labels,
            batched=self._signature.inputs[0].is_batched,
        )  # fmt: skip

    def check_size(self, outputs: Feed, wanted: Sequence[Wanted]) -> None:
        """Raise InputError where the answer would be larger than the server sends."""
        size = sum([outputs[want.name].nbytes if want.binary else outputs[want.name].size * _TEXT for want in wanted])
        if size > self._max_bytes:
            raise InputError(
                f"the answer would have some {size} bytes, at most {self._max_bytes} are sent", field="outputs",
                hint="ask for fewer rows, for fewer outputs, or for binary ones",
            )  # fmt: skip

    def _encoded(self, outputs: Feed, request: InferRequest) -> tuple[bytes, list[bytes]]:
        encoded = self.encoded(outputs, request)
        if encoded.json_bytes is None:
            return b"content-type: application/json\r\n", [encoded.body]
        lines = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n"
        return lines % encoded.json_bytes, [encoded.body]

    def _learnt(self, body: bytes, json_bytes: int, request: InferRequest) -> Plan | None:
        """The plan of a header that may come again, and is kept where there is room."""
        arrays = request.feed
        sizes = sum(array.nbytes for array in arrays.values())
        if (
            not 0 < json_bytes <= _HEADER_BYTES
            or request.raws
            or request.id is not None
            or sizes != len(body) - json_bytes
            or any(array.dtype.kind not in "iu" and not is_floating(array.dtype) for array in arrays.values())
            or not all(want.binary and not want.classes for want in request.outputs)
            # On the wire numbers are little-endian; only there they are numpy's own.
            or sys.byteorder != "little"
        ):
            return None
        inputs, offset = [], 0
        for name, array in arrays.items():
            inputs.append(_Input(name=name, dtype=array.dtype, shape=array.shape, offset=offset, count=array.size))
            offset += array.nbytes
        plan = Plan(
            inputs=tuple(inputs), tensor_bytes=offset, rows=request.rows, outputs=request.outputs,
            timeout_us=request.timeout_us,
        )  # fmt: skip
        if len(self._plans) >= _KEPT:
            self._plans.clear()
        self._plans[body[:json_bytes]] = plan
        return plan


def _tensors(plan: Plan, body: bytes, json_bytes: int) -> Feed | None:
    """The tensors after the header; None where they are not what it says, which is for `decode_request` to tell."""
    if len(body) != json_bytes + plan.tensor_bytes:
        return None
    feed: dict[str, Array] = {}
    for one in plan.inputs:
        feed[one.name] = np.frombuffer(body, one.dtype, one.count, json_bytes + one.offset).reshape(one.shape)
    return feed
