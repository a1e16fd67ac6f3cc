"""Beam search over audio-conditioned prompts; greedy search is one beam.

The rules are those of transformers' `generate(num_beams=K)`: of the best 2K candidates of a step
(more with several end tokens), those that end with an end token and are among the first K are
finished; scores are divided by length ** length_penalty (the end token counts); an utterance is
done when no open hypothesis can beat its K finished ones, with `early_stopping` as soon as it has
K. Forbidden tokens are left out after the softmax: the others' probabilities stay, as with
`suppress_tokens` there. Unlike there, every utterance has its own limit of tokens, and leaves the
batch when it is done.

Shapes: N utterances still open, K beams, C candidates of a hypothesis, L prompt positions, E width
of the LLM, V tokens.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from isthmus.decoding.steps import open_steps
from isthmus.decoding.transcript import FinishReason
from isthmus.errors import IsthmusError
from isthmus.model.llm import LLM

CYCLES = range(1, 21)  # lengths, in tokens, of what a hypothesis may not repeat ...
REPEATS = 8  # ... so many times
BROKEN_OFF: tuple[FinishReason, ...] = ("repetition", "deadline")
BLOCK = 64  # tokens of the vocabulary that are compared as one


@dataclass(frozen=True)
class Hypothesis:
    """Tokens without the end token.

    `log_probs` are the language model's of each token, the end token's last if there is one.
    `score` is their sum, with what scorers added, divided by length ** length_penalty; where a
    repetition was cut off, that of the text with it.
    """

    tokens: list[int]
    score: float
    finish_reason: FinishReason
    log_probs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class SearchOptions:
    """What a search may do beside its beam size."""

    early_stopping: bool = False
    forbidden: tuple[int, ...] = ()  # tokens never to be produced
    repetition_guard: bool = True
    """Close a hypothesis that ends with eight times the same one to twenty tokens."""
    deadline: float | None = None
    """Seconds after which open hypotheses are returned as they are."""
    strict: bool = False
    """Each utterance alone: its tokens and scores are the same to the bit in any company."""
    candidates: int = 32
    """Tokens of a hypothesis that scorers are asked about."""


DEFAULT_OPTIONS = SearchOptions()


class Scorer(Protocol):
    """Something else to say about hypotheses: another model, a list of words.

    It keeps a state of its own for each hypothesis; what it returns is weighted already. H
    hypotheses, of any utterances, are asked about at once.
    """

    def start(self, utterance: int) -> Any:
        """State of the empty hypothesis of the utterance at that place in the batch."""

    def score(self, states: Sequence[Any], tokens: Tensor) -> Tensor:
        """What to add (H, C) for each of the next tokens (H, C) of hypotheses."""

    def extend(self, states: Sequence[Any], tokens: Sequence[int]) -> Sequence[Any]:
        """States of H hypotheses with one more token each."""

    def finish(self, states: Sequence[Any]) -> Tensor:
        """What to add (H,) for an end token, in place of `score`."""


@dataclass(frozen=True)
class Open:
    """A hypothesis that goes on."""

    tokens: list[int]
    log_probs: list[float]
    total: float  # what the search ranks by
    parent: int = 0  # its place among those of the step before
    states: tuple[Any, ...] = ()  # of the scorers


@dataclass(frozen=True)
class Rules:
    """How hypotheses end."""

    end_tokens: frozenset[int]
    beam_size: int
    length_penalty: float
    options: SearchOptions

    @property
    def keep(self) -> int:
        """Candidates enough for K open hypotheses, should all the rest end."""
        return max(2, 1 + len(self.end_tokens)) * self.beam_size

    def hypothesis(self, one: Open, total: float, reason: FinishReason) -> Hypothesis:
        """A finished one; its last token is an end token if the reason is "stop"."""
        tokens = one.tokens[:-1] if reason == "stop" else one.tokens
        return Hypothesis(
            tokens, total / max(1, len(one.tokens)) ** self.length_penalty, reason, one.log_probs
        )

    def without_repetition(self, one: Open) -> Hypothesis | None:
        """The hypothesis with its cycle once, if it ends in one.

        It keeps its own score: that of the rest would be of a text nobody meant to end there.
        """
        cycle = repetition(one.tokens) if self.options.repetition_guard else 0
        if not cycle:
            return None
        length = len(one.tokens) - (REPEATS - 1) * cycle
        whole = self.hypothesis(one, one.total, "repetition")
        return replace(whole, tokens=one.tokens[:length], log_probs=one.log_probs[:length])


@dataclass
class Search:
    """One utterance's open and finished hypotheses."""

    index: int
    limit: int
    rules: Rules
    open: list[Open]
    finished: list[Hypothesis] = field(default_factory=list)

    def advance(self, candidates: Sequence[tuple[float, float, int, int]]) -> None:
        """A step with candidates, the best first: (total, log-probability, parent, token)."""
        rules, opened = self.rules, list[Open]()
        for rank, (total, log_prob, parent, token) in enumerate(candidates):
            if total == -math.inf or len(opened) == rules.beam_size:
                break
            before = self.open[parent]
            one = Open(
                [*before.tokens, token],
                [*before.log_probs, log_prob],
                total,
                parent,
                before.states,
            )
            ended = token in rules.end_tokens
            if ended or len(one.tokens) >= self.limit:
                if rank < rules.beam_size:
                    reason: FinishReason = "stop" if ended else "length"
                    self.finished.append(rules.hypothesis(one, total, reason))
            elif repeated := rules.without_repetition(one):
                self.finished.append(repeated)
            else:
                opened.append(one)
            if rules.beam_size == 1 and self.finished:
                opened = []  # greedy: the most probable token has ended it
                break
        if not opened and not self.finished:  # nothing that may follow has any probability
            self.close("length")
        self.open = opened
        self._prune()

    def close(self, reason: FinishReason) -> None:
        """End the open hypotheses where they are."""
        for one in self.open:
            self.finished.append(self.rules.hypothesis(one, one.total, reason))
        self.open = []
        self._prune()

    def _prune(self) -> None:
        rules = self.rules
        self.finished = ranked(self.finished)[: rules.beam_size]
        if self.open and len(self.finished) == rules.beam_size:
            length = len(self.open[0].tokens)
            best = self.open[0].total / length**rules.length_penalty
            worst = min(one.score for one in self.finished)
            if rules.options.early_stopping or best <= worst:
                self.open = []


