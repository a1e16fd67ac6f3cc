"""Recordings of any length: cut into chunks that a model can hear, their texts put together again.

A chunk ends in a pause; where nobody pauses for longer than a chunk may last, it ends at the
quietest place, and the next one begins a little before: that overlap is heard twice, and `join`
finds the seam in it. Audio comes in blocks and no more than a chunk of it is kept.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from isthmus.decoding.transcript import Segment, Word, words_of
from isthmus.errors import IsthmusError
from isthmus.speech.activity import Region, speech_regions
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.text import UNSPACED

OVERLAP_SECONDS = 2.0  # five words or so
LONGEST_SILENCE_SECONDS = 1.0  # within a chunk; a longer one is dropped
QUIET_SECONDS = 0.05  # over which loudness is measured where no pause is found

WORDS_PER_SECOND = 5.0  # of fast speech: how many words an overlap may hold
LETTERS_PER_SECOND = 10.0  # the same where no spaces divide words
SIMILAR = 0.6  # ratio of difflib, from which one word may be the other cut off
SAME_WORD_SECONDS = 0.75  # how far apart two decodings may place one word

Detect: TypeAlias = Callable[[np.ndarray], list[Region]]


@dataclass(frozen=True)
class Chunk:
    """A stretch of a recording, short enough to be decoded as one."""

    start: float  # seconds from the beginning of the recording
    waveform: np.ndarray  # (S,) float32, 16 kHz
    overlap: float = 0.0  # seconds at its beginning that the chunk before has too


class Chunks(Iterator[Chunk]):
    """Chunks in order; when all are taken, `duration` and `skipped` hold for the recording."""

    def __init__(
        self, blocks: Iterable[np.ndarray], max_seconds: float, overlap: float, detect: Detect
    ) -> None:
        self._blocks = iter(blocks)
        self._max = int(max_seconds * SAMPLE_RATE)
        self._silence = round(LONGEST_SILENCE_SECONDS * SAMPLE_RATE)
        self._overlap = round(overlap * SAMPLE_RATE)
        self._detect = detect
        self._buffer = np.zeros(0, np.float32)
        self._position = 0  # of the buffer's beginning; like those below in samples
        self._ended = False  # no block is left to read
        self._heard_to = 0  # the end of the latest chunk
        self._num_heard = 0
        self._found: list[tuple[int, int]] = []  # the speech that was last detected

    @property
    def duration(self) -> float:
        """Seconds of the recording that were read so far."""
        return (self._position + len(self._buffer)) / SAMPLE_RATE

    @property
    def skipped(self) -> float:
        """Seconds without speech that no chunk holds, so far."""
        return (max(self._position, self._heard_to) - self._num_heard) / SAMPLE_RATE

    def __next__(self) -> Chunk:
        while True:
            self._fill(self._max + self._silence)
            if not len(self._buffer):
                raise StopIteration
            silent, end, resume = self._plan()
            self._drop(silent)
            news = end and self._position + end > self._heard_to  # else all of it is overlap
            chunk = self._chunk(end) if news else None
            self._drop(resume)
            if chunk is not None:
                return chunk

    def _fill(self, num_samples: int) -> None:
        """Read until the buffer has that many samples or the recording ends."""
        pieces, held = [self._buffer], len(self._buffer)
        while held < num_samples and not self._ended:
            block = next(self._blocks, None)
            self._ended = block is None
            if block is not None:
                pieces.append(block.astype(np.float32, copy=False))
                held += len(block)
        if len(pieces) > 1:
            self._buffer = np.concatenate(pieces)

    def _plan(self) -> tuple[int, int, int]:
        """Of the buffer: samples to drop at once; the chunk's end; where the next one begins.

        The end is 0 where nothing can be said before the silence is dropped.
        """
        known = self._known()
        plan = self._to_silence(known, _pauses(known))
        if plan is not None:  # what was seen before says it
            return plan
        sight = self._buffer[: self._max + self._silence]
        last = self._ended and len(sight) == len(self._buffer)
        begin = self._position
        self._found = [
            (begin + int(start * SAMPLE_RATE), begin + min(len(sight), round(end * SAMPLE_RATE)))
            for start, end in self._detect(sight)
        ]
        regions = self._known()
        if not regions:
            # The silence at the end of what is seen may be the beginning of a word.
            return (len(sight) if last else len(sight) - self._silence), 0, 0
        pauses = _pauses(regions)
        if last or len(sight) - regions[-1][1] > self._silence:
            pauses.append((regions[-1][1], len(sight)))
        plan = self._to_silence(regions, pauses)
        if plan is not None:
            return plan
        if last and len(sight) <= self._max:
            return 0, len(sight), len(sight)
        middles = [(end + begin) // 2 for end, begin in pauses]
        within = [middle for middle in middles if middle <= self._max]
        if within:
            return 0, within[-1], within[-1]
        quiet = self._quietest(sight)
        return 0, quiet + self._overlap // 2, quiet - self._overlap // 2

    def _known(self) -> list[tuple[int, int]]:
        """The speech that was detected last, in samples of the buffer as it is now."""
        begin = self._position
        return [(max(0, a - begin), b - begin) for a, b in self._found if b > begin]

    def _to_silence(
        self, regions: list[tuple[int, int]], pauses: list[tuple[int, int]]
    ) -> tuple[int, int, int] | None:
        """The plan where a silence comes that is too long for a chunk."""
        if regions and regions[0][0] > self._silence:
            return regions[0][0], 0, 0
        for end, begin in pauses:
            if begin - end > self._silence and end <= self._max:
                return 0, end, end
        return None

    def _quietest(self, sight: np.ndarray) -> int:
        """The quietest sample of the chunk's second half at which an overlap can be centred."""
        width = round(QUIET_SECONDS * SAMPLE_RATE)
        begin, end = self._max // 2, self._max - self._overlap // 2
        power = np.cumsum(sight[begin:end].astype(np.float64) ** 2)
        if len(power) <= width:
            return (begin + end) // 2
        return begin + int(np.argmin(power[width:] - power[:-width])) + width // 2

    def _chunk(self, end: int) -> Chunk:
        start, stop = self._position, self._position + end
        overlap = max(0, self._heard_to - start)
        self._num_heard += end - overlap
        self._heard_to = stop
        # A copy: a slice would keep the whole block alive.
        return Chunk(start / SAMPLE_RATE, self._buffer[:end].copy(), overlap / SAMPLE_RATE)

    def _drop(self, num_samples: int) -> None:
        self._buffer = self._buffer[num_samples:]
        self._position += num_samples


