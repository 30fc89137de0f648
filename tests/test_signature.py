"""What fits a signature and what does not, the tensor at fault always named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dlops.errors import InputError
from dlops.signature import DimRange, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="tokens", dtype="int64", shape=("batch", "length")),
        TensorSpec(name="image", dtype="float32", shape=("batch", 3, 4)),
    ),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 2)),),
    dims={"batch": DimRange(min=1, max=4), "length": DimRange(min=2, max=8)},
)


def feed(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return {"tokens": np.zeros((2, 5), np.int64), "image": np.zeros((2, 3, 4), np.float32), **changes}


@given(batch=st.integers(0, 6), length=st.integers(0, 10), channels=st.integers(2, 4))
def test_a_feed_is_taken_exactly_when_every_dim_is_in_range(batch: int, length: int, channels: int) -> None:
    given_feed = feed(tokens=np.zeros((batch, length), np.int64), image=np.zeros((batch, channels, 4), np.float32))
    if 1 <= batch <= 4 and 2 <= length <= 8 and channels == 3:
        SIGNATURE.check(given_feed)
    else:
        with pytest.raises(InputError) as caught:
            SIGNATURE.check(given_feed)
        assert caught.value.field in given_feed
        assert str(caught.value.field) in caught.value.message


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"image": np.zeros((2, 3, 4), np.float64)}, "image", "dtype float64, expected float32"),
        ({"image": np.zeros((2, 3, 4), ">f4")}, "image", "foreign byte order"),
        ({"tokens": np.zeros((2, 5), np.int32)}, "tokens", "dtype int32, expected int64"),
        ({"image": np.zeros((2, 3), np.float32)}, "image", r"shape \[2, 3\], expected \[batch, 3, 4\]"),
        ({"image": np.zeros((2, 3, 5), np.float32)}, "image", r"shape \[2, 3, 5\]"),
        ({"image": np.zeros((5, 3, 4), np.float32), "tokens": np.zeros((5, 5), np.int64)}, "tokens", "batch is 5"),
        ({"tokens": np.zeros((2, 9), np.int64)}, "tokens", "length is 9, allowed is 2 to 8"),
        ({"image": np.zeros((3, 3, 4), np.float32)}, "image", "batch is 3, but 2 in tokens"),
        ({"image": np.full((2, 3, 4), np.nan, np.float32)}, "image", "NaN or infinity"),
        ({"image": np.full((2, 3, 4), -np.inf, np.float32)}, "image", "NaN or infinity"),
        ({"mask": np.zeros(2)}, "mask", "unknown input 'mask'"),
    ],
)
def test_a_feed_that_does_not_fit_names_the_tensor(changes: dict[str, np.ndarray], field: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        SIGNATURE.check(feed(**changes))
    assert caught.value.field == field
    assert field in caught.value.message


@pytest.mark.parametrize("name", ["tokens", "image"])
def test_a_missing_input_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"input '{name}' is missing") as caught:
        SIGNATURE.check({key: array for key, array in feed().items() if key != name})
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"inputs": ()}, "at least 1 item"),
        ({"outputs": ()}, "at least 1 item"),
        ({"dims": {"batch": DimRange(max=4)}}, "without a range: length"),
        ({"inputs": SIGNATURE.inputs[:1] * 2}, "names repeat"),
        ({"outputs": (TensorSpec(name="y", dtype="float32", shape=("rows",)),)}, "without a range: rows"),
    ],
)
def test_an_inconsistent_signature_is_refused(fields: dict[str, object], said: str) -> None:
    document = {name: getattr(SIGNATURE, name) for name in ("inputs", "outputs", "dims")}
    with pytest.raises(ValidationError, match=said):
        Signature(**{**document, **fields})


@pytest.mark.parametrize("shape", [(-1, 3), ("", 3), (1.5,)])
def test_a_shape_of_anything_but_sizes_and_names_is_refused(shape: tuple[object, ...]) -> None:
    with pytest.raises(ValidationError):
        TensorSpec(name="x", dtype="float32", shape=shape)


def test_a_range_that_is_upside_down_is_refused() -> None:
    with pytest.raises(ValidationError, match="max 2 is below min 3"):
        DimRange(min=3, max=2)


def test_the_largest_batch_is_one_where_there_is_no_batch_axis() -> None:
    fixed = TensorSpec(name="x", dtype="float32", shape=(1, 3))
    assert Signature(inputs=(fixed,), outputs=(fixed,)).max_batch == 1
    assert SIGNATURE.max_batch == 4
    assert not fixed.is_batched
    assert SIGNATURE.inputs[0].is_batched


def test_a_signature_survives_json() -> None:
    assert Signature.model_validate_json(SIGNATURE.model_dump_json()) == SIGNATURE
