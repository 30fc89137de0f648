"""Under load requests share runs; each is answered as if it had been alone."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import torch

import dlops
from dlops.artifact import Artifact
from dlops.bench.http import Connection
from dlops.runtimes import SessionOptions, open_session
from dlops.serve.launch import ServerProcess
from dlops.signature import Array

REQUESTS = 10_000
CONNECTIONS = 48
PIXELS = 784
MOST_ROWS = 5
VARIANTS = ("onnx-fp32", "onnx-int8", "onnx-int8dyn")


def artifacts(folder: Path) -> list[Artifact]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(PIXELS, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)).eval()
    x = np.random.default_rng(0).normal(size=(256, PIXELS)).astype(np.float32)
    with torch.no_grad():
        targets = model(torch.from_numpy(x)).argmax(dim=1).numpy()
    checkpoint = dlops.save_checkpoint(
        model, folder / "run", name="mlp", evaluation=(x[:128], targets[:128]), calibration=(x[128:], targets[128:])
    )
    return dlops.export_variants(
        checkpoint, variants=list(VARIANTS), out=folder / "artifacts", max_drop=100.0, model=lambda: model
    )


def encoded(name: str, number: int, rows: Array) -> bytes:
    """One request, with its number as its id and a tensor of its own."""
    head = json.dumps(
        {
            "id": str(number),
            "inputs": [
                {
                    "name": "input", "datatype": "FP32", "shape": list(rows.shape),
                    "parameters": {"binary_data_size": rows.nbytes},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()  # fmt: skip
    return (
        f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nInference-Header-Content-Length: {len(head)}\r\n"
        f"Content-Length: {len(head) + rows.nbytes}\r\n\r\n".encode()
        + head
        + rows.tobytes()
    )


def test_every_answer_is_the_one_of_its_own_rows(write_page: Callable[..., Path], tmp_path: Path) -> None:
    made = artifacts(tmp_path)
    table, wrong = [], []
    # A loud neighbour would move a scale that is taken over the whole batch.
    loudness = 10.0 ** np.random.default_rng(1).uniform(-2, 2, REQUESTS)
    with ServerProcess(*made, threads=1, env={"DLOPS_QUEUE_DELAY_US": "500"}) as server:
        for artifact in made:
            name = f"mlp-{artifact.slug}"
            session = open_session(artifact, SessionOptions(device="cpu", threads=1))
            worst, swaps = 0.0, 0

            async def client(first: int, name: str = name, session=session) -> None:
                nonlocal worst, swaps
                connection = await Connection.open("127.0.0.1", server.port)
                try:
                    for number in range(first, REQUESTS, CONNECTIONS):
                        draw = np.random.default_rng(number)
                        rows = draw.normal(size=(int(draw.integers(1, MOST_ROWS + 1)), PIXELS)) * loudness[number]
                        rows = rows.astype(np.float32)
                        answer = await connection.send(encoded(name, number, rows), timeout_s=30)
                        assert answer.status == 200, answer.body
                        length = int(answer.headers["inference-header-content-length"])
                        swaps += json.loads(answer.body[:length])["id"] != str(number)
                        found = np.frombuffer(answer.body[length:], np.float32).reshape(len(rows), 10)
                        expected = session.run({"input": rows})["logits"]
                        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
                finally:
                    connection.close()

            async def all_of_them() -> None:
                await asyncio.gather(*[client(first) for first in range(CONNECTIONS)])

            asyncio.run(all_of_them())
            session.close()
            text = httpx.get(f"{server.url}/metrics").text
            runs = float(re.search(rf'dlops_batch_rows_count\{{model="{name}"\}} (\S+)', text)[1])
            rows = float(re.search(rf'dlops_batch_rows_sum\{{model="{name}"\}} (\S+)', text)[1])
            table.append([f"`{artifact.slug}`", f"{REQUESTS:,}", f"{REQUESTS / runs:.2f}", f"{rows / runs:.2f}",
                          str(swaps), f"{worst:.1e}"])  # fmt: skip
            joined = runs < REQUESTS
            wrong += (
                [artifact.slug] if swaps or worst > 1e-4 or joined == (artifact.variant.precision == "int8dyn") else []
            )
    write_page(
        "serving-neighbours",
        title="Each answer is that of its own rows",
        says=f"An MLP, {PIXELS} → 256 → 10, in three precisions in one service; {CONNECTIONS} connections, each "
        f"request with 1 to {MOST_ROWS} rows of its own, by factors of 0.01 to 100 as loud as its neighbours', and an "
        "id. Each answer is compared with a run of the same rows alone, by ONNX Runtime in the test's own process; the "
        "difference is the largest of all, over the answer's largest value. Dynamic int8 takes its scale over all "
        "that is in a run, so no two requests share one.",
        header=["variant", "requests", "requests a run", "rows a run", "ids of others", "largest difference"],
        rows=table,
    )
    assert not wrong, table
