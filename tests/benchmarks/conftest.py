"""Experiments: what depends on a real clock or runs long. Each writes a page of docs/benchmarks/ with its numbers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dlops.environment import describe_environment

PAGES = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"

WritePage = Callable[..., Path]


def _commit() -> str:
    """What was measured, "" outside of a git repository; "and changes" where files are not as in the commit."""
    commands = (["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "--", ":(top)*.py"])
    said = [subprocess.run(one, cwd=PAGES, capture_output=True, text=True, check=False).stdout for one in commands]
    return said[0].strip() + (" and changes" if said[0] and said[1].strip() else "")


@pytest.fixture(scope="session")
def write_page() -> WritePage:
    """Writes docs/benchmarks/<name>.md: what was measured, where, with which command, and the table."""

    def write(name: str, *, title: str, says: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
        where = describe_environment()
        system = where.system.partition("-")[0]
        versions = ", ".join(f"{package} {version}" for package, version in where.packages.items())
        if commit := _commit():
            versions = versions.replace("dlops ", f"dlops at {commit}, version ", 1)
        lines = [
            f"# {title}",
            "",
            says,
            "",
            f"| {' | '.join(header)} |",
            f"|{'---|' * len(header)}",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Measured on {datetime.now(UTC):%-d %B %Y}: {where.cpu}, {where.cores} cores, {system}, "
            f"Python {where.python}; {versions}.",
            "",
            "Repeat it: `make experiments`.",
            "",
        ]
        path = PAGES / f"{name}.md"
        path.write_text("\n".join(lines))
        return path

    return write
