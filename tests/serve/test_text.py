"""A model that reads text, from the module to the service and the page: bytes need no vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch
from torch import nn

import dlops
from dlops.artifact import Artifact, open_artifact
from dlops.errors import InputError, UsageError
from dlops.preprocess import Preprocess, Utf8
from dlops.samples import Samples
from dlops.serve.launch import ServerProcess
from tests.browser import Browser, Tab

LENGTH, PAD, END, OFFSET = 24, 0, 1, 3
TEXT = Preprocess(input="text", shape=(LENGTH,), dtype="int64", steps=(Utf8(offset=OFFSET, end=END, pad=PAD),))
LABELS = ("statement", "question")
SENTENCES = ("who is it?", "it is me.", "¿quién es?", "soy yo", "где ты?", "я тут", "?", "a longer sentence than fits")


class Asking(nn.Module):
    """Whether there is a question mark, by one weight for each byte."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256 + OFFSET, 2)
        with torch.no_grad():
            self.table.weight.zero_()
            self.table.weight[:, 0] = 0.01
            self.table.weight[ord("?") + OFFSET] = torch.tensor([0.0, 4.0])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).sum(dim=1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("text")
    samples = Samples(
        raw=tuple(sentence.encode() for sentence in SENTENCES),
        targets=np.array([int("?" in sentence) for sentence in SENTENCES]),
    )
    checkpoint = dlops.save_checkpoint(
        Asking(), folder / "run", evaluation=samples, labels=LABELS, preprocess=TEXT, name="asking", max_batch=8
    )
    [made] = dlops.export_variants(checkpoint, variants=["onnx-fp32"], model=Asking, out=folder / "artifacts")
    return open_artifact(made.directory)


@pytest.fixture(scope="module")
def server(artifact: Artifact) -> Iterator[ServerProcess]:
    with ServerProcess(artifact) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as opened:
        yield opened


def test_bytes_are_counted_from_the_offset_ended_and_padded() -> None:
    assert TEXT.apply("hé").tolist() == [107, 198, 172, 1] + [0] * 20
    assert TEXT.apply(b"").tolist() == [1] + [0] * 23
    # What is longer is cut off, and its end stands last.
    assert TEXT.apply("?" * 30).tolist() == [66] * 23 + [1]
    bare = Preprocess(input="text", shape=(3,), dtype="int64", steps=(Utf8(),))
    assert bare.batch(["a", "abcd"]).tolist() == [[97, 0, 0], [97, 98, 99]]


@pytest.mark.parametrize("raw", [b"\xff\xfe", "\ud800", [1, 2]], ids=["no UTF-8", "half a pair", "numbers"])
def test_what_is_no_text_is_refused(raw: object) -> None:
    with pytest.raises(InputError, match="text"):
        TEXT.apply(raw)


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float32"}, {"steps": ()}, {"shape": (2, 3)}, {"input": "numbers"}, {"shape": (0,)}],
    ids=str,
)
def test_a_preprocessing_of_text_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="text"):
        Preprocess(**{"input": "text", "shape": (3,), "dtype": "int64", "steps": (Utf8(),), **changes})


def test_it_is_not_put_into_the_graph(artifact: Artifact, tmp_path) -> None:
    samples = Samples(raw=(b"a?", b"b"), targets=np.array([1, 0]))
    checkpoint = dlops.save_checkpoint(Asking(), tmp_path / "run", evaluation=samples, labels=LABELS, preprocess=TEXT)
    with pytest.raises(UsageError, match="it takes text"):
        dlops.export_variants(checkpoint, variants=["onnx-fp32-raw"], model=Asking, out=tmp_path / "artifacts")


def test_text_is_answered_as_a_body_or_as_json(client: httpx.Client) -> None:
    for kind in ("text/plain", "text/plain; charset=utf-8", 'text/plain;charset="UTF-8"'):
        answer = client.post("/predict", content="где ты?".encode(), headers={"Content-Type": kind})
        assert [one["label"] for one in answer.json()["predictions"]] == ["question"], answer.text
    for inputs, labels in (("who?", ["question"]), (["who?", "me", "или?"], ["question", "statement", "question"])):
        answer = client.post("/predict", json={"inputs": inputs})
        assert [one["label"] for one in answer.json()["predictions"]] == labels


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (b"\xff", "text/plain", 400, "no UTF-8"),
        ("é".encode("latin-1"), "text/plain; charset=latin-1", 415, "UTF-8"),
        (b"GIF89a", "image/gif", 415, "text/plain"),
        (b'{"inputs": [1, 2]}', "application/json", 400, "inputs must be a text"),
        (b'{"inputs": []}', "application/json", 400, "inputs must be a text"),
        (b'{"inputs": ["a", null]}', "application/json", 400, "inputs must be a text"),
        (b"", "text/plain", 400, "empty"),
    ],
)
def test_what_is_no_text_is_a_clients_error(client: httpx.Client, content, kind, status, said) -> None:
    answer = client.post("/predict", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]
    assert client.post("/predict", json={"inputs": "who?"}).status_code == 200


def test_the_page_takes_text(browser: Browser, server: ServerProcess) -> None:
    tab = Tab(browser)
    tab.visit(f"{server.url}/?sample=2")
    tab.wait_for("document.querySelectorAll('#result .label').length === 2")
    assert tab.tell("document.getElementById('text').value") == SENTENCES[2]
    assert tab.tell("document.querySelector('#result .label span').textContent") == "question"
    tab.tell("document.getElementById('text').value = \"it's me\"")
    tab.tell("document.querySelector('#text-input button').click()")
    tab.wait_for("document.querySelector('#result .label span')?.textContent === 'statement'")
    assert "text/plain" in tab.tell("document.getElementById('curl').textContent")
    tab.close()
