"""Variants that take raw inputs: preprocessing and probabilities are in the model file, decoding alone is outside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlops.checkpoint import Checkpoint
from dlops.errors import UsageError
from dlops.preprocess import CenterCrop, Decode, Normalize, Preprocess, Resize, Scale, Step
from dlops.samples import Samples
from dlops.signature import Array, Feed, Signature, TensorSpec
from dlops.tasks.classification import LABEL, PROBABILITIES, softmax

Size = tuple[int, int]
"""(height, width)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawInputs:
    """signature: of the variant's file. outside: what a caller still does, inside: the steps that the file does.

    core: the signature of the checkpoint's module, which gives logits for tensors.
    """

    signature: Signature
    outside: Preprocess
    inside: tuple[Step, ...]
    core: Signature

    def feed(self, samples: Samples) -> Feed:
        """The file's inputs for raw samples. Raises InputError for one that has not the size of the file's input."""
        return {self.signature.inputs[0].name: self.outside.batch(samples.raw)}

    def reference(self, outputs: Feed) -> Feed:
        """What the file is to answer where the module gives `outputs` for the same samples, transformed outside."""
        return answers(outputs[self.core.outputs[0].name])


def answers(logits: Array) -> dict[str, Array]:
    """probabilities: (n, classes) float32. label: (n,) int64, the index of the most probable class."""
    return {
        PROBABILITIES: softmax(np.asarray(logits, np.float64)).astype(np.float32),
        LABEL: np.argmax(logits, axis=1).astype(np.int64),
    }


def plan_raw(checkpoint: Checkpoint, *, image_size: Size | None) -> RawInputs:
    """What of the checkpoint's preprocessing a file can do.

    image_size: of all images, which a resize or crop in the file needs to know; left out, these stay outside. Raises
    UsageError, with the reason, where there is no preprocessing or the model is no classifier of one input.
    """
    preprocess, signature = checkpoint.spec.preprocess, checkpoint.signature
    problem = _problem(checkpoint)
    if problem is not None or preprocess is None:
        raise UsageError(
            f"{checkpoint.name}: a variant that takes raw inputs cannot be made: {problem}",
            hint="leave --embed-preprocess (the -raw variants) out",
        )
    if preprocess.input == "numbers":
        if image_size is not None:
            raise UsageError(f"{checkpoint.name}: an image size was given, and the model takes numbers")
        outside = Preprocess(input="numbers", shape=preprocess.shape)
        inside = preprocess.steps
        taken = TensorSpec(name="numbers", dtype="float32", shape=("batch", *preprocess.shape))
    else:
        geometry: list[Step] = [step for step in preprocess.steps if isinstance(step, (Resize, CenterCrop))]
        decode = preprocess.steps[0]
        assert isinstance(decode, Decode)
        moved = geometry if image_size is not None else []
        channels, *size = preprocess.shape
        height, width = image_size or size
        outside = Preprocess(
            input="image", dtype="uint8", shape=(height, width, channels),
            steps=(decode, *(step for step in geometry if step not in moved)),
        )  # fmt: skip
        inside = (*moved, *(step for step in preprocess.steps if isinstance(step, (Scale, Normalize))))
        taken = TensorSpec(name="pixels", dtype="uint8", shape=("batch", height, width, channels))
    classes = signature.outputs[0].shape[1]
    return RawInputs(
        signature=Signature(
            inputs=(taken,),
            outputs=(
                TensorSpec(name=PROBABILITIES, dtype="float32", shape=("batch", classes)),
                TensorSpec(name=LABEL, dtype="int64", shape=("batch",)),
            ),
            dims=signature.dims,
        ),
        outside=outside, inside=inside, core=signature,
    )  # fmt: skip


def _problem(checkpoint: Checkpoint) -> str | None:
    signature, spec = checkpoint.signature, checkpoint.spec
    if spec.preprocess is None:
        return "the checkpoint has no preprocessing, it takes tensors as they are"
    if spec.preprocess.input == "text":
        return "it takes text, and what is asked for is made for images and numbers"
    if spec.task != "classification":
        return f"probabilities are those of a classifier, and its task is {spec.task}"
    if len(signature.inputs) != 1 or len(signature.outputs) != 1:
        return f"it has {len(signature.inputs)} inputs and {len(signature.outputs)} outputs, one of each is wanted"
    output = signature.outputs[0]
    if output.dtype != "float32" or signature.inputs[0].dtype != "float32" or len(output.shape) != 2:
        return f"{output.name} is {output.dtype}{list(output.shape)}, float32 logits [batch, classes] are wanted"
    names = {signature.inputs[0].name, output.name} & {"pixels", "numbers", PROBABILITIES, LABEL}
    if names:
        return f"its tensor {names.pop()} has a name that the new inputs and outputs take"
    return None
