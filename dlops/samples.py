"""A handful of real inputs that travel with a checkpoint or an artifact, in one safetensors file.

They hold the raw input (encoded image bytes, uint8 pixels or numbers), and where they are kept the preprocessed
tensors, the outputs that the reference gave, and the targets. So export calibrates and any machine verifies without
the data set's code.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from dlops.errors import CorruptError, InputError, from_os_error
from dlops.preprocess import Preprocess, Raw
from dlops.signature import Array, Feed, TensorSpec, is_floating

# By safetensors' names.
_DTYPES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
RawKind = Literal["encoded", "pixels", "numbers"]
# How many an artifact carries: enough to see a wrong model, small enough to copy everywhere.
MAX_ARTIFACT_SAMPLES = 32
# What a checkpoint may carry of one split.
MAX_SAMPLES = 10_000
MAX_SAMPLES_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """raw: one entry a sample. inputs, outputs: (n, ...) a tensor, or empty. targets: (n, ...) or None."""

    raw: tuple[bytes | Array, ...]
    inputs: Feed = field(default_factory=dict)
    outputs: Feed = field(default_factory=dict)
    targets: Array | None = None

    def __post_init__(self) -> None:
        lengths = {len(array) for array in (*self.inputs.values(), *self.outputs.values())}
        if self.targets is not None:
            lengths.add(len(self.targets))
        if lengths - {len(self)}:
            raise ValueError(f"{len(self)} raw samples beside tensors of {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.raw)

    def take(self, indices: Sequence[int] | slice) -> Self:
        """The samples at those places, in that order."""
        chosen = list(range(len(self)))[indices] if isinstance(indices, slice) else list(indices)
        return type(self)(
            raw=tuple(self.raw[i] for i in chosen),
            inputs={name: array[chosen] for name, array in self.inputs.items()},
            outputs={name: array[chosen] for name, array in self.outputs.items()},
            targets=None if self.targets is None else self.targets[chosen],
        )

    def feed(self, preprocess: Preprocess | None, input_name: str) -> Feed:
        """The input tensors: the kept ones, else preprocessed from raw now."""
        if self.inputs:
            return self.inputs
        if preprocess is None:
            raise InputError("samples hold neither preprocessed tensors nor a preprocessing to make them")
        return {input_name: preprocess.batch(self.raw)}

    def fingerprints(self) -> list[str]:
        """One SHA-256 a sample over its raw input, as it is stored."""
        return [fingerprint(raw) for raw in self.raw]

    def to_bytes(self) -> bytes:
        """The safetensors file."""
        kind = _kind(self.raw)
        # Pixels and numbers may differ in shape from sample to sample, so all are laid end to end.
        if kind == "encoded":
            chunks = [np.frombuffer(_as_bytes(raw), dtype=np.uint8) for raw in self.raw]
            tensors = {}
        else:
            arrays = [np.asarray(raw) for raw in self.raw]
            ranks = {array.ndim for array in arrays}
            if len(ranks) > 1:
                raise InputError(f"raw samples mix arrays of {sorted(ranks)} dimensions")
            chunks = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
            dtypes = {array.dtype.name for array in arrays}
            if len(dtypes) > 1:
                raise InputError(f"raw samples mix arrays of {', '.join(sorted(dtypes))}", hint="give all in one dtype")
            tensors = {"raw.shapes": np.array([array.shape for array in arrays], dtype=np.int64)}
        tensors["raw.data"] = np.concatenate(chunks) if chunks else np.zeros(0, np.uint8)
        tensors["raw.offsets"] = np.cumsum([0, *[len(chunk) for chunk in chunks]], dtype=np.int64)
        for prefix, feed in (("input", self.inputs), ("output", self.outputs)):
            # Numbered, for the file is sorted by name, and a task takes its logits from the first output.
            tensors |= {f"{prefix}.{i}.{name}": np.ascontiguousarray(feed[name]) for i, name in enumerate(feed)}
        if self.targets is not None:
            tensors["target"] = np.ascontiguousarray(self.targets)
        return save(tensors)


def read_safetensors(path: Path) -> dict[str, Array]:
    """The tensors of a safetensors file, bfloat16 among them, which its own numpy reader has not.

    Raises OSError and SafetensorError, and ValueError for a type that no signature has.
    """
    content = path.read_bytes()
    tensors: dict[str, Array] = {}
    for name, found in deserialize(content):  # type: ignore[no-untyped-call]
        if found["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is {found['dtype']}, of which there are no arrays here")
        flat = np.frombuffer(found["data"], np.dtype(_DTYPES[found["dtype"]]).newbyteorder("<"))
        tensors[name] = flat.reshape(found["shape"])
    return tensors


def read_samples(path: Path) -> Samples:
    """Raises CorruptError where the file is not samples that dlops wrote."""
    try:
        tensors = read_safetensors(path)
        data, offsets = tensors["raw.data"], tensors["raw.offsets"]
        if offsets.ndim != 1 or offsets.dtype != np.int64 or len(offsets) == 0:
            raise ValueError("raw.offsets is not a list of places")
        if offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
            raise ValueError("raw.offsets does not cut raw.data")
        pieces = [data[start:end] for start, end in itertools.pairwise(offsets)]
        raw: tuple[bytes | Array, ...]
        if "raw.shapes" in tensors:
            shapes = tensors["raw.shapes"]
            raw = tuple(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))
        else:
            if data.dtype != np.uint8:
                raise ValueError(f"raw.data holds {data.dtype.name}, not bytes")
            raw = tuple(piece.tobytes() for piece in pieces)
        return Samples(
            raw=raw,
            inputs=_feed(tensors, "input"),
            outputs=_feed(tensors, "output"),
            targets=tensors.get("target"),
        )
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CorruptError(f"{path}: not a samples file that dlops wrote ({error})") from None


def _feed(tensors: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The tensors `<prefix>.<place>.<name>`, in the order of their places."""
    placed = [key.split(".", 2) for key in tensors if key.startswith(f"{prefix}.")]
    ordered = sorted(placed, key=lambda parts: int(parts[1]))
    return {name: tensors[f"{prefix}.{place}.{name}"] for _, place, name in ordered}


