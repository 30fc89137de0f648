"""Where the time goes, as profiles say it: for the console, Markdown and the page."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from html import escape

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dlops.bench import cells
from dlops.report import Profile, Report

OUTSIDE = "outside operators"
_CONSOLE_ROWS = 24
_NAME_CHARS, _TYPE_CHARS = 40, 24
# The style sheet has eight colours; the last is for all types that got none.
_COLOURED = 7
_LABELLED = 0.09
# Above this, what was recorded is mostly not what was timed.
_MUCH_SLOWER = 2.0
_NAMED = 8


def name(profile: Profile) -> str:
    """What its row in the table of results is called."""
    return profile.artifact if profile.artifact and "#" not in profile.target else profile.target


def title(profile: Profile, report: Report) -> str:
    """`onnx-int8, batch 1: 2,345 profiled calls, mean 0.315 ms (timed p50 0.0714 ms)`."""
    timed = _timed_ns(profile, report)
    beside = f" (timed p50 {cells.significant(timed / 1e6)} ms)" if timed else ""
    return (
        f"{name(profile)}, {_under(profile, report)}: {profile.calls:,} profiled calls, mean "
        f"{cells.significant(profile.mean_ns / 1e6)} ms{beside}"
    )


def headings(profiles: Sequence[Profile]) -> list[str]:
    """provider is left out where every target ran on one alone."""
    several = any(len(profile.providers) > 1 for profile in profiles)
    return ["operator", "type", *(["provider"] if several else []), "per call", "share"]


def rows(profile: Profile, headings: Sequence[str], limit: int) -> list[list[str]]:
    """The costliest operators, at most `limit`, then what the others take and what is outside all, as texts."""
    shown = profile.operators[:limit]
    left = len(profile.operators) - len(shown) + profile.others
    left_share = profile.others_share + sum(one.share for one in profile.operators[limit:])
    found = [
        {
            "operator": one.name,
            # In torch an operator on the CPU is its own type.
            "type": "" if one.op_type == one.name and profile.runtime != "onnxruntime" else one.op_type,
            "provider": one.provider.removesuffix("ExecutionProvider"),
            "per call": f"{cells.significant(one.calls / profile.calls)}" if one.calls % profile.calls else
            f"{one.calls // profile.calls}",
            "share": _percent(one.share),
        }
        for one in shown
    ]  # fmt: skip
    if left:
        found.append({"operator": f"{left} other{'' if left == 1 else 's'}", "share": _percent(left_share)})
    found.append({"operator": OUTSIDE, "share": _percent(profile.outside_share)})
    return [[row.get(heading, "") for heading in headings] for row in found]


def placements(report: Report) -> list[str]:
    """What did not run on the provider that its row names, a line for each target and batch."""
    lines = []
    for profile in report.profiles:
        everything = sum(use.operators for use in profile.providers.values())
        for provider, use in profile.providers.items():
            if provider == profile.provider:
                continue
            names = ", ".join(use.names[:_NAMED]) + (" and others" if len(use.names) > _NAMED else "")
            lines.append(
                f"{name(profile)} at {_under(profile, report)}: {use.operators} of {everything} nodes ran on "
                f"{provider}: {names}"
            )
        if profile.copies:
            lines.append(
                f"{name(profile)} at {_under(profile, report)}: {profile.copies} of {everything} "
                f"{'nodes' if profile.runtime == 'onnxruntime' else 'operators'} copy between host and device"
            )
    return lines


def explanations(report: Report) -> list[str]:
    """What a reader must know about the shares."""
    if not report.profiles:
        return []
    lines = [
        "share: of a call under the profiler, in a process of its own after the timing. Recording slows calls down, so"
        " shares are to be quoted, not times",
        f"{OUTSIDE}: the runtime itself, Python, and waiting",
    ]
    slower = [
        (name(profile), profile.mean_ns / timed)
        for profile in report.profiles
        if (timed := _timed_ns(profile, report)) and profile.mean_ns > _MUCH_SLOWER * timed
    ]
    if slower:
        factors = [factor for _, factor in slower]
        low, high = (f"{pick(factors):.1f}" for pick in (min, max))
        lines.append(
            f"{', '.join(dict.fromkeys(one for one, _ in slower))}: {low if low == high else f'{low} to {high}'} times"
            " slower under the profiler: recording takes longer than small operators do, whose shares are overstated,"
            " or something else used the machine"
        )
    on_device = [name(profile) for profile in report.profiles if profile.times == "device"]
    if on_device:
        lines.append(f"{', '.join(dict.fromkeys(on_device))}: an operator's time is that of its kernels on the GPU")
    launched = [
        name(profile)
        for profile in report.profiles
        if profile.times == "host" and profile.provider in ("CUDAExecutionProvider", "cuda")
    ]
    if launched:
        lines.append(
            f"{', '.join(dict.fromkeys(launched))}: this ONNX Runtime records no kernels, so an operator's time is that"
            " of starting it, and the wait for the GPU is in the copies"
        )
    return lines


def render_tables(report: Report) -> list[RenderableType]:
    """For the console, in 80 columns: the fewer the targets, the more operators of each; nothing without profiles."""
    profiles = report.profiles
    if not profiles:
        return []
    limit = max(3, _CONSOLE_ROWS // len(profiles))
    columns = headings(profiles)
    texts = [
        [[_fit(text, heading) for text, heading in zip(row, columns, strict=True)] for row in rows(one, columns, limit)]
        for one in profiles
    ]
    widths = [
        max(len(heading), *(len(row[index]) for one in texts for row in one)) for index, heading in enumerate(columns)
    ]
    parts: list[RenderableType] = [Text("\nwhere the time goes", style="bold")]
    for profile, one in zip(profiles, texts, strict=True):
        parts.append(Text(f"\n{title(profile, report)}"))
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
        for heading, width in zip(columns, widths, strict=True):
            right = heading in ("per call", "share")
            table.add_column(heading, justify="right" if right else "left", width=width, no_wrap=True)
        for row in one:
            table.add_row(*(Text(text) for text in row))
        parts.append(table)
    parts.append(Text(""))
    parts += [Text(line) for line in explanations(report)]
    return parts


def markdown(report: Report) -> list[str]:
    """The lines of a section with a table for each target; none without profiles."""
    if not report.profiles:
        return []
    columns = headings(report.profiles)
    lines = ["", "**where the time goes**", ""]
    for profile in report.profiles:
        lines += [f"{title(profile, report)}", "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + "|".join("---:" if one in ("per call", "share") else "---" for one in columns) + "|")
        for row in rows(profile, columns, len(profile.operators)):
            lines.append("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |")
        lines.append("")
    return lines + [f"- {line}" for line in explanations(report)]


def render_section(report: Report) -> str:
    """The page's section: a bar of each target by operator type, and tables; empty without profiles."""
    if not report.profiles:
        return ""
    looks = _looks(report.profiles)
    entries = [*looks.items()]
    if any(kind not in looks for profile in report.profiles for kind in profile.op_types):
        entries.append(("other types", "s7"))
    legend = "".join(
        f'<li><i class="{look}"></i>{escape(kind)}</li>' for kind, look in [*entries, (OUTSIDE, "outside")]
    )
    bars = []
    for under, group in itertools.groupby(report.profiles, key=lambda profile: _under(profile, report)):
        tracks = "".join(_bar(profile, looks) for profile in group)
        bars.append(f'<p class="batch">{under}</p><div class="shares">{tracks}</div>')
    columns = headings(report.profiles)
    tables = "".join(_table(profile, columns, report) for profile in report.profiles)
    notes = "".join(f"<li>{escape(line)}</li>" for line in explanations(report))
    return (
        "<section><h2>Where the time goes</h2>"
        f'<figure><h3>Share of a call, by type of operator</h3><ul class="legend">{legend}</ul>{"".join(bars)}'
        "<figcaption>From left to right: the costliest types first, and at the end what is outside all operators."
        "</figcaption></figure>"
        f'<div class="tables">{tables}</div><div class="card"><ul class="notes">{notes}<li>Every trace is a file '
        "beside this page, for ui.perfetto.dev or chrome://tracing.</li></ul></div></section>"
    )


