"""Samples come back as they were stored, and a file that is not theirs is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import load_file, save_file

from dlops.errors import CorruptError, InputError, UsageError
from dlops.preprocess import Decode, Preprocess, Scale
from dlops.samples import Samples, fingerprint, read_samples


def stored(samples: Samples, directory: Path) -> Samples:
    path = directory / "samples.safetensors"
    path.write_bytes(samples.to_bytes())
    return read_samples(path)


def assert_same(one: Samples, other: Samples) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one.raw, other.raw, strict=True):
        assert type(mine) is type(theirs)
        if isinstance(mine, bytes):
            assert mine == theirs
        else:
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
    for feed, other_feed in ((one.inputs, other.inputs), (one.outputs, other.outputs)):
        assert list(feed) == list(other_feed)
        for name, array in feed.items():
            assert array.dtype == other_feed[name].dtype
            np.testing.assert_array_equal(array, other_feed[name])
    assert (one.targets is None) == (other.targets is None)
    if one.targets is not None:
        np.testing.assert_array_equal(one.targets, other.targets)


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_encoded_samples_come_back(tmp_path_factory: pytest.TempPathFactory, raws: list[bytes]) -> None:
    samples = Samples(raw=tuple(raws), targets=np.arange(len(raws)))
    assert_same(stored(samples, tmp_path_factory.mktemp("samples")), samples)


@given(st.lists(npst.arrays(np.uint8, npst.array_shapes(min_dims=3, max_dims=3, min_side=0)), min_size=1, max_size=5))
def test_pixels_of_different_sizes_come_back(tmp_path_factory: pytest.TempPathFactory, raws: list[np.ndarray]) -> None:
    samples = Samples(raw=tuple(raws))
    assert_same(stored(samples, tmp_path_factory.mktemp("samples")), samples)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "float16"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_numbers_come_back(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    raws = tuple(np.full(shape, value, dtype) for value in (1, 2))
    samples = Samples(raw=raws, inputs={"x": np.stack(raws)}, targets=np.array([0.5, 1.5]))
    assert_same(stored(samples, tmp_path), samples)


def test_tensors_keep_their_order_whatever_their_names_and_dtypes(tmp_path: Path) -> None:
    outputs = {
        name: np.zeros((1, 2), dtype) for name, dtype in [("z.logits", "float32"), ("a", "int64"), ("m", "bool")]
    }
    samples = Samples(raw=(b"x",), inputs={"b": np.ones((1, 1)), "a": np.zeros((1, 1))}, outputs=outputs)
    back = stored(samples, tmp_path)
    assert list(back.outputs) == ["z.logits", "a", "m"]
    assert list(back.inputs) == ["b", "a"]
    assert_same(back, samples)


def test_arrays_that_are_not_contiguous_come_back(tmp_path: Path) -> None:
    photo = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    samples = Samples(raw=(photo[:, ::-1], photo.transpose(1, 0, 2)), targets=np.arange(4)[::2])
    assert_same(stored(samples, tmp_path), samples)


@pytest.mark.parametrize(
    ("raws", "said"),
    [
        ((b"x", np.zeros(2, np.uint8)), "mix encoded and pixels"),
        ((np.zeros(2, np.uint8), np.zeros(2, np.float32)), "mix numbers and pixels"),
        ((np.zeros(2, np.int64), np.zeros(2, np.float32)), "mix arrays of float32, int64"),
        ((np.zeros(2), np.zeros((2, 2))), r"mix arrays of \[1, 2\] dimensions"),
    ],
)
def test_raw_samples_of_several_forms_are_refused(raws: tuple[bytes | np.ndarray, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Samples(raw=raws).to_bytes()


def test_tensors_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 raw samples beside tensors of \[3\]"):
        Samples(raw=(b"a", b"b"), targets=np.zeros(3))


def test_take_keeps_raw_tensors_and_targets_together() -> None:
    samples = Samples(
        raw=(b"a", b"b", b"c"), inputs={"x": np.array([[1], [2], [3]])}, outputs={"y": np.array([4, 5, 6])},
        targets=np.array([7, 8, 9]),
    )  # fmt: skip
    for indices in ([2, 0], slice(None, None, -2)):
        taken = samples.take(indices)
        assert taken.raw == (b"c", b"a")
        assert taken.inputs["x"].tolist() == [[3], [1]]
        assert taken.outputs["y"].tolist() == [6, 4]
        assert taken.targets is not None
        assert taken.targets.tolist() == [9, 7]
    assert len(samples.take([])) == 0


def test_feed_takes_the_kept_tensors_or_makes_them_from_raw() -> None:
    pixels = np.full((2, 2), 51, np.uint8)
    preprocess = Preprocess(input="image", shape=(1, 2, 2), steps=(Decode(mode="L"), Scale()))
    made = Samples(raw=(pixels,)).feed(preprocess, "image")
    np.testing.assert_allclose(made["image"], np.full((1, 1, 2, 2), 0.2), rtol=1e-6)
    kept = {"image": np.zeros((1, 1, 2, 2), np.float32)}
    assert Samples(raw=(pixels,), inputs=kept).feed(preprocess, "image") is kept
    with pytest.raises(InputError, match="neither preprocessed tensors nor a preprocessing"):
        Samples(raw=(pixels,)).feed(None, "image")


def test_fingerprints_are_equal_where_the_raw_input_is_and_survive_the_file(tmp_path: Path) -> None:
    pixels = np.arange(6, dtype=np.uint8)
    distinct = [
        pixels.reshape(2, 3), pixels.reshape(3, 2), pixels.reshape(1, 6), pixels.astype(np.int64).reshape(2, 3),
        pixels.reshape(2, 3) + np.uint8(1), pixels.tobytes(),
    ]  # fmt: skip
    assert len({fingerprint(raw) for raw in distinct}) == len(distinct)
    assert fingerprint(np.asfortranarray(distinct[0])) == fingerprint(distinct[0])
    samples = Samples(raw=(distinct[0], distinct[1]))
    assert stored(samples, tmp_path).fingerprints() == samples.fingerprints()


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_truncated_file_is_corrupt(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "samples.safetensors"
    path.write_bytes(Samples(raw=(b"abc", b"de")).to_bytes()[:kept])
    with pytest.raises(CorruptError, match="not a samples file"):
        read_samples(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"raw.data": None},
        {"raw.offsets": None},
        {"raw.offsets": np.array([0, 3, 9])},
        {"raw.offsets": np.array([1, 3, 5])},
        {"raw.offsets": np.array([0, 4, 3, 5])},
        {"raw.offsets": np.array([0.0, 3.0, 5.0])},
        {"raw.offsets": np.zeros(0, np.int64)},
        {"raw.data": np.zeros(5, np.float32)},
        {"raw.shapes": np.array([[3], [3]])},
        {"target": np.zeros(3)},
        {"input.0.x": np.zeros((9, 1))},
        {"output.logits": np.zeros((2, 1))},
        {"output.first.logits": np.zeros((2, 1))},
    ],
)
def test_a_foreign_safetensors_file_is_corrupt(tmp_path: Path, changes: dict[str, np.ndarray | None]) -> None:
    path = tmp_path / "samples.safetensors"
    path.write_bytes(Samples(raw=(b"abc", b"de")).to_bytes())
    tensors = {**load_file(path), **changes}
    save_file({name: array for name, array in tensors.items() if array is not None}, path)
    with pytest.raises(CorruptError, match="not a samples file"):
        read_samples(path)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    import pickle

    path = tmp_path / "samples.safetensors"
    path.write_bytes(pickle.dumps({"raw.data": b"x"}))
    with pytest.raises(CorruptError):
        read_samples(path)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_samples(tmp_path / "absent.safetensors")
