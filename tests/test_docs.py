"""What README and docs show is true: Python blocks run, and command lines are ones that dlops takes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from dlops.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN_MARK = "python"


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def command_lines() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for text in blocks(page, "sh", "bash", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if line.startswith("dlops "):
                    found.append((page.relative_to(ROOT).as_posix(), line))
    return found


def test_the_pages_are_there() -> None:
    assert {page.name for page in PAGES} >= {"README.md", "train.md", "export.md", "serve.md", "bench.md", "deploy.md"}
    assert len(command_lines()) > 20


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_a_command_line_in_the_docs_is_one_that_dlops_takes(page: str, line: str) -> None:
    words = shlex.split(line.partition("#")[0].partition("|")[0].partition(">")[0].rstrip("& "))[1:]
    group = typer.main.get_command(app)
    if words[0].startswith("-"):
        assert words[0] in ("--help", "-h", "--version")
        return
    context = group.make_context("dlops", words[:1], resilient_parsing=True)
    command = group.get_command(context, words[0])  # type: ignore[attr-defined]
    assert command is not None, f"{page}: {line}"
    if not {"--help", "-h"} & set(words):
        command.make_context(words[0], words[1:])


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, RUN_MARK)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(working_folder)
    # As short as it can be: how well pruned models recover is tested elsewhere.
    monkeypatch.setattr("dlops.export.recover.EPOCHS", 6)
    monkeypatch.setattr("dlops.export.recover.MIN_STEPS", 0)
    scope: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, RUN_MARK), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), scope)


def test_every_command_has_a_function_in_python_that_is_there() -> None:
    rows = re.findall(r"^\| (`dlops .*?) \| (.*) \|$", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE)
    commands = {word for first, _ in rows for word in re.findall(r"`(?:dlops )?(\w+)", first)}
    assert commands == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for _, functions in rows:
        module = "dlops"
        for name in re.findall(r"`([\w.]+)`", functions):
            given, _, attribute = name.rpartition(".")
            module = given or module
            assert callable(getattr(importlib.import_module(module), attribute)), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
