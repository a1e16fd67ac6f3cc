"""Spelling units of CTC: letters as ever, and sentence pieces that know where words begin."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from isthmus.errors import IsthmusError
from isthmus.model.spelling import BLANK, WORD_BORDER, learn_units, letters_known
from isthmus.settings.conformers import LetterUnits, SentencePieceUnits

TEXTS = ["eins zwei drei vier", "fünf sechs sieben", "one two three four", "müde żółw"] * 20


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    return learn_units(SentencePieceUnits(type="sentencepiece", size=60), TEXTS)


def test_letters_are_what_they_were() -> None:
    tokenizer = learn_units(LetterUnits(letters="abc "), [])
    assert tokenizer.get_vocab() == {BLANK: 0, "<unk>": 1, "a": 2, "b": 3, "c": 4, " ": 5}
    assert tokenizer.encode("a cab", add_special_tokens=False) == [2, 5, 4, 2, 3]
    assert letters_known(tokenizer) == set("abc ")  # none of the blank's own name


def test_pieces_spell_the_texts_and_begin_words(pieces: PreTrainedTokenizerFast) -> None:
    assert pieces.pad_token_id == pieces.get_vocab()[BLANK] == 0
    assert len(pieces) <= 60
    for text in (*TEXTS[:4], "vier zwei", "ż", ""):
        units = pieces.encode(text, add_special_tokens=False)
        names = pieces.convert_ids_to_tokens(units)
        assert pieces.decode(units).strip() == text
        assert len(units) <= len(text) + 1
        assert pieces.unk_token_id not in units
        assert sum(name.startswith(WORD_BORDER) for name in names) == len(text.split())
        assert not any(WORD_BORDER in name[1:] for name in names)
    assert letters_known(pieces) >= set("".join(TEXTS))
    assert "q" not in letters_known(pieces)


def test_pieces_are_shorter_than_letters() -> None:
    texts = ["international information station nation"] * 50
    tokenizer = learn_units(SentencePieceUnits(type="sentencepiece", size=40), texts)
    assert len(tokenizer.encode(texts[0], add_special_tokens=False)) < len(texts[0]) / 2


def test_the_order_of_pieces_is_not_chance(pieces: PreTrainedTokenizerFast) -> None:
    pieces_again = learn_units(SentencePieceUnits(type="sentencepiece", size=60), TEXTS[::-1])
    assert pieces_again.get_vocab() == pieces.get_vocab()


def test_they_are_kept(pieces: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pieces.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.get_vocab() == pieces.get_vocab()
    assert again.encode("drei müde", add_special_tokens=False) == pieces.encode(
        "drei müde", add_special_tokens=False
    )


def test_too_few_units_for_the_letters() -> None:
    with pytest.raises(IsthmusError, match=r"units\.size is 8, but the texts have \d+ letters"):
        learn_units(SentencePieceUnits(type="sentencepiece", size=8), TEXTS)
