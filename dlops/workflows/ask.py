"""Ask a running service about real samples, as a client would, and count its answers."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import httpx
import numpy as np
from PIL import Image

from dlops.artifact import Artifact
from dlops.errors import GateError, MachineError
from dlops.manifest import Record
from dlops.parity import run_batched
from dlops.runtimes import SessionOptions, open_session
from dlops.runtimes.session import Device
from dlops.samples import Samples
from dlops.signature import Array
from dlops.tasks import open_task

_TIMEOUT_S = 30.0


class Answers(Record):
    """What a service said of `asked` samples. correct: against the targets. predicted: the labels, in order."""

    asked: int
    correct: int
    predicted: tuple[str, ...]
    expected: tuple[str, ...]


def ask_service(url: str, samples: Samples, *, labels: Sequence[str]) -> Answers:
    """Send every sample to `POST /predict` as an image or as numbers, and read the labels.

    Raises MachineError where the service answers anything but 200, or not at all.
    """
    assert samples.targets is not None
    predicted = []
    # It is on this machine: a proxy of the environment has no part in it.
    with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
        for raw in samples.raw:
            content, media_type = as_request(raw)
            try:
                response = client.post("/predict", content=content, headers={"Content-Type": media_type})
            except httpx.HTTPError as error:
                raise MachineError(f"{url}/predict does not answer: {type(error).__name__}: {error}") from error
            if response.status_code != 200:
                raise MachineError(f"{url}/predict answered {response.status_code}: {response.text[:300]}")
            predicted.append(_first_label(response.json()))
    expected = tuple(str(labels[int(target)]) for target in samples.targets)
    correct = sum(said == meant for said, meant in zip(predicted, expected, strict=True))
    return Answers(asked=len(samples), correct=correct, predicted=tuple(predicted), expected=expected)


def ask_artifact(artifact: Artifact, samples: Samples, *, device: Device = "auto") -> tuple[str, ...]:
    """The labels that the artifact itself gives to the same samples, in this process."""
    inputs = samples.inputs
    if artifact.preprocess is not None:
        inputs = {artifact.signature.inputs[0].name: artifact.preprocess.batch(samples.raw)}
    session = open_session(artifact, SessionOptions(device=device))
    try:
        # One at a time, as the service is asked: dynamic int8 takes its ranges from all that it is given at once.
        outputs = run_batched(session, inputs, 1)
    finally:
        session.close()
    return tuple(
        str(answer["label"]) for answer in open_task(artifact.task).answer(outputs, labels=artifact.labels, top=1)
    )


def check_answers(answers: Answers, own: Sequence[str], *, title: str) -> None:
    """Raise GateError where the service gave other labels than the artifact itself gives, `own`."""
    differing = [i for i, (said, meant) in enumerate(zip(answers.predicted, own, strict=True)) if said != meant]
    if differing:
        first = differing[0]
        raise GateError(
            f"{title}: the service labels {len(differing)} of {answers.asked} samples otherwise than the artifact does "
            f"in process: sample {first} is {answers.predicted[first]!r} there and {own[first]!r} here",
            hint="dlops verify checks the artifact alone; where that passes, serving it is at fault",
        )


def as_request(raw: bytes | Array) -> tuple[bytes, str]:
    """Body and media type: an encoded image as it is, pixels as PNG, numbers as JSON."""
    if isinstance(raw, bytes):
        return raw, "application/octet-stream"
    if raw.dtype == np.uint8:
        buffer = io.BytesIO()
        Image.fromarray(raw.squeeze()).save(buffer, format="PNG")
        return buffer.getvalue(), "image/png"
    return json.dumps({"inputs": [raw.tolist()]}).encode(), "application/json"


def _first_label(document: object) -> str:
    first = document[0] if isinstance(document, list) else document
    if isinstance(first, dict) and "predictions" in first:
        first = first["predictions"][0]
    if not isinstance(first, dict) or "label" not in first:
        raise MachineError(f"/predict answered without a label: {str(document)[:200]}")
    return str(first["label"])
