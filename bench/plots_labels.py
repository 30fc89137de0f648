"""Where the names of a plot's points go: beside a lone point, and for points that crowd, in a list with leader lines.

Coordinates are those of the plot's SVG: x to the right, y down, one unit a pixel of a 12-pixel font.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

LINE = 16.0
_TEXT_HEIGHT = 13.0
_DOT = 7.0
# From a dot's centre to a name without a leader line.
_BESIDE = 11.0
# Dots closer than this hide one another, and a name beside one would seem to mean either.
_CROWDED = 30.0
_LEADER = 18.0
# Costs, in the unit of a leader line's length.
_ON_BAR, _THROUGH_DOT, _CROSSED, _NO_ROOM = 40.0, 50.0, 60.0, 10_000.0
# Width of a character as a share of the font's size in DejaVu Sans, which is among the widest a page may get.
_WIDTHS = {"ijl": 0.29, "-.,:;/|'!() ": 0.4, "frtI": 0.42, "mwMW@#%×": 0.98}
_BY_CHARACTER = {character: width for characters, width in _WIDTHS.items() for character in characters}


@dataclass(frozen=True, slots=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@dataclass(frozen=True, slots=True)
class Segment:
    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def length(self) -> float:
        return math.hypot(self.x2 - self.x1, self.y2 - self.y1)

    def crosses(self, other: Segment) -> bool:
        """Whether the two share a point inside both; lines that only meet at an end do not."""

        def side(x: float, y: float, line: Segment) -> float:
            return (line.x2 - line.x1) * (y - line.y1) - (line.y2 - line.y1) * (x - line.x1)

        apart = side(self.x1, self.y1, other) * side(self.x2, self.y2, other) < 0
        return apart and side(other.x1, other.y1, self) * side(other.x2, other.y2, self) < 0

    def enters(self, box: Box) -> bool:
        """Liang and Barsky's clipping: whether any of the segment lies inside the box."""
        dx, dy = self.x2 - self.x1, self.y2 - self.y1
        first, last = 0.0, 1.0
        for step, room in (
            (-dx, self.x1 - box.left), (dx, box.right - self.x1), (-dy, self.y1 - box.top), (dy, box.bottom - self.y1),
        ):  # fmt: skip
            if step == 0:
                if room < 0:
                    return False
            elif step < 0:
                first = max(first, room / step)
            else:
                last = min(last, room / step)
        return first < last


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A dot that wants its name. bars: its error bars."""

    x: float
    y: float
    name: str
    bars: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A name in its box; leader: from the dot to the box, where the name is not right beside its dot."""

    point: Point
    text: str
    box: Box
    leader: Segment | None = None


@dataclass(slots=True)
class _Canvas:
    """What is taken so far."""

    area: Box
    points: Sequence[Point]
    lines: Sequence[Segment]
    labels: list[Label] = field(default_factory=list)

    def cost(self, labels: Sequence[Label]) -> float:
        """What these labels would cover and cross; infinite where a name would lie on a name or leave the area."""
        total = 0.0
        bars = [*self.lines, *(bar for point in self.points for bar in point.bars)]
        for label in labels:
            box, leader = label.box, label.leader
            if box.left < self.area.left or box.right > self.area.right or box.bottom > self.area.bottom:
                return math.inf
            if any(box.overlaps(other.box) for other in self.labels):
                return math.inf
            total += sum(_NO_ROOM for point in self.points if box.overlaps(_dot(point)))
            total += sum(_ON_BAR for bar in bars if bar.enters(box))
            total += sum(_CROSSED for other in self.labels if other.leader and other.leader.enters(box))
            if leader is None:
                continue
            total += leader.length
            others = (point for point in self.points if point is not label.point)
            total += sum(
                _THROUGH_DOT for point in others if not _near(point, label.point) and leader.enters(_dot(point))
            )
            total += sum(_NO_ROOM for other in self.labels if leader.enters(other.box))
            total += sum(_CROSSED for other in self.labels if other.leader and other.leader.crosses(leader))
        # Room above the plot makes the whole figure higher.
        return total + 2 * max(0.0, self.area.top - min(label.box.top for label in labels))


def place_labels(points: Sequence[Point], lines: Sequence[Segment], area: Box) -> list[Label]:
    """A label for each point, in their order: no two overlap, and none leaves the area but upwards.

    lines: what else is drawn and should not be covered. Where the area is too full, boxes lie above its top, at
    negative heights if need be: the caller makes the plot that much higher.
    """
    canvas = _Canvas(area, points, lines)
    queue = sorted(_clusters(points), key=len, reverse=True)
    while queue:
        cluster = queue.pop(0)
        best = min(_choices(cluster, canvas), key=lambda choice: choice[0], default=None)
        if (best is None or best[0] >= _NO_ROOM) and len(cluster) > 1:
            middle = len(cluster) // 2
            queue[:0] = [cluster[:middle], cluster[middle:]]
            continue
        assert best is not None, "a single name is never wider than half the area"
        canvas.labels += best[1]
    by_point = {id(label.point): label for label in canvas.labels}
    return [by_point[id(point)] for point in points]


