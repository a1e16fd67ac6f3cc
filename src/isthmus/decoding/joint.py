"""Joint decoding: the encoder's CTC head has a say in the beam search of the LLM.

To a hypothesis' log-probability by the LLM, `weight` times log p_ctc(text ...) is added: the
probability that what CTC spells begins with the text, summed over all alignments, and of finished
hypotheses that it is the text and nothing more (Watanabe et al., 2017, "Hybrid CTC/Attention
Architecture for End-to-End Speech Recognition", section IV and algorithm 2). That paper's share
of CTC is weight / (1 + weight).

The LLM's tokens are not CTC's units, so texts are spelled anew: letter by letter where the units
are letters, else word by word, as soon as the word is over.

Shapes: N utterances, H hypotheses, C candidates, R rows (texts to go on with), T frames of the
longest utterance, V units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from isthmus.decoding.beam import Scorer
from isthmus.decoding.fusion import TokenTexts
from isthmus.decoding.timestamps import FLOOR, WILDCARD, CTCModel, spell

UNSPELLABLE = -5.0  # log-probability of a run of letters or digits that CTC has no units for
CANDIDATES = 8  # likeliest tokens of a hypothesis that CTC is asked about, if not more are kept
LETTER_BYTES = 4  # of UTF-8, at most


@dataclass(frozen=True)
class Spelling:
    """Units of a piece of text, separators between its words among them."""

    units: tuple[int, ...]
    unspellable: int  # how often it has what CTC has no units for
    before: bool  # it begins with white space ...
    after: bool  # ... or ends with it


class CTCSpelling(TokenTexts):
    """The text of the LLM's tokens in the units of a CTC model.

    What cannot be spelled (digits, another script) is left out and costs UNSPELLABLE; punctuation
    that CTC does not know is left out at no cost.
    """

    def __init__(self, tokenizer: Any, ctc: CTCModel):
        super().__init__(tokenizer)
        self.blank = ctc.blank
        units = ctc.tokenizer
        vocabulary: dict[str, int] = units.get_vocab()
        special = set(units.all_special_tokens)
        self.by_letter = all(len(unit) == 1 for unit in vocabulary if unit not in special)
        delimiter = getattr(units, "word_delimiter_token", None) or " "
        self.separator = (vocabulary[delimiter],) if delimiter in vocabulary else ()
        self.spell = lru_cache(1 << 16)(lambda word: spell(word, units))
        self.spelling = lru_cache(1 << 16)(self._spelling)

    def _spelling(self, text: str) -> Spelling:
        units, unspellable = list[int](), 0
        for word in text.split():
            own = self.spell(word)
            known = [unit for unit in own if unit != WILDCARD]
            if any(map(str.isalnum, word)):
                unspellable += len(own) - len(known)
            units += [*(self.separator if units and known else ()), *known]
        return Spelling(tuple(units), unspellable, text[:1].isspace(), text[-1:].isspace())


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
    gap: bool = False  # white space came after it
    held: tuple[int, ...] = ()  # tokens that end within a letter
    rest: str = ""  # of the text: a word that may go on, where units are longer than letters


@dataclass(frozen=True)
class Step:
    """What a token (or the end of the text) adds to a hypothesis."""

    units: tuple[int, ...]
    unspellable: int
    gap: bool
    held: tuple[int, ...] = ()
    rest: str = ""


class CTCPrefixScorer(Scorer):
    """Adds `weight` times the prefix log-probability of CTC to hypotheses of a batch.

    `log_probs` are those of the units, (T, V), of each utterance. No text is given less than
    FLOOR, so that a search goes on where there are too few frames for any text.
    """

    def __init__(self, spelling: CTCSpelling, log_probs: Sequence[Tensor], weight: float):
        self.spelling, self.weight = spelling, weight
        longest = max(map(len, log_probs))
        # Blanks that are sure, behind the shorter ones, change no probability.
        self.table = torch.full(
            (len(log_probs), log_probs[0].shape[1], longest), FLOOR, dtype=torch.float64
        )
        self.table[:, spelling.blank] = 0.0
        for own, one in zip(self.table, log_probs, strict=True):
            own[:, : len(one)] = one.T.double().nan_to_num(nan=FLOOR, neginf=FLOOR)
        # (N, V, T + 1): a unit in all of the first t frames
        self.runs = torch.nn.functional.pad(self.table.cumsum(dim=2), (1, 0))

    def start(self, utterance: int) -> Said:
        blanks = self.runs[utterance, self.spelling.blank]
        return Said(utterance, torch.stack([torch.full_like(blanks, -math.inf), blanks]))

    def score(self, states: Sequence[Said], tokens: Tensor) -> Tensor:
        steps = [
            (state, self._step(state, token))
            for state, row in zip(states, tokens.tolist(), strict=True)
            for token in row
        ]
        rows, added = zip(*steps, strict=True)
        return self._gain(rows, added, self._prefixes(rows, added)).view(tokens.shape)

    def extend(self, states: Sequence[Said], tokens: Sequence[int]) -> list[Said]:
        steps = [self._step(state, token) for state, token in zip(states, tokens, strict=True)]
        prefixes = self._prefixes(states, steps).tolist()
        endings = self._endings(states, [step.units for step in steps])
        return [
            Said(
                state.utterance,
                ending,
                prefix,
                step.units[-1] if step.units else state.last,
                step.gap,
                step.held,
                step.rest,
            )
            for state, step, ending, prefix in zip(states, steps, endings, prefixes, strict=True)
        ]

    def finish(self, states: Sequence[Said]) -> Tensor:
        steps = [self._spell(state, self._text(state), whole=True) for state in states]
        endings = self._endings(states, [step.units for step in steps])
        whole = endings[:, :, -1].logsumexp(dim=1).clamp_min(FLOOR)
        return self._gain(states, steps, whole)

    def _gain(self, states: Sequence[Said], steps: Sequence[Step], after: Tensor) -> Tensor:
        """What to add (R,) where steps lead to these log-probabilities."""
        before = torch.tensor([state.prefix for state in states], dtype=torch.float64)
        unspellable = torch.tensor([step.unspellable for step in steps], dtype=torch.float64)
        return self.weight * (after - before + UNSPELLABLE * unspellable)

    def _step(self, state: Said, token: int) -> Step:
        text = self._text(state, token)
        if text.endswith("\ufffd") and len(state.held) < LETTER_BYTES - 1:
            held = (*state.held, token)
            return Step((), 0, state.gap, held, state.rest)
        return self._spell(state, text)

    def _text(self, state: Said, *tokens: int) -> str:
        """Of what is not spelled yet, and of tokens behind it."""
        return state.rest + self.spelling.text(*state.held, *tokens)

    def _spell(self, state: Said, text: str, *, whole: bool = False) -> Step:
        end = len(text)
        while end and not (whole or self.spelling.by_letter or text[end - 1].isspace()):
            end -= 1
        found, rest = self.spelling.spelling(text[:end]), text[end:]
        gap = state.gap or found.before
        if not found.units:
            return Step((), found.unspellable, gap or found.after, rest=rest)
        between = self.spelling.separator if gap and state.last >= 0 else ()
        return Step((*between, *found.units), found.unspellable, found.after, rest=rest)

    def _prefixes(self, states: Sequence[Said], steps: Sequence[Step]) -> Tensor:
        """Prefix log-probabilities (R,) of hypotheses with the units of steps."""
        prefixes = torch.tensor([state.prefix for state in states], dtype=torch.float64)
        rows = [row for row, step in enumerate(steps) if step.units]
        if rows:
            chosen, units = [states[row] for row in rows], [steps[row].units for row in rows]
            lasts = [([one.last, *own])[-2] for one, own in zip(chosen, units, strict=True)]
            endings = self._endings(chosen, [own[:-1] for own in units])
            reached, where, which = self._reached(
                endings, chosen, lasts, [own[-1] for own in units]
            )
            # in which frame the last unit begins
            begun = (reached + self.table[where, which]).logsumexp(dim=1)
            prefixes[rows] = begun.clamp_min(FLOOR)
        return prefixes

    def _endings(self, states: Sequence[Said], units: Sequence[tuple[int, ...]]) -> Tensor:
        """`ending` (R, 2, T + 1) of hypotheses with more units."""
        endings = torch.stack([state.ending for state in states])
        lasts = [state.last for state in states]
        for depth in range(max(map(len, units))):
            rows = [row for row, own in enumerate(units) if len(own) > depth]
            chosen, new = [states[row] for row in rows], [units[row][depth] for row in rows]
            reached, where, which = self._reached(
                endings[rows], chosen, [lasts[row] for row in rows], new
            )
            blanks = self.runs[where, self.spelling.blank]
            in_unit = lasting(reached, self.runs[where, which])
            in_blank = lasting(in_unit[:, :-1], blanks)
            endings[rows] = torch.stack([in_unit, in_blank], dim=1)
            for row, unit in zip(rows, new, strict=True):
                lasts[row] = unit
        return endings

    def _reached(
        self, endings: Tensor, states: Sequence[Said], lasts: Sequence[int], new: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities (R, T) that a new unit may begin in a frame; utterances and units."""
        before, units = torch.tensor(lasts), torch.tensor(new)
        in_unit, in_blank = endings[:, :, :-1].unbind(dim=1)
        # The same unit again needs a blank between.
        reached = torch.where(
            (before == units)[:, None], in_blank, torch.logaddexp(in_unit, in_blank)
        )
        return reached, torch.tensor([state.utterance for state in states]), units


def lasting(reached: Tensor, runs: Tensor) -> Tensor:
    """Log-probabilities (R, T + 1) to be in a state after t frames.

    `reached` (R, T) are those to be where it may be entered in a frame, and `runs` (R, T + 1) those
    that all frames up to there are of the state. In place of the recurrence
    x[t] = (x[t - 1] + reached[t]) p[t] it is a running sum of reached[s] over the run before s.
    """
    entered = (reached - runs[:, :-1]).logcumsumexp(dim=1) + runs[:, 1:]
    return torch.nn.functional.pad(entered, (1, 0), value=-math.inf)
