"""A turn's calls as a message between a bench run and the process that made them."""

from __future__ import annotations

import numpy as np

from dlops.bench.channel import Message
from dlops.timing import Turn


def turn_message(turn: Turn) -> Message:
    return {"parts": list(turn.parts_ns)}, np.stack(
        [turn.starts_ns, turn.latencies_ns, *turn.parts_ns.values()]
    ).tobytes()


def read_turn(message: Message) -> Turn:
    header, payload = message
    names = header["parts"]
    starts, latencies, *parts = np.frombuffer(payload, np.int64).reshape(2 + len(names), -1)
    return Turn(starts_ns=starts, latencies_ns=latencies, parts_ns=dict(zip(names, parts, strict=True)))