def fingerprint(raw: Raw) -> str:
    """SHA-256 of one raw input, its dtype and shape included."""
    if isinstance(raw, (bytes, bytearray, memoryview)):
        return hashlib.sha256(raw).hexdigest()
    array = np.ascontiguousarray(raw)
    return hashlib.sha256(f"{array.dtype.str}{array.shape}".encode() + array.tobytes()).hexdigest()


def row_fingerprints(feed: Feed, specs: Sequence[TensorSpec]) -> list[str]:
    """One SHA-256 a sample over its row of every input, in the dtypes that the model takes.

    Equal where the model sees the same, in whatever form the raw input came.
    """
    # Adding zero makes -0.0, which compares equal to 0.0, the same bytes.
    arrays = [np.ascontiguousarray(feed[spec.name]).astype(spec.dtype, copy=False) for spec in specs]
    arrays = [array + array.dtype.type(0) if is_floating(array.dtype) else array for array in arrays]
    digests = []
    for place in range(len(arrays[0])):
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(f"{array.shape[1:]}".encode())
            digest.update(array[place].tobytes())
        digests.append(digest.hexdigest())
    return digests


def _kind(raws: Sequence[bytes | Array]) -> RawKind:
    kinds: set[RawKind] = {
        "encoded" if isinstance(raw, bytes) else "pixels" if raw.dtype == np.uint8 else "numbers" for raw in raws
    }
    if len(kinds) > 1:
        raise InputError(f"raw samples mix {' and '.join(sorted(kinds))}", hint="give all in one form")
    return kinds.pop() if kinds else "encoded"


def _as_bytes(raw: bytes | Array) -> bytes:
    assert isinstance(raw, bytes)
    return raw