# The same few names are tried in thousands of places.
@lru_cache(maxsize=1024)
def text_width(text: str) -> float:
    """An upper bound in pixels for nearly every font at 12 pixels."""
    return sum(
        12 * _BY_CHARACTER.get(one, 1.0 if ord(one) > 0x2E7F else 0.72 if one.isupper() else 0.64) for one in text
    )


def shorten(text: str, width: float) -> str:
    """The text, or its two ends with … between, at most so wide."""
    kept = len(text)
    short = text
    while text_width(short) > width and kept > 2:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}…{text[-(kept // 2) :]}"
    return short


def _clusters(points: Sequence[Point]) -> list[list[Point]]:
    """Points that crowd one another, directly or through others; each cluster from left to right."""
    clusters: list[list[Point]] = []
    for point in sorted(points, key=lambda one: (one.x, one.y)):
        joined = [one for one in clusters if any(_near(point, other) for other in one)]
        clusters = [one for one in clusters if one not in joined]
        clusters.append([*itertools.chain.from_iterable(joined), point])
    return [sorted(cluster, key=lambda one: (one.x, one.y)) for cluster in clusters]


def _choices(cluster: Sequence[Point], canvas: _Canvas) -> Iterator[tuple[float, list[Label]]]:
    """Ways to label a cluster with their costs, none that is dearer than one before it by its leaders' length alone."""
    best = math.inf
    if len(cluster) == 1:
        for label in _beside(cluster[0], canvas.area):
            cost = canvas.cost([label])
            best = min(best, cost)
            yield cost, [label]
    lists = ((sum(label.leader.length for label in one if label.leader), one) for one in _lists(cluster, canvas))
    for length, labels in sorted(lists, key=lambda one: one[0]):
        if length >= best:
            return
        cost = canvas.cost(labels)
        best = min(best, cost)
        yield cost, labels


def _beside(point: Point, area: Box) -> Iterator[Label]:
    text = shorten(point.name, (area.right - area.left) / 2 - _LEADER)
    width, half = text_width(text), _TEXT_HEIGHT / 2
    right = max([point.x + _BESIDE, *(bar.x2 + 5 for bar in point.bars)])
    left = min([point.x - _BESIDE, *(bar.x1 - 5 for bar in point.bars)])
    middles = ((right, point.y), (left - width, point.y))
    above = ((point.x - width / 2, point.y - LINE), (point.x - width / 2, point.y + LINE))
    for left, middle in (*middles, *above):
        yield Label(point=point, text=text, box=Box(left, middle - half, left + width, middle + half))


def _lists(cluster: Sequence[Point], canvas: _Canvas) -> Iterator[list[Label]]:
    """The cluster's names under one another, right or left of its dots, at every height that may serve."""
    area = canvas.area
    texts = {id(point): shorten(point.name, (area.right - area.left) / 2 - _LEADER) for point in cluster}
    height = LINE * len(cluster)
    middle = sum(point.y for point in cluster) / len(cluster)
    rooms_above = 2 * LINE * len(canvas.points)
    tops = [middle - height / 2 + step * LINE * 0.75 for step in range(-100, 100)]
    tops = [top for top in tops if area.top - rooms_above <= top <= area.bottom - height]
    for step, top in itertools.product(range(10), tops):
        for side in (1, -1):
            reach = max(side * point.x for point in cluster) + _LEADER + step * 14
            yield _list(cluster, texts, side, side * reach, top)


def _list(cluster: Sequence[Point], texts: dict[int, str], side: int, edge: float, top: float) -> list[Label]:
    """Names from `top` downwards that begin (side 1) or end (side -1) at `edge`, in the order of shortest leaders."""
    heights = [top + LINE * (row + 0.5) for row in range(len(cluster))]

    def length(point: Point, row: int) -> float:
        return math.hypot(point.x - edge, point.y - heights[row])

    order = list(cluster)
    # Exchanging two while that is shorter leaves no two leaders crossing: of four ends, crossing ones are longer.
    changed = True
    while changed:
        changed = False
        for one, two in itertools.combinations(range(len(order)), 2):
            now = length(order[one], one) + length(order[two], two)
            if length(order[one], two) + length(order[two], one) < now - 1e-6:
                order[one], order[two] = order[two], order[one]
                changed = True
    labels = []
    for point, middle in zip(order, heights, strict=True):
        text = texts[id(point)]
        left = edge if side > 0 else edge - text_width(text)
        box = Box(left, middle - _TEXT_HEIGHT / 2, left + text_width(text), middle + _TEXT_HEIGHT / 2)
        leader = Segment(point.x, point.y, edge - 4 * side, middle)
        labels.append(Label(point=point, text=text, box=box, leader=leader))
    return labels


def _dot(point: Point) -> Box:
    return Box(point.x - _DOT, point.y - _DOT, point.x + _DOT, point.y + _DOT)


def _near(one: Point, two: Point) -> bool:
    return math.hypot(one.x - two.x, one.y - two.y) < _CROWDED
