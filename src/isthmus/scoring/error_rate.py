"""Word and character error rates of a corpus, where the errors are, and how sure we may be.

The word error rate (WER) is (substitutions + insertions + deletions) / reference words, pooled over
the corpus: never a mean of the utterances' own rates. All rates are fractions (0.05 is 5 %), and
they can exceed 1. Chinese, Japanese, Thai and other scripts without spaces between words have no
words to count: there the character error rate (CER) is the number to read, and `Score.primary`
says so. White space is not a character here, so where a text is split into words, or a comma
became a space, costs nothing in CER.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import kaldialign
import numpy as np
from numpy.typing import NDArray

from isthmus.errors import IsthmusError
from isthmus.scoring.normalise import normaliser as find_normaliser
from isthmus.text import UNSPACED

__all__ = [
    "ErrorCounts",
    "Score",
    "SetScores",
    "UtteranceScore",
    "score",
    "score_sets",
]

Interval: TypeAlias = tuple[float, float]
Missing: TypeAlias = Literal["error", "empty"]


@dataclass(frozen=True)
class ErrorCounts:
    """Errors that add up: over words, over utterances, over sets.

    `words` and `characters` count the reference. A rate is None where the reference has nothing to
    divide by, however many words were inserted: no number would be true.
    """

    sub: int = 0
    ins: int = 0
    del_: int = 0
    words: int = 0
    character_errors: int = 0
    characters: int = 0
    wrong: int = 0  # utterances with at least one word error
    utterances: int = 0

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        names = [field.name for field in fields(self)]
        return ErrorCounts(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def errors(self) -> int:
        """Word errors: substitutions, insertions and deletions."""
        return self.sub + self.ins + self.del_

    @property
    def wer(self) -> float | None:
        """Word error rate, a fraction; None without reference words."""
        return _rate(self.errors, self.words)

    @property
    def cer(self) -> float | None:
        """Character error rate, a fraction; None without reference characters."""
        return _rate(self.character_errors, self.characters)

    @property
    def sentence_error_rate(self) -> float | None:
        """Fraction of utterances with at least one word error; None without utterances."""
        return _rate(self.wrong, self.utterances)


@dataclass(frozen=True)
class UtteranceScore:
    """One utterance: normalised texts, their alignment and the errors in it.

    `alignment` holds pairs (reference word, hypothesis word); "" stands where a side has no word,
    so ("", "so") is an insertion and ("so", "") a deletion.
    """

    id: str
    reference: str
    hypothesis: str
    alignment: tuple[tuple[str, str], ...]
    counts: ErrorCounts

    def marked(self) -> str:
        """Reference words with the errors marked: (EDISON->ADDISON), (THE->*), (*->AND)."""
        return " ".join(
            said if said == heard else f"({said or '*'}->{heard or '*'})"
            for said, heard in self.alignment
        )


@dataclass(frozen=True)
class Score:
    """The score of one corpus. `interval` and `cer_interval` are 95 % bootstrap intervals."""

    utterances: tuple[UtteranceScore, ...]
    normaliser: str
    interval: Interval | None
    cer_interval: Interval | None
    missing: tuple[str, ...] = ()  # utterances without a hypothesis, scored as empty

    @cached_property
    def counts(self) -> ErrorCounts:
        """Errors of the whole corpus."""
        return sum((utterance.counts for utterance in self.utterances), ErrorCounts())

    @property
    def wer(self) -> float | None:
        """Corpus word error rate, a fraction; None without reference words."""
        return self.counts.wer

    @property
    def cer(self) -> float | None:
        """Corpus character error rate, a fraction; None without reference characters."""
        return self.counts.cer

    @cached_property
    def primary(self) -> Literal["wer", "cer"]:
        """The rate to read: `cer` where most of the reference is written without spaces."""
        unspaced = sum(_unspaced(utterance.reference) for utterance in self.utterances)
        return "cer" if 2 * unspaced > self.counts.characters else "wer"

    @cached_property
    def confusions(self) -> Counter[tuple[str, str]]:
        """How often each error happened, keyed as in `UtteranceScore.alignment`."""
        return Counter(
            pair
            for utterance in self.utterances
            for pair in utterance.alignment
            if pair[0] != pair[1]
        )

    def substitutions(self, limit: int = 10) -> list[tuple[str, str, int]]:
        """The most frequent (reference word, hypothesis word, times)."""
        ranked = self._ranked_confusions
        return [(*pair, times) for pair, times in ranked if pair[0] and pair[1]][:limit]

    def insertions(self, limit: int = 10) -> list[tuple[str, int]]:
        """The words most often inserted, with how often."""
        return [(pair[1], times) for pair, times in self._ranked_confusions if not pair[0]][:limit]

    def deletions(self, limit: int = 10) -> list[tuple[str, int]]:
        """The words most often deleted, with how often."""
        return [(pair[0], times) for pair, times in self._ranked_confusions if not pair[1]][:limit]

    @cached_property
    def _ranked_confusions(self) -> list[tuple[tuple[str, str], int]]:
        return sorted(self.confusions.items(), key=lambda item: (-item[1], item[0]))

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON takes them; rates and intervals are fractions or None."""
        counts = self.counts
        return {
            "wer": self.wer,
            "interval": _listed(self.interval),
            "sub": counts.sub,
            "ins": counts.ins,
            "del": counts.del_,
            "words": counts.words,
            "cer": self.cer,
            "cer_interval": _listed(self.cer_interval),
            "characters": counts.characters,
            "primary": self.primary,
            "sentence_error_rate": counts.sentence_error_rate,
            "utterances": counts.utterances,
            "missing": len(self.missing),
            "normaliser": self.normaliser,
        }

    def listing(self, *, limit: int | None = None) -> Iterator[str]:
        """Lines to read: the figures, every utterance with errors, worst first, top confusions.

        Worst is most word errors; `limit` keeps that many utterances. Errors are marked in the
        reference: `(EDISON->ADDISON)` substituted, `(THE->*)` deleted, `(*->AND)` inserted.
        """
        yield from self._summary()
        ranked = sorted(self.utterances, key=lambda item: (-item.counts.errors, item.id))
        wrong = [utterance for utterance in ranked if utterance.counts.errors]
        yield ""
        yield f"Utterances with errors: {len(wrong)} of {len(ranked)}, worst first"
        for utterance in wrong[:limit]:
            yield f"{utterance.id}\t{utterance.marked()}"
        yield from _table("Substitutions", (f"{a} -> {b}\t{n}" for a, b, n in self.substitutions()))
        yield from _table("Deletions", (f"{word}\t{n}" for word, n in self.deletions()))
        yield from _table("Insertions", (f"{word}\t{n}" for word, n in self.insertions()))

    def _summary(self) -> Iterator[str]:
        counts = self.counts
        yield (
            f"WER {_percent(self.wer, self.interval)}: {counts.sub} substitutions, "
            f"{counts.ins} insertions, {counts.del_} deletions in {counts.words} words "
            f"of {counts.utterances} utterances"
        )
        yield (
            f"CER {_percent(self.cer, self.cer_interval)}: {counts.character_errors} errors "
            f"in {counts.characters} characters"
        )
        yield f"Utterances with an error {_percent(counts.sentence_error_rate, None)}"
        yield f"Normaliser {self.normaliser}"
        if self.primary == "cer":
            yield "Most of the reference has no spaces between words: read CER, not WER"
        if self.missing:
            yield f"Scored as empty for want of a hypothesis: {len(self.missing)} utterances"


