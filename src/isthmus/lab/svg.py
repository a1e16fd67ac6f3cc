"""Line charts and heat maps as inline SVG, coloured by the classes of report.css."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 400  # of a curve
MAX_COLUMNS = 240  # of a heat map: more are averaged
LEVELS = 12  # shades of a heat map
BLANK = 0.75  # quantile of a heat map below which nothing is drawn
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 440, 46, 14, 12, 40  # of a drawing and its margins, in px
CHART_HEIGHT = 250
WIDE, WIDE_HEIGHT, KEY_ROW = 760, 360, 20  # of a chart of several runs, and a line of its key
COLOURS = 8  # of runs, as in report.css; further ones are dashed
SMALLEST_ROW, LARGEST_ROW = 4.5, 16.0  # height of a heat map's row
ROWS_HEIGHT = 320.0  # that a heat map aims at
LETTER = 6.2  # width of a letter of a token
LONGEST_TOKEN = 14  # letters


@dataclass(frozen=True)
class Series:
    """One curve: `kind` is a class of report.css, `train`, `trend` or `dev`."""

    kind: str
    steps: Sequence[float]
    values: Sequence[float]


def downsample(
    steps: Sequence[float], values: Sequence[float], limit: int = MAX_POINTS
) -> list[tuple[float, float]]:
    """At most `limit` points: the means of equally long runs of neighbours."""
    count = max(1, min(limit, len(steps)))
    runs = np.array_split(np.array([steps, values], dtype=np.float64), count, axis=1)
    return [(float(run[0].mean()), float(run[1].mean())) for run in runs if run.size]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Means (N,) over `window` neighbours (one more if it is even), fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first = np.maximum(places - window // 2, 0)
    behind = np.minimum(places + window // 2 + 1, len(values))
    means: list[float] = ((sums[behind] - sums[first]) / (behind - first)).tolist()
    return means


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True)
class RunCurve:
    """The accuracy of one run, and where it jumped."""

    name: str
    note: str  # what is said of it in the key
    steps: Sequence[float]
    values: Sequence[float]  # fractions
    mark: float | None = None  # step


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    percent: bool = False,
    mark: tuple[float, str] | None = None,
) -> str:
    """Curves over training steps, from zero; `mark` is a step to point at, and words for it."""
    drawn = [(item.kind, downsample(item.steps, item.values)) for item in series]
    points = [point for _, line in drawn for point in line]
    last_step = max((x for x, _ in points), default=1.0)
    top = 1.0 if percent else 1.05 * max((y for _, y in points), default=1.0) or 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * step / last_step
        return across, CHART_HEIGHT - BOTTOM - (CHART_HEIGHT - TOP - BOTTOM) * min(value, top) / top

    parts = []
    for value in ticks(0.0, top):
        y = place(0, value)[1]
        shown = f"{100 * value:.0f} %" if percent else f"{value:g}"
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 8, y + 4, shown, "end"))
    for step in ticks(0.0, last_step):
        parts.append(_text(place(step, 0)[0], CHART_HEIGHT - BOTTOM + 18, f"{step:,.0f}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, CHART_HEIGHT - 4, "training step", "middle"))
    if mark is not None:
        parts += _mark(place(mark[0], 0)[0], mark[1])
    for kind, line in drawn:
        places = [place(*point) for point in line]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line {kind}" d="M{path}"/>' if places else "")
        if kind == "dev":
            parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
    return _drawing(CHART_HEIGHT, label, parts)


def runs_chart(runs: Sequence[RunCurve], *, label: str) -> str:
    """Accuracies of runs over training steps, jumps dashed; below it a key with a line a run."""
    drawn = [downsample(run.steps, run.values) for run in runs]
    last_step = max((x for line in drawn for x, _ in line), default=1.0)
    across, high = WIDE - LEFT - RIGHT, WIDE_HEIGHT - TOP - BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        return LEFT + across * step / last_step, TOP + high * (1 - min(value, 1.0))

    parts = []
    for value in ticks(0.0, 1.0):
        y = place(0, value)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDE - RIGHT}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{100 * value:.0f} %", "end"))
    for step in ticks(0.0, last_step, about=8):
        x = place(step, 0)[0]
        anchor = "middle" if x < WIDE - 2 * RIGHT else "end"  # the last one stays within
        parts.append(_text(x, TOP + high + 18, f"{step:,.0f}", anchor))
    parts.append(_text(LEFT + across / 2, TOP + high + 36, "training step", "middle"))
    for number, (run, line) in enumerate(zip(runs, drawn, strict=True)):
        kind = f"run run{number % COLOURS}{' more' if number >= COLOURS else ''}"
        if run.mark is not None:
            x = place(run.mark, 0)[0]
            parts.append(f'<path class="jump {kind}" d="M{x:.1f} {TOP}v{high}"/>')
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<path class="line {kind}" d="M{path}"/>' if path else "")
        y = WIDE_HEIGHT + KEY_ROW * (number + 1)
        parts.append(f'<path class="line {kind}" d="M{LEFT} {y:.1f}h22"/>')
        parts.append(_text(LEFT + 30, y + 4, f"{run.name}: {run.note}", "start", "name"))
    height = WIDE_HEIGHT + KEY_ROW * (len(runs) + 1)
    return _drawing(height, label, parts, WIDE)


def reliability_chart(points: Sequence[tuple[float, float, int]], *, label: str) -> str:
    """Share of right words over confidence; points are (confidence, right, words) of each bin.

    On the diagonal the model is as sure as it is right. A dot's area grows with its words.
    """
    across, high = WIDTH - LEFT - RIGHT, CHART_HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + across * x, CHART_HEIGHT - BOTTOM - high * y

    parts = []
    for value in ticks(0.0, 1.0):
        x, y = place(value, value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{100 * value:.0f} %", "end"))
        anchor = "middle" if value < 1 else "end"  # the last one stays within the drawing
        parts.append(_text(x, CHART_HEIGHT - BOTTOM + 18, f"{100 * value:.0f} %", anchor))
    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    parts.append(f'<path class="line trend" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
    parts.append(_text(LEFT + across / 2, CHART_HEIGHT - 4, "confidence of a word", "middle"))
    most = max((words for _, _, words in points), default=1)
    for confidence, right, words in points:
        x, y = place(confidence, right)
        radius = 2 + 6 * math.sqrt(words / most)
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')
    return _drawing(CHART_HEIGHT, label, parts)


def heat_map(
    values: NDArray[np.floating], tokens: Sequence[str], seconds: float, *, label: str
) -> str:
    """A matrix (A, L): time to the right, tokens downwards; the lowest three quarters are blank."""
    grid = _average_rows(np.asarray(values, dtype=np.float64)).T  # (L, columns)
    rows, columns = grid.shape
    row = min(LARGEST_ROW, max(SMALLEST_ROW, ROWS_HEIGHT / rows))
    names = [_visible(token) for token in tokens]
    left = round(12 + LETTER * max(map(len, names)))
    bottom = TOP + row * rows
    cell = (WIDTH - left - RIGHT) / columns
    low, high = float(np.quantile(grid, BLANK)), float(grid.max())
    shades = np.clip((grid - low) / (high - low if high > low else 1.0), 0.0, 1.0)
    parts = _cells(np.round(shades * LEVELS).astype(int), (left, TOP), (cell, row))
    parts.append(f'<path class="axis" d="M{left} {TOP}V{bottom:.1f}H{WIDTH - RIGHT}"/>')
    every = math.ceil(10 / row)  # labels need 10 px
    for number, name in enumerate(names):
        if number % every == 0:
            parts.append(_text(left - 6, TOP + row * (number + 0.5) + 3.5, name, "end", "token"))
    for second in ticks(0.0, seconds):
        across = left + (WIDTH - left - RIGHT) * second / seconds
        parts.append(f'<path class="axis" d="M{across:.1f} {bottom:.1f}v4"/>')
        parts.append(_text(across, bottom + 17, f"{second:g}", "middle"))
    parts.append(_text(left, bottom + 36, "seconds", "start"))
    parts += _key(bottom + 28, low, high)
    return _drawing(bottom + 42, label, parts)


def _average_rows(values: NDArray[np.float64]) -> NDArray[np.float64]:
    runs = np.array_split(values, min(MAX_COLUMNS, len(values)))
    return np.stack([run.mean(axis=0) for run in runs])


def _cells(
    shades: NDArray[np.int_], corner: tuple[float, float], size: tuple[float, float]
) -> list[str]:
    """One path a shade, neighbours of the same shade in one rectangle: small files."""
    paths: dict[int, list[str]] = {}
    for number, line in enumerate(shades.tolist()):
        start = 0
        for shade, run in itertools.groupby(line):
            width = len(list(run))
            x, y = corner[0] + start * size[0], corner[1] + number * size[1]
            box = f"M{x:.1f} {y:.1f}h{width * size[0]:.1f}v{size[1]:.1f}h-{width * size[0]:.1f}z"
            paths.setdefault(shade, []).append(box)
            start += width
    return [
        f'<path class="cell" fill-opacity="{shade / LEVELS:.2f}" d="{"".join(boxes)}"/>'
        for shade, boxes in sorted(paths.items())
        if shade
    ]


def _key(y: float, low: float, high: float) -> list[str]:
    """The shades with the numbers that they begin and end at."""
    width = 7
    start = WIDTH - RIGHT - 34 - LEVELS * width
    parts = [_text(start - 6, y + 8, f"{low:.2f}", "end")]
    for shade in range(LEVELS):
        x, opacity = start + shade * width, (shade + 1) / LEVELS
        box = f'x="{x}" y="{y:.1f}" width="{width}" height="9"'
        parts.append(f'<rect class="cell" fill-opacity="{opacity:.2f}" {box}/>')
    return [*parts, _text(start + LEVELS * width + 6, y + 8, f"{high:.2f}", "start")]


def _mark(x: float, words: str) -> list[str]:
    left = x > WIDTH / 2
    anchor, shift = ("end", -6) if left else ("start", 6)
    line = f'<path class="mark" d="M{x:.1f} {TOP}V{CHART_HEIGHT - BOTTOM}"/>'
    above_axis = CHART_HEIGHT - BOTTOM - 10
    return [line, _text(x + shift, above_axis, words, anchor, "marked")]


def _visible(token: str) -> str:
    shown = token.replace("\n", "⏎").replace(" ", "␣")
    if len(shown) > 1 and token.startswith(" "):
        shown = shown[1:]  # the space that most tokens of words begin with says nothing
    return shown if len(shown) <= LONGEST_TOKEN else shown[: LONGEST_TOKEN - 1] + "…"


def _text(x: float, y: float, words: str, anchor: str, kind: str = "label") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(words)}</text>'


def _drawing(height: float, label: str, parts: Sequence[str], width: int = WIDTH) -> str:
    box = f'viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(parts)}</svg>'
