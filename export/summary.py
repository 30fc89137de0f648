"""One line of what a variant is, for the person who waits for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlops.export.worth import worth_text

if TYPE_CHECKING:
    from dlops.artifact import Artifact


def summary(artifact: Artifact) -> str:
    parity, accuracy = artifact.parity, artifact.accuracy
    exact = "equal" if parity.sqnr_db is None else f"{parity.sqnr_db:.0f} dB"
    parts = [f"{artifact.slug}: {artifact.model_bytes / 1e6:.2f} MB", f"parity {exact}"]
    if accuracy is not None:
        parts.append(
            f"{accuracy.metric} {accuracy.value:.2%}, {accuracy.drop_points:+.2f} points lost "
            f"({accuracy.drop_low:+.2f} to {accuracy.drop_high:+.2f}), {accuracy.flips} flips"
        )
    if artifact.repair is not None:
        parts.append(f"{len(artifact.repair.layers)} of {artifact.repair.of} layers in fp32")
    summary = " · ".join(parts)
    return summary if artifact.worth is None else f"{summary}\n  {worth_text(artifact.worth)}"
