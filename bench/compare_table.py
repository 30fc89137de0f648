"""A comparison as a table for the console and as Markdown."""

from __future__ import annotations

import io

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dlops.bench import cells
from dlops.bench.compare import Compared, Comparison, Judged, Quantity, Word

_HEADINGS = ("", "BASE", "NEW", "NEW/BASE", "interval", "verdict")
_NAMES: dict[Quantity, str] = {"p50": "p50 ms", "p99": "p99 ms", "throughput": "items/s"}
_STYLES: dict[Word, str] = {"REGRESSED": "bold red", "IMPROVED": "green", "INCONCLUSIVE": "yellow"}


def render_comparison(comparison: Comparison) -> RenderableType:
    """For `Console.print`: a section a row, then what must be known about them. Fits 80 columns."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    for heading in _HEADINGS:
        left = heading in ("", "verdict")
        table.add_column(heading, justify="left" if left else "right", no_wrap=bool(heading), overflow="fold")
    parts: list[RenderableType] = []
    for number, row in enumerate(comparison.rows, start=1):
        table.add_section()
        mark = " *" if row.against else ""
        if len(comparison.rows) > 1:
            table.add_row(Text(f"row {number}{mark}", style="bold"))
        # Above the table: a long name in it would push the numbers off the page.
        label = f"row {number}: " if len(comparison.rows) > 1 else ""
        parts.append(Text(f"{label}{_title(row)}{mark}", style="bold"))
        for judged in row.judged:
            *values, word = _cells(judged)
            table.add_row(*values, Text(word, style=_STYLES.get(judged.word, "")))
    return Group(*parts, Text(), table, *[Text(line) for line in ("", *notes(comparison))])


def comparison_text(comparison: Comparison, *, width: int = 80) -> str:
    """The console table without colours."""
    console = Console(file=io.StringIO(), width=width, highlight=False, no_color=True, legacy_windows=False)
    with console.capture() as capture:
        console.print(render_comparison(comparison))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def comparison_markdown(comparison: Comparison) -> str:
    """One table for a pull request, then what must be known about it."""
    lines = [f"**{_escaped(comparison.new)} against {_escaped(comparison.base)}: {comparison.verdict}**", ""]
    lines += ["| row | | BASE | NEW | NEW/BASE | interval | verdict |", "|---|---|---:|---:|---:|---:|---|"]
    for row in comparison.rows:
        mark = " \\*" if row.against else ""
        for judged in row.judged:
            *values, word = _cells(judged)
            strong = f"**{word}**" if judged.word == "REGRESSED" else word
            lines.append("| " + " | ".join([_escaped(_title(row)) + mark, *values, strong]) + " |")
    return "\n".join([*lines, "", *[f"- {_escaped(line)}" for line in notes(comparison, numbered=False)]]) + "\n"


def notes(comparison: Comparison, *, numbered: bool = True) -> list[str]:
    """How to read the words, what stands against rows and quantities, what has no partner, what differs.

    numbered: several rows are called by their numbers in the console table, else by their names.
    """
    lines = [_rule(comparison)]
    if comparison.partial:
        lines.insert(0, "This comparison is partial: a run was interrupted or a target failed.")
    for number, row in enumerate(comparison.rows, start=1):
        where = (f"row {number}" if numbered else _title(row)) if len(comparison.rows) > 1 else ""
        for judged in row.judged:
            if judged.because:
                lines.append(": ".join(part for part in (where, judged.quantity, judged.because) if part))
        lines += [": ".join(part for part in ("*", where, reason) if part) for reason in row.against]
    lines += list(comparison.unmatched)
    return [*lines, *[f"warning: {line}" for line in comparison.warnings]]


def _rule(comparison: Comparison) -> str:
    how = "measured in turns in one run" if comparison.paired else "from two runs"
    if comparison.processes > 1:
        how += f", {comparison.processes} processes of each"
    if comparison.gate is not None:
        limits = ", ".join(f"{quantity} {100 * (limit - 1):+.3g} %" for quantity, limit in comparison.gate.items())
        return f"{how}; gate: {limits}; {_trust(comparison)}"
    assert comparison.margin is not None
    return f"{how}; margin {100 * comparison.margin:.3g} %; {_trust(comparison)}"


def _trust(comparison: Comparison) -> str:
    """What the 95 % are of: of two runs no interval shows how another run would have differed."""
    return "intervals hold together with 95 %" + ("" if comparison.paired else ", for what these two runs saw")


def _title(row: Compared) -> str:
    boundary = cells.BOUNDARIES.get(row.boundary, row.boundary)
    if row.boundary == "network":
        over_grpc = {target.startswith("oip+grpc://") for target in (row.base_target, row.new_target)}
        boundary = " and ".join("over gRPC" if one else "over HTTP" for one in sorted(over_grpc))
    return f"{row.name}, {boundary}, batch {row.load.batch}"


def _cells(judged: Judged) -> tuple[str, ...]:
    scale = 1.0 if judged.quantity == "throughput" else 1e6
    values = [cells.NONE if one is None else cells.significant(one / scale) for one in (judged.base, judged.new)]
    ratio = judged.ratio
    if ratio is None:
        return (_NAMES[judged.quantity], *values, cells.NONE, cells.NONE, judged.word)
    ends = [cells.NONE if one is None else f"{one:.3f}" for one in (ratio.low, ratio.high)]
    return (_NAMES[judged.quantity], *values, f"{ratio.value:.3f}", " to ".join(ends), judged.word)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
