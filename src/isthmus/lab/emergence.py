"""Capability emergence: the jump in the next-token accuracy of training.

SLAM-ASR (arXiv 2402.08846, figures 2 to 4) saw accuracy stay on a plateau, where the language model
knows language but does not listen, and then rise within few steps to another.

What counts as a jump. Over five neighbouring blocks of m points each, called far, near, rise, next
and last (the points are taken as evenly spaced), with E the standard error of the difference of two
blocks' means:

1. the mean of `next` lies at least `min_rise`, and at least 8 E, above the highest mean of any
   block before `rise` (so the return from a collapse is no jump);
2. that rise is at least a third of what the curve spans, from its lowest block to its highest;
3. the curve is flat before and after: near differs from far, and last from next, by at most 0.3 of
   the rise less 2 E (so a steady line, whose near - far is half of its rise, is no jump, nor is a
   curve that rises from the first step on and levels off);
4. it lasts: all points from `next` on have a mean above the middle of the rise.

All positions and all m from 2 to a fifth of the curve are tried: a jump is fast when compared with
the plateau before it, whatever its length. Of all that qualify the surest counts: the largest rise
less 8 E. The noise behind E comes from the differences of neighbouring points.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]

MIN_RISE = 0.1  # absolute accuracy
SURE = 8.0  # standard errors; no jump in noise alone, however many places are tried
SHARE = 1 / 3  # of the curve's span
FLAT = 0.3  # of the rise
SHORTEST = 2  # points of a block


@dataclass(frozen=True)
class Emergence:
    """A jump in accuracy (fractions)."""

    step: int  # the first one nearer to the level after
    before: float  # mean accuracy of the plateau before
    after: float  # mean accuracy of the plateau after


def find_emergence(
    steps: Sequence[int], accuracy: Sequence[float], *, min_rise: float = MIN_RISE
) -> Emergence | None:
    """The surest jump of an accuracy curve, or None; what a jump is stands at the top of this file.

    Args:
        steps: rising training steps (N,).
        accuracy: next-token accuracy at each, a fraction (N,).
        min_rise: smallest rise that counts.

    Raises:
        ValueError: the two differ in length, steps do not rise, or an accuracy is not finite.
    """
    curve = np.asarray(accuracy, dtype=np.float64)
    _check(steps, curve)
    if len(curve) < 5 * SHORTEST:
        return None
    noise = _noise(curve)
    found = max(_candidates(curve, noise, min_rise), default=None)
    if found is None:
        return None
    _, start, size = found
    after = start + 3 * size
    before_level = float(curve[start : start + 2 * size].mean())
    after_level = float(curve[after : after + 2 * size].mean())
    split = start + size + _split(curve[start + size : after + size])
    return Emergence(int(steps[split]), before_level, after_level)


class EmergenceMonitor:
    """Watches an accuracy curve grow and reports its first jump, once.

    The curve is searched again whenever it has grown by 2 %, so watching costs little and reports
    are at most that much late. A jump is seen when the level after it has held for as long as the
    rise took, twice over.
    """

    def __init__(self, min_rise: float = MIN_RISE):
        self.min_rise = min_rise
        self.found: Emergence | None = None
        self._steps: list[int] = []
        self._accuracy: list[float] = []
        self._next_search = 5 * SHORTEST

    def update(self, step: int, accuracy: float) -> Emergence | None:
        """The jump, at the call in which it is first seen; else None. Raises as find_emergence."""
        if self.found is not None:
            return None
        self._steps.append(step)
        self._accuracy.append(accuracy)
        if len(self._steps) < self._next_search:
            return None
        self._next_search = len(self._steps) + max(1, len(self._steps) // 50)
        self.found = find_emergence(self._steps, self._accuracy, min_rise=self.min_rise)
        return self.found


def _check(steps: Sequence[int], curve: Curve) -> None:
    if curve.shape != (len(steps),):
        raise ValueError(
            f"{len(steps)} steps and accuracies of shape {curve.shape}: give one accuracy a step."
        )
    for before, after in itertools.pairwise(steps):
        if after <= before:
            raise ValueError(f"step {after} follows step {before}: give each step once, in order.")
    if not np.isfinite(curve).all():
        place = int(np.flatnonzero(~np.isfinite(curve))[0])
        raise ValueError(
            f"the accuracy at step {steps[place]} is {curve[place]}: leave such steps out."
        )


def _candidates(curve: Curve, noise: float, min_rise: float) -> Iterator[tuple[float, int, int]]:
    """(rise less its uncertainty, first point of `far`, m) of all that qualify."""
    sums = np.concatenate([[0.0], np.cumsum(curve)])
    for size in _sizes(len(curve) // 5):
        means = (sums[size:] - sums[:-size]) / size  # of the block that begins at each point
        highest = np.maximum.accumulate(means)
        count = len(curve) - 5 * size + 1
        far, near, following, last = (means[k * size :][:count] for k in (0, 1, 3, 4))
        rise = following - highest[size:][:count]
        error = noise * np.sqrt(2 / size)
        flat = FLAT * rise - 2 * error
        good = rise >= max(min_rise, SURE * error, SHARE * np.ptp(means))
        rest = (sums[-1] - sums[3 * size :][:count]) / (len(curve) - 3 * size - np.arange(count))
        good &= rest > following - rise / 2
        good &= np.maximum(np.abs(near - far), np.abs(last - following)) <= flat
        if good.any():
            start = int(np.argmax(np.where(good, rise, -np.inf)))
            yield float(rise[start]) - SURE * error, start, size


def _sizes(longest: int) -> Iterator[int]:
    """Block sizes up to `longest`, each about a fifth more than the one before."""
    size = SHORTEST
    while size <= longest:
        yield size
        size += max(1, size // 5)


def _noise(curve: Curve) -> float:
    """Standard deviation around the trend, unmoved by the jump itself and by outliers."""
    # The difference of two normal deviates has a median size of 0.6745 * sqrt(2) deviations.
    return float(np.median(np.abs(np.diff(curve)))) / 0.9539


def _split(curve: Curve) -> int:
    """Where a curve is best cut into two levels (least squares): the first point of the second."""
    number = np.arange(1, len(curve))
    sums = np.cumsum(curve)
    left, right = sums[:-1] / number, (sums[-1] - sums[:-1]) / number[::-1]
    between = number * number[::-1] * np.square(right - left)  # what the cut explains
    return int(np.argmax(between)) + 1
