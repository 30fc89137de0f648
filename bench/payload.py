"""What a benchmark feeds a model: real samples where there are some, else random numbers that fit the signature."""

from __future__ import annotations

import numpy as np

from dlops.artifact import Artifact
from dlops.errors import InputError, UsageError
from dlops.preprocess import Raw
from dlops.signature import Array, Feed, Signature, TensorSpec, is_floating

# Enough different inputs that a branch predictor or a cache of answers gains nothing, few enough to stay in memory.
_MAX_FEEDS = 8


def artifact_feeds(artifact: Artifact, batch: int) -> list[Feed]:
    """Up to eight feeds of `batch` rows made of the artifact's samples in turn, each checked against the signature.

    Raises UsageError where the batch is outside what the signature allows.
    """
    signature = artifact.signature
    check_batch(signature, batch, where=artifact.title)
    whole = artifact.samples().feed(artifact.preprocess, signature.inputs[0].name)
    count = len(next(iter(whole.values())))
    if count == 0:
        raise UsageError(f"{artifact.title}: it carries no samples to run", hint="export it again")
    feeds: list[Feed] = []
    for rows in _rows(count, batch):
        feeds.append({name: np.ascontiguousarray(array[rows]) for name, array in whole.items()})
    for feed in feeds:
        signature.check(feed)
    return feeds


def raw_batches(artifact: Artifact, batch: int) -> list[list[Raw]]:
    """The same rows as the feeds', as they come before preprocessing: encoded images or pixels."""
    raws = artifact.samples().raw
    return [[raws[row] for row in rows] for rows in _rows(len(raws), batch)]


def random_feed(signature: Signature, batch: int, *, seed: int = 0) -> Feed:
    """Random values that fit the signature; named dims other than the batch take their smallest size."""
    check_batch(signature, batch, where="this model")
    draw = np.random.default_rng(seed)
    return {spec.name: _random(spec, signature, batch, draw) for spec in signature.inputs}


def check_batch(signature: Signature, batch: int, *, where: str) -> None:
    """Raise UsageError unless the model takes that many rows a call."""
    if "batch" not in signature.dims:
        if batch != 1:
            raise UsageError(f"{where}: batch {batch} asked, and the model has no batch axis", hint="--batch 1")
        return
    limits = signature.dims["batch"]
    if not limits.min <= batch <= limits.max:
        raise UsageError(f"{where}: batch {batch} asked, it takes {limits.min} to {limits.max}")


def most_items(signature: Signature) -> int:
    """The largest batch that the model takes."""
    return signature.dims["batch"].max if "batch" in signature.dims else 1


def check_fits(feeds: list[Feed], signature: Signature, *, where: str) -> None:
    """Raise UsageError where feeds made for one model do not fit another that is measured beside it."""
    try:
        for feed in feeds:
            signature.check(feed)
    except InputError as error:
        raise UsageError(
            f"{where}: does not take the same inputs as the other targets ({error.message})",
            hint="measure models with different inputs in separate runs",
        ) from None


def _rows(count: int, batch: int) -> list[list[int]]:
    return [[(first + row) % count for row in range(batch)] for first in range(min(count, _MAX_FEEDS))]


def _random(spec: TensorSpec, signature: Signature, batch: int, draw: np.random.Generator) -> Array:
    shape = [
        dim if isinstance(dim, int) else batch if dim == "batch" else signature.dims[dim].min for dim in spec.shape
    ]
    dtype = np.dtype(spec.dtype)
    if is_floating(dtype):
        return draw.standard_normal(shape).astype(dtype)
    # 0 and 1 are valid wherever integers are: as indices, masks, pixels and tokens.
    return draw.integers(0, 2, shape).astype(dtype)
