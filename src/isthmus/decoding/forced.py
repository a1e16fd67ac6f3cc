"""Texts that are given, scored as the search scores those it finds.

Shapes: N texts, M tokens of the longest, L prompt positions, E width of the LLM, V tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.decoding.beam import Hypothesis, Scorer
from isthmus.model.cache import CopiedSteps
from isthmus.model.llm import LLM


@dataclass(frozen=True)
class Given:
    """A text for the utterance at a place in the batch."""

    utterance: int
    tokens: list[int]


@torch.inference_mode()
def forced_hypotheses(
    llm: LLM,
    prompts: Sequence[Tensor],
    given: Sequence[Given],
    end_tokens: Sequence[int],
    *,
    length_penalty: float = 1.0,
    scorers: Sequence[Scorer] = (),
) -> list[Hypothesis]:
    """Each text with its end token behind the prompt (L, E) of its utterance.

    In one pass of the language model. The scorers' utterances are those of `prompts`.
    """
    texts = [one.tokens for one in given]
    longest = max(map(len, texts))
    whole = []
    for one in given:
        tokens = torch.tensor(one.tokens, dtype=torch.long, device=prompts[0].device)
        prompt = prompts[one.utterance]
        whole.append(torch.cat([prompt, llm.embed(tokens).to(prompt)]))
    logits = CopiedSteps(llm.network, whole).prefill(longest + 1)  # (N, M + 1, V)
    found = []
    for own, text, added in zip(logits, texts, _added(given, scorers), strict=True):
        log_probs = _log_probs(own[longest - len(text) :], text, end_tokens)
        score = (sum(log_probs) + added) / len(log_probs) ** length_penalty
        found.append(Hypothesis(text, score, "stop", log_probs))
    return found


def _log_probs(logits: Tensor, text: Sequence[int], end_tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of a text's tokens, and of the likeliest end, from logits (M + 1, V)."""
    log_probs = logits.float().log_softmax(dim=-1)
    ends = [token for token in end_tokens if token < log_probs.shape[1]]
    own: list[float] = log_probs[range(len(text)), list(text)].tolist()
    return [*own, float(log_probs[-1, ends].max())]


def _added(given: Sequence[Given], scorers: Sequence[Scorer]) -> list[float]:
    """What scorers say of each text, asked token by token as in the search."""
    totals = torch.zeros(len(given))
    for scorer in scorers:
        states: list[Any] = [scorer.start(one.utterance) for one in given]
        for place in range(max(len(one.tokens) for one in given)):
            rows = [row for row, one in enumerate(given) if place < len(one.tokens)]
            own = [states[row] for row in rows]
            tokens = [given[row].tokens[place] for row in rows]
            totals[rows] += scorer.score(own, torch.tensor(tokens)[:, None])[:, 0].to(totals)
            for row, state in zip(rows, scorer.extend(own, tokens), strict=True):
                states[row] = state
        totals += scorer.finish(states).to(totals)
    found: list[float] = totals.tolist()
    return found
