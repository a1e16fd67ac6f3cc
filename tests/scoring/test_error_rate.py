"""Error rates: by hand, and against jiwer."""

import json
import subprocess
import sys

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.scoring import ErrorCounts, score, score_sets
from isthmus.scoring.error_rate import percentile_interval, resampled_rates

WORDS = st.lists(st.sampled_from(["a", "b", "cat", "dog", "the", "é"]), max_size=8).map(" ".join)
CORPUS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6)


def both(pairs: list[tuple[str, str]]) -> tuple[dict[str, str], dict[str, str]]:
    references = {f"u{index}": pair[0] for index, pair in enumerate(pairs)}
    return references, {f"u{index}": pair[1] for index, pair in enumerate(pairs)}


def joined(text: str) -> str:
    return text.replace(" ", "")


@settings(max_examples=150, deadline=None)
@given(CORPUS)
def test_agrees_with_jiwer(pairs: list[tuple[str, str]]) -> None:
    result = score(*both(pairs), normaliser="none", resamples=0)
    counts = result.counts
    # jiwer leaves out what it cannot divide by, so only corpora with reference words are compared.
    spoken = [pair for pair in pairs if pair[0]]
    silent = sum(len(pair[1].split()) for pair in pairs if not pair[0])
    assert counts.words == sum(len(pair[0].split()) for pair in pairs)
    if not spoken:
        assert (result.wer, counts.errors, counts.ins) == (None, silent, silent)
        return
    oracle = jiwer.process_words([pair[0] for pair in spoken], [pair[1] for pair in spoken])
    errors = oracle.substitutions + oracle.insertions + oracle.deletions
    assert counts.errors == errors + silent
    assert counts.ins - counts.del_ == oracle.insertions - oracle.deletions + silent
    assert result.wer == pytest.approx((errors + silent) / counts.words)
    letters = jiwer.process_characters(
        [joined(pair[0]) for pair in spoken], [joined(pair[1]) for pair in spoken]
    )
    silent_letters = sum(len(joined(pair[1])) for pair in pairs if not pair[0])
    assert counts.character_errors == silent_letters + (
        letters.substitutions + letters.insertions + letters.deletions
    )


@given(CORPUS)
@settings(deadline=None)
def test_alignment_spells_both_sides(pairs: list[tuple[str, str]]) -> None:
    for utterance in score(*both(pairs), normaliser="none", resamples=0).utterances:
        assert " ".join(a for a, _ in utterance.alignment if a) == utterance.reference
        assert " ".join(b for _, b in utterance.alignment if b) == utterance.hypothesis
        assert utterance.counts.errors == sum(a != b for a, b in utterance.alignment)


def test_by_hand() -> None:
    references = {"a": "the cat sat on the mat", "b": "yes"}
    hypotheses = {"b": "yes", "a": "the cat sit on mat now"}
    figures = score(references, hypotheses).to_dict()
    assert {name: figures[name] for name in ("sub", "ins", "del", "words", "utterances")} == {
        "sub": 1,
        "ins": 1,
        "del": 1,
        "words": 7,
        "utterances": 2,
    }
    assert figures["wer"] == pytest.approx(3 / 7)
    assert figures["sentence_error_rate"] == 0.5
    assert figures["normaliser"] == "basic"
    low, high = figures["interval"]
    assert 0 <= low <= 3 / 7 <= high <= 0.5
    json.dumps(figures, allow_nan=False)


def test_corpus_rate_is_pooled_and_no_mean() -> None:
    result = score(
        {"long": "a b c d e f g h i", "short": "a"}, {"long": "a b c d e f g h i", "short": "b"}
    )
    assert result.wer == pytest.approx(0.1)


def test_empty_hypothesis_is_all_deletions() -> None:
    counts = score({"a": "one two"}, {"a": ""}).counts
    assert (counts.sub, counts.ins, counts.del_, counts.words) == (0, 0, 2, 2)
    assert counts.cer == 1.0


