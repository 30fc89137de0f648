"""What folders of artifacts are called: names, versions, and what is refused."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dlops.artifact import Artifact
from dlops.errors import CorruptError, UsageError
from dlops.serve.repository import Repository, absolute, entry_of, newest_first, open_entry


def called(*sources: Path | str, versions: int | None = 1) -> list[tuple[str, str]]:
    return [(entry.name, entry.version) for entry in Repository(sources, versions=versions).entries()]


@pytest.fixture
def copy(digits_artifact: Artifact, tmp_path: Path):
    """copy("models/digits/2"): another artifact there; its folder."""

    def make(where: str) -> Path:
        shutil.copytree(digits_artifact.directory, tmp_path / where)
        return tmp_path / where

    return make


def test_one_that_is_named_has_its_own_name(copy) -> None:
    assert called(copy("anywhere")) == [("digits", "1")]


def test_a_numbered_folder_is_a_version_of_the_one_above(copy, tmp_path: Path) -> None:
    for version in ("1", "2", "10"):
        copy(f"models/numbers/{version}")
    assert called(tmp_path / "models") == [("numbers", "10")]
    assert called(tmp_path / "models", versions=2) == [("numbers", "10"), ("numbers", "2")]
    assert called(tmp_path / "models", versions=None) == [("numbers", "10"), ("numbers", "2"), ("numbers", "1")]
    # Named themselves they are served, however old.
    folders = [tmp_path / "models/numbers/1", tmp_path / "models/numbers/2/artifact.json"]
    assert called(*folders) == [("numbers", "1"), ("numbers", "2")]


def test_others_in_a_folder_are_called_by_their_variant(copy, tmp_path: Path) -> None:
    copy("models/some/onnx-fp32")
    copy("models/numbers/3")
    assert called(tmp_path / "models") == [("digits-onnx-fp32", "1"), ("numbers", "3")]


@pytest.mark.parametrize("odd", ["0", "01", "1.5", "v2"])
def test_what_is_no_whole_number_is_no_version(copy, tmp_path: Path, odd: str) -> None:
    copy(f"models/numbers/{odd}")
    assert called(tmp_path / "models") == [("digits-onnx-fp32", "1")]


def test_several_of_one_name_are_told_apart_by_their_variant(make_digits_artifact, tmp_path: Path) -> None:
    one = make_digits_artifact(tmp_path / "one").directory
    other = make_digits_artifact(tmp_path / "other", precision="int8dyn").directory
    assert called(one, other) == [("digits-onnx-fp32", "1"), ("digits-onnx-int8dyn", "1")]
    with pytest.raises(UsageError, match=r"one and .*one are both version 1 of digits-onnx-fp32") as caught:
        called(one, one)
    assert "NAME/VERSION" in str(caught.value)


def test_without_a_source_it_is_the_newest(make_digits_artifact, tmp_path: Path, monkeypatch) -> None:
    make_digits_artifact(tmp_path / "artifacts/a/onnx-fp32", name="old", created=datetime(2020, 1, 1, tzinfo=UTC))
    make_digits_artifact(tmp_path / "artifacts/b/onnx-fp32", name="new")
    monkeypatch.chdir(tmp_path)
    assert called() == [("new", "1")]


def test_what_is_not_there_or_damaged_is_refused_and_named(copy, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        called(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        called(tmp_path / "empty")
    copy("models/numbers/1")
    broken = copy("models/numbers/2") / "artifact.json"
    broken.write_text(broken.read_text()[:-100])
    with pytest.raises(UsageError, match=r"numbers/2"):
        called(tmp_path / "models")
    found, damaged = Repository([tmp_path / "models"], versions=None).readable()
    assert [entry.version for entry in found] == ["1"]
    (one,) = damaged
    assert (one.name, one.version) == ("numbers", "2")
    assert "numbers/2" in one.reason


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what BentoML imports
def test_a_tag_that_is_in_no_store_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing:latest: not in BentoML's model store"):
        called("bentoml:nothing:latest")


def test_an_entry_is_opened_only_as_what_it_was(copy, make_digits_artifact, tmp_path: Path) -> None:
    (entry,) = Repository([copy("it")]).entries()
    assert open_entry(entry).sha256 == entry.sha256
    model = next((tmp_path / "it").glob("model*.onnx"))
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError):
        open_entry(entry)
    shutil.rmtree(tmp_path / "it")
    make_digits_artifact(tmp_path / "it", name="another")
    with pytest.raises(UsageError, match="another artifact than a moment ago"):
        open_entry(entry)


def test_paths_are_made_absolute_and_tags_left(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(["a", Path("b"), "bentoml:c:latest"]) == (
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        "bentoml:c:latest",
    )


def test_an_entry_survives_its_json(digits_artifact: Artifact) -> None:
    entry = entry_of(digits_artifact, "other", "7")
    assert type(entry).model_validate_json(entry.model_dump_json()) == entry


def test_versions_are_ordered_as_numbers() -> None:
    assert newest_first(["2", "10", "1", "next"]) == ["10", "2", "1", "next"]


def test_a_version_may_be_a_link_and_is_called_as_it(copy, tmp_path: Path) -> None:
    copy(tmp_path / "store" / "8a1f")
    copy(tmp_path / "models" / "digits" / "1")
    (tmp_path / "models" / "digits" / "2").symlink_to(tmp_path / "store" / "8a1f")
    # Round and round.
    (tmp_path / "models" / "digits" / "above").symlink_to(tmp_path / "models")
    found = Repository([tmp_path / "models"], versions=None).entries()
    assert [(entry.name, entry.version) for entry in found] == [("digits", "2"), ("digits", "1")]
    (one,) = Repository([tmp_path / "models" / "digits" / "2"]).entries()
    assert (one.name, one.version) == ("digits", "2")
    open_entry(found[0])
