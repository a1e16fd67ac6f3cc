"""Text normalisers by name: what counts as the same word when a hypothesis is scored.

Store raw text and normalise when scoring: a score can then be computed again under another
normaliser, but a normalised hypothesis can never be made raw again. Error rates compare only
under the same normaliser, so every score names the one it used.
"""

import importlib
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

from isthmus.errors import IsthmusError, suggest
from isthmus.text import composed

Normaliser = Callable[[str], str]

_APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\uff07": "'"})


@cache
def _english() -> Normaliser:
    # Imported on first use: it reads a table of spellings and pulls in `regex`.
    from whisper_normalizer.english import EnglishTextNormalizer

    english: Normaliser = EnglishTextNormalizer()
    return english


@cache
def _basic(preserve_marks: bool) -> Normaliser:
    from whisper_normalizer.basic import BasicTextNormalizer

    basic: Normaliser = BasicTextNormalizer(preserve_marks=preserve_marks)
    return basic


def _fold(text: str) -> str:
    """One space between words, none at the ends; letters and their accents composed."""
    return " ".join(composed(text).split())


def whisper(text: str) -> str:
    """Whisper's English normaliser: numbers, contractions, spelling (paper, appendix C)."""
    return _fold(_english()(text))


def basic(text: str) -> str:
    """Whisper's normaliser for any language: lower case; brackets, symbols and marks removed.

    A mark becomes a space: vowels go in Thai, Hindi and their relatives, and words with the vowel
    points of Arabic and Hebrew fall into letters. `basic-marks` keeps them. Letters that have a
    code point with their accent (ü, ł, ç) are letters.
    """
    return _fold(_basic(preserve_marks=False)(text))


def basic_marks(text: str) -> str:
    """`basic` that keeps combining marks, for scripts whose vowels are marks (Thai, Hindi, ...)."""
    return _fold(_basic(preserve_marks=True)(text))


def has_marks(text: str) -> bool:
    """Whether `basic` would take marks out of a text, and with them part of its spelling."""
    compatible = unicodedata.normalize("NFKC", text)
    return any(unicodedata.category(letter)[0] == "M" for letter in compatible)


def none(text: str) -> str:
    """White space is folded and accents composed: case and punctuation count as words do."""
    return _fold(text)


def lower(text: str) -> str:
    """Lower case; punctuation and symbols become spaces, but apostrophes stay within words.

    Compatible forms (NFKC) are made one, and typographic apostrophes become `'`.
    """
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower()
    kept = "".join(
        " " if unicodedata.category(letter)[0] in "PS" and letter != "'" else letter
        for letter in text
    )
    return " ".join(word for word in kept.split() if word.strip("'"))


NORMALISERS: Mapping[str, Normaliser] = MappingProxyType(
    {
        "whisper": whisper,
        "basic": basic,
        "basic-marks": basic_marks,
        "lower": lower,
        "none": none,
    }
)


def normaliser(name: str) -> Normaliser:
    """The normaliser called `name`: one of `NORMALISERS`, or `module:callable` of your own.

    A callable of your own takes the raw text and gives the normalised text; white space is folded
    after it. Importing its module runs that module, so name only modules you trust.

    Raises:
        IsthmusError: no such name, module or callable; the message suggests the nearest name.
    """
    if name in NORMALISERS:
        return NORMALISERS[name]
    if ":" in name:
        return _imported(name)
    raise IsthmusError(
        f"unknown normaliser {name!r}.{suggest(name, NORMALISERS)} "
        f"Known: {', '.join(NORMALISERS)}, or module:callable."
    )


def _imported(name: str) -> Normaliser:
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # of whatever the module does when it runs
        raise IsthmusError(
            f"normaliser {name!r} cannot be imported: {error}. "
            f"Give module:callable, with the module on Python's path."
        ) from error
    if not callable(found):
        raise IsthmusError(
            f"normaliser {name!r} is a {type(found).__name__}, not callable. "
            f"Name a function of one text that gives the normalised text."
        )

    def folded(text: str) -> str:
        result = found(text)
        if not isinstance(result, str):
            raise IsthmusError(
                f"normaliser {name!r} gave {type(result).__name__} for {text!r}; it must give str."
            )
        return _fold(result)

    return folded
