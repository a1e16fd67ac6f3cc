"""Error rates by language, computed by hand, and what normalisation does to their scripts."""

import pytest

from isthmus.scoring import normaliser, score_languages, score_sets
from isthmus.scoring.normalise import has_marks

REFERENCES = {"a": "eins zwei drei vier", "b": "ja", "c": "jeden dwa", "d": "yes"}
HYPOTHESES = {"a": "eins zwei drei", "b": "nein", "c": "jeden dwa", "d": "no"}
LANGUAGES = {"a": "de", "b": "de", "c": "pl", "d": ""}


def test_by_hand() -> None:
    two = {"c": REFERENCES["c"]}, {"c": "jeden"}
    scores = score_sets({"one": (REFERENCES, HYPOTHESES), "two": two})
    found = score_languages(scores, {"one": LANGUAGES, "two": {"c": "pl"}})
    assert found is not None
    assert list(found.languages) == ["de", "pl", "unknown"]
    german, polish = found.languages["de"], found.languages["pl"]
    assert german.wer == 2 / 5  # a deletion and a substitution
    assert polish.wer == 1 / 4
    assert german.cer == (4 + 4) / 18  # vier is missing; of ja, no letter is in its place in nein
    assert polish.counts.utterances == 2  # of both sets
    assert found.wer == pytest.approx((2 / 5 + 1 / 4) / 2)  # utterances without one have no part
    assert found.wer != scores.pooled.wer
    assert found.cer == pytest.approx(((german.cer or 0) + (polish.cer or 0)) / 2)
    assert found.to_dict()["languages"]["de"]["wer"] == 2 / 5
    assert found.to_dict()["macro"] == {"wer": found.wer, "cer": found.cer}


def test_one_language_has_no_table_of_its_own() -> None:
    scores = score_sets({"one": (REFERENCES, HYPOTHESES)})
    assert score_languages(scores, {"one": dict.fromkeys(REFERENCES, "de")}) is None
    assert score_languages(scores, {"one": dict.fromkeys(REFERENCES, "")}) is None


def test_a_language_without_words_has_no_say_in_the_mean() -> None:
    scores = score_sets({"one": ({"a": "ja", "b": ""}, {"a": "nein", "b": "so"})})
    found = score_languages(scores, {"one": {"a": "de", "b": "nl"}})
    assert found is not None
    assert found.languages["nl"].wer is None
    assert found.wer == 1.0


@pytest.mark.parametrize(
    ("text", "basic"),
    [
        ("Schöne Grüße, Straße!", "schöne grüße straße"),  # German
        ("Scho\u0308ne Gru\u0308ße", "schöne grüße"),  # the same, accents apart
        ("Zażółć gęślą jaźń.", "zażółć gęślą jaźń"),  # Polish
        ("L'été, ça va?", "l été ça va"),  # French
        ("مرحبا، كيف الحال؟", "مرحبا كيف الحال"),  # Arabic as it is written
        ("שלום, מה שלומך?", "שלום מה שלומך"),  # Hebrew as it is written
    ],
)
def test_letters_stay_letters(text: str, basic: str) -> None:
    assert not has_marks(text)
    for name in ("basic", "basic-marks"):
        assert normaliser(name)(text) == basic


@pytest.mark.parametrize("text", ["مَرْحَبًا", "שָׁלוֹם", "नमस्ते", "สวัสดี"])
def test_marks_are_for_the_normaliser_that_keeps_them(text: str) -> None:
    assert has_marks(text)
    assert len(normaliser("basic")(text).split()) > 1  # the word has fallen apart
    assert len(normaliser("basic-marks")(text).split()) == 1
