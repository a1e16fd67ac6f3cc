"""Drawings show the values they are given."""

import re

import numpy as np
import pytest

from isthmus.lab.svg import Series, downsample, heat_map, line_chart, moving_mean, ticks


def test_downsampling_keeps_short_curves_and_means() -> None:
    assert downsample([1, 2, 3], [4, 5, 6]) == [(1, 4), (2, 5), (3, 6)]
    assert downsample([1, 2, 3, 4], [0, 2, 4, 6], limit=2) == [(1.5, 1), (3.5, 5)]
    long = downsample(range(1001), range(1001))
    assert len(long) == 400
    assert all(x == y for x, y in long)
    assert np.diff([x for x, _ in long]) == pytest.approx(2.5, abs=0.5)
    assert downsample([], []) == []


def test_moving_means() -> None:
    assert moving_mean([1, 2, 6, 3], 3) == pytest.approx([1.5, 3, 11 / 3, 4.5])
    assert moving_mean([1, 2], 1) == [1, 2]
    assert moving_mean([1, 3], 9) == [2, 2]
    assert moving_mean([], 3) == []


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1400, [0, 500, 1000]),
        (0, 2.3, [0, 0.5, 1, 1.5, 2]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def points(html: str, kind: str) -> list[tuple[float, float]]:
    [path] = re.findall(rf'class="line {kind}" d="M([^"]*)"', html)
    return [(float(x), float(y)) for x, y in (pair.split(" ") for pair in path.split("L"))]


def test_higher_is_further_up_and_later_further_right() -> None:
    chart = line_chart(
        [Series("train", [1, 50, 100], [0.1, 0.9, 0.5]), Series("dev", [100], [0.7])],
        label="accuracy",
        percent=True,
    )
    (x1, y1), (x2, y2), (x3, y3) = points(chart, "train")
    assert x1 < x2 < x3
    assert y2 < y3 < y1
    [(x, y)] = points(chart, "dev")
    assert (x, y2 < y < y3) == (x3, True)


def test_the_mark_stands_at_its_step() -> None:
    series = [Series("train", [0, 50, 100], [0, 0, 1])]
    chart = line_chart(series, label="accuracy", mark=(50, "step 50"))
    [across] = re.findall(r'class="mark" d="M([\d.]+) ', chart)
    assert float(across) == points(chart, "train")[1][0]
    assert "step 50" in chart
    assert "mark" not in line_chart(series, label="accuracy")


def test_an_empty_or_flat_chart_is_still_drawn() -> None:
    assert "svg" in line_chart([Series("train", [], [])], label="empty")
    assert "nan" not in line_chart([Series("train", [1, 2], [0.0, 0.0])], label="zero")


def dark_cells(html: str) -> list[tuple[float, float, float]]:
    """x, y and width of the fully dark cells."""
    [path] = re.findall(r'<path class="cell" fill-opacity="1.00" d="([^"]*)"', html)
    found = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v", path)
    return [(float(x), float(y), float(width)) for x, y, width in found]


def test_the_largest_similarity_is_darkest_in_its_place() -> None:
    matrix = np.zeros((8, 2))
    matrix[0, 0] = matrix[7, 1] = 0.8  # first token at the beginning, second at the end
    drawing = heat_map(matrix, ("a", " b"), 2.0, label="map")
    (x1, y1, width1), (x2, y2, width2) = dark_cells(drawing)
    assert (x1 < x2, y1 < y2) == (True, True)
    assert width1 == width2
    assert x2 - x1 == pytest.approx(7 * width1, abs=0.4)
    assert "0.00" in drawing
    assert "0.80" in drawing
    assert re.findall(r'class="token"[^>]*>([^<]*)<', drawing) == ["a", "b"]


def test_large_maps_stay_small_and_legible() -> None:
    matrix = np.random.default_rng(0).normal(size=(3000, 120))
    drawing = heat_map(matrix, ["extraordinarily"] * 120, 300.0, label="map")
    assert len(drawing) < 1_500_000
    names = re.findall(r'class="token"[^>]*>([^<]*)<', drawing)
    assert len(names) == 40
    assert set(names) == {"extraordinari…"}


def test_a_flat_map_has_no_cells() -> None:
    drawing = heat_map(np.full((3, 2), 0.4), ("\n", " "), 1.0, label="map")
    assert '<path class="cell"' not in drawing
    assert "nan" not in drawing
    assert re.findall(r'class="token"[^>]*>([^<]*)<', drawing) == ["⏎", "␣"]
