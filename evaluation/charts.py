"""Charts as inline SVG text: no plotting library, no script, colours from the page's style sheet.

Every chart is a pure function of its numbers. Coordinates are SVG user units with y downwards; the page scales a chart
to its column.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 44
LEGEND_HEIGHT = 24
BAR_HEIGHT, BAR_PITCH, BAR_TEXT, CAP = 16, 52, 130, 4
CHARACTER_WIDTH = 7.3  # on average, at the larger font of narrow pages; only the legend's spacing depends on it
MOST_DOTS = 40  # on a curve
MOST_CHARACTERS = int((WIDTH - LEFT - 30) / CHARACTER_WIDTH)  # of a name in the legend


@dataclass(frozen=True)
class Series:
    """Points to draw.

    Attributes:
        label: name in the legend.
        x, y: coordinates; points that are not finite are left out.
        error: half length of the bar at each point, None for no bar; empty for none at all. A band on curves of many points.
        joined: whether a line joins the points.
        colour: index of one of the page's chart colours.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None] = ()
    joined: bool = True
    colour: int = 0


@dataclass(frozen=True)
class Bar:
    """One bar from zero, with an error bar of one `error` to either side."""

    label: str
    value: float
    error: float | None
    text: str
    colour: int = 0


@dataclass(frozen=True)
class Axis:
    """A range of values with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def position(self, value: float) -> float:
        """Where the value lies: 0 at `low`, 1 at `high`."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low)


