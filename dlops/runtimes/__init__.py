"""What executes an artifact: the Session protocol, and one file per runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlops import catalog
from dlops.runtimes.session import Bound, Placement, Session, SessionOptions

if TYPE_CHECKING:
    from dlops.artifact import Artifact

__all__ = ["Bound", "Placement", "Session", "SessionOptions", "open_session"]


def open_session(artifact: Artifact, options: SessionOptions | None = None) -> Session:
    """A session for an artifact that was opened (its digests are checked by then).

    Raises MachineError where the runtime's package, device or provider is not there: it never falls back in silence.
    """
    session: Session = catalog.resolve(catalog.RUNTIMES, "runtime", artifact.variant.format)(
        artifact, options or SessionOptions()
    )
    return session