def test_empty_reference() -> None:
    quiet = score({"a": "", "b": "one two"}, {"a": "", "b": "one two"})
    assert (quiet.wer, quiet.counts.sentence_error_rate) == (0.0, 0.0)
    heard = score({"a": "", "b": "one two"}, {"a": "thank you", "b": "one two"})
    assert (heard.counts.ins, heard.counts.words, heard.wer) == (2, 2, 1.0)


@pytest.mark.parametrize("hypothesis", ["", "thank you"])
def test_no_reference_words_gives_no_rate(hypothesis: str) -> None:
    result = score({"a": "..."}, {"a": hypothesis})
    figures = result.to_dict()
    assert (figures["wer"], figures["cer"], figures["interval"]) == (None, None, None)
    assert figures["ins"] == len(hypothesis.split())
    assert "undefined" in next(iter(result.listing()))
    json.dumps(figures, allow_nan=False)


def test_no_utterances() -> None:
    figures = score({}, {}).to_dict()
    assert (figures["wer"], figures["utterances"], figures["interval"]) == (None, 0, None)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors", "characters"),
    [
        ("今天，天气很好。", "今天天气不好", 1, 6),  # the comma is no character, nor its space
        ("日本 語", "日本語", 0, 3),
        ("東京へ", "東京え", 1, 3),
    ],
)
def test_unspaced_scripts_read_the_character_rate(
    reference: str, hypothesis: str, errors: int, characters: int
) -> None:
    result = score({"a": reference}, {"a": hypothesis})
    assert (result.counts.character_errors, result.counts.characters) == (errors, characters)
    assert result.cer == pytest.approx(errors / characters)
    assert result.primary == "cer"
    assert any("read CER" in line for line in result.listing())


def test_spaced_scripts_read_the_word_rate() -> None:
    result = score({"a": "привет мир", "b": "the 東"}, {"a": "привет мир", "b": "the 東"})
    assert result.primary == "wer"
    assert not any("read CER" in line for line in result.listing())


def test_thai_marks_are_characters() -> None:
    result = score({"a": "ที่นี่"}, {"a": "ที่นี"}, normaliser="basic-marks")
    assert (result.counts.character_errors, result.counts.characters) == (1, 6)
    assert result.primary == "cer"


def test_missing_hypotheses_are_named_or_count_as_empty() -> None:
    references = {f"u{index}": "one two" for index in range(8)}
    with pytest.raises(
        ValueError, match=r"7 of 8 .* u1, u2, u3, u4, u5 and 2 more.*missing='empty'"
    ):
        score(references, {"u0": "one two"})
    result = score(references, {"u0": "one two"}, missing="empty")
    assert (result.counts.del_, len(result.missing)) == (14, 7)
    assert any("want of a hypothesis: 7" in line for line in result.listing())


def test_extra_hypotheses_are_named() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 hypotheses have no reference: ghost"):
        score({"a": "x"}, {"a": "x", "ghost": "y"}, missing="empty")


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="missing='skip'"):
        score({}, {}, missing="skip")  # type: ignore[arg-type] # the wrong value is the test
    with pytest.raises(ValueError, match="resamples=-1"):
        score({"a": "x"}, {"a": "x"}, resamples=-1)


def test_interval_is_seeded_and_narrows() -> None:
    def result(number: int, seed: int) -> tuple[float, float]:
        pairs = [("a b c d", "a b c d" if index % 3 else "a b c x") for index in range(number)]
        interval = score(*both(pairs), seed=seed, resamples=400).interval
        assert interval is not None
        return interval

    assert result(60, 0) == result(60, 0)
    assert result(60, 0) != result(60, 1)
    low, high = result(60, 0)
    narrow_low, narrow_high = result(960, 0)
    assert (narrow_high - narrow_low) < 0.4 * (high - low)


def test_interval_covers_what_the_binomial_says() -> None:
    # One word an utterance, 20 of 100 wrong: standard error 0.04, so about 0.2 +- 0.078.
    pairs = [("a", "a" if index % 5 else "b") for index in range(100)]
    interval = score(*both(pairs), resamples=4000).interval
    assert interval == pytest.approx((0.12, 0.28), abs=0.015)


