"""A schedule kept whatever the server does: which request goes out on which connection, and what became of it.

No clock and no socket: those are passed in as numbers, so that a simulation drives the same code as a real run.
"""

from __future__ import annotations

from collections.abc import Sequence

# A request that was answered. Over HTTP what became of it is the status; gRPC's statuses are counted on from GRPC.
ANSWERED, GRPC = 200, 1000
# By number, as the gRPC specification has them.
GRPC_STATUSES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
# What became of a request, where it is no status.
PENDING, TIMED_OUT, REFUSED, LOST, NOT_HTTP, NOT_SENT, ABANDONED, NO_FILES, OTHER = 0, -1, -2, -3, -4, -5, -6, -7, -8
OUTCOMES = {
    TIMED_OUT: "timed out",
    REFUSED: "connection refused",
    LOST: "connection lost",
    NOT_HTTP: "not an HTTP answer",
    NOT_SENT: "not sent: the server was gone",
    ABANDONED: "not waited for after Ctrl-C",
    NO_FILES: "not sent: too many open files here (ulimit -n)",
    OTHER: "another answer than the first",
}

GONE = "no request was answered for 2 s: the server is gone or refuses everything"
GONE_AT_END = "the server was gone at the end: connections were refused or lost"


def is_gone(reasons: Sequence[str]) -> bool:
    """Whether one of a row's reasons says that the server died."""
    return GONE in reasons or GONE_AT_END in reasons


def outcome_name(outcome: int) -> str:
    """What became of a request, in words: `HTTP 503`, `gRPC UNAVAILABLE`, `timed out`."""
    if outcome >= GRPC:
        return f"gRPC {GRPC_STATUSES[outcome - GRPC]}"
    return OUTCOMES.get(outcome, f"HTTP {outcome}")


class Pacer:
    """Requests 0 to n-1 in the order they come due; connections are numbers that the caller gives.

    due_ns: ascending. sent_ns, arrived_ns: by request, -1 where it was not. outcome: a status, or one of those above.
    """

    def __init__(self, due_ns: Sequence[int]) -> None:
        self.due_ns = list(due_ns)
        self.sent_ns = [-1] * len(self.due_ns)
        self.arrived_ns = [-1] * len(self.due_ns)
        self.outcome = [PENDING] * len(self.due_ns)
        self._next = 0
        self._idle: list[int] = []
        # In the order of sending: a connection leaves when it is answered and comes in again at the end.
        self._flying: dict[int, int] = {}

    @property
    def next_due_ns(self) -> int | None:
        """When the first request that was not sent is due, which may be past; None after the last."""
        return self.due_ns[self._next] if self._next < len(self.due_ns) else None

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    @property
    def is_done(self) -> bool:
        return self._next == len(self.due_ns) and not self._flying

    def add(self, connection: int) -> None:
        """A new connection, or one that is free again."""
        # The last one that became free is the next one used: few connections stay warm instead of all half cold.
        self._idle.append(connection)

    def take(self, now_ns: int) -> tuple[int, int] | None:
        """The next (connection, request) that can go now, taken as sent; None where nothing is due or none is free."""
        request = self._next
        if request == len(self.due_ns) or self.due_ns[request] > now_ns or not self._idle:
            return None
        connection = self._idle.pop()
        self._next += 1
        self.sent_ns[request] = now_ns
        self._flying[connection] = request
        return connection, request

    def waiting(self, now_ns: int, *, at_most: int) -> int:
        """How many requests are due and have no connection, counted up to `at_most`."""
        count = 0
        while count < at_most and self._next + count < len(self.due_ns) and self.due_ns[self._next + count] <= now_ns:
            count += 1
        return count

    def is_asked(self, connection: int) -> bool:
        """Whether a request is on it that is not answered."""
        return connection in self._flying

    def answered(self, connection: int, now_ns: int, status: int) -> None:
        request = self._flying.pop(connection)
        self.arrived_ns[request] = now_ns
        self.outcome[request] = status

    def failed(self, connection: int, outcome: int) -> None:
        """The connection is gone, and with it the request that was on it, if there was one."""
        if (request := self._flying.pop(connection, None)) is not None:
            self.outcome[request] = outcome
        elif connection in self._idle:
            self._idle.remove(connection)

    def refused(self, now_ns: int, outcome: int) -> None:
        """No connection could be made for the first request that waits: it has failed."""
        if self._next < len(self.due_ns) and self.due_ns[self._next] <= now_ns:
            self.sent_ns[self._next] = now_ns
            self.outcome[self._next] = outcome
            self._next += 1

    def overdue(self, before_ns: int) -> list[int]:
        """Connections whose request was sent before then and is not answered."""
        found = []
        for connection, request in self._flying.items():
            if self.sent_ns[request] >= before_ns:
                break
            found.append(connection)
        return found

    def give_up(self) -> None:
        """Send no more: what is left is marked as not sent."""
        for request in range(self._next, len(self.due_ns)):
            self.outcome[request] = NOT_SENT
        self._next = len(self.due_ns)

    def abandon(self) -> None:
        """Wait for no answer either."""
        self.give_up()
        for request in self._flying.values():
            self.outcome[request] = ABANDONED
        self._flying.clear()
