"""Jumps in accuracy curves are found where they are, and nowhere else."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.lab import emergence
from isthmus.lab.emergence import Emergence, EmergenceMonitor, find_emergence

Curve = NDArray[np.float64]
POINTS = 600
PLACE = np.arange(POINTS) / POINTS  # of training


def jump(at: float, low: float, high: float, width: float = 0.05) -> Curve:
    """A sigmoid: `width` is the share of training in which most of the rise happens."""
    return low + (high - low) / (1 + np.exp(-4.4 * (PLACE - at) / width))


def noisy(curve: Curve, deviation: float, seed: int = 0) -> Curve:
    return np.clip(curve + np.random.default_rng(seed).normal(0, deviation, len(curve)), 0, 1)


def find(curve: Curve) -> Emergence | None:
    return find_emergence(range(1, len(curve) + 1), curve.tolist())


JUMPS = {
    "early": (jump(0.1, 0.4, 0.9, 0.02), 0.1, 0.4, 0.9),
    "late": (jump(0.9, 0.4, 0.9, 0.02), 0.9, 0.4, 0.9),
    "high": (jump(0.5, 0.7, 0.98), 0.5, 0.7, 0.98),
    "low": (jump(0.5, 0.02, 0.25), 0.5, 0.02, 0.25),
    "at once": (np.where(PLACE < 0.3, 0.1, 0.6), 0.3, 0.1, 0.6),
    "after a rise that levels off": (
        jump(0.5, 0.0, 0.5, 0.03) + 0.4 * (1 - np.exp(-PLACE * 40)),
        0.5,
        0.4,
        0.9,
    ),
    "and then slowly on": (
        jump(0.3, 0.3, 0.7, 0.03) + 0.2 * np.clip(PLACE - 0.35, 0, 1),
        0.3,
        0.3,
        0.72,
    ),
}


@pytest.mark.parametrize("deviation", [0.0, 0.03])
@pytest.mark.parametrize(("curve", "at", "low", "high"), JUMPS.values(), ids=JUMPS)
def test_a_jump_is_found(
    curve: Curve, at: float, low: float, high: float, deviation: float
) -> None:
    for seed in range(5):
        found = find(noisy(curve, deviation, seed))
        assert found is not None
        assert found.step == pytest.approx(1 + at * POINTS, abs=10)
        assert found.before == pytest.approx(low, abs=0.05)
        assert found.after == pytest.approx(high, abs=0.05)


STEADY = {
    "flat": np.full(POINTS, 0.4),
    "line": PLACE,
    "gentle line": 0.3 + 0.3 * PLACE,
    "square": PLACE**2,
    "slow S": np.sin(np.pi * PLACE / 2) ** 2,
    "levelling off": 0.4 + 0.5 * (1 - np.exp(-5 * PLACE)),
    "logarithm": 0.9 * np.log1p(50 * PLACE) / np.log(51),
    "step down": 1.3 - jump(0.5, 0.4, 0.9),
    "collapse and return": np.where((PLACE > 0.3) & (PLACE < 0.6), 0.1, 0.7),
    "short spike": np.where((PLACE > 0.5) & (PLACE < 0.51), 0.9, 0.4),
    "plateau that is lost again": np.where((PLACE > 0.3) & (PLACE < 0.5), 0.9, 0.4),
    "too small a jump": jump(0.5, 0.4, 0.48),
}


@pytest.mark.parametrize("deviation", [0.0, 0.02, 0.08])
@pytest.mark.parametrize("curve", STEADY.values(), ids=STEADY)
def test_no_jump_is_seen_in(curve: Curve, deviation: float) -> None:
    assert [find(noisy(curve, deviation, seed)) for seed in range(10)] == [None] * 10


@pytest.mark.parametrize("name", ["flat", "line", "square", "levelling off"])
def test_false_alarms_are_rare(name: str) -> None:
    curve = STEADY[name][::2]
    assert sum(find(noisy(curve, 0.1, seed)) is not None for seed in range(100)) <= 1


def test_the_same_curve_without_its_jump_has_none() -> None:
    """The inverse: what was found is the jump, not something else about these curves."""
    for curve, at, low, high in JUMPS.values():
        without = curve - np.where(at < PLACE, high - low, 0)
        near = np.abs(PLACE - at) < 0.06
        without[near] = np.interp(PLACE[near], PLACE[~near], without[~near])
        assert find(noisy(without, 0.02)) is None


def test_noise_hides_a_jump_that_it_outgrows() -> None:
    assert find(noisy(jump(0.5, 0.45, 0.56), 0.01)) is not None
    assert find(noisy(jump(0.5, 0.45, 0.56), 0.3)) is None


def test_steps_are_those_given() -> None:
    curve = jump(0.5, 0.4, 0.9)
    found = find_emergence(range(100, 100 + 50 * POINTS, 50), curve.tolist())
    assert found is not None
    assert found.step == 100 + 50 * 300


def test_a_single_outlier_on_a_plateau_changes_nothing() -> None:
    curve = noisy(jump(0.5, 0.4, 0.9), 0.02)
    expected = find(curve)
    assert expected is not None
    curve[[50, 100, 500]] = [1.0, 0.0, 0.0]
    found = find(curve)
    assert found is not None
    assert found.step == pytest.approx(expected.step, abs=3)


@pytest.mark.parametrize("number", [0, 1, 9])
def test_a_few_points_show_nothing(number: int) -> None:
    assert find(np.where(np.arange(number) < number / 2, 0.1, 0.9)) is None


def test_ten_points_can_show_a_jump() -> None:
    assert find(np.repeat([0.2, 0.8], 5)) == Emergence(6, 0.2, 0.8)


@pytest.mark.parametrize(
    ("steps", "accuracy", "message"),
    [
        ([1, 2], [0.5], "2 steps and accuracies of shape"),
        ([1, 2, 2], [0.5] * 3, "step 2 follows step 2"),
        ([1, 2], [0.5, float("nan")], "at step 2 is nan"),
    ],
)
def test_bad_curves_are_named(steps: list[int], accuracy: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_emergence(steps, accuracy)


def watch(curve: Curve) -> list[tuple[int, Emergence]]:
    monitor = EmergenceMonitor()
    reports = [(step, monitor.update(step, value)) for step, value in enumerate(curve, 1)]
    return [(step, found) for step, found in reports if found is not None]


def test_the_monitor_reports_once_soon_after_the_jump() -> None:
    [(when, found)] = watch(noisy(jump(0.3, 0.4, 0.9, 0.03), 0.03))
    assert found.step == pytest.approx(180, abs=6)
    assert found.step < when <= 260


@pytest.mark.parametrize("name", ["flat", "line", "levelling off", "step down"])
def test_the_monitor_keeps_silent(name: str) -> None:
    assert watch(noisy(STEADY[name], 0.03)) == []


def test_watching_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    search = emergence.find_emergence

    def counted(steps: Sequence[int], accuracy: Sequence[float], **options: Any) -> Any:
        searched.append(len(steps))
        return search(steps, accuracy, **options)

    monkeypatch.setattr(emergence, "find_emergence", counted)
    assert watch(np.random.default_rng(0).normal(0.4, 0.05, 10_000)) == []
    assert len(searched) < 400
    assert sum(searched) < 60 * 10_000  # each point is looked at 60 times, however long the run
