"""Scores: normalised text, word and character error rates, and whether a difference is real.

Needs neither torch nor transformers, so a machine without them can score what another decoded.
"""

from isthmus.scoring.by_language import LanguageScores, score_languages
from isthmus.scoring.comparison import Comparison, PairedScores, compare
from isthmus.scoring.error_rate import (
    ErrorCounts,
    Score,
    SetScores,
    UtteranceScore,
    score,
    score_sets,
)
from isthmus.scoring.normalise import NORMALISERS, normaliser
from isthmus.scoring.significance import PairedResult, paired_bootstrap, paired_mean
from isthmus.scoring.texts import read_pair, read_texts

__all__ = [
    "NORMALISERS",
    "Comparison",
    "ErrorCounts",
    "LanguageScores",
    "PairedResult",
    "PairedScores",
    "Score",
    "SetScores",
    "UtteranceScore",
    "compare",
    "normaliser",
    "paired_bootstrap",
    "paired_mean",
    "read_pair",
    "read_texts",
    "score",
    "score_languages",
    "score_sets",
]
