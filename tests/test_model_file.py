"""What a model file alone says of itself: written, read back, and every kind of file that says nothing or nonsense."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import onnx
import pytest

from dlops.artifact import Artifact
from dlops.cli import run
from dlops.embedded import EXTRA_FILE, Embedded, read_embedded
from dlops.errors import CorruptError, UsageError
from dlops.inspect_file import describe_file
from dlops.model_file import MAX_METADATA_BYTES, onnx_metadata


@pytest.fixture
def said(digits_artifact: Artifact) -> Embedded:
    return Embedded(
        name="digits", version="7", variant="onnx-fp32", task="classification", labels=("é", "1"),
        preprocess=digits_artifact.preprocess, signature=digits_artifact.signature, checkpoint_sha256="ab" * 32,
    )  # fmt: skip


def write_onnx(path: Path, artifact: Artifact, entries: Mapping[str, str]) -> Path:
    model = onnx.load(artifact.path("model"))
    onnx.helper.set_model_props(model, dict(entries))
    path.write_bytes(model.SerializeToString())
    return path


def write_zip(path: Path, members: Mapping[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {"data.pkl": b"", "version": b"3\n", **members}.items():
            archive.writestr(f"model/{name}", content)
    return path


def write_openvino(path: Path, texts: Mapping[str, str], *, before: str = "", name: str = "net") -> Path:
    said = "".join(f"<{key} value={quoteattr(text)} />" for key, text in texts.items())
    layers = '<layers><layer id="0"><rt_info><dlops><name value="a layer" /></dlops></rt_info></layer></layers>'
    path.write_text(f"""<?xml version="1.0"?>
{before}<{name} name="dlops">{layers}<rt_info><dlops>{said}</dlops><other value="1" /></rt_info></{name}>""")
    return path


def test_every_format_gives_back_what_was_written(digits_artifact: Artifact, said: Embedded, tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "a.onnx", digits_artifact, {"author": "me", **said.to_entries()})
    assert read_embedded(path) == ("onnx", said)
    assert onnx_metadata(path)["author"] == "me"
    path = write_zip(tmp_path / "a.pt", {f"extra/{EXTRA_FILE}": said.to_json().encode()})
    assert read_embedded(path) == ("torchscript", said)
    path = write_openvino(tmp_path / "a.xml", said.to_texts())
    assert read_embedded(path) == ("openvino", said)


def test_the_keys_are_those_that_are_documented(said: Embedded) -> None:
    entries = said.to_entries()
    assert set(entries) == {
        "dlops.schema", "dlops.name", "dlops.version", "dlops.variant", "dlops.task", "dlops.labels",
        "dlops.preprocess", "dlops.signature", "dlops.checkpoint_sha256", "dlops.dlops_version",
    }  # fmt: skip
    # A version of digits alone stays text, and lists are JSON for any reader.
    assert entries["dlops.version"] == "7"
    assert json.loads(entries["dlops.labels"]) == ["é", "1"]
    assert json.loads(entries["dlops.signature"])["inputs"][0]["shape"] == ["batch", 1, 8, 8]


def test_a_file_is_described_by_its_content_and_not_by_its_name(
    digits_artifact: Artifact, said: Embedded, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_onnx(tmp_path / "model.bin", digits_artifact, said.to_entries())
    assert run(["inspect", str(path)]) == 0
    text = capfd.readouterr().out
    for word in ("digits/onnx-fp32", "float32[batch, 1, 8, 8]", "2. resize", "é, 1", "ab" * 8, "no manifest"):
        assert word in text, word
    assert run(["inspect", str(path), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["embedded"]["labels"] == ["é", "1"]
    assert document == json.loads(describe_file(path).to_json())


def test_a_file_that_says_nothing_gets_one_clear_line(
    digits_artifact: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (digits_artifact.path("model"), write_zip(tmp_path / "model.pt", {})):
        assert run(["inspect", str(path)]) == 2
        output, errors = capfd.readouterr()
        assert output == ""
        assert "does not say what it is: it carries no metadata of dlops" in errors
        assert "Traceback" not in errors


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def too_much(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, {"k": "x" * (MAX_METADATA_BYTES + 1)})
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (lambda _: b"", "no ONNX, OpenVINO or TorchScript file"),
        (lambda _: b"# a text\n" * 50, "no ONNX, OpenVINO or TorchScript file"),
        (cut, "no ONNX, OpenVINO or TorchScript file, or cut short"),
        (lambda content: content + b"\x72", "no ONNX, OpenVINO or TorchScript file"),
        # A string of invalid UTF-8; a length that leads past the end; fields without end.
        (lambda content: content + b"\x72\x03\x0a\x01\xff", "no ONNX, OpenVINO or TorchScript file"),
        (lambda content: content + b"\x72\xff\xff\xff\xff\x7f", "no ONNX, OpenVINO or TorchScript file"),
        (lambda content: content + b"\x28\x01" * 100_000, "no ONNX, OpenVINO or TorchScript file"),
        (lambda content: content + b"\xff" * 11, "no ONNX, OpenVINO or TorchScript file"),
        (too_much, "bytes of metadata"),
    ],
)
def test_what_is_no_onnx_file_is_refused(
    digits_artifact: Artifact, alter: Callable[[bytes], bytes], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(alter(digits_artifact.path("model").read_bytes()))
    with pytest.raises(CorruptError, match=words):
        read_embedded(path)


def test_an_archive_that_is_none_of_torchs_or_is_damaged_is_refused(said: Embedded, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(CorruptError, match=r"no TorchScript file: it has no data\.pkl"):
        read_embedded(tmp_path / "photos.zip")
    path = write_zip(tmp_path / "a.pt", {f"extra/{EXTRA_FILE}": said.to_json().encode()})
    whole = path.read_bytes()
    path.write_bytes(cut(whole))
    with pytest.raises(CorruptError, match="the archive cannot be read"):
        read_embedded(path)
    path.write_bytes(whole.replace(b'"task":"classification"', b'"task":"clussification"', 1))
    with pytest.raises(CorruptError, match=r"the archive cannot be read: Bad CRC-32"):
        read_embedded(path)


def test_a_member_that_unpacks_to_too_much_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b" " * (MAX_METADATA_BYTES + 1)
    path = write_zip(tmp_path / "a.pt", {f"extra/{EXTRA_FILE}": content}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(CorruptError, match="unpacks to"):
        read_embedded(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"signature": "{"}, "not those that dlops writes"),
        ({"signature": "[]"}, "not a description that dlops wrote: signature"),
        ({"name": None}, "not a description that dlops wrote: name: field required"),
        ({"colour": '"blue"'}, "not a description that dlops wrote: colour"),
        ({"schema": "2", "colour": '"blue"', "dlops_version": "9.1"}, r"newer than this dlops reads .*dlops 9\.1"),
        ({"labels": "[" * 100_000}, "not those that dlops writes"),
    ],
)
def test_metadata_that_are_not_ours_are_refused_with_the_key(
    digits_artifact: Artifact, said: Embedded, changes: dict[str, str | None], words: str, tmp_path: Path
) -> None:
    altered = said.to_entries() | {f"dlops.{key}": text for key, text in changes.items() if text is not None}
    for key in (key for key, text in changes.items() if text is None):
        del altered[f"dlops.{key}"]
    path = write_onnx(tmp_path / "model.onnx", digits_artifact, altered)
    with pytest.raises(CorruptError, match=words):
        read_embedded(path)


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff"])
def test_an_extra_file_that_is_no_object_is_refused(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=r"its dlops\.json is not"):
        read_embedded(write_zip(tmp_path / "a.pt", {f"extra/{EXTRA_FILE}": text}))


def test_a_file_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        describe_file(tmp_path / "absent.onnx")


_BOMB = '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>\n'


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"before": _BOMB}, CorruptError, "it declares a document type"),
        ({"name": "svg"}, CorruptError, "XML, and no OpenVINO graph: it begins with <svg>"),
        ({"texts": {}}, UsageError, "an OpenVINO graph that does not say what it is"),
        ({"texts": {"name": "x" * (MAX_METADATA_BYTES + 1)}}, CorruptError, "bytes of metadata"),
        ({"texts": {"schema": "1", "labels": "[oops"}}, CorruptError, "not those that dlops writes"),
    ],
)
def test_xml_that_says_nothing_or_nonsense_is_named(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], said: str
) -> None:
    path = write_openvino(tmp_path / "a.xml", **{"texts": {"name": "x"}, **changes})
    with pytest.raises(kind, match=said):
        read_embedded(path)


def test_xml_that_is_cut_short_is_named(said: Embedded, tmp_path: Path) -> None:
    path = write_openvino(tmp_path / "a.xml", said.to_texts())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptError, match="not an OpenVINO graph, or cut short"):
        read_embedded(path)
