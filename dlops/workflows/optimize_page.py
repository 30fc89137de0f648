"""The page of a search: accuracy against latency with the target as lines, in the style of the bench report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from dlops.artifact import Variant
from dlops.bench.plots_frame import (
    NARROW,
    WIDE,
    Frame,
    line_between,
    linear_ticks,
    log_scale,
    log_ticks,
    make_frame,
    percent_of,
    svg_of,
    text_at,
    tick_limit,
    x_grid,
    y_grid,
)
from dlops.bench.plots_labels import Box, Label, Point, Segment, place_labels
from dlops.environment import describe_environment
from dlops.report import Interval

if TYPE_CHECKING:
    from dlops.workflows.optimize import Result
    from dlops.workflows.trials import Question, Setting, Trial

_COLOURS = 8
_NOTES = (
    "Every point was exported, has passed parity and the accuracy gate, and was measured in processes of its own in "
    "turns with the baseline. Bars are 95 % intervals; of the accuracy that of the paired loss against the checkpoint.",
    "The best of many noisy measurements is a flattered one. So the fastest few were measured once more, side by side, "
    "and that decides: the target is kept where the whole interval lies within it.",
    "The times hold for this machine and this batch. What was refused lost too much or failed another gate.",
)


def render_page(result: Result) -> str:
    style = resources.files("dlops.bench").joinpath("report.css").read_text(encoding="utf-8")
    body = [_header(result), _summary(result), _figure(result)]
    body += [_table("Measured again, side by side: this decides", result.finals, result)]
    body += [_table("All that was measured", [one for one in result.trials if one.tail], result)]
    body += [_refused(result), _how_to_read(), _footer(result)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(result.question.checkpoint)}: search</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(part for part in body if part)}\n</main>\n</body>\n</html>\n"
    )


def _header(result: Result) -> str:
    question, machine = result.question, describe_environment()
    made = result.created.strftime("%d %B %Y, %H:%M UTC")
    where = f"{machine.cpu}, {machine.cores_in_words}" + "".join(f", {gpu}" for gpu in question.gpus)
    asked = (
        f"{question.quantile} ≤ {question.limit_ns / 1e6:g} ms at batch {question.batch}, "
        f"at most {question.max_drop:g} points lost"
    )
    return f"<header><h1>{escape(question.checkpoint)}: {escape(asked)}</h1><p>{made} · {escape(where)}</p></header>"


def _summary(result: Result) -> str:
    shown = result.winner or result.nearest
    trial = _final(result, shown) if shown else None
    kind, verdict = (
        ("chosen", shown.text if shown else "") if result.winner else ("warning", "Nothing meets the target")
    )
    if result.partial:
        kind, verdict = "warning", "Cut short"
    figures = "".join(
        f"<li><b>{escape(v)}</b><span>{escape(w)}</span></li>" for v, w in _figures(trial, result.question)
    )
    return (
        f'<div class="card {kind}"><p class="verdict">{escape(verdict)}</p>'
        f'<p class="because">{escape(result.because)}.</p>'
        f"{f'<ul class=figures>{figures}</ul>' if figures else ''}</div>"
    )


def _figures(trial: Trial | None, question: Question) -> list[tuple[str, str]]:
    if trial is None or trial.tail is None:
        return []
    figures = [(f"{trial.tail.value / 1e6:.3g} ms", f"{question.quantile}, limit {question.limit_ns / 1e6:g} ms")]
    if trial.median is not None:
        figures.append((f"{trial.median.value / 1e6:.3g} ms", "median"))
    if trial.accuracy is not None and trial.drop_points is not None:
        lost = trial.drop_points + 0.0
        figures.append((f"{trial.accuracy:.2%}", f"{trial.metric}, {lost:.2f} of {question.max_drop:g} points lost"))
    if trial.model_bytes is not None:
        figures.append((f"{trial.model_bytes / 1e6:.2f} MB", "model"))
    return figures


def _figure(result: Result) -> str:
    drawn = [trial for trial in _best_known(result) if trial.tail is not None and trial.accuracy is not None]
    if not drawn:
        return ""
    return (
        "<section><h2>Accuracy against latency</h2><figure>"
        f"{_plot(drawn, result, WIDE)}{_plot(drawn, result, NARROW)}"
        f"<figcaption>{result.question.quantile} of a call and {escape(drawn[0].metric or 'the metric')}, with 95 % "
        "intervals. Left of the vertical line and above the horizontal one the target is kept; the broken grey line "
        "joins those that no other beats in both.</figcaption></figure></section>"
    )


def _plot(trials: Sequence[Trial], result: Result, width: int) -> str:
    question = result.question
    spans = [_accuracy(trial) for trial in trials]
    floor = _floor(trials, question)
    bottom = min([floor, *((span.low if span.low is not None else span.value) for span in spans)])
    top = max([floor, *((span.high if span.high is not None else span.value) for span in spans)])
    room = max((top - bottom) * 0.1, 0.002)
    tails = [trial.tail for trial in trials if trial.tail is not None]
    ends = [question.limit_ns, *(end for tail in tails for end in (tail.low, tail.value, tail.high) if end is not None)]
    low, high = min(ends) / 1.25 / 1e6, max(ends) * 1.25 / 1e6
    y_range = (max(0.0, bottom - room), min(1.0, top + room))
    frame = make_frame(380, width, x=log_scale(low, high), y_range=y_range)
    parts = y_grid(frame, linear_ticks(*y_range), percent_of(y_range))
    parts += x_grid(frame, log_ticks(low, high, tick_limit(frame)), f"{question.quantile} of a call, ms (log scale)")
    base, limit, least = frame.height - frame.bottom, frame.x(question.limit_ns / 1e6), frame.y(floor)
    parts.append(line_between(limit, frame.top, limit, base, "limit"))
    parts.append(line_between(frame.left, least, width - frame.right, least, "limit"))
    parts.append(text_at("limit-name", frame.left + 6, least + 14, f"at most {question.max_drop:g} points lost"))
    near_right = limit > width - frame.right - 90
    parts.append(
        text_at("limit-name", limit + (-5 if near_right else 5), base - 6, f"{question.limit_ns / 1e6:g} ms",
                anchor="end" if near_right else "start")
    )  # fmt: skip
    points = [_point(frame, trial, span) for trial, span in zip(trials, spans, strict=True)]
    looks = {slug: f"s{place % _COLOURS}" for place, slug in enumerate(dict.fromkeys(_kind(one) for one in trials))}
    front = _front(trials, points)
    if len(front) > 1:
        path = " ".join(f"{point.x:.1f},{point.y:.1f}" for point in front)
        parts.append(f'<polyline class="front" points="{path}"/>')
    for trial, point in zip(trials, points, strict=True):
        parts += [line_between(bar.x1, bar.y1, bar.x2, bar.y2, f"bar {looks[_kind(trial)]}") for bar in point.bars]
    for trial, point in zip(trials, points, strict=True):
        if trial.setting == result.winner:
            parts.append(f'<circle class="whisker" fill="none" cx="{point.x:.1f}" cy="{point.y:.1f}" r="11"/>')
        title = escape(f"{trial.setting.text}: {_range(trial.tail)} ms")
        parts.append(
            f'<circle class="dot {looks[_kind(trial)]}" cx="{point.x:.1f}" cy="{point.y:.1f}" r="5">'
            f"<title>{title}</title></circle>"
        )
    # Names where they tell something: on the front, the winner, the nearest. The others have theirs under the pointer.
    named = [
        point for trial, point in zip(trials, points, strict=True)
        if point in front or trial.setting in (result.winner, result.nearest)
    ]  # fmt: skip
    steps = [Segment(one.x, one.y, two.x, two.y) for one, two in itertools.pairwise(front)]
    area = Box(frame.left + 4, frame.top, width - 6, base - 22)
    labels = place_labels(named, steps, area)
    for label in labels:
        if label.leader:
            line = label.leader
            parts.append(line_between(line.x1, line.y1, line.x2, line.y2, "whisker"))
    parts += [_text(label) for label in labels]
    headroom = max([0.0, *(4 - label.box.top for label in labels)])
    return svg_of(frame, parts, "Accuracy against latency", headroom=math.ceil(headroom))


def _point(frame: Frame, trial: Trial, span: Interval) -> Point:
    assert trial.tail is not None
    tail = trial.tail
    x, y = frame.x(tail.value / 1e6), frame.y(span.value)
    bars = []
    if span.low is not None and span.high is not None:
        bars.append(Segment(x, frame.y(span.low), x, frame.y(span.high)))
    if tail.low is not None and tail.high is not None:
        bars.append(Segment(frame.x(tail.low / 1e6), y, frame.x(tail.high / 1e6), y))
    return Point(x=x, y=y, name=trial.setting.text, bars=tuple(bars))


def _front(trials: Sequence[Trial], points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, from the fastest to the most accurate."""
    kept: list[Point] = []
    best = -1.0
    ranked = sorted(zip(trials, points, strict=True), key=lambda one: (one[1].x, -(one[0].accuracy or 0.0)))
    for trial, point in ranked:
        if (trial.accuracy or 0.0) > best:
            kept.append(point)
            best = trial.accuracy or 0.0
    return kept


