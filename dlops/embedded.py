"""What a model file says of itself, where the manifest beside it is lost: which model, what it takes, what made it.

ONNX holds it in `metadata_props`, a key for each field, OpenVINO in the graph's `rt_info` under `dlops`, torch's
archives in the extra file `dlops.json`. ExecuTorch's programs hold nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationError

from dlops.errors import CorruptError, UsageError
from dlops.manifest import Record, Sha256, explain_validation
from dlops.model_file import ModelFormat, archive_extra, format_of, onnx_metadata, openvino_rt_info
from dlops.preprocess import Preprocess
from dlops.signature import Signature
from dlops.version import __version__

PREFIX = "dlops."
RT_INFO = "dlops"
EXTRA_FILE = "dlops.json"
# Text in ONNX and OpenVINO as it is; what is not among them is JSON there.
_PLAIN = frozenset({"name", "version", "variant", "task", "checkpoint_sha256", "dlops_version"})


class Embedded(Record):
    """Nothing in it depends on the run: the same checkpoint exported again says the same.

    variant: its slug. checkpoint_sha256: of the manifest it was made from.
    """

    newest_schema: ClassVar[int] = 1

    schema_version: int = Field(1, alias="schema", ge=1)
    name: str
    version: str
    variant: str
    task: str
    labels: tuple[str, ...]
    preprocess: Preprocess | None
    signature: Signature
    checkpoint_sha256: Sha256
    dlops_version: str = __version__

    def to_entries(self) -> dict[str, str]:
        """Key to text for ONNX's `metadata_props`, every key with the prefix `dlops.`."""
        return {PREFIX + key: text for key, text in self.to_texts().items()}

    def to_texts(self) -> dict[str, str]:
        """Key to text, for OpenVINO's `rt_info`."""
        fields = self.model_dump(mode="json", by_alias=True)
        return {key: value if key in _PLAIN else json.dumps(value) for key, value in fields.items()}

    def to_json(self) -> str:
        """One object, for TorchScript's extra file."""
        return self.model_dump_json(by_alias=True)

    @classmethod
    def from_entries(cls, entries: Mapping[str, str], *, where: str) -> Self:
        """Back from `to_entries`; keys of others are passed over. Raises CorruptError for what it did not write."""
        ours = {key.removeprefix(PREFIX): text for key, text in entries.items() if key.startswith(PREFIX)}
        try:
            fields = {key: text if key in _PLAIN else json.loads(text) for key, text in ours.items()}
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{where}: its {PREFIX}* metadata are not those that dlops writes: {error}") from None
        return cls._checked(fields, where=where)

    @classmethod
    def from_json(cls, text: bytes, *, where: str) -> Self:
        """Back from `to_json`. Raises CorruptError for what it did not write."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{where}: its {EXTRA_FILE} is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise CorruptError(f"{where}: its {EXTRA_FILE} is not a JSON object")
        return cls._checked(fields, where=where)

    @classmethod
    def _checked(cls, fields: dict[str, Any], *, where: str) -> Self:
        schema = fields.get("schema")
        if isinstance(schema, int) and schema > cls.newest_schema:
            raise CorruptError(
                f"{where}: its description has schema {schema}, newer than this dlops reads ({cls.newest_schema})",
                hint=f"it was written by dlops {fields.get('dlops_version', 'of a later version')}: upgrade to that",
            )
        try:
            # As JSON, so that a list is read where the record has a tuple.
            return cls.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            raise CorruptError(f"{where}: not a description that dlops wrote: {explain_validation(error)}") from None


def read_embedded(path: Path) -> tuple[ModelFormat, Embedded]:
    """The file's format and what it says of itself. No framework is imported, and nothing is run or unpickled.

    Raises UsageError where it says nothing, CorruptError where it is no file of a known format or says nonsense.
    """
    where = str(path)
    match form := format_of(path):
        case "torchscript" | "torchexport" | "aotinductor":
            extra = archive_extra(path, EXTRA_FILE)
            if extra is not None:
                return form, Embedded.from_json(extra, where=where)
            raise _silent(path, "a TorchScript file" if form == "torchscript" else "a .pt2 file")
        case "openvino":
            texts = openvino_rt_info(path, RT_INFO)
            if texts:
                entries = {PREFIX + key: text for key, text in texts.items()}
                return form, Embedded.from_entries(entries, where=where)
            raise _silent(path, "an OpenVINO graph")
        case "executorch":
            raise _silent(path, "an ExecuTorch program")
        case "tensorrt":
            raise _silent(path, "a TensorRT engine")
        case "onnx":
            entries = onnx_metadata(path)
            if any(key.startswith(PREFIX) for key in entries):
                return form, Embedded.from_entries(entries, where=where)
            raise _silent(path, "an ONNX file")


def _silent(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path}: {what} that does not say what it is: it carries no metadata of dlops",
        hint="another tool or an older dlops wrote it; of an artifact, inspect the folder",
    )
