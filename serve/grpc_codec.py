"""The messages of an inference over gRPC: what a request holds, checked, and the answer to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dlops.errors import InputError
from dlops.grpc_messages import CONTENTS, service_pb2
from dlops.serve import protocol
from dlops.serve.classes import check_classes
from dlops.serve.model import ServedModel
from dlops.serve.protocol import Wanted
from dlops.serve.raws import PIXELS, RawInput
from dlops.signature import Array, Feed, Signature
from dlops.wire_format import fields

# Of ModelInferRequest, and of an input in it.
_INPUTS, _OUTPUTS, _TENSOR_CONTENTS = 5, 6, 5
_MOST_PARTS = 20_000


def check_parts(body: bytes) -> None:
    """Raise InputError where a ModelInferRequest is none, or has more parts than it needs: each may be sent in two
    bytes, and costs a hundred once it is made."""
    seen = 0
    try:
        for number, begin, end in fields(body):
            seen += 1
            if number in (_INPUTS, _OUTPUTS):
                for inner, inner_begin, inner_end in fields(body, begin, end):
                    seen += 1
                    if number == _INPUTS and inner == _TENSOR_CONTENTS:
                        for _ in fields(body, inner_begin, inner_end):
                            seen += 1
                            _check_count(seen)
                    _check_count(seen)
            _check_count(seen)
    except ValueError:
        raise InputError("the message is no ModelInferRequest") from None


def _check_count(parts: int) -> None:
    if parts > _MOST_PARTS:
        raise InputError(f"the message has more than {_MOST_PARTS} parts", hint="send numbers in raw_input_contents")


def timeout_us(request: Any) -> int | None:
    """How long the client waits, by the request's own parameter. Raises InputError."""
    if "timeout" not in request.parameters:
        return None
    timeout = request.parameters["timeout"]
    choice = timeout.WhichOneof("parameter_choice")
    return protocol.timeout_us(None if choice is None else getattr(timeout, choice))


def raws_in(request: Any, raw_input: RawInput | None) -> list[Any]:
    """The pictures or texts that came as BYTES, none where tensors did. Raises InputError."""
    if raw_input is None or len(request.inputs) != 1:
        return []
    (tensor,), raw = request.inputs, request.raw_input_contents
    if not raw_input.is_meant(name=tensor.name, datatype=tensor.datatype):
        return []
    if any(key in tensor.parameters for key in protocol.SHARED_MEMORY):
        raise protocol.SharedMemoryError(f"{tensor.name}: shared memory is not supported", field=tensor.name)
    if not raw:
        if tensor.datatype == PIXELS:
            # Counted before they are made Python's.
            raw_input.check_pixels(tuple(tensor.shape), len(tensor.contents.uint_contents))
            return raw_input.from_numbers(list(tensor.contents.uint_contents), tuple(tensor.shape))
        return raw_input.from_contents(list(tensor.contents.bytes_contents), tuple(tensor.shape))
    if len(raw) != 1 or tensor.HasField("contents"):
        raise InputError(f"{tensor.name}: one raw tensor is expected, and nothing beside it", field=tensor.name)
    return raw_input.from_binary(memoryview(raw[0]), tuple(tensor.shape), tensor.datatype)


def feed_in(request: Any, signature: Signature) -> Feed:
    """The request's tensors, checked. Raises InputError naming the one at fault."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"{len(raw)} raw tensors for {len(request.inputs)} inputs", field="raw_input_contents")
    specs = {spec.name: spec for spec in signature.inputs}
    feed: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        name, shape = tensor.name, tuple(tensor.shape)
        if any(key in tensor.parameters for key in protocol.SHARED_MEMORY):
            raise protocol.SharedMemoryError(f"{name}: shared memory is not supported", field=name)
        spec = protocol.spec_of({"name": name, "datatype": tensor.datatype}, specs, f"inputs[{index}]")
        if name in feed:
            raise InputError(f"input {name!r} is given twice", field=name)
        signature.check_shape(spec, shape)
        if raw:
            if tensor.HasField("contents"):
                raise InputError(f"{name}: both raw and typed contents are given", field=name)
            feed[name] = protocol.from_binary(memoryview(raw[index]), spec, shape)
            continue
        field = CONTENTS.get(tensor.datatype)
        if field is None:
            raise InputError(f"{name}: {tensor.datatype} comes in raw_input_contents", field=name)
        numbers = getattr(tensor.contents, field)
        # Counted before they are made Python's.
        if len(numbers) != math.prod(shape):
            raise InputError(f"{name}: {len(numbers)} values, shape {list(shape)} takes {math.prod(shape)}", field=name)
        feed[name] = protocol.from_numbers(list(numbers), spec, shape)
    signature.check(feed, finite=False)
    return feed


def wanted_by(request: Any, signature: Signature) -> list[Wanted]:
    """The outputs that are asked for, all where none is named. Raises InputError."""
    specs = {spec.name: spec for spec in signature.outputs}
    wanted = []
    for index, output in enumerate(request.outputs):
        if output.name not in specs:
            raise InputError(
                f"unknown output {output.name!r}, the model gives {', '.join(specs)}", field=f"outputs[{index}]"
            )
        if any(key in output.parameters for key in protocol.SHARED_MEMORY):
            raise protocol.SharedMemoryError(f"{output.name}: shared memory is not supported", field=output.name)
        count = output.parameters["classification"].int64_param if "classification" in output.parameters else 0
        count = check_classes(specs[output.name], count, field=f"outputs[{index}]")
        wanted.append(Wanted(name=output.name, binary=True, classes=count))
    if len({want.name for want in wanted}) != len(wanted):
        raise InputError("an output is asked for twice", field="outputs")
    return wanted or [Wanted(name=name, binary=True) for name in specs]


def response_of(model: ServedModel, outputs: Feed, wanted: Sequence[Wanted], *, identity: str) -> Any:
    """A ModelInferResponse with raw contents."""
    response = service_pb2.ModelInferResponse(model_name=model.name, model_version=model.version, id=identity)
    batched = model.signature.inputs[0].is_batched
    for want in wanted:
        datatype, array = protocol.as_wanted(outputs[want.name], want, labels=model.artifact.labels, batched=batched)
        response.outputs.add(name=want.name, datatype=datatype, shape=array.shape)
        response.raw_output_contents.append(protocol.raw_bytes(array))
    return response
