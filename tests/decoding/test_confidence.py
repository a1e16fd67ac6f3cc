"""Probabilities of words from those of tokens, and how far two texts are apart."""

import math
from collections.abc import Sequence

import pytest

from isthmus.decoding.confidence import text_distance, word_confidences
from isthmus.decoding.transcript import Segment, Transcript


class Pieces:
    """Tokens that are pieces of text."""

    def __init__(self, *texts: str, whole: str | None = None):
        self.texts, self.whole = texts, whole

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        if self.whole is not None and len(tokens) == len(self.texts):
            return self.whole
        return "".join(self.texts[token] for token in tokens)


def test_a_word_is_as_probable_as_its_tokens_together() -> None:
    found = word_confidences(Pieces("go", " le", "ft", "!"), range(4), [math.log(p) for p in
                             (0.5, 0.8, 0.5, 0.25, 0.9)])  # fmt: skip
    assert [word for word, _ in found] == ["go", "left!"]
    assert [p for _, p in found] == pytest.approx([0.5, 0.1])  # the end token is of no word


def test_a_token_of_two_words_counts_for_both() -> None:
    found = word_confidences(Pieces("go le", "ft"), range(2), [math.log(0.5), 0.0])
    assert dict(found) == pytest.approx({"go": 0.5, "left": 0.5})


def test_where_the_pieces_do_not_add_up_all_words_have_the_mean() -> None:
    found = word_confidences(Pieces("a", "b", whole="x y z"), range(2), [0.0, math.log(0.25)])
    assert dict(found) == pytest.approx({"x": 0.5, "y": 0.5, "z": 0.5})
    assert word_confidences(Pieces(), [], []) == ()


def test_distance_is_the_share_of_letters_that_differ() -> None:
    assert text_distance("Go left, now!", "GO LEFT NOW") == text_distance("", "...") == 0.0
    assert text_distance("go left", "go lift") == text_distance("go lift", "go left") == 1 / 6
    assert text_distance("go", "go left") == 4 / 6
    assert text_distance("abc", "") == text_distance("", "abc") == 1.0


def test_distance_of_a_transcript_is_the_mean_over_time_of_what_is_known() -> None:
    def whole(*parts: tuple[float, float | None]) -> float | None:
        rows = [Segment(0.0, end, "", ctc_distance=distance) for end, distance in parts]
        return Transcript(tuple(rows), 9.0).ctc_distance

    assert whole((3.0, 0.5), (1.0, 0.1), (5.0, None)) == pytest.approx(0.4)
    assert whole((5.0, None)) is whole() is None
