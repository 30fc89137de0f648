"""However right and wrong requests follow one another on a connection, the right ones are answered in order until a
wrong one ends it."""

from __future__ import annotations

from random import Random

import pytest

from dlops.serve.launch import ServerProcess
from tests.serve.malformed import good, status_of
from tests.serve.malformed_rows import Row, RowAnswer, answers_of, fault_of, row

ROWS = 80


def test_no_row_of_requests_brings_it_down(server: ServerProcess) -> None:
    draw, first, answered = Random(0), 0, 0
    for _ in range(ROWS):
        made = row(draw)
        answers = answers_of(server.port, made)
        assert fault_of(made, answers) is None, made.sent[:3000]
        first, answered = first + made.first, answered + len(answers)
    assert answered > first > ROWS / 2
    assert status_of(server.port, good()) == 200


@pytest.mark.parametrize(
    ("answers", "fault"),
    [
        ([(200, 0), (200, 1), (400, None)], "None"),
        ([(200, 0)], "the first 2 are right"),
        ([(400, None), (200, 0), (200, 1)], "the first 2 are right"),
        ([(200, 0), (503, 1)], "the first 2 are right"),
        ([(200, 0), (200, 1), (200, 3), (200, 2)], "out of order"),
        ([(200, 0), (200, 1), (200, 2), (200, 2)], "out of order"),
        ([(200, 0), (200, 1), (500, None)], "answered {500}"),
        ([(200, 0), (200, 1), *[(400, None)] * 4], "6 answers to 4 requests"),
    ],
    ids=["none", "too few", "late", "refused", "disordered", "twice", "undeclared", "too many"],
)
def test_a_fault_is_seen(answers: list[tuple[int, int | None]], fault: str) -> None:
    """Else the test above could not fail."""
    made = Row(sent=b"", first=2, length=4)
    assert fault in str(fault_of(made, [RowAnswer(*one) for one in answers]))
