"""Matched-pairs bootstrap: equal, clearly different, and not comparable systems."""

import pytest

from isthmus.scoring import Score, paired_bootstrap, paired_mean, score

REFERENCES = {f"u{index}": "a b c d" for index in range(120)}


def system(wrong_every: int, offset: int = 0) -> Score:
    hypotheses = {
        id: "a b c x" if (index + offset) % wrong_every == 0 else text
        for index, (id, text) in enumerate(REFERENCES.items())
    }
    return score(REFERENCES, hypotheses, resamples=0)


def test_a_system_does_not_differ_from_itself() -> None:
    result = paired_bootstrap(system(4), system(4), resamples=200)
    assert (result.difference, result.interval, result.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_same_rate_on_other_utterances_is_no_difference() -> None:
    result = paired_bootstrap(system(4), system(4, offset=1), resamples=1000)
    assert result.difference == 0.0
    assert result.interval[0] < 0 < result.interval[1]
    assert result.p_value > 0.5


def test_sets_are_averaged_each_with_the_same_weight() -> None:
    few = {"a": "a b", "b": "c d"}
    better = score(few, few, resamples=0)
    worse = score(few, {"a": "x y", "b": "c d"}, resamples=0)
    pairs = [(system(2), system(40)), (better, worse)]
    result = paired_mean(pairs, resamples=500)
    assert result.difference == pytest.approx(((60 - 3) / 480 - 0.5) / 2)
    assert result.interval[0] == pytest.approx((57 / 480 - 1) / 2, abs=0.03)
    assert paired_mean(pairs[:1], resamples=500) == paired_bootstrap(*pairs[0], resamples=500)


def test_a_real_difference_is_found_and_has_a_sign() -> None:
    better, worse = system(40), system(2)
    result = paired_bootstrap(better, worse, resamples=1000)
    assert result.difference == pytest.approx((3 - 60) / 480)
    assert result.interval[1] < 0
    assert result.p_value == pytest.approx(2 / 1001)
    swapped = paired_bootstrap(worse, better, resamples=1000)
    assert swapped.difference == -result.difference
    assert swapped.interval == pytest.approx((-result.interval[1], -result.interval[0]))


def test_pairing_sees_what_single_intervals_hide() -> None:
    # b makes a's errors on the hard half and a few more: the intervals overlap, the pairs differ.
    hypotheses_a = {id: "x x x x" if int(id[1:]) < 60 else text for id, text in REFERENCES.items()}
    hypotheses_b = hypotheses_a | {f"u{index}": "a b c x" for index in range(60, 72)}
    a, b = (score(REFERENCES, hypotheses) for hypotheses in (hypotheses_a, hypotheses_b))
    assert a.interval is not None
    assert b.interval is not None
    assert a.interval[1] > b.interval[0]
    assert paired_bootstrap(a, b, resamples=1000).p_value < 0.01


def test_utterances_are_paired_by_id() -> None:
    turned = dict(reversed(REFERENCES.items()))
    forwards, backwards = score(REFERENCES, REFERENCES), score(turned, REFERENCES)
    assert paired_bootstrap(forwards, backwards, resamples=50).p_value == 1.0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (score({"u0": "a"}, {"u0": "a"}), "120 utterances differ"),
        (score(REFERENCES, REFERENCES, normaliser="none"), "normalisers 'basic' and 'none'"),
    ],
)
def test_what_cannot_be_paired_is_refused(other: Score, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(system(4), other)


def test_nothing_to_compare() -> None:
    empty = score({"a": ""}, {"a": "x"})
    with pytest.raises(ValueError, match="hold no words"):
        paired_bootstrap(empty, empty)
    with pytest.raises(ValueError, match="resamples=0"):
        paired_bootstrap(system(4), system(4), resamples=0)
