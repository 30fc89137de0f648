"""How long a request would wait, by how long the last runs took."""

from __future__ import annotations

# Of the sums at every run: the last five or so count, so that the pace follows a machine that slows down.
_KEPT = 0.8


class Pace:
    """Of one model; written by its instances' threads, each addition whole under the caller's lock."""

    def __init__(self, instances: int) -> None:
        self._instances = instances
        self._rows = 0.0
        self._ns = 0.0

    def add(self, *, rows: int, ns: int) -> None:
        """A run of so many rows took so long."""
        self._rows = _KEPT * self._rows + rows
        self._ns = _KEPT * self._ns + ns

    def ns_for(self, rows: int) -> int:
        """Until so many rows are done, all instances together; 0 before the first run, when nothing is known."""
        return int(rows * self._ns / self._rows / self._instances) if self._rows else 0