def _text(label: Label) -> str:
    box, x = label.box, label.point.x
    if box.left <= x <= box.right:
        place, anchor = (box.left + box.right) / 2, "middle"
    else:
        place, anchor = (box.left, "start") if x < box.left else (box.right, "end")
    return text_at("name", place, box.bottom - 3, label.text, label.point.name, anchor=anchor)


def _table(caption: str, trials: Sequence[Trial], result: Result) -> str:
    if not trials:
        return ""
    question = result.question
    headings = ("", f"{question.quantile} ms", "p50 ms", "speed", "accuracy", "points lost", "MB", "target")
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    ordered = sorted(trials, key=lambda trial: trial.tail.value if trial.tail else math.inf)
    rows = "".join(_row(trial, result) for trial in ordered)
    return (
        f'<section><div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _row(trial: Trial, result: Result) -> str:
    mark = "" if trial.steady else ' <span class="mark" title="the row was not steady">*</span>'
    where = f"<small>{escape((trial.provider or '').removesuffix('ExecutionProvider'))}</small>"
    lost = "–" if trial.drop_points is None else f"{trial.drop_points + 0.0:.2f}"
    span = "" if trial.drop_low is None else f"{trial.drop_low:.2f} to {trial.drop_high:.2f}"
    values = [
        (_number(trial.tail), _ends(trial.tail)), (_number(trial.median), _ends(trial.median)),
        ("1" if trial.speedup is None else f"{trial.speedup.value:.2f} ×", ""),
        ("–" if trial.accuracy is None else f"{trial.accuracy:.2%}", ""), (lost, span),
        ("–" if trial.model_bytes is None else f"{trial.model_bytes / 1e6:.2f}", ""),
        (_kept(trial, result.question), ""),
    ]  # fmt: skip
    cells = "".join(f"<td>{escape(v)}{f'<small>{escape(s)}</small>' if s else ''}</td>" for v, s in values)
    kind = ' class="chosen"' if trial.setting == result.winner else ""
    return f'<tr{kind}><th scope="row">{escape(trial.setting.text)}{mark}{where}</th>{cells}</tr>'


def _kept(trial: Trial, question: Question) -> str:
    if trial.tail is None:
        return "unknown"
    if trial.tail.high is not None and trial.tail.high <= question.limit_ns:
        return "kept"
    if trial.tail.low is not None and trial.tail.low > question.limit_ns:
        return "missed"
    return "unsure"


def _refused(result: Result) -> str:
    by_variant: dict[str, str] = {}
    for trial in result.trials:
        if trial.reason is not None:
            by_variant.setdefault(trial.setting.variant, trial.reason)
    if not by_variant:
        return ""
    items = "".join(f"<li><b>{escape(slug)}</b>: {escape(reason)}</li>" for slug, reason in by_variant.items())
    return f'<section><h2>Refused or not measured</h2><ul class="notes">{items}</ul></section>'


def _how_to_read() -> str:
    items = "".join(f"<li>{note}</li>" for note in _NOTES)
    return f'<section><h2>How to read it</h2><ul class="notes">{items}</ul></section>'


def _footer(result: Result) -> str:
    left = f"{result.left} settings were not tried. " if result.left else "Every setting was tried. "
    finals = '<a href="finals/report.html">The last measurements in full</a>. ' if result.finals else ""
    command = f"<code>{escape(' '.join(result.command))}</code>" if result.command else ""
    return f"<footer><p>{left}{finals}dlops {escape(result.question.dlops_version)} {command}</p></footer>"


def _best_known(result: Result) -> list[Trial]:
    """Every setting once: as measured last."""
    latest = {trial.setting: trial for trial in (*result.trials, *(one for one in result.finals if one.tail))}
    return list(latest.values())


def _final(result: Result, setting: Setting) -> Trial | None:
    return next((trial for trial in _best_known(result) if trial.setting == setting), None)


def _kind(trial: Trial) -> str:
    """What has one colour: a format and precision, whatever was pruned."""
    variant = Variant.parse(trial.setting.variant)
    return f"{variant.format}-{variant.precision}"


def _accuracy(trial: Trial) -> Interval:
    assert trial.accuracy is not None
    if trial.drop_points is None or trial.drop_low is None or trial.drop_high is None:
        return Interval(value=trial.accuracy, low=None, high=None)
    reference = trial.accuracy + trial.drop_points / 100
    return Interval(
        value=trial.accuracy, low=max(0.0, reference - trial.drop_high / 100),
        high=min(1.0, reference - trial.drop_low / 100),
    )  # fmt: skip


def _floor(trials: Sequence[Trial], question: Question) -> float:
    """The lowest accuracy that is allowed: the checkpoint's, without the points that may be lost."""
    reference = max((trial.accuracy or 0.0) + (trial.drop_points or 0.0) / 100 for trial in trials)
    return max(0.0, reference - question.max_drop / 100)


def _number(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.value / 1e6:.3g}"


def _ends(interval: Interval | None) -> str:
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"{interval.low / 1e6:.3g}–{interval.high / 1e6:.3g}"


def _range(interval: Interval | None) -> str:
    return f"{_number(interval)} ({_ends(interval)})"
