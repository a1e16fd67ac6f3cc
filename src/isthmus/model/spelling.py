"""Spelling units of CTC: letters, or sentence pieces learnt from the texts.

To add a kind: its `learn_units` here, and a settings class in isthmus.settings.conformers.
"""

import itertools
import json
import unicodedata
from collections.abc import Iterable
from functools import singledispatch
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from isthmus.errors import IsthmusError
from isthmus.settings.base import PartSettings
from isthmus.settings.conformers import LETTERS, LetterUnits, SentencePieceUnits

BLANK, UNKNOWN = "<blank>", "<unk>"
WILDCARD = -1  # stands for letters that units cannot spell: the likeliest of its own
WORD_BORDER = "\u2581"  # stands for the space before a word in sentence pieces


@singledispatch
def learn_units(settings: PartSettings, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of spelling units, learnt from texts where there is something to learn."""
    raise TypeError(f"{type(settings).__name__} has no tokenizer here")


@learn_units.register
def _(settings: LetterUnits, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    return letter_tokenizer(settings.letters)


@learn_units.register
def _(settings: SentencePieceUnits, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Raises IsthmusError where there are more letters than units.

    The same texts give the same units as far as no two candidates are equally good: which of
    these is left out is chance.
    """
    texts = list(texts)
    letters = {letter for text in texts for letter in text if not letter.isspace()}
    needed = len(letters) + 3  # blank, unknown, the border of words
    if needed > settings.size:
        raise IsthmusError(
            f"units.size is {settings.size}, but the texts have {len(letters)} letters, which need "
            f"{needed} units. Raise it, or clean the texts."
        )
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=settings.size,
        special_tokens=[BLANK, UNKNOWN],
        unk_token=UNKNOWN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return for_ctc(_in_order(tokenizer))


def _in_order(tokenizer: Tokenizer) -> Tokenizer:
    """The same pieces in an order, and with scores, that do not hang on threads and chance."""
    values = json.loads(tokenizer.to_str())
    special, pieces = values["model"]["vocab"][:2], values["model"]["vocab"][2:]
    rounded = sorted((-round(score, 6), piece) for piece, score in pieces)
    values["model"]["vocab"] = [*special, *([piece, -score] for score, piece in rounded)]
    return Tokenizer.from_str(json.dumps(values))


def letter_tokenizer(letters: str = LETTERS) -> PreTrainedTokenizerFast:
    """Spelling units for CTC: single letters, and the blank as the padding token."""
    vocabulary = {BLANK: 0, UNKNOWN: 1} | {letter: 2 + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return for_ctc(tokenizer)


def for_ctc(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer whose padding is the blank."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=BLANK, unk_token=UNKNOWN)


def letters_known(tokenizer: Any) -> set[str]:
    """The letters that units spell, white space too where words are parted by a border."""
    units = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    letters = {letter for unit in units for letter in unit}
    return letters | {" "} if WORD_BORDER in letters else letters


def spell(word: str, tokenizer: Any) -> list[int]:
    """Units of a word, at least one: of its spelling with the fewest letters unknown.

    Tried are the word as it is, in small and in capital letters, and these without accents.
    Punctuation that the model does not know is left out. A run of unknown letters (digits,
    another script) is one wildcard.
    """
    vocabulary = tokenizer.get_vocab()
    decomposed = unicodedata.normalize("NFKD", word)
    bare = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    forms = dict.fromkeys(  # each once
        "".join(letter for letter in form if letter.isalnum() or letter in vocabulary)
        for base in (word, bare)
        for form in (base, base.lower(), base.upper())
    )
    unknown = tokenizer.unk_token_id
    spellings = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    best = min(spellings, key=lambda units: (not units, units.count(unknown)))
    runs = itertools.groupby(WILDCARD if unit == unknown else unit for unit in best)
    units = [unit for unit, run in runs for _ in ([unit] if unit == WILDCARD else run)]
    return units or [WILDCARD]
