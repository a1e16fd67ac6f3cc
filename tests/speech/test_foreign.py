"""Synthetic speech in other languages: words of their own, voices of their own."""

import json
from pathlib import Path

import numpy as np
import pytest

from isthmus.errors import IsthmusError
from isthmus.lab.synthesis import (
    HELD_OUT_VARIANTS,
    Voice,
    draw_texts,
    random_voice,
    speak,
    synthesise_corpus,
)
from isthmus.speech.foreign import COMMANDS, DIGITS, LANGUAGES, VOICES, short_text

FOREIGN = [language for language in LANGUAGES if language != "en"]


@pytest.mark.parametrize("language", FOREIGN)
def test_a_table_has_all_that_is_drawn(language: str) -> None:
    words = [*DIGITS[language], *COMMANDS[language]]
    assert len(DIGITS[language]) == 10
    assert len(COMMANDS[language]) >= 20
    assert len(set(words)) == len(words)
    assert all(word == word.lower().strip() and word.isalpha() for word in words)
    rng = np.random.default_rng(0)
    texts = [short_text(rng, language) for _ in range(600)]
    assert {word for text in texts for word in text.split()} == set(words)
    assert max(len(text.split()) for text in texts) == 7


def test_the_eight_languages_of_the_paper() -> None:
    assert sorted(LANGUAGES) == ["de", "en", "es", "fr", "it", "nl", "pl", "pt"]
    assert set(VOICES) == set(DIGITS) == set(COMMANDS)


def test_texts_depend_on_seed_and_place() -> None:
    assert draw_texts(3, 5, language="pl") == draw_texts(9, 5, language="pl")[:3]
    assert draw_texts(9, 5, language="pl") != draw_texts(9, 6, language="pl")
    with pytest.raises(IsthmusError, match=r"language 'german'.*Known: en, de"):
        draw_texts(1, 0, language="german")
    with pytest.raises(IsthmusError, match="kinds of English text"):
        draw_texts(1, 0, {"digits": 1.0}, "de")


def test_english_voices_are_drawn_as_ever() -> None:
    drawn = [random_voice(np.random.default_rng(i)).name for i in range(3)]
    assert drawn == [random_voice(np.random.default_rng(i), language="en").name for i in range(3)]
    assert all(name.startswith("en-") for name in drawn)


@pytest.mark.parametrize("language", FOREIGN)
def test_every_voice_speaks(language: str) -> None:
    pytest.importorskip("espeakng_loader", reason="needs the synth extra")
    for accent in VOICES[language]:
        waveform, words = speak(" ".join(DIGITS[language][:3]), Voice(accent))
        assert [word.text for word in words] == DIGITS[language][:3]
        assert np.abs(waveform).max() > 0.05


def test_languages_sound_different() -> None:
    pytest.importorskip("espeakng_loader", reason="needs the synth extra")
    spoken = [speak("zero", Voice(name))[0] for name in ("it", "pl", "pt")]
    assert len({len(waveform) for waveform in spoken}) == 3


def test_a_corpus_says_its_language(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="needs the synth extra")
    texts = draw_texts(3, 1, language="de")
    manifest = synthesise_corpus(tmp_path, texts, 1, held_out=True, language="de")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row["text"] for row in rows] == texts
    assert {row["language"] for row in rows} == {"de"}
    assert rows[0]["id"] == "synthetic_de_1_000000"  # beside that of another language
    variants = {row["speaker"].split("-")[0].partition("+")[2] for row in rows}
    assert variants <= set(HELD_OUT_VARIANTS)
