"""Beam search over audio-conditioned prompts; greedy search is one beam.

The rules are those of transformers' `generate(num_beams=K, early_stopping=False)`: of the best 2K
candidates of a step, those that end with an end token and are among the first K are finished;
scores are divided by length ** length_penalty (the end token counts); an utterance is done when no
open hypothesis can beat its K finished ones. Unlike there, every utterance has its own limit of
tokens, and leaves the batch when it is done.

Shapes: N utterances still open, K beams, L prompt positions, E width, V tokens.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isthmus.model.llm import LLM

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Hypothesis:
    """Tokens without the end token; `score` is their log-probability, normalised by length."""

    tokens: list[int]
    score: float
    finish_reason: FinishReason


@dataclass
class _Search:
    """One utterance's open and finished hypotheses."""

    index: int
    limit: int
    open: list[tuple[list[int], float]] = field(default_factory=lambda: [([], 0.0)])
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False


@torch.inference_mode()
def beam_search(
    llm: LLM,
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    end_tokens: Sequence[int],
    *,
    beam_size: int = 4,
    length_penalty: float = 1.0,
) -> list[list[Hypothesis]]:
    """Best hypotheses of each prompt (L, E), best first, at most `limits` tokens long."""
    steps = _Steps(llm.network, prompts)
    searches = [_Search(i, limit) for i, limit in enumerate(limits)]
    results: list[list[Hypothesis]] = [[] for _ in prompts]
    logits = steps.prefill()  # (N, V)
    while searches:
        log_probs = logits.float().log_softmax(dim=-1).view(len(searches), -1, logits.shape[-1])
        origins: list[int] = []  # rows of the cache that the next step goes on from
        tokens: list[int] = []
        remaining = []
        width = log_probs.shape[1]
        for place, search in enumerate(searches):
            parents = _advance(search, log_probs[place], set(end_tokens), beam_size, length_penalty)
            if search.done:
                results[search.index] = search.finished
                continue
            remaining.append(search)
            origins += [place * width + parent for parent in parents]
            tokens += [sequence[-1] for sequence, _ in search.open]
        searches = remaining
        if searches:
            logits = steps.next(origins, tokens)
    return results


def _advance(
    search: _Search, log_probs: Tensor, end_tokens: set[int], beam_size: int, length_penalty: float
) -> list[int]:
    """One step of an utterance from log-probabilities (K, V); returns each open beam's parent."""
    scores = torch.tensor([score for _, score in search.open], device=log_probs.device)
    totals = (log_probs + scores[:, None]).flatten()
    keep = max(2, 1 + len(end_tokens)) * beam_size
    best = totals.topk(min(keep, len(totals)))
    vocabulary = log_probs.shape[1]
    length = len(search.open[0][0]) + 1
    out_of_room = length >= search.limit
    opened: list[tuple[list[int], float]] = []
    parents: list[int] = []
    for rank, (total, position) in enumerate(
        zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ):
        parent, token = divmod(position, vocabulary)
        prefix = search.open[parent][0]
        ended = token in end_tokens
        if ended or out_of_room:
            if rank < beam_size:
                search.finished.append(
                    Hypothesis(
                        prefix if ended else [*prefix, token],
                        total / length**length_penalty,
                        "stop" if ended else "length",
                    )
                )
        elif len(opened) < beam_size:
            opened.append(([*prefix, token], total))
            parents.append(parent)
        if beam_size == 1 and ended and rank == 0:
            break  # greedy: the most probable token is the end
    search.finished.sort(key=lambda hypothesis: -hypothesis.score)
    del search.finished[beam_size:]
    search.open = opened
    if not opened:
        search.done = True
    elif beam_size == 1:
        search.done = bool(search.finished)
    elif len(search.finished) == beam_size:
        search.done = opened[0][1] / length**length_penalty <= search.finished[-1].score
    return parents


class _Steps:
    """The language model, a token at a time, with its cache of keys and values."""

    def __init__(self, network: nn.Module, prompts: Sequence[Tensor]):
        self.network = network
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
        longest = int(lengths.max())
        dtype = next(network.parameters()).dtype
        self.embeddings = torch.stack(
            [nn.functional.pad(p, (0, 0, longest - len(p), 0)) for p in prompts]
        ).to(dtype)  # (N, L, E), padded at the front
        self.mask = (
            torch.arange(longest, device=lengths.device) >= longest - lengths[:, None]
        ).long()
        self.cache: Any = None
        self.takes_positions = "position_ids" in inspect.signature(network.forward).parameters

    def prefill(self) -> Tensor:
        return self._forward(inputs_embeds=self.embeddings)

    def next(self, origins: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Go on from cache rows `origins` with one token each; logits (N * K, V)."""
        rows = torch.tensor(origins, device=self.mask.device)
        self.cache.reorder_cache(rows)
        self.mask = nn.functional.pad(self.mask[rows], (0, 1), value=1)
        return self._forward(input_ids=torch.tensor(tokens, device=rows.device)[:, None])

    def _forward(self, **inputs: Tensor) -> Tensor:
        if self.takes_positions:
            positions = self.mask.cumsum(dim=1) - 1
            new = next(iter(inputs.values())).shape[1]
            inputs["position_ids"] = positions[:, -new:].clamp_min(0)
        output = self.network(
            **inputs,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits
