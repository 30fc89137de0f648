from __future__ import annotations

import json

import numpy as np
import pytest

from dlops.errors import InputError
from dlops.serve import protocol
from dlops.serve.classes import strongest, to_bytes
from dlops.serve.metadata import model_config, model_metadata
from dlops.serve.protocol import Wanted, decode_request, encode_response, number_array
from dlops.signature import DimRange, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("batch", 3)),
        TensorSpec(name="ids", dtype="int64", shape=("batch", 2)),
    ),
    outputs=(
        TensorSpec(name="y", dtype="float32", shape=("batch", 2)),
        TensorSpec(name="z", dtype="int64", shape=("batch",)),
    ),
    dims={"batch": DimRange(max=4)},
)
X = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1.0, 2, 3.5]}
IDS = {"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [[7, 8]]}


def decode(document: object, binary: bytes = b"", *, json_bytes: int | None = None):
    head = json.dumps(document).encode()
    if binary and json_bytes is None:
        json_bytes = len(head)
    return decode_request(head + binary, json_bytes=json_bytes, signature=SIGNATURE)


def test_json_tensors_flat_and_nested_are_read() -> None:
    request = decode({"id": "a", "inputs": [X, IDS]})
    assert request.feed["x"].tolist() == [[1.0, 2.0, 3.5]]
    assert request.feed["x"].dtype == np.float32
    assert request.feed["ids"].tolist() == [[7, 8]]
    assert (request.id, request.rows, request.timeout_us) == ("a", 1, None)
    assert request.outputs == (Wanted(name="y", binary=False), Wanted(name="z", binary=False))


def test_binary_and_json_tensors_mix_in_one_request() -> None:
    x = np.arange(6, dtype="<f4").reshape(2, 3)
    entry = {"name": "x", "datatype": "FP32", "shape": [2, 3], "parameters": {"binary_data_size": 24}}
    ids = {"name": "ids", "datatype": "INT64", "shape": [2, 2], "data": [1, 2, 3, 4]}
    request = decode({"inputs": [ids, entry]}, x.tobytes())
    assert request.feed["x"].tolist() == x.tolist()
    assert request.rows == 2


def test_requested_outputs_keep_their_order_and_form() -> None:
    outputs = [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}]
    assert decode({"inputs": [X, IDS], "outputs": outputs}).outputs == (
        Wanted(name="z", binary=True),
        Wanted(name="y", binary=False),
    )
    parameters = {"binary_data_output": True, "timeout": 5000}
    request = decode({"inputs": [X, IDS], "parameters": parameters})
    assert all(want.binary for want in request.outputs)
    assert request.timeout_us == 5000


