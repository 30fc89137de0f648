"""Requests become a batch: joined, padded to a size that was bound, and told apart again."""

from __future__ import annotations

import numpy as np
import pytest

from dlops.artifact import Artifact
from dlops.runtimes import SessionOptions, open_session
from dlops.runtimes.session import Session
from dlops.serve.instance import Instance, bucket_sizes, zeros


@pytest.fixture
def session(digits_artifact: Artifact):
    opened = open_session(digits_artifact, SessionOptions(device="cpu", threads=1))
    yield opened
    opened.close()


def images(rows: int, *, seed: int) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(seed).random((rows, 1, 8, 8)).astype(np.float32)}


@pytest.mark.parametrize("buckets", [(), (1, 2, 4, 8)])
def test_every_request_gets_what_it_gets_alone_whatever_was_joined(session: Session, buckets: tuple[int, ...]) -> None:
    instance = Instance(session, buckets=buckets)
    kept = []
    for seed, sizes in enumerate([(1,), (2, 1), (3, 2, 1), (1, 1, 1, 1, 1, 1, 1, 1), (2,), (8,)]):
        feeds = [images(rows, seed=10 * seed + n) for n, rows in enumerate(sizes)]
        ran = instance.run(feeds, sum(sizes))
        assert len(ran.outputs["logits"]) == sum(sizes)
        padded = 0 if not buckets else min(size for size in buckets if size >= sum(sizes)) - sum(sizes)
        assert ran.padded_rows == padded
        kept.append((feeds, ran.outputs["logits"]))
    # Only now: what an earlier run returned is not touched by a later one.
    for feeds, together in kept:
        alone = np.concatenate([session.run(feed)["logits"] for feed in feeds])
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_more_rows_than_the_largest_bucket_run_as_they_are(session: Session) -> None:
    ran = Instance(session, buckets=(1, 2)).run([images(2, seed=1), images(3, seed=2)], 5)
    assert (len(ran.outputs["logits"]), ran.padded_rows) == (5, 0)


def test_what_lies_in_the_padding_does_not_come_out(session: Session) -> None:
    instance = Instance(session, buckets=(4,))
    instance.run([{"image": np.full((4, 1, 8, 8), np.inf, np.float32)}], 4)
    feed = images(1, seed=3)
    np.testing.assert_allclose(instance.run([feed], 1).outputs["logits"], session.run(feed)["logits"], rtol=1e-5)


class HandingOn:
    """Its output is its input, in the same memory."""

    def __init__(self, session: Session) -> None:
        self.signature = session.signature

    def run(self, feed):
        return {"logits": feed["image"].reshape(len(feed["image"]), -1)[:, :10]}


def test_an_output_that_is_the_input_outlives_the_next_batch(session: Session) -> None:
    instance = Instance(HandingOn(session))
    feeds = [images(1, seed=4), images(1, seed=5)]
    first = instance.run(feeds, 2).outputs["logits"]
    instance.run([images(1, seed=6), images(1, seed=7)], 2)
    np.testing.assert_array_equal(first, np.concatenate([feed["image"].reshape(1, -1)[:, :10] for feed in feeds]))


def test_buckets_are_powers_of_two_and_the_largest_batch() -> None:
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(32) == (1, 2, 4, 8, 16, 32)
    assert bucket_sizes(24) == (1, 2, 4, 8, 16, 24)


def test_zeros_have_the_rows_and_the_smallest_of_every_other_dim(session: Session) -> None:
    assert {name: array.shape for name, array in zeros(session.signature, 3).items()} == {"image": (3, 1, 8, 8)}