def linear_axis(low: float, high: float, *, snap: bool, count: int = 5) -> Axis:
    """An axis over [low, high] with about `count` ticks at 1, 2 or 5 times a power of ten.

    Args:
        snap: widen the range to whole ticks. A range of one value is always widened.
    """
    if low == high:
        low, high, snap = low - abs(low) * 0.5, high + abs(high) * 0.5, True
        if low == high:
            low, high = 0.0, 1.0
    step = _nice_step((high - low) / count)
    first, last = (math.floor, math.ceil) if snap else (math.ceil, math.floor)
    indices = range(first(low / step), last(high / step) + 1)
    # Ticks are rounded: 3 * 0.1 is not 0.3.
    ticks = tuple(round(i * step, max(0, 1 - math.floor(math.log10(step)))) for i in indices)
    return Axis(ticks[0], ticks[-1], ticks) if snap else Axis(low, high, ticks)


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis over positive values: ticks at 1, 2 and 5 times powers of ten, or at the powers if many."""
    if low == high:
        low, high = low / 2, high * 2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    values = [float(f"{factor}e{power}") for power in powers for factor in factors]
    lower = max((v for v in values if v <= low), default=low)
    upper = min((v for v in values if v >= high), default=high)
    return Axis(lower, upper, tuple(v for v in values if lower <= v <= upper), log=True)


def line_chart(series: Sequence[Series], *, title: str, x_label: str, log_y: bool = False) -> str:
    """Lines or points over a common axis, as one <svg> element.

    Args:
        title: what the chart shows, for screen readers.
        x_label: text under the x axis.
        log_y: logarithmic y axis; all values must be positive.
    """
    drawn = [(s, _points(s)) for s in series]
    points = [point for _, part in drawn for point in part]
    if not points:
        return _svg(title, HEIGHT, [_text(WIDTH / 2, HEIGHT / 2, "no values", anchor="middle")])
    lows, highs = [y - e for _, y, e in points], [y + e for _, y, e in points]
    x_axis = linear_axis(min(p[0] for p in points), max(p[0] for p in points), snap=False)
    if log_y:
        y_axis = log_axis(min(p[1] for p in points), max(highs))
    else:
        y_axis = linear_axis(min(lows), max(highs), snap=True)
    frame = [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, anchor="middle"), *_grid(x_axis, y_axis)]
    marks = [mark for s, part in drawn for mark in _marks(s, part, x_axis, y_axis)]
    rows = _legend_rows([s for s in series if s.label])
    return _svg(title, HEIGHT, [*frame, *marks, *_legend(rows)], above=LEGEND_HEIGHT * len(rows))


def bar_chart(bars: Sequence[Bar], *, title: str) -> str:
    """Horizontal bars from zero, one per line, each with its label above and its text at the end."""
    # A negative or missing value has no length; its text still says what it is.
    reach = max([b.value + (b.error or 0.0) for b in bars if math.isfinite(b.value)] + [0.0]) or 1.0
    scale = (WIDTH - BAR_TEXT) / reach
    parts = []
    for i, bar in enumerate(bars):
        y = 14 + i * BAR_PITCH
        length = max(bar.value, 0.0) * scale if math.isfinite(bar.value) else 0.0
        error = (bar.error or 0.0) * scale
        parts.append(_text(0, y, bar.label))
        parts.append(f'<rect class="fill{bar.colour}" x="0" y="{y + 7}" width="{length:.1f}" height="{BAR_HEIGHT}"/>')
        if error:
            parts.append(_whisker_x(max(length - error, 0.0), length + error, y + 7 + BAR_HEIGHT / 2))
        parts.append(_text(length + error + 8, y + 7 + BAR_HEIGHT * 0.75, bar.text, cls="value"))
    return _svg(title, max(1, len(bars)) * BAR_PITCH, parts)


def thin(x: Sequence[float], y: Sequence[float], max_points: int) -> tuple[list[float], list[float], int]:
    """Means of k consecutive points, with the smallest k that leaves at most `max_points`; and k."""
    k = max(1, math.ceil(len(x) / max_points))
    starts = range(0, len(x), k)
    return [_mean(x[i : i + k]) for i in starts], [_mean(y[i : i + k]) for i in starts], k


def format_tick(value: float) -> str:
    """Short text of an axis value: 1500, 20k, 1.5M, 0.05."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and size == 1e6):
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _points(series: Series) -> list[tuple[float, float, float]]:
    errors = [e or 0.0 for e in series.error] or [0.0] * len(series.x)
    rows = zip(series.x, series.y, errors, strict=True)
    return [(float(x), float(y), float(e)) for x, y, e in rows if all(map(math.isfinite, (x, y, e)))]


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.position(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.position(max(value, axis.low)) * (HEIGHT - TOP - BOTTOM)


def _grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    parts = []
    for tick in y_axis.ticks:
        y = _y(y_axis, tick)
        parts.append(f'<line class="rule" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, format_tick(tick), anchor="end"))
    for tick in x_axis.ticks:
        x = _x(x_axis, tick)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" y1="{HEIGHT - BOTTOM}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        parts.append(_text(x, HEIGHT - BOTTOM + 18, format_tick(tick), anchor="middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>')
    return parts


def _marks(series: Series, points: list[tuple[float, float, float]], x_axis: Axis, y_axis: Axis) -> list[str]:
    drawn = [(_x(x_axis, x), _y(y_axis, y), _y(y_axis, y - error), _y(y_axis, y + error)) for x, y, error in points]
    # Dots and error bars on a long curve would hide it.
    is_long = series.joined and len(points) > MOST_DOTS
    parts = []
    if is_long and any(error for _, _, error in points):
        edge = [(x, high) for x, _, _, high in drawn] + [(x, low) for x, _, low, _ in reversed(drawn)]
        parts.append(f'<polygon class="fill{series.colour} band" points="{_path(edge)}"/>')
    if series.joined and len(points) > 1:
        parts.append(f'<polyline class="line{series.colour}" points="{_path([(x, y) for x, y, _, _ in drawn])}"/>')
    for x, y, low, high in () if is_long else drawn:
        if low != high:
            parts.append(_whisker_y(x, low, high, series.colour))
        parts.append(_dot(x, y, 3, series.colour))
    return parts


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _dot(x: float, y: float, radius: float, colour: int) -> str:
    return f'<circle class="fill{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>'


def _whisker_x(x1: float, x2: float, y: float) -> str:
    caps = f"M{x1:.1f} {y - CAP}v{2 * CAP}M{x2:.1f} {y - CAP}v{2 * CAP}"
    return f'<path class="whisker" d="{caps}M{x1:.1f} {y}H{x2:.1f}"/>'


def _whisker_y(x: float, y1: float, y2: float, colour: int) -> str:
    caps = f"M{x - CAP:.1f} {y1:.1f}h{2 * CAP}M{x - CAP:.1f} {y2:.1f}h{2 * CAP}"
    return f'<path class="line{colour}" d="{caps}M{x:.1f} {y1:.1f}V{y2:.1f}"/>'


def _legend_rows(series: Sequence[Series]) -> list[list[tuple[float, Series]]]:
    """The series with the x at which each is named, in as many rows as they need."""
    rows: list[list[tuple[float, Series]]] = []
    x = float(WIDTH)
    for s in series:
        width = 30 + CHARACTER_WIDTH * min(len(s.label), MOST_CHARACTERS)
        if x + width > WIDTH:
            rows.append([])
            x = float(LEFT)
        rows[-1].append((x, s))
        x += width
    return rows


def _legend(rows: Sequence[Sequence[tuple[float, Series]]]) -> list[str]:
    parts = []
    for above, row in enumerate(reversed(rows)):
        y = -8 - LEGEND_HEIGHT * above
        for x, s in row:
            label = s.label if len(s.label) <= MOST_CHARACTERS else f"{s.label[: MOST_CHARACTERS - 1]}…"
            parts += [_dot(x + 4, y - 4, 4, s.colour), _text(x + 13, y, label)]
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", cls: str = "") -> str:
    name = f' class="{cls}"' if cls else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, height: float, parts: Sequence[str], above: float = 0) -> str:
    box = f"0 {-above:g} {WIDTH} {height + above:g}"
    head = f'<svg role="img" xmlns="http://www.w3.org/2000/svg" viewBox="{box}" aria-label="{escape(title)}">'
    return f"{head}{''.join(parts)}</svg>"