@dataclass(frozen=True)
class SetScores:
    """Scores of several sets, and of all their utterances pooled (not a mean of the sets)."""

    sets: Mapping[str, Score]
    pooled: Score

    def to_dict(self) -> dict[str, Any]:
        """The figures of all utterances together, and under `sets` those of each by name."""
        sets = {name: score.to_dict() for name, score in self.sets.items()}
        return self.pooled.to_dict() | {"sets": sets}


def score(
    references: Mapping[str, str],
    hypotheses: Mapping[str, str],
    *,
    normaliser: str = "basic",
    missing: Missing = "error",
    seed: int = 0,
    resamples: int = 1000,
) -> Score:
    """Scores raw hypotheses against raw references, both by utterance id.

    An utterance with an empty reference counts as right when its hypothesis is empty, else its
    words are insertions. The interval is the bootstrap over utterances of Bisani and Ney
    (ICASSP 2004): the corpus rate of `resamples` corpora drawn with replacement; it takes
    utterances as independent, so with few speakers it is too narrow.

    Args:
        normaliser: a name for `isthmus.scoring.normaliser`; applied to both sides.
        missing: what a reference without a hypothesis is: an error, or an empty hypothesis.
        seed: of the bootstrap; the rates do not depend on it.
        resamples: corpora drawn for the intervals; 0 gives no intervals.

    Raises:
        IsthmusError: ids differ (they are named), or an option has no such value.
    """
    if missing not in ("error", "empty"):
        raise IsthmusError(f"missing={missing!r}: give 'error' or 'empty'.")
    extra = [id for id in hypotheses if id not in references]
    if extra:
        raise IsthmusError(
            f"{len(extra)} of {len(hypotheses)} hypotheses have no reference: {_named(extra)}. "
            f"Score the set the hypotheses belong to, or remove them."
        )
    absent = [id for id in references if id not in hypotheses]
    if absent and missing == "error":
        raise IsthmusError(
            f"{len(absent)} of {len(references)} references have no hypothesis: {_named(absent)}. "
            f"Decode them, or give missing='empty' to count their words as deleted."
        )
    normalise = find_normaliser(normaliser)
    utterances = [
        _score_utterance(id, normalise(text), normalise(hypotheses.get(id, "")))
        for id, text in references.items()
    ]
    return _corpus(utterances, normaliser, absent, seed, resamples)