def test_order_of_hypotheses_does_not_matter() -> None:
    references, hypotheses = both([("a b", "a c"), ("d", "d"), ("e f", "f")])
    shuffled = dict(reversed(hypotheses.items()))
    assert score(references, hypotheses) == score(references, shuffled)


def test_intervals_do_not_depend_on_the_order_of_utterances() -> None:
    """`evaluate` scores the shortest first, `score` as the file has them."""
    references = {f"u{i}": "a b c d"[: 1 + 2 * (i % 4)] for i in range(40)}
    hypotheses = {
        id: text.replace("b", "x" if id > "u2" else "b") for id, text in references.items()
    }
    backwards = dict(reversed(references.items()))
    there, back = score(references, hypotheses), score(backwards, hypotheses)
    assert there.interval == back.interval
    assert there.cer_interval == back.cer_interval
    pooled = score_sets({"set": (backwards, hypotheses)}).pooled
    assert (pooled.interval, pooled.cer_interval) == (there.interval, there.cer_interval)
    # drawn in the order given, they would differ
    drawn = [
        percentile_interval(
            resampled_rates(
                np.array([[one.counts.errors for one in found.utterances]]),
                np.array([[one.counts.words for one in found.utterances]]),
                seed=0,
                resamples=1000,
            )[0]
        )
        for found in (there, back)
    ]
    assert drawn[0] != drawn[1]


def test_listing_marks_errors_worst_first() -> None:
    references = {"fine": "yes", "small": "MISTER EDISON", "big": "OH THE CAT SAT"}
    hypotheses = {"fine": "yes", "small": "MISTER ADDISON", "big": "CAT SET DOWN"}
    lines = list(score(references, hypotheses, normaliser="none").listing())
    big = lines.index("big\t(OH->*) (THE->*) CAT (SAT->SET) (*->DOWN)")
    assert lines.index("small\tMISTER (EDISON->ADDISON)") == big + 1
    assert not any(line.startswith("fine") for line in lines)
    assert "EDISON -> ADDISON\t1" in lines
    assert "DOWN\t1" in lines
    limited = list(score(references, hypotheses, normaliser="none").listing(limit=1))
    assert not any(line.startswith("small") for line in limited)


def test_most_frequent_errors() -> None:
    pairs = [
        ("in", "and"),
        ("in", "and"),
        ("a", "the"),
        ("x", ""),
        ("x", ""),
        ("", "um"),
        ("y", ""),
    ]
    result = score(*both(pairs), normaliser="none")
    assert result.substitutions() == [("in", "and", 2), ("a", "the", 1)]
    assert result.deletions(1) == [("x", 2)]
    assert result.insertions() == [("um", 1)]


def test_counts_add_up() -> None:
    left, right = ErrorCounts(sub=1, words=4, utterances=1), ErrorCounts(ins=2, words=6, wrong=1)
    assert left + right == ErrorCounts(sub=1, ins=2, words=10, wrong=1, utterances=1)
    assert (left + right).wer == 0.3


def test_sets_are_pooled_not_averaged() -> None:
    sets = {
        "clean": ({"1": "a b c d e f g h"}, {"1": "a b c d e f g h"}),
        "other": ({"1": "a b"}, {"1": "x y"}),
    }
    result = score_sets(sets)
    assert (result.sets["clean"].wer, result.sets["other"].wer) == (0.0, 1.0)
    assert result.pooled.wer == pytest.approx(0.2)
    assert [utterance.id for utterance in result.pooled.utterances] == ["clean/1", "other/1"]
    assert result.to_dict()["sets"]["other"]["sub"] == 2


def test_sets_name_the_set_in_errors_and_keep_the_missing() -> None:
    with pytest.raises(ValueError, match=r"set 'other': 1 of 1 references"):
        score_sets({"other": ({"1": "a"}, {})})
    assert score_sets({"other": ({"1": "a"}, {})}, missing="empty").pooled.missing == ("other/1",)


def test_scoring_loads_nothing_heavy() -> None:
    program = (
        "import sys, isthmus.scoring as scoring\n"
        "scoring.score({'a': 'x'}, {'a': 'y'}, normaliser='whisper')\n"
        "print([n for n in ('torch', 'transformers', 'lhotse') if n in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"