def _pauses(regions: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """From the end of each region to the beginning of the next."""
    return [(end, begin) for (_, end), (begin, _) in pairwise(regions)]


def split(
    audio: np.ndarray | Iterable[np.ndarray],
    max_seconds: float,
    *,
    overlap_seconds: float = OVERLAP_SECONDS,
    detect: Detect = speech_regions,
) -> Chunks:
    """Chunks of at most `max_seconds` of a 16 kHz mono waveform (S,), or of its blocks (n,).

    As long as the pauses allow; silence of more than a second is dropped. `detect` finds the
    speech in a waveform. Raises IsthmusError if `max_seconds` leaves no room for overlaps.
    """
    if overlap_seconds < 0 or not max_seconds >= max(4 * overlap_seconds, 1.0):
        raise IsthmusError(
            f"Chunks of {max_seconds:g} s cannot overlap by {overlap_seconds:g} s: they need at "
            "least four times as much, and one second. Take a shorter overlap or longer chunks."
        )
    blocks = [audio] if isinstance(audio, np.ndarray) else audio
    return Chunks(blocks, max_seconds, overlap_seconds, detect)


def joined(segments: Iterable[tuple[Segment, float]]) -> Iterator[Segment]:
    """Segments as they come, each with its overlap in seconds, with their seams joined.

    A segment is given out when the next one has come, or at the end.
    """
    held: Segment | None = None
    for segment, overlap in segments:
        if held is not None:
            heard = join(held.as_by_ctc, segment.as_by_ctc, overlap)
            held, segment = join(held, segment, overlap)
            yield replace(held, ctc_text=heard[0].text, ctc_words=heard[0].words)
            segment = replace(segment, ctc_text=heard[1].text, ctc_words=heard[1].words)
        held = segment
    if held is not None:
        yield held


def join(previous: Segment, following: Segment, overlap_seconds: float) -> tuple[Segment, Segment]:
    """Both segments without what they say twice in the `overlap_seconds` that both have heard.

    Words at an edge may be cut off, garbled or missing; the other segment has them whole. The
    two agree where their words do, helped by the words' times where both have them. Text, words,
    start and end are changed; tokens and scores stay those of the decoding.
    """
    if overlap_seconds <= 0 or not previous.text or not following.text:
        return previous, following
    letters = UNSPACED.search(previous.text + following.text)
    rate = LETTERS_PER_SECOND if letters else WORDS_PER_SECOND
    reach = int(overlap_seconds * rate) + 2
    before, after = _units(previous), _units(following)
    timed = all(word is not None for word in (*before.words, *after.words))
    tail = max(0, len(before.texts) - reach)
    begin = following.start
    if timed:  # of the words that may lie in the overlap, all
        ends = [word.end for word in before.words if word is not None]
        tail = sum(end <= begin - SAME_WORD_SECONDS for end in ends)
        starts = [word.start for word in after.words if word is not None]
        reach = sum(start < begin + overlap_seconds + SAME_WORD_SECONDS for start in starts)
    keep, drop = _seam(before.from_(tail), after.to(reach), begin + overlap_seconds / 2)
    return _cut(previous, following, before.to(tail + keep), after.from_(drop), overlap_seconds)


@dataclass(frozen=True)
class _Units:
    """The words of a segment that are aligned, with their times where they are known."""

    found: list[re.Match[str]]  # in the segment's text
    words: list[Word | None]

    @cached_property
    def texts(self) -> list[str]:
        return [one[0] for one in self.found]

    @property
    def whole(self) -> str:
        """The part of the segment's text that they are."""
        if not self.found:
            return ""
        return self.found[0].string[self.found[0].start() : self.found[-1].end()]

    def from_(self, index: int) -> "_Units":
        return _Units(self.found[index:], self.words[index:])

    def to(self, index: int) -> "_Units":
        return _Units(self.found[:index], self.words[:index])


def _units(segment: Segment) -> _Units:
    found = words_of(segment.text)
    timed = len(segment.words) == len(found)
    return _Units(found, list(segment.words) if timed else [None] * len(found))


def _seam(tail: _Units, head: _Units, middle: float) -> tuple[int, int]:
    """How many of the tail to keep, and how many of the head to drop for them.

    `middle` is the time at which the seam should lie.
    """
    if not tail.texts or not head.texts:
        return len(tail.texts), 0
    pairs = _align(tail, head)
    same = [pair for pair in pairs if _same(tail, head, *pair)]
    if same:
        best = same[(len(same) - 1) // 2]
        if tail.words[0] is not None:
            best = min(same, key=lambda pair: abs(_centre(tail.words[pair[0]]) - middle))
        return best[0] + 1, best[1] + 1
    if pairs:  # one word, cut off in one of them
        i, j = pairs[0]
        cut_in_tail = i == len(tail.texts) - 1
        if cut_in_tail and (j > 0 or len(head.texts[0]) >= len(tail.texts[i])):
            return i, j
        return i + 1, j + 1
    if tail.words[0] is None:
        return len(tail.texts), 0  # rather twice than not at all
    return (
        sum(_centre(word) < middle for word in tail.words),
        sum(_centre(word) < middle for word in head.words),
    )


def _align(tail: _Units, head: _Units) -> list[tuple[int, int]]:
    """Places (in tail, in head) of one word, by the best alignment of an end with a beginning.

    What comes before the overlap in the tail and after it in the head is free, and so is one
    garbled word at either edge; in between a missing or a different word costs 1, and a common
    one brings 2.
    """
    rows, columns = len(tail.texts), len(head.texts)
    score = np.zeros((rows + 1, columns + 1), np.int64)
    score[0] = np.minimum(0, 1 - np.arange(columns + 1))
    for i in range(rows):
        for j in range(columns):
            score[i + 1, j + 1] = max(
                score[i, j] + _likeness(tail, head, i, j), score[i, j + 1] - 1, score[i + 1, j] - 1
            )
    i, j = max(
        ((row, column) for row in (rows, rows - 1) for column in range(columns + 1)),
        key=lambda place: score[place],
    )
    pairs: list[tuple[int, int]] = []
    if score[i, j] <= 0:
        return pairs
    while i > 0 and j > 0:
        likeness = _likeness(tail, head, i - 1, j - 1)
        if score[i, j] == score[i - 1, j - 1] + likeness:
            i, j = i - 1, j - 1
            if likeness > 0:
                pairs.append((i, j))
        elif score[i, j] == score[i - 1, j] - 1:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def _likeness(tail: _Units, head: _Units, i: int, j: int) -> int:
    """2 for the same word, 1 for one that may be the other cut off at an edge, else -1."""
    if _same(tail, head, i, j):
        return 2
    at_edge = i == len(tail.texts) - 1 or j == 0
    one, other = _plain(tail.texts[i]), _plain(head.texts[j])
    if at_edge and _near(tail.words[i], head.words[j]) and len(one) > 1 and len(other) > 1:
        return 1 if SequenceMatcher(None, one, other).ratio() >= SIMILAR else -1
    return -1


def _same(tail: _Units, head: _Units, i: int, j: int) -> bool:
    one, other = _plain(tail.texts[i]), _plain(head.texts[j])
    return one == other != "" and _near(tail.words[i], head.words[j])


def _near(one: Word | None, other: Word | None) -> bool:
    if one is None or other is None:
        return True
    return abs(_centre(one) - _centre(other)) <= SAME_WORD_SECONDS


def _plain(text: str) -> str:
    """Without case and punctuation."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _centre(word: Word | None) -> float:
    assert word is not None
    return (word.start + word.end) / 2


def _cut(
    previous: Segment, following: Segment, before: _Units, after: _Units, overlap_seconds: float
) -> tuple[Segment, Segment]:
    """The segments with these texts, and the words and the seam in time that go with them."""
    seam = following.start + overlap_seconds / 2
    first = next(iter(after.words), None)
    if first is not None:
        seam = max(previous.start, first.start)
    words = tuple(word for word in before.words if word is not None)
    if None in before.words:  # they are not those of the text
        words = tuple(word for word in previous.words if _centre(word) < seam)
    others = tuple(word for word in after.words if word is not None)
    if None in after.words:
        others = tuple(word for word in following.words if _centre(word) >= seam)
    end = max(following.end, seam)
    return (
        replace(previous, end=seam, text=before.whole, words=words),
        replace(following, start=seam, end=end, text=after.whole, words=others),
    )
