"""Bodies of /predict for models of other kinds than images, without a server."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from dlops.artifact import Artifact
from dlops.errors import InputError
from dlops.preprocess import Normalize, Preprocess
from dlops.serve.predict import read_inputs, to_feed
from dlops.signature import DimRange, Signature, TensorSpec


def variation(
    artifact: Artifact, *, shape: tuple[int, ...], preprocess: Preprocess | None, dtype="float32"
) -> Artifact:
    """The artifact as one that takes numbers of that shape."""
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype=dtype, shape=("batch", *shape)),),
        outputs=artifact.signature.outputs,
        dims={"batch": DimRange(max=4)},
    )
    return artifact.model_copy(update={"signature": signature, "preprocess": preprocess})


def read(document: object, artifact: Artifact) -> np.ndarray:
    async def here(call):
        return call()

    body = json.dumps(document).encode()
    raws = asyncio.run(read_inputs(body, "application/json", artifact, offload=here))
    return np.asarray(to_feed(artifact, raws)["x"])


@pytest.fixture
def features(digits_artifact) -> Artifact:
    steps = (Normalize(mean=(1.0, 1.0, 1.0), std=(2.0, 2.0, 2.0)),)
    return variation(digits_artifact, shape=(3,), preprocess=Preprocess(input="numbers", shape=(3,), steps=steps))


def test_features_are_read_one_or_several_and_normalized(features: Artifact) -> None:
    assert read({"inputs": [1, 3, 5]}, features).tolist() == [[0, 1, 2]]
    assert read({"inputs": [[1, 3, 5], [5, 3, 1.0]]}, features).tolist() == [[0, 1, 2], [2, 1, 0]]


@pytest.mark.parametrize(
    ("inputs", "field", "says"),
    [
        ([1, 2], "inputs[0]", "shape [2], expected [3]"),
        ([[1, 2, 3], [1, 2]], "inputs[1]", "shape [2], expected [3]"),
        ([1, 2, float("nan")], "inputs[0]", "NaN or infinity"),
        ([1, 2, "x"], "inputs[0]", "not an array of numbers"),
        ([[1, 2, 3], "abc"], "inputs[1]", "not an array of numbers"),
        ([[1, 2, 3]] * 5, "inputs", "at most 4"),
        ({"a": 1}, "inputs", "must be a list"),
    ],
)
def test_features_that_do_not_fit_are_refused_by_their_place(features, inputs, field: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        read({"inputs": inputs}, features)
    assert caught.value.field == field
    assert says in str(caught.value)


def test_an_artifact_without_preprocessing_takes_its_tensor(digits_artifact) -> None:
    plain = variation(digits_artifact, shape=(2, 2), preprocess=None, dtype="int64")
    assert read({"inputs": [[1, 2], [3, 4]]}, plain).tolist() == [[[1, 2], [3, 4]]]
    assert read({"inputs": [[[1, 2], [3, 4]]] * 2}, plain).shape == (2, 2, 2)
    for wrong in ([[1, 2]], [[1.5, 2], [3, 4]], [[1, 2], [3]]):
        with pytest.raises(InputError):
            read({"inputs": wrong}, plain)


def test_files_are_refused_where_the_model_takes_numbers(features, digits_artifact, digit_pngs) -> None:
    with pytest.raises(InputError, match="takes numbers, not a file"):
        to_feed(features, [digit_pngs[0]])
    with pytest.raises(InputError, match="no preprocessing"):
        to_feed(variation(digits_artifact, shape=(3,), preprocess=None), [digit_pngs[0]])


def test_a_model_of_several_inputs_is_sent_to_the_other_door(digits_artifact) -> None:
    two = digits_artifact.signature.model_copy(
        update={
            "inputs": (*digits_artifact.signature.inputs, TensorSpec(name="more", dtype="float32", shape=("batch",)))
        }
    )
    with pytest.raises(InputError, match="/v2/models/digits/infer"):
        read({"inputs": [1]}, digits_artifact.model_copy(update={"signature": two}))


def test_json_that_no_request_needs_is_not_read(features: Artifact, digits_artifact: Artifact) -> None:
    with pytest.raises(InputError, match=r"more JSON than this model's inputs can need: at most 66304 bytes"):
        read({"inputs": [[1.0] * 3] * 10_000}, features)
    with pytest.raises(InputError, match=r"at most 4194304 bytes") as refused:
        read({"inputs": "x" * (4 * 1024 * 1024)}, digits_artifact)
    assert refused.value.hint == "images come as files"
