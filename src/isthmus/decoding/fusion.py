"""What else has a say in beam search: phrases that are expected, and n-gram language models.

Where words begin and end is read from the text of the tokens, so any tokenizer will do.
"""

import gzip
import math
import re
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.decoding.beam import Scorer
from isthmus.errors import IsthmusError

ANCHOR = "a"  # a word before others, so that tokenizers see them in the middle of a text
FLOOR = -20.0  # log-probability of an unknown word where the model has no <unk>
LN_10 = math.log(10.0)  # ARPA files have decimal logarithms
PUNCTUATION = ".,;:!?¿¡\"“”„()[]…—–-'‘’«»"


class TokenTexts:
    """Texts of an LLM's tokens, and tokens of texts."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.anchor = self.encode(ANCHOR)
        decode = tokenizer.decode
        self.decode = lru_cache(1 << 18)(lambda tokens: str(decode([*self.anchor, *tokens])))

    def encode(self, text: str) -> list[int]:
        encode = self.tokenizer.encode
        return list(encode(text, add_special_tokens=False, split_special_tokens=True))

    def text(self, *tokens: int) -> str:
        """Of tokens behind other text, their leading space included."""
        return self.decode(tokens)[len(self.decode(())) :]


class TokenScorer(TokenTexts, Scorer):
    """A `Scorer` that says a token at a time what it adds, and in which state it is then."""

    @abstractmethod
    def advance(self, state: Any, token: int) -> tuple[float, Any]: ...

    @abstractmethod
    def end(self, state: Any) -> float: ...

    def score(self, states: Sequence[Any], tokens: Tensor) -> Tensor:
        rows = zip(states, tokens.tolist(), strict=True)
        return torch.tensor([[self.advance(state, t)[0] for t in row] for state, row in rows])

    def extend(self, states: Sequence[Any], tokens: Sequence[int]) -> list[Any]:
        return [self.advance(state, t)[1] for state, t in zip(states, tokens, strict=True)]

    def finish(self, states: Sequence[Any]) -> Tensor:
        return torch.tensor([self.end(state) for state in states])


@dataclass
class Node:
    """A text that one or several phrases begin with."""

    depth: int = 0  # tokens
    kept: int = 0  # of them, those of a shorter phrase that was said on the way
    phrase: bool = False
    shorter: int = 0  # node of its longest proper end that phrases begin with
    said: int = 0  # tokens of phrases that it ends with, if its last word is over
    next: dict[int, int] = field(default_factory=dict)

    @property
    def pending(self) -> int:  # taken back if the phrase breaks off
        return self.depth - self.kept


class Hotwords(TokenScorer):
    """Phrases that are expected: `bonus` nats for each of their tokens.

    It comes token by token, to lead the search into a phrase, and is taken back where the phrase
    breaks off or its last word goes on: a text that ends without a whole phrase scores as if there
    were none. Only one cut short by its limit within a phrase keeps what it has. Tokens that two
    phrases said begin with count once. Phrases are matched in their own letter case, as tokenised
    at the beginning of a text and behind a space (an automaton, Aho and Corasick 1975).
    """

    def __init__(self, phrases: Iterable[str], tokenizer: Any, bonus: float = 1.0):
        super().__init__(tokenizer)
        self.bonus = bonus
        self.nodes = [Node(), Node()]  # nothing matched: within a text, and at its beginning
        for phrase in phrases:
            self._add(phrase)
        self._link()

    def start(self, utterance: int) -> int:
        return 1

    def advance(self, state: int, token: int) -> tuple[float, int]:
        after = self._step(state, token)
        one = self.nodes[state]
        said = one.said * self._ends_word(token)
        return self.bonus * (said + self.nodes[after].pending - one.pending), after

    def end(self, state: int) -> float:
        return self.bonus * (self.nodes[state].said - self.nodes[state].pending)

    def _ends_word(self, token: int) -> bool:
        return re.match(r"[^\w\ufffd]", self.text(token)) is not None  # \ufffd: part of a letter

    def _add(self, phrase: str) -> None:
        text = " ".join(phrase.split())
        first, behind = self.encode(text), self.encode(f"{ANCHOR} {text}")[len(self.anchor) :]
        if not text:
            raise IsthmusError(f"Hotword {phrase!r} has no words. Leave it out.")
        for place, tokens in [(0, behind)] + [(1, first)] * (first != behind):
            for token in tokens:
                node = self.nodes[place]
                if token not in node.next:
                    node.next[token] = len(self.nodes)
                    self.nodes.append(Node(node.depth + 1))
                place = node.next[token]
            self.nodes[place].phrase = True

    def _link(self) -> None:
        """Find for each node, the shallow first, where it goes on when its phrase breaks off."""
        waiting = deque([0, 1])
        while waiting:
            place = waiting.popleft()
            node = self.nodes[place]
            node.said = node.pending * node.phrase + (self.nodes[node.shorter].said if place else 0)
            for token, child in node.next.items():
                after = self.nodes[child]
                after.shorter = self._step(node.shorter, token) if place else 0
                after.kept = node.depth if node.phrase and self._ends_word(token) else node.kept
                waiting.append(child)

    def _step(self, place: int, token: int) -> int:
        while place and token not in self.nodes[place].next:
            place = self.nodes[place].shorter
        return self.nodes[place].next.get(token, 0)


@dataclass(frozen=True)
class NGram:
    """A back-off model of words; logarithms are natural, n-grams are words joined by spaces."""

    order: int
    log_probs: dict[str, float]
    backoffs: dict[str, float]

    def log_prob(self, context: Sequence[str], word: str) -> float:
        """Of a word after others, of which the last order - 1 count (Katz 1987)."""
        word = word if word in self.log_probs else "<unk>"
        if word not in self.log_probs:
            return FLOOR
        spent = 0.0
        for start in range(max(0, len(context) - self.order + 1), len(context)):
            before = " ".join(context[start:])
            if (found := self.log_probs.get(f"{before} {word}")) is not None:
                return spent + found
            spent += self.backoffs.get(before, 0.0)
        return spent + self.log_probs[word]


def read_arpa(path: str | Path) -> NGram:
    """Read an n-gram model in ARPA's format, compressed if its name ends with .gz.

    Raises IsthmusError where it cannot be read or is not one.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    order, log_probs, backoffs = 0, dict[str, float](), dict[str, float]()
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for order, fields in _ngrams(lines):
                words = " ".join(fields[1 : order + 1])
                log_probs[words] = float(fields[0]) * LN_10
                for backoff in fields[order + 1 :]:
                    backoffs[words] = float(backoff) * LN_10
        if not log_probs:
            raise ValueError("it has no n-grams")
    except (OSError, EOFError, ValueError) as error:
        raise IsthmusError(
            f"Cannot read n-gram model {path} (ARPA, or its .gz): {error}."
        ) from error
    return NGram(order, log_probs, backoffs)


