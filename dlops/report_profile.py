"""Where a target's time went, by its runtime's profiler. How fields are documented is said in `dlops.report_rows`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dlops.manifest import Record


class ProfiledOperator(Record):
    """One operator over all profiled calls."""

    name: str
    """The node's in ONNX Runtime, the operator's in torch."""
    op_type: str
    """Such as `Conv` or `aten::addmm`."""
    provider: str
    """That it ran on; in torch the kind of device."""
    calls: int = Field(ge=1)
    """[runs] Of it in all profiled calls."""
    total_ns: int = Field(ge=0)
    """In all of them, without what ran inside it."""
    share: float
    """[fraction] Of the profile's `total_ns`."""


class ProviderUse(Record):
    """What ran on one provider (in torch: on one kind of device)."""

    operators: int = Field(ge=1)
    """[operators] That ran there."""
    share: float
    """[fraction] Of the time."""
    names: tuple[str, ...] = ()
    """Which, given for every provider but the session's own."""


class Profile(Record):
    """Where one target's time went, in a process of its own under its runtime's profiler, which slows it down.

    The shares of `operators`, of the others and of what is outside every operator add up to 1.
    """

    target: str
    """As in the row."""
    artifact: str | None
    """Its slug; null where it is none."""
    runtime: str
    """That ran it."""
    provider: str
    """The session's own."""
    device: str
    """`cpu` or `cuda:0`."""
    threads: int | None
    """[threads] For one call; null where that is the runtime's own choice."""
    batch: int = Field(ge=1)
    """[items] In one call."""
    calls: int = Field(ge=1)
    """[calls] That were profiled."""
    total_ns: int = Field(ge=0)
    """How long they took in all."""
    times: Literal["host", "device"] = "host"
    """host: an operator's time is taken on the CPU; device: it is that of its kernels on the GPU."""
    operators: tuple[ProfiledOperator, ...]
    """The costliest."""
    others: int = Field(ge=0)
    """[operators] That are not among those."""
    others_share: float
    """[fraction] Of `total_ns` that the others took."""
    outside_share: float
    """[fraction] Of `total_ns` outside every operator: the runtime itself, Python, waiting."""
    op_types: dict[str, float]
    """[fraction] Of `total_ns`, for every type."""
    providers: dict[str, ProviderUse]
    """By name."""
    copies: int = Field(0, ge=0)
    """[operators] That copy between host and device."""
    trace: str
    """The role of the file of all events, gzipped JSON in Chrome's trace format."""
    traced_calls: int = Field(ge=1)
    """[calls] That the file holds, the first ones."""

    @property
    def mean_ns(self) -> float:
        """Of a profiled call."""
        return self.total_ns / self.calls
