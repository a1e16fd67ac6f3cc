"""Joint decoding: a CTC head has a say in the beam search of the LLM.

To a hypothesis' log-probability by the LLM, `weight` times log p_ctc(text ...) is added: the
probability that what CTC spells begins with the text, summed over all alignments, and of finished
hypotheses that it is the text and nothing more (Watanabe et al., 2017, "Hybrid CTC/Attention
Architecture for End-to-End Speech Recognition", section IV and algorithm 2). That paper's share
of CTC is weight / (1 + weight).

Where the LLM's tokens are not CTC's units, texts are spelled anew: letter by letter if the units
are letters, else word by word, as soon as the word is over.

Shapes: N utterances, H hypotheses, C candidates, R rows (texts to go on with), T frames of the
longest utterance, V units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from isthmus.decoding.beam import Scorer
from isthmus.decoding.fusion import TokenTexts
from isthmus.decoding.timestamps import FLOOR
from isthmus.model.ctc_head import CTCHead, LogProbs
from isthmus.model.spelling import WILDCARD, spell

UNSPELLABLE = -5.0  # log-probability of a run of letters or digits that CTC has no units for
CANDIDATES = 8  # likeliest tokens of a hypothesis that CTC is asked about, if not more are kept
LETTER_BYTES = 4  # of UTF-8, at most


@dataclass(frozen=True)
class Pending:
    """What of a hypothesis' text is not spelled yet."""

    begun: bool = False  # something is spelled
    gap: bool = False  # white space came after it
    held: tuple[int, ...] = ()  # tokens that end within a letter
    rest: str = ""  # a word that may go on, where units are longer than letters


@dataclass(frozen=True)
class Step:
    """What a token (or the end of the text) adds to a hypothesis."""

    units: tuple[int, ...] = ()
    unspellable: int = 0  # how often the text has what CTC has no units for
    pending: Pending = Pending()


class Spelling(Protocol):
    """How the LLM's tokens are said in the units of a CTC head."""

    blank: int

    def step(self, pending: Pending, token: int) -> Step: ...
    def end(self, pending: Pending) -> Step: ...


class TokenSpelling(Spelling):
    """Where they are its units."""

    def __init__(self, ctc: CTCHead):
        self.blank = ctc.blank

    def step(self, pending: Pending, token: int) -> Step:
        return Step((token,))

    def end(self, pending: Pending) -> Step:
        return Step()


@dataclass(frozen=True)
class Spelled:
    """Units of a piece of text, separators between its words among them."""

    units: tuple[int, ...]
    unspellable: int
    before: bool  # it begins with white space ...
    after: bool  # ... or ends with it


class TextSpelling(TokenTexts, Spelling):
    """Where they are not, by their text.

    What cannot be spelled (digits, another script) is left out and costs UNSPELLABLE; punctuation
    that CTC does not know is left out at no cost.
    """

    def __init__(self, tokenizer: Any, ctc: CTCHead):
        super().__init__(tokenizer)
        self.blank = ctc.blank
        units = ctc.tokenizer
        special = set(units.all_special_tokens)
        self.by_letter = all(len(unit) == 1 for unit in units.get_vocab() if unit not in special)
        self.separator = () if ctc.separator is None else (ctc.separator,)
        self.spell = lru_cache(1 << 16)(lambda word: spell(word, units))
        self.spelled = lru_cache(1 << 16)(self._spelled)

    def step(self, pending: Pending, token: int) -> Step:
        text = pending.rest + self.text(*pending.held, token)
        if text.endswith("\ufffd") and len(pending.held) < LETTER_BYTES - 1:
            return Step(pending=replace(pending, held=(*pending.held, token)))
        end = len(text)
        while end and not (self.by_letter or text[end - 1].isspace()):
            end -= 1
        return self._step(pending, text[:end], text[end:])

    def end(self, pending: Pending) -> Step:
        return self._step(pending, pending.rest + self.text(*pending.held), "")

    def _step(self, pending: Pending, text: str, rest: str) -> Step:
        found = self.spelled(text)
        gap = pending.gap or found.before
        if not found.units:
            left = Pending(pending.begun, gap or found.after, rest=rest)
            return Step((), found.unspellable, left)
        between = self.separator if gap and pending.begun else ()
        left = Pending(True, found.after, rest=rest)
        return Step((*between, *found.units), found.unspellable, left)

    def _spelled(self, text: str) -> Spelled:
        units, unspellable = list[int](), 0
        for word in text.split():
            own = self.spell(word)
            known = [unit for unit in own if unit != WILDCARD]
            if any(map(str.isalnum, word)):
                unspellable += len(own) - len(known)
            units += [*(self.separator if units and known else ()), *known]
        return Spelled(tuple(units), unspellable, text[:1].isspace(), text[-1:].isspace())


@dataclass(frozen=True)
class Said:
    """A hypothesis as CTC hears it.

    `ending` (2, T + 1) has log-probabilities that its units, and no more, were spelled in the
    first t frames: by alignments that end in the last unit, and in a blank.
    """

    utterance: int
    ending: Tensor
    prefix: float = 0.0  # log-probability that what is spelled begins with the units
    last: int = -1  # unit; none is spelled yet
    pending: Pending = Pending()