@pytest.mark.parametrize(
    ("document", "field", "says"),
    [
        ([], "body", "not a JSON object"),
        ({}, "inputs", "must be a list"),
        ({"inputs": [X]}, "ids", "missing"),
        ({"inputs": [X, X, IDS]}, "x", "twice"),
        ({"inputs": [X, IDS, X | {"name": "w"}]}, "w", "unknown input"),
        ({"inputs": ["x"]}, "inputs[0]", "must be an object"),
        ({"inputs": [X | {"name": 3}]}, "inputs[0]", "name must be a string"),
        ({"inputs": [X | {"datatype": "FP64"}, IDS]}, "x", "expected FP32"),
        ({"inputs": [X | {"shape": [2, 3]}, IDS]}, "x", "3 values, shape [2, 3] takes 6"),
        ({"inputs": [X | {"shape": [1, 4]}, IDS]}, "x", "shape [1, 4], expected [batch, 3]"),
        ({"inputs": [X | {"shape": [0, 10**30], "data": []}, IDS]}, "x", "batch is 0"),
        ({"inputs": [X | {"shape": [1, 10**30], "data": []}, IDS]}, "x", "expected [batch, 3]"),
        ({"inputs": [X | {"shape": [2**31, 3, 0], "data": []}, IDS]}, "x", "expected [batch, 3]"),
        ({"inputs": [X | {"shape": [10**30, 3], "data": []}, IDS]}, "x", f"batch is {10**30}"),
        ({"inputs": [X | {"shape": [1, -3]}, IDS]}, "x", "shape must be"),
        ({"inputs": [X | {"shape": [True, 3]}, IDS]}, "x", "shape must be"),
        ({"inputs": [X | {"shape": [3], "data": [1, 2, 3]}, IDS]}, "x", "shape [3], expected [batch, 3]"),
        ({"inputs": [X | {"shape": [0, 3], "data": []}, IDS]}, "x", "batch is 0"),
        ({"inputs": [X | {"shape": [5, 3], "data": [0] * 15}, IDS]}, "x", "batch is 5"),
        ({"inputs": [X, IDS | {"shape": [2, 2], "data": [1, 2, 3, 4]}]}, "ids", "batch is 2, but 1 in x"),
        ({"inputs": [X | {"data": [1, 1e39, 3]}, IDS]}, "x", "too large for FP32"),
        ({"inputs": [X | {"data": [1, "2", 3]}, IDS]}, "x", "not all FP32"),
        ({"inputs": [X | {"data": [[1, 2], [3]]}, IDS]}, "x", "different lengths"),
        ({"inputs": [X | {"data": {"a": 1}}, IDS]}, "x", "data must be a list"),
        ({"inputs": [X, IDS | {"data": [1.5, 2]}]}, "ids", "not all INT64"),
        ({"inputs": [X, IDS | {"data": [2**63, 2**63]}]}, "ids", "outside of"),
        ({"inputs": [X, IDS | {"data": [2**70, 1]}]}, "ids", "not all INT64"),
        ({"inputs": [X | {"parameters": {"binary_data_size": 12}}, IDS]}, "x", "both data and binary_data_size"),
        ({"inputs": [X | {"parameters": {"shared_memory_region": "r"}}, IDS]}, "x", "shared memory"),
        ({"inputs": [X, IDS], "outputs": [{"name": "q"}]}, "outputs[0]", "unknown output"),
        ({"inputs": [X, IDS], "outputs": [{"name": "y"}, {"name": "y"}]}, "outputs", "twice"),
        ({"inputs": [X, IDS], "outputs": "y"}, "outputs", "must be a list"),
        ({"inputs": [X, IDS], "id": 3}, "id", "must be a string"),
        ({"inputs": [X, IDS], "parameters": {"timeout": -1}}, "parameters", "timeout"),
        ({"inputs": [X, IDS], "parameters": {"binary_data_output": 1}}, "parameters", "true or false"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_field(document: object, field: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        decode(document)
    assert caught.value.field == field
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("size", "shape", "given", "says"),
    [
        (24, [2, 3], 20, "20 bytes are left"),
        (20, [2, 3], 20, "takes 24"),
        (24, [2, 3], 28, "4 bytes follow"),
        (24, [2**62, 2**62], 24, f"batch is {2**62}"),
        (0, [0, 10**30], 24, "batch is 0"),
        (0, [2**31, 2**31, 4, 0], 24, r"expected \[batch, 3\]"),
        (-1, [2, 3], 24, "whole number"),
        (True, [2, 3], 24, "whole number"),
    ],
)
def test_binary_sizes_that_do_not_add_up_are_refused(size: int, shape: list[int], given: int, says: str) -> None:
    x = {"name": "x", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}}
    ids = {"name": "ids", "datatype": "INT64", "shape": [2, 2], "data": [1, 2, 3, 4]}
    with pytest.raises(InputError, match=says):
        decode({"inputs": [x, ids]}, bytes(given))


def test_a_header_length_beyond_the_body_is_refused() -> None:
    with pytest.raises(InputError, match="Inference-Header-Content-Length") as caught:
        decode({"inputs": [X, IDS]}, json_bytes=10_000)
    assert caught.value.field == "Inference-Header-Content-Length"


def test_a_mask_has_infinities_in_it() -> None:
    body = json.dumps({"inputs": [X | {"data": [1, -float("inf"), float("nan")]}, IDS]}).encode()
    for json_bytes, sent in ((None, body), (len(body), body)):
        found = decode_request(sent, json_bytes=json_bytes, signature=SIGNATURE).feed["x"]
        np.testing.assert_array_equal(found, np.array([[1, -np.inf, np.nan]], np.float32))


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"inputs": NaN}'])
def test_bodies_that_are_not_json_are_refused(body: bytes) -> None:
    with pytest.raises(InputError):
        decode_request(body, json_bytes=None, signature=SIGNATURE)


def test_a_bool_tensor_takes_the_bytes_0_and_1_only() -> None:
    signature = Signature(
        inputs=(TensorSpec(name="m", dtype="bool", shape=(2,)),), outputs=SIGNATURE.outputs, dims=SIGNATURE.dims
    )
    entry = {"name": "m", "datatype": "BOOL", "shape": [2], "parameters": {"binary_data_size": 2}}
    head = json.dumps({"inputs": [entry]}).encode()
    request = decode_request(head + b"\x00\x01", json_bytes=len(head), signature=signature)
    assert request.feed["m"].tolist() == [False, True]
    with pytest.raises(InputError, match="byte 0 or 1"):
        decode_request(head + b"\x00\x02", json_bytes=len(head), signature=signature)


def test_responses_hold_json_and_binary_outputs_in_the_order_asked() -> None:
    outputs = {"y": np.array([[1, 2.5]], np.float32), "z": np.array([9], np.int64)}
    wanted = (Wanted(name="z", binary=True), Wanted(name="y", binary=False))
    encoded = encode_response(outputs, wanted, model="m", version="3", identity="a")
    assert encoded.json_bytes is not None
    document = json.loads(encoded.body[: encoded.json_bytes])
    assert document == {
        "id": "a",
        "model_name": "m",
        "model_version": "3",
        "outputs": [
            {"name": "z", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": 8}},
            {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.5]},
        ],
    }
    assert np.frombuffer(encoded.body[encoded.json_bytes :], "<i8").tolist() == [9]
    plain = encode_response(outputs, wanted[1:], model="m", version="3", identity=None)
    assert plain.json_bytes is None
    assert "id" not in json.loads(plain.body)


def test_half_precision_and_nan_outputs_encode() -> None:
    outputs = {"y": np.array([[0.5, np.nan]], np.float16)}
    encoded = encode_response(outputs, (Wanted(name="y", binary=False),), model="m", version="1", identity=None)
    value = json.loads(encoded.body)["outputs"][0]
    assert value["datatype"] == "FP16"
    assert value["data"][0] == 0.5
    assert np.isnan(value["data"][1])


def test_metadata_keeps_the_batch_axis_and_config_leaves_it_out() -> None:
    metadata = model_metadata(SIGNATURE, name="m", version="1", platform="p")
    assert metadata["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 3]}
    config = model_config(SIGNATURE, name="m", platform="p", device="cpu", max_batch=4)
    assert config["input"][0] == {"name": "x", "data_type": "TYPE_FP32", "dims": [3]}
    unbatched = model_config(SIGNATURE, name="m", platform="p", device="cpu", max_batch=0)
    assert unbatched["input"][0]["dims"] == [-1, 3]
    assert "dynamic_batching" not in unbatched


def test_numbers_keep_their_values_or_are_refused() -> None:
    assert number_array([[1, 2]], "float64", field="f").tolist() == [[1.0, 2.0]]
    with pytest.raises(InputError, match="outside of -128 to 127"):
        number_array([200], "int8", field="f")
    with pytest.raises(InputError, match="not all BOOL"):
        number_array([1], "bool", field="f")


def test_json_is_bounded_by_what_the_inputs_can_need() -> None:
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 1)),), dims={"batch": DimRange(max=2)},
    )  # fmt: skip
    limit = protocol.json_limit(signature)
    fits = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": [-1.2345678e-38] * 8}]})
    assert len(fits) < limit
    assert protocol.decode_request(fits.encode(), json_bytes=None, signature=signature).rows == 2
    with pytest.raises(InputError, match=f"at most {limit} bytes"):
        protocol.decode_request(fits.encode().ljust(limit + 1), json_bytes=None, signature=signature)


