"""What a runtime's error says: a model that refuses what is in its input, or a session that failed."""

from __future__ import annotations

import re

# What ONNX Runtime writes before the reason, and the operator that gave it.
_ONNX_PREFIX = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : (?:.*? while running (\w+) node\. .*?Status Message: )?"
)
# Runtimes that have one kind of error for everything. Their words, and not Python's for a list or NumPy's for an array:
# those would be a bug of ours.
_OUT_OF_RANGE = re.compile(
    r"index out of range in self"  # torch's embedding
    r"|index -?\d+ is out of bounds for dimension \d+ with size \d+"  # torch's gather and indexing
    r"|Class values must be \w+[^.\n]*"  # torch's one_hot
    r"|index out of bounds: .{1,80}"  # AOTInductor's kernels
    r"|Out of range value in index tensor"  # ONNX Runtime's GatherElements
)
# ExecuTorch's InvalidArgument, by its number alone.
_EXECUTORCH = re.compile(r"execute\(\) failed with error 0x12\b")


def refusal(error: Exception) -> str | None:
    """Why a model refuses what is in a feed that fits its signature, in a line: an index out of range, say.

    None where the session may be at fault, or nothing tells the two apart. OpenVINO never refuses: it reads zeros.
    """
    text = str(error)
    kind = type(error)
    if kind.__name__ == "InvalidArgument" and kind.__module__.startswith("onnxruntime."):
        found = _ONNX_PREFIX.match(text)
        reason = text[found.end() :] if found else text
        operator = found.group(1) if found else None
        return _line(reason if operator is None else f"{operator}: {reason}")
    if not isinstance(error, RuntimeError | IndexError) and not kind.__module__.startswith("onnxruntime."):
        return None
    if (found := _OUT_OF_RANGE.search(text)) is not None:
        return _line(found.group())
    return "InvalidArgument" if _EXECUTORCH.search(text) else None


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
