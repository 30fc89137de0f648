"""The shape of what runs an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from dlops.signature import Feed, Signature

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """device: "auto" takes CUDA where it works and says so in the placement; "cuda" fails where it does not.

    threads: for one operator; None for as many as this process may use. spin: whether idle threads spin between runs,
    which is faster for one model alone on a machine and slower for everything beside it. profile_prefix: how the path
    of the profile begins that ONNX Runtime is to record; the other runtimes are profiled from outside.
    """

    device: Device = "auto"
    threads: int | None = None
    spin: bool = True
    profile_prefix: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What truly runs: runtime "onnxruntime", device "cpu" or "cuda:0", provider "CPUExecutionProvider", say.

    precision: what the kernels compute in, which may be wider than what the file stores.
    """

    runtime: str
    device: str
    provider: str
    precision: str
    threads: int


class Session(Protocol):
    """Open until `close`. `run` may be called from any one thread at a time."""

    @property
    def signature(self) -> Signature: ...

    @property
    def placement(self) -> Placement: ...

    def run(self, feed: Feed) -> Feed:
        """Outputs by name. The feed must fit the signature: check it where it comes in, not here."""

    def close(self) -> None: ...
