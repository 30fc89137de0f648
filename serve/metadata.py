"""What the Open Inference Protocol, and Triton's extensions of it, say of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlops.datatypes import DATATYPES
from dlops.signature import Signature, TensorSpec


def model_metadata(signature: Signature, *, name: str, version: str, platform: str) -> dict[str, Any]:
    """The answer to GET /v2/models/NAME."""
    return {
        "name": name,
        "versions": [version],
        "platform": platform,
        "inputs": [_tensor_metadata(spec) for spec in signature.inputs],
        "outputs": [_tensor_metadata(spec) for spec in signature.outputs],
    }


def model_config(
    signature: Signature, *, name: str, platform: str, device: str, max_batch: int, instances: int = 1,
    versions: int = 1, batch_sizes: Sequence[int] = (), queue_delay_us: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The answer to GET /v2/models/NAME/config, as Triton's model configuration in JSON.

    max_batch: 0 where requests are not joined, as Triton has it; the shapes then hold the batch axis. instances: of all
    workers. versions: how many of the newest are served, 0 for all. batch_sizes: that batches are padded to or joined
    up to, where that is not max_batch alone. queue_delay_us: that an instance waits for more rows.
    """
    kind = "KIND_GPU" if device.startswith("cuda") else "KIND_CPU"
    batching = {"preferred_batch_size": list(batch_sizes), "max_queue_delay_microseconds": queue_delay_us}
    return {
        "name": name,
        "platform": platform,
        "backend": "dlops",
        "version_policy": {"latest": {"num_versions": versions}} if versions else {"all": {}},
        "max_batch_size": max_batch,
        "input": [_tensor_config(spec, batched=max_batch > 0) for spec in signature.inputs],
        "output": [_tensor_config(spec, batched=max_batch > 0) for spec in signature.outputs],
        "instance_group": [{"name": name, "kind": kind, "count": instances}],
        **({"dynamic_batching": batching} if max_batch else {}),
    }


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    shape = [-1 if isinstance(dim, str) else dim for dim in spec.shape]
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape}


def _tensor_config(spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    dims = [-1 if isinstance(dim, str) else dim for dim in spec.shape]
    # Triton spells it TYPE_FP32, and BYTES alone as TYPE_STRING, which no signature of ours holds.
    return {"name": spec.name, "data_type": f"TYPE_{DATATYPES[spec.dtype]}", "dims": dims[1:] if batched else dims}
