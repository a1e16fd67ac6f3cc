"""What was heard: a transcript, its segments, their words. Times are seconds from the beginning."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from isthmus.text import UNSPACED

FinishReason = Literal["stop", "length", "repetition", "no_speech", "deadline"]
"""Why a segment ends: its end token; no more tokens allowed; it began to repeat itself; there was
nothing to hear; time was up."""
# the first that is found among its segments stands for a transcript
WORST: tuple[FinishReason, ...] = ("deadline", "repetition", "length", "stop", "no_speech")

_WORD = re.compile(rf"[^\w\s]*{UNSPACED.pattern}[^\w\s]*|(?:(?!{UNSPACED.pattern})\S)+")


def words_of(text: str) -> list[re.Match[str]]:
    """The words of a text and their places in it: what spaces part, and each letter of a script
    that is written without spaces, with the marks and the punctuation around it."""
    return list(_WORD.finditer(text))


def gap(before: str, after: str) -> str:
    """What parts two texts: a space, or nothing where both are in scripts without."""
    return "" if UNSPACED.match(before[-1:]) and UNSPACED.match(after) else " "


def together(texts: Iterable[str]) -> str:
    """Texts one behind the other, with their gaps; empty ones are left out."""
    whole = ""
    for text in texts:
        whole += gap(whole, text) + text if whole and text else text
    return whole


@dataclass(frozen=True)
class Word:
    """A word, or a letter where no spaces part words, with the seconds it was said at."""

    text: str
    start: float
    end: float
    confidence: float  # between 0 and 1


@dataclass(frozen=True)
class Alternative:
    """Another hypothesis, less likely; `score` is as that of a Segment."""

    text: str
    score: float


@dataclass(frozen=True)
class Segment:
    """A stretch of speech that was decoded as one; `start` and `end` are seconds."""

    start: float
    end: float
    text: str
    score: float = 0.0  # log-probability of the text divided by its length in tokens
    finish_reason: FinishReason = "stop"
    tokens: tuple[int, ...] = ()
    token_log_probs: tuple[float, ...] = ()
    words: tuple[Word, ...] = ()  # with word timestamps only
    alternatives: tuple[Alternative, ...] = ()  # with decode.nbest only, best first
    confidences: tuple[float, ...] = ()  # of its words (words_of), 0 to 1
    ctc_text: str = ""  # what the CTC head heard by itself, if there is one
    ctc_words: tuple[Word, ...] = ()  # those of ctc_text, where words have times
    ctc_distance: float | None = None  # of the text from that, 0 to 1
    doubtful: bool = False  # the system seems out of its depth

    @property
    def confidence(self) -> float:
        """Geometric mean of the tokens' probabilities, 0 to 1; 1 where nothing was heard."""
        return _confidence(self.token_log_probs)

    @property
    def as_by_ctc(self) -> "Segment":
        """The same with the text of the CTC head and its words."""
        return replace(self, text=self.ctc_text, words=self.ctc_words)

    def shifted(self, seconds: float) -> "Segment":
        """The same, that much later."""
        words, ctc_words = (
            tuple(replace(one, start=one.start + seconds, end=one.end + seconds) for one in own)
            for own in (self.words, self.ctc_words)
        )
        start, end = self.start + seconds, self.end + seconds
        return replace(self, start=start, end=end, words=words, ctc_words=ctc_words)

    def timed_by_words(self) -> "Segment":
        """The same, from its first word's start to its last one's end where words are timed."""
        if not self.words:
            return self
        return replace(self, start=self.words[0].start, end=self.words[-1].end)


@dataclass(frozen=True)
class Transcript:
    """All that was heard in a recording; times and `duration` are seconds from its beginning."""

    segments: tuple[Segment, ...]
    duration: float  # of the recording
    language: str | None = None
    seconds: float = 0.0  # of computing

    @property
    def text(self) -> str:
        return together(segment.text for segment in self.segments)

    @property
    def ctc_text(self) -> str:
        """What the CTC head heard by itself."""
        return together(segment.ctc_text for segment in self.segments)

    @property
    def words(self) -> tuple[Word, ...]:
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def finish_reason(self) -> FinishReason:
        """The worst of the segments' own; no_speech where there is none."""
        found = {segment.finish_reason for segment in self.segments}
        return next((reason for reason in WORST if reason in found), "no_speech")

    @property
    def confidence(self) -> float:
        """Geometric mean of the tokens' probabilities, 0 to 1; 1 where nothing was heard."""
        return _confidence([v for segment in self.segments for v in segment.token_log_probs])

    @property
    def doubtful(self) -> bool:
        """Whether the system seems out of its depth in any segment."""
        return any(segment.doubtful for segment in self.segments)

    @property
    def ctc_distance(self) -> float | None:
        """Mean over time of the segments' own, of those that have one; None if there is none."""
        pairs = [(s.ctc_distance, s.end - s.start) for s in self.segments]
        known = [(distance, seconds) for distance, seconds in pairs if distance is not None]
        total = sum(seconds for _, seconds in known)
        return sum(one * seconds for one, seconds in known) / total if total else None

    @property
    def score(self) -> float:
        """Mean of the segments' scores."""
        return sum(s.score for s in self.segments) / max(1, len(self.segments))


def _confidence(log_probs: Sequence[float]) -> float:
    return math.exp(sum(log_probs) / len(log_probs)) if log_probs else 1.0
