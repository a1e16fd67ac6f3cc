"""Greedy search helped by a draft of the text, as an encoder with a CTC head writes for nothing.

The language model reads the draft as if it had written it, in one pass with the prompt, and says
at each token what it would have written. Up to the first disagreement that is what it writes; from
there more of the draft is put behind its own word and read again, the less the worse it was. What
was rejected is forgotten: the cache never holds more than the batch has written. The tokens are
those of greedy search without a draft, whatever the draft (speculative decoding, arXiv 2211.17192,
with the most probable token in place of a sample).

Shapes: N utterances still open, M tokens read in a pass, S slots of the cache, L prompt positions,
E width of the LLM, V tokens.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from isthmus.decoding.beam import (
    DEFAULT_OPTIONS,
    Hypothesis,
    Open,
    Rules,
    Search,
    SearchOptions,
    beam_search,
    likeliest,
)
from isthmus.decoding.steps import MaskedSteps, open_steps
from isthmus.model.llm import LLM

AHEAD = 16  # tokens of a draft that are read, at most, after one that was wrong at once ...
TRUST = 4  # ... or that many times those that were right
WINDOW = 4  # tokens around a disagreement where the draft may go on


@torch.inference_mode()
def draft_search(
    llm: LLM,
    prompts: Sequence[Tensor],
    drafts: Sequence[Sequence[int]],
    limits: Sequence[int],
    end_tokens: Sequence[int],
    *,
    length_penalty: float = 1.0,
    options: SearchOptions = DEFAULT_OPTIONS,
) -> list[list[Hypothesis]]:
    """What `beam_search` finds with one beam for prompts (L, E), from drafts of token ids.

    It pays for few utterances at a time with good drafts: at 2 % wrong tokens the language model
    is asked about twice, not for each token. In half precision the passes round differently, so
    tokens of nearly the same probability may be others.
    """
    rules = Rules(frozenset(end_tokens), 1, length_penalty, options)
    until = math.inf if options.deadline is None else time.monotonic() + options.deadline
    readings = [
        _Reading(Search(i, limit, rules, [Open([], [], 0.0)]), list(draft), len(draft))
        for i, (limit, draft) in enumerate(zip(limits, drafts, strict=True))
    ]
    batches = [[reading] for reading in readings] if options.strict else [readings]
    return [one for batch in batches if batch for one in _decode(llm, prompts, batch, until)]


def _decode(
    llm: LLM, prompts: Sequence[Tensor], batch: list["_Reading"], until: float
) -> list[list[Hypothesis]]:
    own = [prompts[reading.search.index] for reading in batch]
    limits = [reading.search.limit for reading in batch]
    steps = open_steps(llm, own, max(limits))
    if isinstance(steps, MaskedSteps):
        _run(llm, steps, batch, until)
        return [reading.search.finished for reading in batch]
    # nothing but the cache itself would tell the network what to forget
    rules = batch[0].search.rules
    left = None if until == math.inf else max(0.0, until - time.monotonic())
    return beam_search(
        llm,
        own,
        limits,
        sorted(rules.end_tokens),
        beam_size=1,
        length_penalty=rules.length_penalty,
        options=replace(rules.options, deadline=left),
    )


@dataclass
class _Reading:
    """One utterance, what is written of it, and the draft."""

    search: Search
    draft: list[int]
    ahead: int  # tokens of the draft that may be read in the next pass; 0 for ever: given up
    place: int = 0  # in the draft, of the next token
    proposed: list[int] = field(default_factory=list)  # of the draft, to be read in the next pass

    def propose(self) -> list[int]:
        room = self.search.limit - len(self.search.open[0].tokens) - 1
        self.proposed = self.draft[self.place : self.place + min(room, self.ahead)]
        return self.proposed

    def accept(self, log_probs: Sequence[float], tokens: Sequence[int]) -> int:
        """Write what the model would, as long as the draft is that; how much of it was."""
        for count in range(len(self.proposed) + 1):
            token, log_prob = tokens[count], log_probs[count]
            total = self.search.open[0].total + log_prob
            self.search.advance([(total, log_prob, 0, token)])
            agreed = self.proposed[count : count + 1] == [token]
            if not self.search.open or not agreed:
                break
        self.place = realigned(self.draft, self.place + count, token)
        self.ahead = max(min(self.ahead // 2, AHEAD), TRUST * count)
        return count


def realigned(draft: Sequence[int], place: int, token: int) -> int:
    """Where the draft goes on, if `token` is what stands at or near `place` in it.

    The nearest such token within the window; if there is none, the draft's was another one.
    """
    near = range(max(0, place - WINDOW), min(len(draft), place + WINDOW + 1))
    found = [other for other in near if draft[other] == token]
    return 1 + min(found, key=lambda other: (abs(other - place), -other), default=place)


def _run(llm: LLM, steps: MaskedSteps, readings: list[_Reading], until: float) -> None:
    options = readings[0].search.rules.options
    tokens, real = _padded([reading.propose() for reading in readings], steps.mask.device)
    embeddings = torch.cat([steps.embeddings, llm.embed(tokens).to(steps.embeddings)], dim=1)
    logits = steps.prefill_with(
        embeddings, torch.cat([steps.mask, real], dim=1), keep=tokens.shape[1] + 1
    )
    known = 0  # tokens that this pass began with, and the last one left unread
    while True:
        best, found = (part[..., 0].tolist() for part in likeliest(logits, 1, options.forbidden))
        accepted = [
            known + reading.accept(*row)
            for reading, *row in zip(readings, best, found, strict=True)
        ]
        _keep(steps, accepted, tokens.shape[1])
        if time.monotonic() > until:
            for reading in readings:
                reading.search.close("deadline")
        rows = [place for place, reading in enumerate(readings) if reading.search.open]
        if not rows:
            return
        readings = [readings[row] for row in rows]
        steps.select(rows)
        known = 1
        tokens, real = _padded(
            [[r.search.open[0].tokens[-1], *r.propose()] for r in readings], steps.mask.device
        )
        logits = _read(steps, tokens, real)


def _read(steps: MaskedSteps, tokens: Tensor, real: Tensor) -> Tensor:
    """Logits (N, M, V) after each of the tokens (N, M), padded at the end where not `real`."""
    length = tokens.shape[1]
    causal = steps.unseen.expand(length, length).triu(1)
    seen = [steps.seen.expand(-1, length, -1), causal.expand(len(tokens), -1, -1)]
    positions = steps.lengths[:, None] + real.cumsum(dim=1) - 1
    return steps.forward(tokens, torch.cat(seen, dim=2), positions)


def _keep(steps: MaskedSteps, accepted: Sequence[int], length: int) -> None:
    """Of the last `length` slots, see the first `accepted` of each utterance from now on."""
    longest = max(accepted)
    steps.cache.crop(longest - length)
    count = torch.tensor(accepted, device=steps.seen.device)
    kept = torch.arange(longest, device=count.device) < count[:, None]
    steps.seen = torch.cat([steps.seen, torch.where(kept, 0, steps.unseen)[:, None]], dim=2)
    steps.lengths = steps.lengths + count


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens as (N, M), and where they are, 1 or 0."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row).long() for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    real = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return tokens.to(device), real.to(device)
