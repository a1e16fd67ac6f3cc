"""Whether the model is as sure as it is right: confidences of words against what was said.

A word counts as right where the alignment of the error rate pairs it with itself. The expected
calibration error (Guo et al., arXiv 1706.04599, equation 3) is the mean distance between
confidence and share of right words, over bins of equal width, weighted by their words.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Words of like confidence."""

    words: int
    confidence: float  # mean
    right: float  # share


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram in numbers."""

    bins: tuple[Bin, ...]  # those that hold words, least sure first
    error: float  # expected calibration error
    words: int
    skipped: int  # words of utterances that the normaliser cut into other words

    def to_dict(self) -> dict[str, Any]:
        return {
            "expected_calibration_error": self.error,
            "words": self.words,
            "skipped": self.skipped,
            "bins": [asdict(one) for one in self.bins],
        }


Alignment = Iterable[tuple[str, str]]  # (said, heard), "" where there is none


def calibrate(utterances: Iterable[tuple[list[float], Alignment]]) -> Calibration | None:
    """The calibration of utterances: confidences of the words heard, and the alignment.

    None where there is no word to judge by.
    """
    sure: list[tuple[float, bool]] = []
    skipped = 0
    for confidences, alignment in utterances:
        right = [said == heard for said, heard in alignment if heard]
        if len(right) == len(confidences):
            sure += zip(confidences, right, strict=True)
        else:
            skipped += len(right)
    bins = []
    for number in range(BINS):
        inside = [pair for pair in sure if min(int(pair[0] * BINS), BINS - 1) == number]
        if inside:
            mean = sum(p for p, _ in inside) / len(inside)
            bins.append(Bin(len(inside), mean, sum(r for _, r in inside) / len(inside)))
    if not bins:
        return None
    error = sum(one.words * abs(one.confidence - one.right) for one in bins) / len(sure)
    return Calibration(tuple(bins), error, len(sure), skipped)
