"""Error rates of each language, and their average in which every language counts the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.scoring.error_rate import Score, SetScores, score_part

UNKNOWN = "unknown"  # of utterances whose corpus names no language


@dataclass(frozen=True)
class LanguageScores:
    """The score of each language; of utterances without one, as `unknown`, which is no language."""

    languages: Mapping[str, Score]

    @property
    def wer(self) -> float | None:
        """Mean of the languages' word error rates; None where none has reference words."""
        return _mean([score.wer for name, score in self.languages.items() if name != UNKNOWN])

    @property
    def cer(self) -> float | None:
        """Mean of the languages' character error rates; None where none has characters."""
        return _mean([score.cer for name, score in self.languages.items() if name != UNKNOWN])

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON takes them."""
        languages = {name: score.to_dict() for name, score in self.languages.items()}
        return {"languages": languages, "macro": {"wer": self.wer, "cer": self.cer}}


def score_languages(
    scores: SetScores, languages: Mapping[str, Mapping[str, str]]
) -> LanguageScores | None:
    """Scores by language, from the language ("" if not known) of each utterance of each set.

    None where there is only one.
    """
    found: dict[str, set[str]] = {}
    for name, score in scores.sets.items():
        for utterance in score.utterances:
            spoken = languages[name][utterance.id] or UNKNOWN
            found.setdefault(spoken, set()).add(f"{name}/{utterance.id}")
    if len(found) < 2:
        return None
    return LanguageScores({name: score_part(scores.pooled, found[name]) for name in sorted(found)})


def _mean(rates: list[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return sum(known) / len(known) if known else None
