"""What callers of a variant's file see: tensors, or with the preprocessing inside, raw values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlops.errors import InputError, UsageError

if TYPE_CHECKING:
    from dlops.checkpoint import Checkpoint
    from dlops.export.raw_inputs import RawInputs
    from dlops.preprocess import Preprocess
    from dlops.samples import Samples
    from dlops.signature import Feed, Signature


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """A file's signature, what is done outside of it, and the evaluation samples as it takes them."""

    signature: Signature
    preprocess: Preprocess | None
    feed: Feed
    raw: RawInputs | None = None

    def reference(self, outputs: Feed) -> Feed:
        """What it is to answer where the module gives `outputs`."""
        return outputs if self.raw is None else self.raw.reference(outputs)


def raw_face(raw: RawInputs, evaluation: Samples, checkpoint: Checkpoint) -> Face:
    """Raises UsageError where the samples as they were before preprocessing do not fit."""
    try:
        feed = raw.feed(evaluation)
    except InputError as error:
        raise UsageError(
            f"{checkpoint.name}: the raw evaluation samples do not fit a model that takes raw inputs: {error.message}",
            hint="all images must have the size that --image-size names; without it resizing stays outside",
        ) from None
    return Face(signature=raw.signature, preprocess=raw.outside, feed=feed, raw=raw)
