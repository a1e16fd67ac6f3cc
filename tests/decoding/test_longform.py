"""A long recording is cut without losing a sample of speech and joined without losing a word."""

import os
import random
import tracemalloc
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.decoding.longform import Chunk, Chunks, join, joined, split
from isthmus.decoding.transcript import Segment, Transcript, Word, together
from isthmus.errors import IsthmusError
from isthmus.speech.activity import Region, speech_regions
from isthmus.speech.audio import SAMPLE_RATE, audio_blocks


def detect(waveform: np.ndarray) -> list[Region]:
    """Stands in for a detector: whatever is above 0.5 is speech."""
    steps = np.flatnonzero(np.diff((waveform > 0.5).astype(np.int8), prepend=0, append=0))
    return [(a / SAMPLE_RATE, b / SAMPLE_RATE) for a, b in steps.reshape(-1, 2).tolist()]


def recording(stretches: list[tuple[bool, float]]) -> np.ndarray:
    """(S,) above 0.5 where there is speech, and no two samples near each other the same."""
    flags = np.repeat([f for f, _ in stretches], [round(s * SAMPLE_RATE) for _, s in stretches])
    wave = np.arange(len(flags)) % 4001 / 10_000
    return (wave + 0.55 * flags).astype(np.float32)


def cut(waveform: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    position = 0
    while position < len(waveform):
        for size in sizes:
            yield waveform[position : position + size]
            position += size


def held(chunks: list[Chunk], num_samples: int) -> np.ndarray:
    """(S,) how many chunks hold each sample."""
    counts = np.zeros(num_samples, int)
    for chunk in chunks:
        begin = round(chunk.start * SAMPLE_RATE)
        counts[begin : begin + len(chunk.waveform)] += 1
    return counts


STRETCHES = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.05, 0.3, 0.9, 1.5, 4.0, 9.0])), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(
    stretches=STRETCHES,
    max_seconds=st.sampled_from([2.0, 3.7, 8.0]),
    overlap=st.sampled_from([0.0, 0.2, 0.5]),
    sizes=st.lists(st.integers(1000, 100_000), min_size=1, max_size=4),
)
def test_split_keeps_all_speech(
    stretches: list[tuple[bool, float]], max_seconds: float, overlap: float, sizes: list[int]
) -> None:
    waveform = recording(stretches)
    stream = split(cut(waveform, sizes), max_seconds, overlap_seconds=overlap, detect=detect)
    chunks = list(stream)
    counts = held(chunks, len(waveform))
    assert counts[waveform > 0.5].all()
    assert counts.max(initial=0) <= 2
    end = 0
    for chunk in chunks:
        begin = round(chunk.start * SAMPLE_RATE)
        assert 0 < len(chunk.waveform) <= max_seconds * SAMPLE_RATE
        assert np.array_equal(chunk.waveform, waveform[begin : begin + len(chunk.waveform)])
        assert round(chunk.overlap * SAMPLE_RATE) == max(0, end - begin)
        assert chunk.overlap <= overlap
        assert begin + len(chunk.waveform) > end
        end = begin + len(chunk.waveform)
    assert stream.duration == pytest.approx(len(waveform) / SAMPLE_RATE)
    assert stream.skipped == pytest.approx((counts == 0).sum() / SAMPLE_RATE)


@settings(max_examples=20, deadline=None)
@given(stretches=STRETCHES, sizes=st.lists(st.integers(1000, 100_000), min_size=1, max_size=4))
def test_blocks_do_not_matter(stretches: list[tuple[bool, float]], sizes: list[int]) -> None:
    waveform = recording(stretches)
    whole = list(split(waveform, 4.0, overlap_seconds=0.5, detect=detect))
    pieces = list(split(cut(waveform, sizes), 4.0, overlap_seconds=0.5, detect=detect))
    assert [(c.start, c.overlap, len(c.waveform)) for c in whole] == [
        (c.start, c.overlap, len(c.waveform)) for c in pieces
    ]


def spans(chunks: Chunks) -> list[tuple[float, float, float]]:
    return [
        (round(c.start, 3), round(c.start + len(c.waveform) / SAMPLE_RATE, 3), c.overlap)
        for c in chunks
    ]


def test_chunks_end_in_the_last_pause_that_fits() -> None:
    waveform = recording([(True, 3), (False, 0.6), (True, 3), (False, 0.8), (True, 3)])
    assert spans(split(waveform, 8.0, overlap_seconds=1, detect=detect)) == [
        (0, 7.0, 0),
        (7.0, 10.4, 0),
    ]


