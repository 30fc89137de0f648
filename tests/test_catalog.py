"""The tables name what is there, and everything that is there is in a table."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

import dlops
from dlops import catalog
from dlops.errors import DlopsError, MachineError, UsageError

PACKAGE = Path(dlops.__file__).parent
TABLES: dict[str, Mapping[str, str]] = {
    "builder": catalog.BUILDERS,
    "recipe": catalog.RECIPES,
    "dataset": catalog.DATASETS,
    "format": catalog.FORMATS,
    "runtime": catalog.RUNTIMES,
    "task": catalog.TASKS,
}
# Table, folder, and the files of that folder that are no entry: what entries share.
FOLDERS = [
    (catalog.RECIPES, "train/recipes", "*.py", set()),
    (catalog.BUILDERS, "train/models", "*.py", set()),
    (catalog.FORMATS, "export", "to_*.py", set()),
    (catalog.TASKS, "tasks", "*.py", set()),
    (catalog.RUNTIMES, "runtimes", "*.py", {"session", "eager", "refusal", "tensorrt_provider"}),
]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TABLES.items() for name in table])
def test_every_name_resolves(kind: str, name: str) -> None:
    if name == "tensorrt" and find_spec("tensorrt") is None:
        # It is not in [all]: gigabytes for machines with a GPU. tests/export/test_to_tensorrt.py has a stand-in.
        with pytest.raises(MachineError, match=f"{kind} tensorrt needs tensorrt, which is not installed"):
            catalog.resolve(TABLES[kind], kind, name)
        return
    found = catalog.resolve(TABLES[kind], kind, name)
    assert callable(found) or callable(getattr(found, "train", None))


@pytest.mark.parametrize(("table", "folder", "pattern", "shared"), FOLDERS, ids=[folder for _, folder, *_ in FOLDERS])
def test_the_table_and_the_folder_hold_the_same(
    table: Mapping[str, str], folder: str, pattern: str, shared: set[str]
) -> None:
    files = {path.stem for path in (PACKAGE / folder).glob(pattern)} - {"__init__"} - shared
    modules = {entry.partition(":")[0].rpartition(".")[2] for entry in table.values()}
    assert modules
    assert files == modules


def test_every_format_has_a_runtime_and_says_what_it_needs() -> None:
    assert set(catalog.FORMATS) == set(catalog.RUNTIMES) == set(catalog.REQUIREMENTS)


def test_an_unknown_name_lists_the_known_ones_nearest_first() -> None:
    with pytest.raises(UsageError, match="unknown recipe 'cnnn'") as caught:
        catalog.resolve(catalog.RECIPES, "recipe", "cnnn")
    assert caught.value.hint == "did you mean cnn? known: cnn, mlp"


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        ("import package_that_is_absent", MachineError, "needs package_that_is_absent, which is not installed"),
        ("raise ImportError('libcudart.so: cannot open')", MachineError, "does not import: libcudart"),
        ("from dlops import not_there_at_all", MachineError, "does not import"),
        ("import dlops.not_there_at_all", DlopsError, "in the catalog but not in the package"),
    ],
)
def test_an_entry_that_does_not_import_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, kind: type[DlopsError], said: str
) -> None:
    (tmp_path / "entry_under_test.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "entry_under_test", raising=False)
    with pytest.raises(kind, match=said):
        catalog.resolve({"x": "entry_under_test:open"}, "runtime", "x")
