"""How sure the language model is of each word it wrote, and whether CTC heard the same."""

import math
from collections.abc import Sequence
from typing import Any

import kaldialign

from isthmus.decoding.transcript import words_of


def word_confidences(
    tokenizer: Any, tokens: Sequence[int], log_probs: Sequence[float]
) -> tuple[tuple[str, float], ...]:
    """The words of a transcript, each with the probability of its tokens given all before.

    That is their product. A token that reaches into two words counts for both. Where the texts of
    a transcript's beginnings do not add up to it, every word has the mean of all tokens.
    """
    text, spans = token_spans(tokenizer, tokens)
    words = words_of(text)
    if spans is None:
        mean = math.exp(sum(log_probs[: len(tokens)]) / max(1, len(tokens)))
        return tuple((word.group(), mean) for word in words)
    places = list(zip(spans, log_probs, strict=False))
    found = []
    for word in words:
        inside = [p for (start, end), p in places if start < word.end() and end > word.start()]
        found.append((word.group(), math.exp(sum(inside))))
    return tuple(found)


def token_spans(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, list[tuple[int, int]] | None]:
    """The text of tokens, and where in it each begins and ends.

    None where the texts of a transcript's beginnings do not add up to it.
    """
    text = _text(tokenizer, tokens)
    # half a letter of several bytes is shown as a question mark
    parts = [_text(tokenizer, tokens[: n + 1]).rstrip("\ufffd") for n in range(len(tokens))]
    if not all(map(text.startswith, parts)):
        return text, None
    ends = [len(part) for part in parts]
    return text, list(zip([0, *ends], ends, strict=False))


def text_distance(one: str, other: str) -> float:
    """Share of letters that differ between two texts, 0 to 1: their edit distance over the longer.

    Only letters and digits count, small and capital ones alike: heads of CTC know no others.
    """
    texts = [[letter for letter in text.casefold() if letter.isalnum()] for text in (one, other)]
    longest = max(map(len, texts))
    return kaldialign.edit_distance(*texts)["total"] / longest if longest else 0.0


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