def ranked(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    """The best first; beside one that came to its end, those broken off are the last."""
    ended = any(one.finish_reason == "stop" for one in hypotheses)

    def order(one: Hypothesis) -> tuple[bool, float]:
        # a loop is likelier by the token than any sentence
        return ended and one.finish_reason in BROKEN_OFF, -one.score

    return sorted(hypotheses, key=order)


@torch.inference_mode()
def beam_search(
    llm: LLM,
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    end_tokens: Sequence[int],
    *,
    beam_size: int = 4,
    length_penalty: float = 1.0,
    options: SearchOptions = DEFAULT_OPTIONS,
    scorers: Sequence[Scorer] = (),
) -> list[list[Hypothesis]]:
    """Best hypotheses of each prompt (L, E), best first, at most `limits` tokens long.

    Beside one that came to its end, those broken off by the repetition guard or the deadline are
    the last, whatever their scores. The end token counts as one token. It is fastest with prompts
    of like length.
    """
    rules = Rules(frozenset(end_tokens), beam_size, length_penalty, options)
    until = math.inf if options.deadline is None else time.monotonic() + options.deadline
    searches = [
        Search(i, limit, rules, [Open([], [], 0.0, states=tuple(s.start(i) for s in scorers))])
        for i, limit in enumerate(limits)
    ]
    batches = [[search] for search in searches] if options.strict else [searches]
    for batch in batches:
        if batch:
            _run(llm, prompts, batch, scorers, until)
    return [search.finished for search in searches]


def _run(
    llm: LLM,
    prompts: Sequence[Tensor],
    searches: list[Search],
    scorers: Sequence[Scorer],
    until: float,
) -> None:
    own = [prompts[search.index] for search in searches]
    steps = open_steps(llm, own, max(search.limit for search in searches))
    logits = steps.prefill()  # (N, K, V)
    while True:
        for search, found in zip(searches, _candidates(logits, searches, scorers), strict=True):
            search.advance(found)
        if time.monotonic() > until:
            for search in searches:
                search.close("deadline")
        rows = [place for place, search in enumerate(searches) if search.open]
        if not rows:
            return
        searches = [searches[row] for row in rows]
        _extend(searches, scorers)
        width = max(len(search.open) for search in searches)
        opened = [
            search.open + [search.open[0]] * (width - len(search.open)) for search in searches
        ]
        logits = steps.next(
            rows,
            [[one.parent for one in row] for row in opened],
            [[one.tokens[-1] for one in row] for row in opened],
        )


def _candidates(
    logits: Tensor, searches: Sequence[Search], scorers: Sequence[Scorer]
) -> list[list[tuple[float, float, int, int]]]:
    """The best of each utterance as `advance` takes them, from logits (N, K, V)."""
    rules = searches[0].rules
    width = max(rules.keep, rules.options.candidates) if scorers else rules.keep
    log_probs, tokens = likeliest(logits, width, rules.options.forbidden)  # (N, K, C)
    totals = torch.full(log_probs.shape[:2], -math.inf)  # rows that only fill up stay there
    for row, search in zip(totals, searches, strict=True):
        row[: len(search.open)] = torch.tensor([one.total for one in search.open])
    scored = log_probs + totals.to(log_probs.device)[:, :, None]
    if scorers:
        scored = scored + _scores(tokens, searches, scorers)
    best, places = scored.flatten(1).topk(min(rules.keep, scored[0].numel()))
    columns = (
        best.tolist(),
        log_probs.flatten(1).gather(1, places).tolist(),
        (places // log_probs.shape[2]).tolist(),
        tokens.flatten(1).gather(1, places).tolist(),
    )
    return [list(zip(*row, strict=True)) for row in zip(*columns, strict=True)]


def likeliest(logits: Tensor, count: int, forbidden: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The `count` best of (..., V): their log-probabilities (..., count), and which they are.

    Raises IsthmusError for logits of NaN.
    """
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    if total.isnan().any():
        raise IsthmusError(
            "The language model computes NaN, so that no text is likelier than another: its "
            "numbers leave the range of its precision. Set llm.dtype: float32 in the recipe."
        )
    # tokenizers may have tokens that the network does not
    if known := [token for token in forbidden if token < logits.shape[-1]]:
        logits = logits.index_fill(-1, torch.tensor(known, device=logits.device), -math.inf)
    if logits.shape[-1] <= count * BLOCK:
        best, places = logits.topk(min(count, logits.shape[-1]), dim=-1)
        return best - total, places
    # the best are in the blocks with the best maxima: far less to sort
    if rest := -logits.shape[-1] % BLOCK:
        logits = torch.nn.functional.pad(logits, (0, rest), value=-math.inf)
    blocks = logits.unflatten(-1, (-1, BLOCK))
    chosen = blocks.amax(dim=-1).topk(count, dim=-1).indices  # (..., count)
    inside = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, BLOCK)).flatten(-2)
    best, places = inside.topk(count, dim=-1)
    return best - total, chosen.gather(-1, places // BLOCK) * BLOCK + places % BLOCK


def _scores(tokens: Tensor, searches: Sequence[Search], scorers: Sequence[Scorer]) -> Tensor:
    """What scorers add (N, K, C) to candidates (N, K, C)."""
    where = [(n, k) for n, search in enumerate(searches) for k in range(len(search.open))]
    rows, columns = (torch.tensor(part) for part in zip(*where, strict=True))
    asked = tokens.cpu()[rows, columns]  # (H, C)
    ends = torch.isin(asked, torch.tensor(sorted(searches[0].rules.end_tokens)))
    added = torch.zeros(asked.shape)
    for number, scorer in enumerate(scorers):
        states = [one.states[number] for search in searches for one in search.open]
        own = torch.where(ends, scorer.finish(states)[:, None], scorer.score(states, asked))
        added += own.to(added)
    scores = torch.zeros(tokens.shape)
    scores[rows, columns] = added
    return scores.to(tokens.device)


def _extend(searches: Sequence[Search], scorers: Sequence[Scorer]) -> None:
    """Let the scorers know which hypotheses go on."""
    if not scorers:
        return
    hypotheses = [one for search in searches for one in search.open]
    last = [one.tokens[-1] for one in hypotheses]
    columns = [
        scorer.extend([one.states[number] for one in hypotheses], last)
        for number, scorer in enumerate(scorers)
    ]
    states = zip(*columns, strict=True)
    for search in searches:
        search.open = [
            Open(one.tokens, one.log_probs, one.total, one.parent, next(states))
            for one in search.open
        ]


def repetition(tokens: Sequence[int]) -> int:
    """Length of the shortest cycle that the tokens end with eight times; 0 if there is none."""
    for cycle in CYCLES:
        span = REPEATS * cycle
        if span > len(tokens):
            return 0
        if tokens[-1] == tokens[-1 - cycle] and tokens[-span:-cycle] == tokens[cycle - span :]:
            return cycle
    return 0
