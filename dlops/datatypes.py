"""The Open Inference Protocol's names of dtypes, for its server and its clients."""

from __future__ import annotations

from collections.abc import Mapping

from dlops.signature import DType

DTYPES: Mapping[str, DType] = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "BF16": "bfloat16", "FP32": "float32",
    "FP64": "float64",
}  # fmt: skip
DATATYPES: Mapping[str, str] = {dtype: name for name, dtype in DTYPES.items()}
