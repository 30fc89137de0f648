"""Native code runs where it was made, or where one says that it may."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlops import trust
from dlops.artifact import Artifact, open_artifact
from dlops.errors import CorruptError, MachineError, UsageError
from dlops.runtimes import SessionOptions
from dlops.trust import note_made_here, trusted_model, was_made_here

PLAIN, TRUSTING = SessionOptions(device="cpu"), SessionOptions(device="cpu", trust=True)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_what_was_made_here_is_trusted_and_a_copy_elsewhere_is_not(
    digits_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(UsageError, match="not made by you on this machine") as caught,
        trusted_model(digits_artifact, PLAIN),
    ):
        pass
    assert "--trust" in str(caught.value.hint)
    note_made_here(digits_artifact.files["model"].sha256)
    with trusted_model(digits_artifact, PLAIN) as path:
        assert path.read_bytes() == digits_artifact.path("model").read_bytes()
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not path.exists()
    # Another user's folder, and another machine with the same home.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    assert not was_made_here(digits_artifact.files["model"].sha256)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert was_made_here(digits_artifact.files["model"].sha256)
    monkeypatch.setattr(trust, "_machine", lambda: "another")
    assert not was_made_here(digits_artifact.files["model"].sha256)


def test_one_can_say_that_it_is_trusted(digits_artifact: Artifact) -> None:
    with trusted_model(digits_artifact, TRUSTING) as path:
        assert path.is_file()


def test_a_file_that_was_replaced_after_it_was_opened_is_found(make_digits_artifact, tmp_path: Path) -> None:
    artifact = open_artifact(make_digits_artifact(tmp_path / "it").directory)
    note_made_here(artifact.files["model"].sha256)
    artifact.path("model").write_bytes(b"something else")
    for options in (PLAIN, TRUSTING):
        with (
            pytest.raises(CorruptError, match="not the file that its manifest names"),
            trusted_model(artifact, options),
        ):
            pass


def test_notes_that_others_could_write_prove_nothing(digits_artifact: Artifact, state: Path) -> None:
    digest = digits_artifact.files["model"].sha256
    note_made_here(digest)
    (folder,) = (state / "dlops" / "made-here").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert not was_made_here(digest)
    with pytest.raises(MachineError, match="others may write there"):
        note_made_here(digest)


def test_a_digest_names_a_file_and_no_path() -> None:
    note_made_here("0" * 64)
    for name in ("", ".", "..", "0" * 63, f"../{'0' * 64}"):
        assert not was_made_here(name)
