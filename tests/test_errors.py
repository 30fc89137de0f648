"""Errors say what, where and what next, and carry the exit status that the command ends with."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import shutil
from pathlib import Path

import pytest

from dlops import errors
from dlops.errors import (
    CorruptError,
    DlopsError,
    GateError,
    InputError,
    LossError,
    MachineError,
    NoVerdictError,
    UsageError,
    from_os_error,
    missing_package,
    unknown_name,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (GateError, 1), (LossError, 1), (UsageError, 2), (InputError, 2), (CorruptError, 2), (NoVerdictError, 3),
        (MachineError, 4), (DlopsError, 70),
    ],
)  # fmt: skip
def test_every_error_has_its_exit_status(kind: type[DlopsError], status: int) -> None:
    assert kind("x").exit_status == status


def test_the_docstring_draws_every_error() -> None:
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DlopsError)]
    assert len(kinds) == 8
    assert all(f"{kind.__name__} " in str(errors.__doc__) for kind in kinds)


def test_an_error_shows_its_hint() -> None:
    assert str(UsageError("no file", hint="make one")) == "no file (make one)"
    assert str(UsageError("no file")) == "no file"
    assert InputError("bad", field="image").field == "image"


def test_an_unknown_name_says_where_and_lists_all() -> None:
    error = unknown_name("key", "widht", ["width", "depth"], where="config.yaml")
    assert error.message == "config.yaml: unknown key 'widht'"
    assert error.hint == "did you mean width? known: depth, width"
    assert unknown_name("key", "zzz", ["width"]).hint == "known: width"


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.ENOSPC, MachineError, "the disk is full: /f"),
        (errno.EDQUOT, MachineError, "the disk is full"),
        (errno.EADDRINUSE, MachineError, "the port is in use"),
        (errno.ENOENT, UsageError, "no such file or directory: /f"),
        (errno.ENOTDIR, UsageError, "not a directory: /f"),
        (errno.EISDIR, UsageError, "is a directory: /f"),
        (errno.EACCES, MachineError, "permission denied: /f"),
        (errno.EROFS, MachineError, "permission denied: /f"),
        (errno.EIO, MachineError, "[iI]nput/output error: /f"),
    ],
)
def test_an_error_of_the_operating_system_is_put_in_words(number: int, kind: type[DlopsError], said: str) -> None:
    error = from_os_error(OSError(number, os.strerror(number), "/f"), doing="saving")
    assert type(error) is kind
    assert re.match(f"saving: {said}", error.message)


def test_of_a_copy_what_was_written_is_named(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/source", None, "/full")
    assert from_os_error(error, doing="copying").message == "copying: the disk is full: /full"
    tree = shutil.Error([("/source/a", "/full/a", "[Errno 28] No space left on device: '/full/a'")])
    assert from_os_error(tree, doing="copying").message == "copying: the disk is full: /full/a"


def test_a_missing_file_without_a_number_is_a_users_mistake() -> None:
    assert isinstance(from_os_error(FileNotFoundError("gone"), doing="reading"), UsageError)


def test_a_missing_package_names_an_extra_that_exists_and_brings_it() -> None:
    requirements = importlib.metadata.requires("dlops") or []
    for module, extra in errors._EXTRAS.items():
        assert missing_package(module, needed_for="this").hint == f"pip install 'dlops[{extra}]'"
        package = {"sklearn": "scikit-learn"}.get(module, module).replace("_", "-")
        assert any(r.startswith(package) and f'extra == "{extra}"' in r for r in requirements), module
