"""What an artifact's folder holds beside its record: the model's files, and samples to check it with anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dlops.export.quantize import spread
from dlops.samples import MAX_ARTIFACT_SAMPLES, Samples

if TYPE_CHECKING:
    from dlops.directory import DirectoryWriter
    from dlops.export.face import Face
    from dlops.export.formats import Exported
    from dlops.manifest import Payload
    from dlops.preprocess import Preprocess
    from dlops.signature import Feed

# The samples that an artifact carries are copied with it everywhere; large inputs come in smaller number.
MAX_CARRIED_BYTES = 16 * 1024 * 1024
MIN_CARRIED = 4


def carried_samples(evaluation: Samples, face: Face, outputs: Feed, *, preprocess: Preprocess | None) -> Samples:
    """Real inputs for any machine to check itself with: raw, tensors, and what the reference answered.

    outputs: the module's on the evaluation samples. preprocess: the checkpoint's; without one the raw samples are as
    large as the tensors.
    """
    size = sum(array[0].nbytes for array in face.feed.values()) * (1 if preprocess else 2)
    size += sum(array[0].nbytes for array in outputs.values())
    limit = max(MIN_CARRIED, min(MAX_ARTIFACT_SAMPLES, MAX_CARRIED_BYTES // max(size, 1)))
    chosen = [int(i) for i in spread({"index": np.arange(len(evaluation))}, limit)["index"]]
    taken = evaluation.take(chosen)
    return Samples(
        raw=taken.raw,
        inputs={name: array[chosen] for name, array in face.feed.items()},
        outputs={name: array[chosen] for name, array in face.reference(outputs).items()},
        targets=taken.targets,
    )


def stored_files(writer: DirectoryWriter, exported: Exported) -> dict[str, Payload]:
    """The model's files among the payloads, by role."""
    if exported.together:
        payloads = writer.add_together("model", list(exported.files.values()))
        return dict(zip(exported.files, payloads, strict=True))
    extra = {role: writer.add_file(f"{role}{path.suffix}", path) for role, path in exported.extra.items()}
    return {"model": writer.add_file(exported.path.name, exported.path), **extra}