def score_sets(
    sets: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]],
    *,
    normaliser: str = "basic",
    missing: Missing = "error",
    seed: int = 0,
    resamples: int = 1000,
) -> SetScores:
    """Scores several sets, each (references, hypotheses), and all their utterances pooled.

    Sets may share utterance ids: in the pooled score an utterance is called `set/id`. Options are
    those of `score`.

    Raises:
        IsthmusError: as `score`, with the set named first.
    """
    scores: dict[str, Score] = {}
    for name, (references, hypotheses) in sets.items():
        try:
            scores[name] = score(
                references,
                hypotheses,
                normaliser=normaliser,
                missing=missing,
                seed=seed,
                resamples=resamples,
            )
        except IsthmusError as error:
            raise IsthmusError(f"set {name!r}: {error}") from error
    utterances = [
        replace(utterance, id=f"{name}/{utterance.id}")
        for name, part in scores.items()
        for utterance in part.utterances
    ]
    absent = [f"{name}/{id}" for name, part in scores.items() for id in part.missing]
    return SetScores(scores, _corpus(utterances, normaliser, absent, seed, resamples))


def score_part(
    whole: Score, ids: Collection[str], *, seed: int = 0, resamples: int = 1000
) -> Score:
    """The score of some of the utterances of a score, by their ids; options as of `score`."""
    utterances = [one for one in whole.utterances if one.id in ids]
    absent = [id for id in whole.missing if id in ids]
    return _corpus(utterances, whole.normaliser, absent, seed, resamples)


def resampled_rates(
    errors: NDArray[np.int64] | NDArray[np.float64],
    totals: NDArray[np.int64] | NDArray[np.float64],
    *,
    seed: int,
    resamples: int,
) -> NDArray[np.float64]:
    """Corpus rates of resampled corpora, drawn by utterance with replacement.

    Args:
        errors: (K, N) errors of N utterances under K counts or systems; all see the same draws.
        totals: (K, N) reference words or characters of the same utterances.

    Returns:
        (K, R) with R <= `resamples`: draws in which some total is 0 have no rate and are left out.
    """
    if resamples < 0:
        raise IsthmusError(f"resamples={resamples}: give 0 (no interval) or more, usually 1000.")
    generator = np.random.default_rng(seed)
    number = errors.shape[1]
    rates: list[NDArray[np.float64]] = []
    for _ in range(resamples if number else 0):
        drawn = generator.integers(0, number, number)
        divisors = totals[:, drawn].sum(axis=1)
        if divisors.all():
            rates.append(errors[:, drawn].sum(axis=1) / divisors)
    return np.array(rates, dtype=np.float64).reshape(-1, errors.shape[0]).T


def percentile_interval(values: NDArray[np.float64]) -> Interval | None:
    """The middle 95 % of `values` (R,); None when there are none."""
    if not values.size:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _score_utterance(id: str, reference: str, hypothesis: str) -> UtteranceScore:
    # "" can mark a missing word because splitting never yields an empty one.
    alignment = tuple(kaldialign.align(reference.split(), hypothesis.split(), ""))
    deletions = sum(not heard for _, heard in alignment)
    insertions = sum(not said for said, _ in alignment)
    errors = sum(said != heard for said, heard in alignment)
    characters = "".join(reference.split())
    heard_characters = "".join(hypothesis.split())
    counts = ErrorCounts(
        sub=errors - deletions - insertions,
        ins=insertions,
        del_=deletions,
        words=len(alignment) - insertions,
        character_errors=kaldialign.edit_distance(characters, heard_characters)["total"],
        characters=len(characters),
        wrong=int(errors > 0),
        utterances=1,
    )
    return UtteranceScore(id, reference, hypothesis, alignment, counts)


def _corpus(
    utterances: Sequence[UtteranceScore],
    normaliser: str,
    absent: Sequence[str],
    seed: int,
    resamples: int,
) -> Score:
    # In the order of ids: what is drawn is not to depend on the order in which a file lists them.
    counts = [one.counts for one in sorted(utterances, key=lambda one: one.id)]
    intervals = [
        percentile_interval(
            resampled_rates(_row(errors), _row(totals), seed=seed, resamples=resamples)[0]
        )
        for errors, totals in (
            ([item.errors for item in counts], [item.words for item in counts]),
            ([item.character_errors for item in counts], [item.characters for item in counts]),
        )
    ]
    return Score(tuple(utterances), normaliser, intervals[0], intervals[1], tuple(absent))


def _row(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array([values], dtype=np.int64)  # (1, N)


def _rate(errors: int, total: int) -> float | None:
    return errors / total if total else None


def _unspaced(text: str) -> int:
    """Characters of scripts without spaces between words."""
    return len(UNSPACED.findall(text))


def _named(ids: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _percent(rate: float | None, interval: Interval | None) -> str:
    if rate is None:
        return "undefined (nothing in the reference)"
    within = f" [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]" if interval else ""
    return f"{100 * rate:.2f} %{within}"


def _table(title: str, rows: Iterable[str]) -> Iterator[str]:
    lines = list(rows)
    if lines:
        yield ""
        yield f"{title}, most frequent first"
        yield from lines
