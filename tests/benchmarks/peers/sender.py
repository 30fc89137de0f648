"""The load in a process of its own: reads an order a line, keeps calls in flight as it says, answers with a line.

An order: port, requests (latin-1 text), connections, seconds, warmup_s. The answer: requests a second, quantiles of
the time from send to answer, the number of calls that each counts, and failures by kind.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

from dlops.bench.http import HttpTransport
from dlops.bench.load import closed_loop


def turn(order: dict[str, Any]) -> dict[str, Any]:
    loaded = closed_loop(
        "127.0.0.1", order["port"], [text.encode("latin-1") for text in order["requests"]],
        concurrency=order["connections"], duration_s=order["seconds"], max_warmup_s=order["warmup_s"],
        transport=HttpTransport(),
    )  # fmt: skip
    ended = np.concatenate([loaded.starts_ns + loaded.latencies_ns, loaded.earlier_ns])
    p50, p99 = np.quantile(loaded.latencies_ns, (0.5, 0.99), method="higher") if len(loaded.latencies_ns) else (0, 0)
    return {
        "rate": int((ended <= loaded.duration_ns).sum()) / loaded.duration_ns * 1e9,
        "p50_ms": p50 / 1e6, "p99_ms": p99 / 1e6, "calls": len(loaded.latencies_ns), "answered": loaded.answered,
        "errors": loaded.errors,
    }  # fmt: skip


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        print(json.dumps(turn(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
