"""Is one system better than another, or is it the luck of the test set?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import IsthmusError
from isthmus.scoring.error_rate import Interval, Score, percentile_interval, resampled_rates


@dataclass(frozen=True)
class PairedResult:
    """WER of system a minus WER of system b, a fraction: below 0, a is better.

    `interval` is the 95 % interval of the difference; `p_value` is two-sided: how easily a
    difference of this sign would come of drawing other utterances, were the systems equal.
    """

    difference: float
    interval: Interval
    p_value: float


def paired_bootstrap(
    score_a: Score, score_b: Score, *, seed: int = 0, resamples: int = 10_000
) -> PairedResult:
    """Matched-pairs bootstrap (Bisani and Ney, ICASSP 2004) of two systems on the same utterances.

    Both systems are scored on the same drawn utterances, so what makes an utterance hard for both
    cancels out; two overlapping intervals of single systems do not show that they are equal.

    Raises:
        IsthmusError: the scores are of different utterances, references or normalisers, or hold no
            reference words.
    """
    return paired_mean([(score_a, score_b)], seed=seed, resamples=resamples)


def paired_mean(
    pairs: Sequence[tuple[Score, Score]], *, seed: int = 0, resamples: int = 10_000
) -> PairedResult:
    """The same of systems on several sets, whose rates are averaged: each set weighs the same.

    `pairs` are the scores of system a and system b on each set; every set is drawn by itself.
    """
    drawn = [_drawn_rates(a, b, seed + number, resamples) for number, (a, b) in enumerate(pairs)]
    number = min(rates.shape[1] for rates in drawn)  # as draws without words have no rate
    rates = np.mean([rates[:, :number] for rates in drawn], axis=0)  # (2, R)
    differences = rates[0] - rates[1]  # (R,)
    interval = percentile_interval(differences)
    if interval is None:
        raise IsthmusError(f"none of {resamples} draws held a reference word. Raise resamples.")
    # One is added so that no finite number of draws claims a p-value of 0.
    tail = min(np.sum(differences <= 0), np.sum(differences >= 0)) + 1
    p_value = min(1.0, 2 * float(tail) / (len(differences) + 1))
    difference = float(np.mean([(a.wer or 0) - (b.wer or 0) for a, b in pairs]))
    return PairedResult(difference, interval, p_value)


def _drawn_rates(score_a: Score, score_b: Score, seed: int, resamples: int) -> NDArray[np.float64]:
    """Rates of both systems (2, R) on the same draws."""
    texts_a, texts_b = (
        {utterance.id: utterance.reference for utterance in part.utterances}
        for part in (score_a, score_b)
    )
    different = [id for id in texts_a | texts_b if texts_a.get(id) != texts_b.get(id)]
    if score_a.normaliser != score_b.normaliser or different:
        raise IsthmusError(
            f"the two scores cannot be paired: normalisers {score_a.normaliser!r} and "
            f"{score_b.normaliser!r}, {len(different)} utterances differ in id or reference "
            f"({', '.join(different[:5]) or 'none'}). Score both systems on one reference file."
        )
    if resamples < 1:
        raise IsthmusError(f"resamples={resamples}: give at least 1, usually 10000.")
    if score_a.wer is None or score_b.wer is None:
        raise IsthmusError("the two scores cannot be compared: their references hold no words.")
    counts_b = {utterance.id: utterance.counts for utterance in score_b.utterances}
    pairs = [(utterance.counts, counts_b[utterance.id]) for utterance in score_a.utterances]
    errors = np.array([[a.errors, b.errors] for a, b in pairs], dtype=np.int64).T  # (2, N)
    words = np.array([[a.words, b.words] for a, b in pairs], dtype=np.int64).T  # (2, N)
    return resampled_rates(errors, words, seed=seed, resamples=resamples)