def _ngrams(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    order = 0
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if fields == ["\\end\\"] and order:
            return
        if fields == [f"\\{order + 1}-grams:"]:
            order += 1
        elif fields and order:
            if len(fields) not in (order + 1, order + 2):
                raise ValueError(f"line {number} is no {order}-gram: {line.strip()!r}")
            yield order, fields
    raise ValueError("it does not end with \\end\\: it is cut short or something else")


# Words before, as far as asked for; the tokens since; how many of their words are judged.
Words = tuple[tuple[str, ...], tuple[int, ...], int]


class NGramFusion(TokenScorer):
    """Shallow fusion: `weight` times a model's log-probability of each word, and `word_bonus`.

    A word counts when the next one begins, the last one with the end of the text, itself judged if
    the model knows `</s>`. Words are looked up in the model's letter case, and where it does not
    know them, without the punctuation around them.
    """

    def __init__(self, model: NGram, tokenizer: Any, weight: float = 0.3, word_bonus: float = 0.0):
        super().__init__(tokenizer)
        self.model, self.weight, self.word_bonus = model, weight, word_bonus
        known = "".join(word for word in model.log_probs if " " not in word and word[0] != "<")
        self.cased = {known.lower(): str.lower, known.upper(): str.upper}.get(known, str)

    def start(self, utterance: int) -> Words:
        return ("<s>",), (), 0

    def advance(self, state: Words, token: int) -> tuple[float, Words]:
        context, tokens, judged = state
        piece = self.text(token)
        if not re.search(r"\s", piece):
            return 0.0, (context, (*tokens, token), judged)
        words = re.split(r"\s+", (self.text(*tokens) + piece).lstrip())
        added, context = self._say(context, words[judged:-1])
        return added, (context, (token,), len(re.split(r"\s+", piece.lstrip())) - 1)

    def end(self, state: Words) -> float:
        context, tokens, judged = state
        added, context = self._say(context, self.text(*tokens).split()[judged:])
        if "</s>" in self.model.log_probs:
            added += self.weight * self.model.log_prob(context, "</s>")
        return added

    def _say(self, context: tuple[str, ...], words: Iterable[str]) -> tuple[float, tuple[str, ...]]:
        added, known = 0.0, self.model.log_probs
        for word in map(self.cased, words):
            name = word if word in known else word.strip(PUNCTUATION)
            if name:  # else it was nothing but punctuation
                added += self.weight * self.model.log_prob(context, name) + self.word_bonus
                context = (*context, name if name in known else "<unk>")[-self.model.order :]
        return added, context