def test_long_silence_is_dropped_and_counted() -> None:
    waveform = recording([(False, 5), (True, 2), (False, 40), (True, 2), (False, 0.5)])
    chunks = split(waveform, 8.0, overlap_seconds=1, detect=detect)
    assert spans(chunks) == [(5, 7, 0), (47, 49.5, 0)]
    assert chunks.skipped == pytest.approx(45)
    assert chunks.duration == pytest.approx(49.5)


def test_without_a_pause_the_quietest_place_is_overlapped() -> None:
    waveform = recording([(True, 13)])
    quiet = slice(round(6.4 * SAMPLE_RATE), round(6.6 * SAMPLE_RATE))
    waveform[quiet] = 0.51
    first, second = split(waveform, 8.0, overlap_seconds=2.0, detect=detect)
    end = len(first.waveform) / SAMPLE_RATE
    assert end == pytest.approx(7.5, abs=0.1)
    assert second.start == pytest.approx(end - 2.0)
    assert second.overlap == pytest.approx(2.0)


@pytest.mark.parametrize(("seconds", "overlap"), [(7.9, 2.0), (0.5, 0.0), (30, -1), (np.nan, 2)])
def test_no_room_for_an_overlap_is_refused(seconds: float, overlap: float) -> None:
    with pytest.raises(IsthmusError, match=r"Take a shorter overlap or longer chunks"):
        split(np.zeros(10, np.float32), seconds, overlap_seconds=overlap)


def peak_megabytes(minutes: int) -> float:
    """Of splitting so much of speech in blocks of ten seconds, with a second's pause now and then.

    The pattern does not depend on the length.
    """
    block = recording([(True, 9.2), (False, 0.8)])
    tracemalloc.start()
    count = sum(1 for _ in split((block.copy() for _ in range(6 * minutes)), 30.0, detect=detect))
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert count > minutes
    return peak


def test_memory_does_not_grow_with_the_recording() -> None:
    assert peak_megabytes(60) == pytest.approx(peak_megabytes(10), abs=2.0)


def test_speech_is_looked_for_once() -> None:
    """What lies behind a long silence is not looked at again for each chunk."""
    waveform = recording([(True, 0.5), (False, 1.5)] * 60)
    seen = 0

    def counting(sight: np.ndarray) -> list[Region]:
        nonlocal seen
        seen += len(sight)
        return detect(sight)

    assert len(list(split(waveform, 30.0, detect=counting))) == 60
    assert seen < 1.5 * len(waveform)


VOCABULARY = [
    "the",
    "a",
    "of",
    "one",
    "two",
    "three",
    "winter",
    "summer",
    "brow",
    "field",
    "beauty",
    "deep",
    "shall",
    "besiege",
    "was",
    "and",
]


def spoken(generator: random.Random, seconds: float) -> list[Word]:
    """Words one after the other, without a pause."""
    words: list[Word] = []
    now = 0.0
    while now < seconds:
        length = generator.uniform(0.15, 0.5)
        words.append(Word(generator.choice(VOCABULARY), now, now + length, 1.0))
        now += length
    return words


def hear(words: list[Word], chunk: Chunk, generator: random.Random, timed: bool) -> Segment:
    """What a model hears in a chunk: all words in it; a cut one is garbled or missing."""
    start, end = chunk.start, chunk.start + len(chunk.waveform) / SAMPLE_RATE
    found: list[Word] = []
    for word in words:
        inside = min(word.end, end) - max(word.start, start)
        if inside <= 0:
            continue
        whole = inside > word.end - word.start - 1e-9
        shake = generator.uniform(-0.05, 0.05) if timed else 0.0
        text = word.text if whole else generator.choice(["", "huh", word.text[1:], word.text[:-1]])
        if text:
            found.append(Word(text, word.start + shake, word.end + shake, 1.0))
    text = " ".join(word.text for word in found)
    return Segment(start, end, text, words=tuple(found) if timed else ())


@pytest.mark.parametrize("timed", [True, False])
def test_joins_lose_and_double_no_word(timed: bool) -> None:
    num_joins = 0
    for seed in range(15):
        generator = random.Random(seed)
        words = spoken(generator, 60.0)
        waveform = recording([(True, words[-1].end + 0.01)])
        chunks = list(split(waveform, 16.0, overlap_seconds=2.0, detect=detect))
        num_joins += sum(chunk.overlap > 0 for chunk in chunks)
        pieces = [(hear(words, chunk, generator, timed), chunk.overlap) for chunk in chunks]
        segments = list(joined(pieces))
        assert " ".join(piece.text for piece, _ in pieces) != " ".join(w.text for w in words)
        assert " ".join(segment.text for segment in segments) == " ".join(w.text for w in words)
        for before, after in pairwise(segments):
            assert before.start <= before.end <= after.start <= after.end
        if timed:
            assert [w.text for s in segments for w in s.words] == [w.text for w in words]
    assert num_joins >= 50


