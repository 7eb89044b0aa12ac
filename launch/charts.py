"""Line charts as plain geometry: what report.html draws as SVG, without a drawing library."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 22, 12, 40
_MOST_POINTS = 240
_LOG_FROM = 20.0
"""A series whose largest value is this many times its smallest one is drawn on a logarithmic axis."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """One labelled position of an axis, in the pixels of the chart."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One drawn series."""

    name: str
    path: str
    """The `d` attribute of an SVG path."""
    end: tuple[float, float]
    last: str
    """The last value, for the legend."""
    first: str


@dataclass(frozen=True)
class Chart:
    """A chart ready to be drawn in a box of WIDTH x HEIGHT."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    note: str = ""
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


def number(value: float, digits: int = 3) -> str:
    """Return a number as people write it: `1500`, `0.0381`, `2.4e-05`; `digits` of them count."""
    if value == 0:
        return "0"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.{digits}g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.2g}"


def thin(points: Points, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most `most` points: the means of neighbours, placed at the last x of each group."""
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round values inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten inside [low, high]; powers of ten alone when those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(ticks) <= 8:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 8)]


def _bounds(values: list[float], *, log: bool, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low * 0.9, high * 1.1
    low = 0.0 if from_zero and low >= 0 else low
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - margin), high + margin


def chart(
    title: str,
    series: Mapping[str, Points],
    *,
    y_label: str,
    x_label: str = "step",
    log: bool | None = None,
    from_zero: bool = True,
) -> Chart | None:
    """Lay out a line chart.

    Args:
        title: above the chart.
        series: name -> points (x, y), finite, in the order of x; the first one is drawn as the main line.
        y_label: what y is; ` (log)` is added on a logarithmic axis.
        x_label: what x is.
        log: a logarithmic y axis, which leaves zeros out; by default where the values are wide apart.
        from_zero: let a linear axis begin at 0.

    Returns:
        The chart, or None when no series has two points.
    """
    kept = {name: points for name, points in series.items() if len(points) > 1}
    if not kept:
        return None
    longest = max(len(points) for points in kept.values())
    note = f"each point is the mean of {math.ceil(longest / _MOST_POINTS)} logged values"
    thinned = {name: thin(points) for name, points in kept.items()}
    values = [y for points in thinned.values() for _, y in points]
    positive = [y for y in values if y > 0]
    if log is None:
        log = bool(positive) and min(values) >= 0 and max(positive) / min(positive) >= _LOG_FROM
    if log:
        thinned = {name: [(x, y) for x, y in points if y > 0] for name, points in thinned.items()}
        thinned = {name: points for name, points in thinned.items() if points}
        values = positive
    x_low = min(points[0][0] for points in thinned.values())
    x_high = max(points[-1][0] for points in thinned.values())
    y_low, y_high = _bounds(values, log=log, from_zero=from_zero)
    left, right, top, bottom = _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM

    def x_at(x: float) -> float:
        return round(left + (right - left) * (x - x_low) / ((x_high - x_low) or 1.0), 1)

    def y_at(y: float) -> float:
        share = math.log(y / y_low) / math.log(y_high / y_low) if log else (y - y_low) / (y_high - y_low)
        return round(bottom - (bottom - top) * share, 1)

    lines = []
    for name, points in thinned.items():
        placed = [(x_at(x), y_at(y)) for x, y in points]
        path = "M" + "L".join(f"{x:g},{y:g}" for x, y in placed)
        lines.append(Line(name, path, placed[-1], number(kept[name][-1][1]), number(kept[name][0][1])))
    y_values = log_ticks(y_low, y_high) if log else linear_ticks(y_low, y_high)
    return Chart(
        title,
        x_label,
        f"{y_label} (log)" if log else y_label,
        tuple(lines),
        tuple(Tick(x_at(x), number(x)) for x in linear_ticks(x_low, x_high)),
        tuple(Tick(y_at(y), number(y)) for y in y_values),
        note if longest > _MOST_POINTS else "",
    )
