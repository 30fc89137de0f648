"""JPEG files in and labels out, through the service and in process, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dlops.artifact import Artifact
from dlops.bench.load import closed_loop
from dlops.environment import available_cores
from dlops.runtimes import SessionOptions, open_session
from dlops.serve.launch import ServerProcess
from tests.benchmarks.serving.photos import jpegs, make_resnet18, posts

ROUNDS = 8
SECONDS = 6.0
BATCHES = (1, 2, 4, 8, 16, 32)
CONNECTIONS = (8, 16, 32)
WANTED = 0.90


def in_process(artifact: Artifact) -> Iterator[Callable[[int, float], float]]:
    """Images a second at a batch: decoded, joined and run, one batch after the other."""
    bodies = jpegs(64, seed=1)
    session = open_session(artifact, SessionOptions(device="cpu", threads=available_cores(), spin=True))
    (spec,) = artifact.signature.inputs
    assert artifact.preprocess is not None

    def rate(batch: int, seconds: float) -> float:
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            raw = [bodies[(done + row) % len(bodies)] for row in range(batch)]
            session.run({spec.name: artifact.preprocess.batch(raw)})
            done += batch
        return done / (time.perf_counter() - began)

    yield rate
    session.close()


def test_photos_through_the_service_and_in_process(write_page: Callable[..., Path], tmp_path: Path) -> None:
    artifact = make_resnet18(tmp_path)
    requests = posts(jpegs(64, seed=1))
    names = [*[("in process", batch) for batch in BATCHES], *[("service", count) for count in CONNECTIONS]]
    rates: dict[tuple[str, int], list[float]] = {name: [] for name in names}
    draw = np.random.default_rng(0)
    with ServerProcess(artifact, threads=available_cores()) as server:
        for rate in in_process(artifact):
            for name in names:  # each once, for nothing
                if name[0] == "in process":
                    rate(name[1], 1.0)
            for _ in range(ROUNDS):
                for name in draw.permutation(len(names)):
                    where, count = names[name]
                    if where == "in process":
                        rates[where, count].append(rate(count, SECONDS))
                        continue
                    loaded = closed_loop(
                        "127.0.0.1", server.port, requests, concurrency=count, duration_s=SECONDS, max_warmup_s=1.0
                    )
                    assert not loaded.errors
                    ended = np.concatenate([loaded.starts_ns + loaded.latencies_ns, loaded.earlier_ns])
                    rates[where, count].append(int((ended <= loaded.duration_ns).sum()) / loaded.duration_ns * 1e9)
    medians = {name: float(np.median(found)) for name, found in rates.items()}
    best = {
        where: max((n for n in names if n[0] == where), key=medians.__getitem__) for where in ("in process", "service")
    }
    ratios = np.array(rates[best["service"]]) / np.array(rates[best["in process"]])
    low, high = np.quantile(np.random.default_rng(0).choice(ratios, (10_000, ROUNDS)).mean(axis=1), (0.025, 0.975))
    ratio = medians[best["service"]] / medians[best["in process"]]
    write_page(
        "serving-photos",
        title="Photos through the service and in process",
        says=f"ResNet-18 in fp32 by ONNX Runtime on {available_cores()} threads: JPEG files of 500×375 in, labels out, "
        f"decoding, resizing and normalizing included. In process: one batch after the other, decoded by the thread "
        f"that runs it. The service: `POST /predict`, one photo a request, so many connections in a closed loop from "
        f"a process that shares the cores. {ROUNDS} rounds of {SECONDS:g} s each, in an order drawn at random. At the "
        f"best of each the service reaches **{ratio:.2f}** of the throughput in process (of the medians; "
        f"the mean of the rounds' ratios, 95 % interval: {low:.2f} to {high:.2f}); {WANTED:g} was asked for.",
        header=["", "batch or connections", "images/s", "least", "most"],
        rows=[
            [where, str(count), f"{medians[where, count]:.1f}", f"{min(found):.1f}", f"{max(found):.1f}"]
            for (where, count), found in rates.items()
        ],
    )
    assert ratio >= WANTED, rates