@pytest.mark.parametrize(
    ("previous", "following", "whole"),
    [
        (
            "when forty winters shall",
            "winters shall besiege thy",
            "when forty winters shall besiege thy",
        ),
        ("when forty wint", "winters shall besiege", "when forty winters shall besiege"),
        ("when forty winters", "inters shall besiege", "when forty winters shall besiege"),
        ("When forty Winters.", "forty winters, shall", "When forty winters, shall"),
        ("when forty", "shall besiege", "when forty shall besiege"),
        ("no no no", "no no no yes", "no no no yes"),
        ("a b c d x e f", "b c d y e f g", "a b c d y e f g"),
        ("", "shall besiege", "shall besiege"),
        ("when forty", "", "when forty"),
        ("春はあけぼのやう", "あけぼのやうやう白く", "春はあけぼのやうやう白く"),
        ("他说 hello world 你好", "world 你好, 吗 yes", "他说 hello world 你好, 吗 yes"),
    ],
)
def test_text_without_times_is_joined(previous: str, following: str, whole: str) -> None:
    first, second = join(Segment(0, 10, previous), Segment(8, 18, following), 2.0)
    assert together([first.text, second.text]) == whole


def test_words_of_a_script_without_spaces_are_cut_with_their_text() -> None:
    def timed(text: str, start: float) -> Segment:
        times = [start + 0.5 * i for i in range(len(text))]
        words = tuple(Word(a, t, t + 0.5, 1) for a, t in zip(text, times, strict=True))
        return Segment(start, start + len(text) / 2, text, words=words)

    first, second = join(timed("春はあけぼのやう", 0), timed("ぼのやうやう白く", 2), 2.0)
    for segment in (first, second):
        assert "".join(word.text for word in segment.words) == segment.text
    transcript = Transcript((first, second), 6.0)
    assert transcript.text == "春はあけぼのやうやう白く"


@pytest.mark.parametrize(
    ("previous", "following", "left"),
    [
        ((("x", 8.2), ("a", 9.2)), (("a", 9.2),), ["x a", ""]),
        ((("wint", 8.2),), (("winters", 8.4), ("shall", 9.2)), ["", "winters shall"]),
    ],
)
def test_no_word_outlives_its_text(
    previous: tuple[tuple[str, float], ...],
    following: tuple[tuple[str, float], ...],
    left: list[str],
) -> None:
    first, second = (
        Segment(start, end, " ".join(text for text, _ in said), words=words)
        for start, end, said in ((0.0, 10.0, previous), (8.0, 18.0, following))
        if (words := tuple(Word(text, at, at + 0.3, 1) for text, at in said))
    )
    segments = join(first, second, 2.0)
    assert [segment.text for segment in segments] == left
    for segment in segments:
        assert [word.text for word in segment.words] == segment.text.split()


def test_segments_without_an_overlap_stay_as_they_are() -> None:
    first, second = Segment(0, 10, "one two"), Segment(10, 18, "one two three")
    assert join(first, second, 0.0) == (first, second)
    assert list(joined([(first, 0.0), (second, 0.0)])) == [first, second]
    assert list(joined([])) == []


def test_times_decide_where_no_word_is_shared() -> None:
    first = Segment(0, 10, "a b", words=(Word("a", 7.0, 7.5, 1), Word("b", 9.2, 9.9, 1)))
    second = Segment(8, 18, "x y", words=(Word("x", 8.1, 8.5, 1), Word("y", 9.1, 9.8, 1)))
    assert [s.text for s in join(first, second, 2.0)] == ["a", "y"]


def test_a_reading_is_cut_in_its_pauses() -> None:
    folder = os.environ.get("ISTHMUS_SPEECH")
    if not folder:
        pytest.skip("ISTHMUS_SPEECH names no speech")
    path = Path(folder) / "long_form/audio/sonnet_p002.flac"
    chunks = split(audio_blocks(path), 15.0, detect=partial(speech_regions, detector="energy"))
    found = list(chunks)
    assert len(found) >= 4
    assert [chunk.overlap for chunk in found] == [0.0] * len(found)
    assert max(len(chunk.waveform) for chunk in found) <= 15 * SAMPLE_RATE
    assert chunks.skipped < 0.2 * chunks.duration