class CTCPrefixScorer(Scorer):
    """Adds `weight` times the prefix log-probability of CTC to hypotheses of a batch.

    `log_probs` are those of the units, (T, V), of each utterance. No text is given less than
    FLOOR, so that a search goes on where there are too few frames for any text.
    """

    def __init__(self, spelling: Spelling, log_probs: Sequence[LogProbs], weight: float):
        self.spelling, self.log_probs, self.weight = spelling, log_probs, weight
        self.longest = max(map(len, log_probs))
        places = torch.arange(len(log_probs))
        self.blanks = _runs(self._columns(places, torch.full_like(places, spelling.blank)))

    def start(self, utterance: int) -> Said:
        blanks = self.blanks[utterance]
        return Said(utterance, torch.stack([torch.full_like(blanks, -math.inf), blanks]))

    def score(self, states: Sequence[Said], tokens: Tensor) -> Tensor:
        steps = [
            (state, self.spelling.step(state.pending, token))
            for state, row in zip(states, tokens.tolist(), strict=True)
            for token in row
        ]
        rows, added = zip(*steps, strict=True)
        return self._gain(rows, added, self._prefixes(rows, added)).view(tokens.shape)

    def extend(self, states: Sequence[Said], tokens: Sequence[int]) -> list[Said]:
        pairs = zip(states, tokens, strict=True)
        steps = [self.spelling.step(state.pending, token) for state, token in pairs]
        prefixes = self._prefixes(states, steps).tolist()
        endings = self._endings(states, [step.units for step in steps])
        return [
            Said(
                state.utterance,
                ending,
                prefix,
                step.units[-1] if step.units else state.last,
                step.pending,
            )
            for state, step, ending, prefix in zip(states, steps, endings, prefixes, strict=True)
        ]

    def finish(self, states: Sequence[Said]) -> Tensor:
        steps = [self.spelling.end(state.pending) for state in states]
        endings = self._endings(states, [step.units for step in steps])
        whole = endings[:, :, -1].logsumexp(dim=1).clamp_min(FLOOR)
        return self._gain(states, steps, whole)

    def _gain(self, states: Sequence[Said], steps: Sequence[Step], after: Tensor) -> Tensor:
        """What to add (R,) where steps lead to these log-probabilities."""
        before = torch.tensor([state.prefix for state in states], dtype=torch.float64)
        unspellable = torch.tensor([step.unspellable for step in steps], dtype=torch.float64)
        return self.weight * (after - before + UNSPELLABLE * unspellable)

    def _prefixes(self, states: Sequence[Said], steps: Sequence[Step]) -> Tensor:
        """Prefix log-probabilities (R,) of hypotheses with the units of steps."""
        prefixes = torch.tensor([state.prefix for state in states], dtype=torch.float64)
        rows = [row for row, step in enumerate(steps) if step.units]
        if rows:
            chosen, units = [states[row] for row in rows], [steps[row].units for row in rows]
            lasts = [([one.last, *own])[-2] for one, own in zip(chosen, units, strict=True)]
            endings = self._endings(chosen, [own[:-1] for own in units])
            new = torch.tensor([own[-1] for own in units])
            # in which frame the last unit begins
            begun = _reached(endings, lasts, new) + self._columns(_utterances(chosen), new)
            prefixes[rows] = begun.logsumexp(dim=1).clamp_min(FLOOR)
        return prefixes

    def _endings(self, states: Sequence[Said], units: Sequence[tuple[int, ...]]) -> Tensor:
        """`ending` (R, 2, T + 1) of hypotheses with more units."""
        endings = torch.stack([state.ending for state in states])
        lasts = [state.last for state in states]
        for depth in range(max(map(len, units))):
            rows = [row for row, own in enumerate(units) if len(own) > depth]
            where = _utterances([states[row] for row in rows])
            new = torch.tensor([units[row][depth] for row in rows])
            reached = _reached(endings[rows], [lasts[row] for row in rows], new)
            in_unit = lasting(reached, _runs(self._columns(where, new)))
            in_blank = lasting(in_unit[:, :-1], self.blanks[where])
            endings[rows] = torch.stack([in_unit, in_blank], dim=1)
            for row in rows:
                lasts[row] = units[row][depth]
        return endings

    def _columns(self, where: Tensor, units: Tensor) -> Tensor:
        """Log-probabilities (R, T) of units (R,) in utterances (R,): of no more than is asked for.

        Blanks that are sure, behind the shorter ones, change no probability.
        """
        columns = torch.full((len(units), self.longest), FLOOR, dtype=torch.float64)
        columns[units == self.spelling.blank] = 0.0
        for utterance in where.unique().tolist():
            rows = (where == utterance).nonzero()[:, 0]
            own = self.log_probs[utterance][:, units[rows]].T.double()
            columns[rows, : own.shape[1]] = own.nan_to_num(nan=FLOOR, neginf=FLOOR)
        return columns


def _utterances(states: Sequence[Said]) -> Tensor:
    return torch.tensor([state.utterance for state in states])


def _runs(columns: Tensor) -> Tensor:
    """Log-probabilities (R, T + 1) of a unit in all of the first t frames, from (R, T)."""
    return torch.nn.functional.pad(columns.cumsum(dim=1), (1, 0))


def _reached(endings: Tensor, lasts: Sequence[int], new: Tensor) -> Tensor:
    """Log-probabilities (R, T) that a new unit (R,) may begin in a frame."""
    in_unit, in_blank = endings[:, :, :-1].unbind(dim=1)
    # The same unit again needs a blank between.
    again = torch.tensor(lasts) == new
    return torch.where(again[:, None], in_blank, torch.logaddexp(in_unit, in_blank))


def lasting(reached: Tensor, runs: Tensor) -> Tensor:
    """Log-probabilities (R, T + 1) to be in a state after t frames.

    `reached` (R, T) are those to be where it may be entered in a frame, and `runs` (R, T + 1) those
    that all frames up to there are of the state. In place of the recurrence
    x[t] = (x[t - 1] + reached[t]) p[t] it is a running sum of reached[s] over the run before s.
    """
    entered = (reached - runs[:, :-1]).logcumsumexp(dim=1) + runs[:, 1:]
    return torch.nn.functional.pad(entered, (1, 0), value=-math.inf)