def _bar(profile: Profile, looks: dict[str, str]) -> str:
    coloured = [(kind, looks[kind], share) for kind, share in profile.op_types.items() if kind in looks]
    rest = sum(share for kind, share in profile.op_types.items() if kind not in looks)
    parts = [*coloured, ("other types", "s7", rest), (OUTSIDE, "outside", profile.outside_share)]
    said = ", ".join(f"{kind} {_percent(share)}" for kind, _, share in parts if round(share, 3))
    segments = "".join(
        f'<i class="{look}" style="width:{share:.2%}" title="{escape(kind)} {_percent(share)}">'
        f"{format(share, '.0%') + ' ' + escape(kind) if share >= _LABELLED else ''}</i>"
        for kind, look, share in parts
        if round(share, 4)
    )
    label = escape(name(profile))
    return f'<span>{label}</span><div class="track" role="img" aria-label="{label}: {escape(said)}">{segments}</div>'


def _table(profile: Profile, columns: Sequence[str], report: Report) -> str:
    head = "".join(f'<th scope="col">{heading}</th>' for heading in columns)
    body = ""
    for row in rows(profile, columns, len(profile.operators)):
        others = "".join(f"<td>{escape(text)}</td>" for text in row[1:])
        body += f'<tr><th scope="row">{escape(row[0])}</th>{others}</tr>'
    file = report.files.get(profile.trace)
    trace = f"<small><code>{escape(file.path)}</code></small>" if file else ""
    return (
        f'<div class="scroll"><table class="operators"><caption>{escape(title(profile, report))}{trace}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _looks(profiles: Sequence[Profile]) -> dict[str, str]:
    """A colour for each of the types that take most time over all targets."""
    shares: dict[str, float] = defaultdict(float)
    for profile in profiles:
        for kind, share in profile.op_types.items():
            shares[kind] += share
    ranked = sorted(shares, key=lambda kind: -shares[kind])
    return {kind: f"s{number}" for number, kind in enumerate(ranked[:_COLOURED])}


def _timed_ns(profile: Profile, report: Report) -> float | None:
    """The median that the timing gave, null where it was not certified."""
    for row in report.measurements:
        placed = (row.target, row.load.batch, row.device, row.threads)
        in_turns = row.boundary == "host" and row.duration_ns is None
        if in_turns and placed == (profile.target, profile.batch, profile.device, profile.threads):
            return row.latency.p50_ns.value if row.latency.p50_ns else None
    return None


def _under(profile: Profile, report: Report) -> str:
    """`batch 1`, with what else its target was profiled under where that varies."""
    alike = [one for one in report.profiles if one.target == profile.target]
    text = f"batch {profile.batch}"
    if len({one.threads for one in alike}) > 1:
        text += f", {profile.threads} thread{'' if profile.threads == 1 else 's'}"
    return text + (f", on {profile.device}" if len({one.device for one in alike}) > 1 else "")


def _fit(text: str, heading: str) -> str:
    """The text, or its two ends with … between where the console has no room for it."""
    limit = {"operator": _NAME_CHARS, "type": _TYPE_CHARS}.get(heading, len(text))
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-(limit - 1) // 2 :]}"


def _percent(share: float) -> str:
    return f"{share:.1%}"