def test_json_of_nothing_but_lists_is_refused_unread() -> None:
    """Two bytes each, and in memory a hundred."""
    body = b'{"inputs":[' + b",".join([b"[]"] * protocol.MAX_JSON_LISTS) + b"]}"
    with pytest.raises(InputError, match="more than 100,000 lists and objects in the JSON"):
        protocol.read_json(body)


def test_a_timeout_beyond_all_clocks_is_as_good_as_none() -> None:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}
    body["parameters"] = {"timeout": 10**400}
    request = protocol.decode_request(json.dumps(body).encode(), json_bytes=None, signature=ONE)
    assert request.timeout_us == 86_400_000_000


ONE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3)),),
    outputs=(
        TensorSpec(name="y", dtype="float32", shape=("batch", 2)),
        TensorSpec(name="z", dtype="bool", shape=("batch",)),
    ),
    dims={"batch": DimRange(max=4)},
)


def test_bytes_alone_are_the_one_input() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    request = decode_request(x.tobytes(), json_bytes=0, signature=ONE)
    assert (request.rows, request.id, request.timeout_us) == (2, None, None)
    np.testing.assert_array_equal(request.feed["x"], x)
    assert request.outputs == (Wanted(name="y", binary=True), Wanted(name="z", binary=True))
    for body, says in (
        (x.tobytes()[:-1], "23 bytes do not tell"),
        (b"", "batch is 0"),
        (x.tobytes() * 3, "batch is 6"),
    ):
        with pytest.raises(InputError, match=says):
            decode_request(body, json_bytes=0, signature=ONE)
    with pytest.raises(InputError, match="a model with one input"):
        decode_request(x.tobytes(), json_bytes=0, signature=SIGNATURE)


@pytest.mark.parametrize(
    ("output", "count", "says"),
    [
        ("y", -1, "must be a number of classes"), ("y", True, "must be a number"), ("y", "2", "must be a number"),
        ("z", 1, "bool has no strongest classes"),
    ],
)  # fmt: skip
def test_classes_that_cannot_be_counted_are_refused(output: str, count: object, says: str) -> None:
    document = {"inputs": [X], "outputs": [{"name": output, "parameters": {"classification": count}}]}
    with pytest.raises(InputError, match=says) as caught:
        decode_request(json.dumps(document).encode(), json_bytes=None, signature=ONE)
    assert caught.value.field == "outputs[0].parameters"


def test_the_strongest_classes_in_words() -> None:
    values = np.array([[0.25, 0.5, -1], [2, 1, 3]], np.float32)
    found = strongest(values, 2, ("a", "b"), batched=True)
    assert found.tolist() == [[b"0.500000:1:b", b"0.250000:0:a"], [b"3.000000:2", b"2.000000:0:a"]]
    # Without a batch axis it is one row, whatever its shape.
    assert strongest(values, 1, (), batched=False).tolist() == [b"3.000000:5"]
    assert strongest(np.array([[7, 9]]), 5, ("a", "\u00e4"), batched=True).tolist() == [
        ["9:1:\u00e4".encode(), b"7:0:a"]
    ]
    assert to_bytes(found[:1]) == b"\x0c\0\0\x000.500000:1:b\x0c\0\0\x000.250000:0:a"
