"""How well a language model foretells text: perplexity a word (SLAM-ASR, table 8).

    perplexity = exp(nats / words)

`nats` is the negative log-likelihood of all tokens of all texts, each with its end token behind
it. That token alone can decide which of two models is the better, so the perplexity without it is
there too, and the figure of the authors' own script, which is another: a text's mean over its
tokens, weighted by its words. Every text stands alone, after the tokenizer's beginning of sequence
(where it has none, after the end token, as if another text had ended). `words` are what white space
parts in the text as the model read it. A word's perplexity can be compared between tokenizers, a
token's cannot.

Shapes: B batch, L tokens, V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from isthmus.decoding.inputs import is_corpus
from isthmus.decoding.transcriber import run_folder
from isthmus.errors import IsthmusError
from isthmus.model.device import choose_device
from isthmus.model.llm import LLM, build_llm
from isthmus.model.prompt import plain_tokens
from isthmus.runs.folder import DEFAULT, SHIPPED_RUNS, holds_run
from isthmus.runs.loading import load_run
from isthmus.scoring import normaliser as find_normaliser
from isthmus.scoring import read_texts
from isthmus.settings.llms import LLMSettings
from isthmus.speech.corpora import read_corpus
from isthmus.speech.cuts import (
    transcript,
)

LOGIT_BYTES = 256 * 2**20  # of a batch, in float32


@dataclass(frozen=True)
class Likelihood:
    """What one text costs the model."""

    nats: float
    words: int
    tokens: int  # its end token among them
    end_nats: float  # of the end token alone


@dataclass(frozen=True)
class Perplexity:
    """Perplexity a word of texts together."""

    texts: tuple[Likelihood, ...]  # in the order in which they were given
    precision: str  # of the model's weights, such as bfloat16: it moves the third digit

    @cached_property
    def nats(self) -> float:
        return math.fsum(text.nats for text in self.texts)

    @cached_property
    def words(self) -> int:
        return sum(text.words for text in self.texts)

    @cached_property
    def tokens(self) -> int:
        return sum(text.tokens for text in self.texts)

    @property
    def value(self) -> float:
        """exp(nats / words); infinite where that is no number a computer holds."""
        return self._exp(self.nats)

    @property
    def without_end(self) -> float:
        """The same without the end tokens."""
        return self._exp(math.fsum(text.nats - text.end_nats for text in self.texts))

    @property
    def slam_llm(self) -> float:
        """What the script of SLAM-ASR's authors (compute_ppl.py) prints of these texts."""
        return self._exp(
            math.fsum(
                text.words * (text.nats - text.end_nats) / (text.tokens - 1) for text in self.texts
            )
        )

    def _exp(self, nats: float) -> float:
        return math.exp(nats / self.words) if nats / self.words < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        values = {
            "perplexity": self.value,
            "perplexity_without_end": self.without_end,
            "perplexity_slam_llm": self.slam_llm,
        }
        return {
            **{name: value if math.isfinite(value) else None for name, value in values.items()},
            "precision": self.precision,
            "nats": self.nats,
            "words": self.words,
            "tokens": self.tokens,
            "texts": len(self.texts),
        }


def perplexity_text(value: float) -> str:
    """As people read it."""
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


@torch.inference_mode()
def word_perplexity(llm: LLM, texts: Sequence[str]) -> Perplexity:
    """Perplexity a word of texts; those without a word count for nothing.

    Only texts of as many tokens share a batch, so that there is no padding. The model is left in
    the mode in which it is found.

    Raises:
        IsthmusError: there are no words, a text is longer than the model takes, or the tokenizer
            has no end token.
    """
    tokenizer = llm.tokenizer
    end = tokenizer.eos_token_id
    if end is None:
        raise IsthmusError(
            f"The tokenizer of {tokenizer.name_or_path} has no end token, with which the "
            "perplexity of a text is counted. Set eos_token in its tokenizer_config.json."
        )
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    texts = [text for text in texts if text.split()]
    if not texts:
        raise IsthmusError("There is no perplexity without words: all texts are empty.")
    tokens = [[int(start), *plain_tokens(tokenizer, text), int(end)] for text in texts]
    for text, ids in zip(texts, tokens, strict=True):
        if llm.max_tokens is not None and len(ids) > llm.max_tokens:
            raise IsthmusError(
                f"The text {text[:60]!r} takes {len(ids)} positions, the language model has "
                f"{llm.max_tokens}. Break it into shorter lines."
            )
    device = next(llm.parameters()).device
    nats: list[tuple[float, float]] = [(0.0, 0.0)] * len(texts)
    training = llm.training
    llm.eval()
    try:
        for batch in _batches([len(ids) for ids in tokens], llm):
            found = _nats(llm, torch.tensor([tokens[place] for place in batch], device=device))
            for place, value in zip(batch, found, strict=True):
                nats[place] = value
    finally:
        llm.train(training)
    return Perplexity(
        tuple(
            Likelihood(cost, len(text.split()), len(ids) - 1, last)
            for (cost, last), text, ids in zip(nats, texts, tokens, strict=True)
        ),
        str(llm.dtype).removeprefix("torch."),
    )


def _batches(lengths: Sequence[int], llm: LLM) -> Iterator[list[int]]:
    """Places of texts of equal length, as many together as LOGIT_BYTES allow."""
    vocabulary = int(llm.network.config.get_text_config().vocab_size)
    alike = defaultdict(list)
    for place, length in enumerate(lengths):
        alike[length].append(place)
    for length, places in sorted(alike.items()):
        size = max(1, LOGIT_BYTES // (4 * vocabulary * length))
        yield from (places[first : first + size] for first in range(0, len(places), size))


def _nats(llm: LLM, tokens: torch.Tensor) -> list[tuple[float, float]]:
    """Negative log-likelihood of each row of tokens (B, L) but the first, and of the last alone."""
    mask = torch.ones_like(tokens)
    keep = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    logits = llm.logits(llm.embed(tokens), mask, keep)  # (B, L - 1, V)
    targets = tokens[:, 1:].reshape(-1)
    lost = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    rows = lost.reshape(len(tokens), -1).double()
    return list(zip(rows.sum(dim=1).tolist(), rows[:, -1].tolist(), strict=True))


def is_run(name: str) -> bool:
    """Whether this names a run, not a language model."""
    return name in (DEFAULT, *SHIPPED_RUNS) or holds_run(Path(name))


def open_llm(name: str) -> LLM:
    """The language model of that name or folder, or that of a run, trained as it is.

    Raises IsthmusError.
    """
    if is_run(name):
        return load_run(run_folder(name))[0].llm
    return build_llm(LLMSettings(path=name)).to(choose_device()).eval()


def texts_of(name: str, normaliser: str) -> list[str]:
    """The normalised texts of a manifest or corpus, or the lines of a text file.

    Raises IsthmusError for what cannot be read, and for an unknown normaliser.
    """
    normalise = find_normaliser(normaliser)
    if is_corpus(name):
        return [normalise(transcript(cut)) for cut in read_corpus(name)]
    if not Path(name).is_file():
        raise IsthmusError(f"No text {name!r}: neither a manifest nor a text file.")
    return [normalise(text) for text in read_texts(name, role="reference").values()]
