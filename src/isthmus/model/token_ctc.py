"""CTC over the language model's own tokens, read off audio embeddings.

An audio embedding says a token by its product with that token's embedding, or nothing at all: the
blank has a learned direction of its own. Nothing of the language model but its table of embeddings
is used, so a projector can be taught to say transcripts before the language model ever runs
(LegoSLM, arXiv 2505.11352, reads the posteriors of a CTC model with the LLM's vocabulary alike).

Shapes: B batch, T encoder frames, A audio embeddings, N of all utterances together, E LLM width,
V tokens, K labels of a batch.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from isthmus.errors import IsthmusError
from isthmus.model.ctc_head import collapsed
from isthmus.model.llm import LLM

SAMPLED = 4096  # tokens that stand for all that no transcript of a training batch has
SHARPNESS = 4.0  # scores of embeddings that are as long as the tokens', in the root of their width
CHUNK_BYTES = 32 * 2**20  # scores at a time, counted in float32
COLUMNS = 32  # at least, of a product: libraries sum those of a few in another order


class TokenCTC(nn.Module):
    """Log-probabilities of the LLM's V tokens, and of the blank behind them, from embeddings."""

    def __init__(self, llm: LLM):
        super().__init__()
        _table(llm)  # or there is nothing to compare with
        self._llm = (llm,)  # in a tuple: its table stays the LLM's and is no part of this
        self.blank_direction = nn.Parameter(torch.zeros(llm.dim))
        self.blank_bias = nn.Parameter(torch.zeros(()))

    @property
    def llm(self) -> LLM:
        return self._llm[0]

    @cached_property
    def scale(self) -> float:
        """Of products with the tokens' embeddings, whose size is a matter of the LLM."""
        table = _table(self.llm)
        parts = table.split(max(1, CHUNK_BYTES // (4 * table.shape[1])))
        squares = sum(float(part.float().square().sum()) for part in parts)
        return SHARPNESS / math.sqrt(squares / table.numel() * self.llm.dim)

    @property
    def blank(self) -> int:
        """The label of no token, V."""
        return len(_table(self.llm))

    def log_probs(self, embeddings: Tensor) -> Tensor:
        """Audio embeddings (..., E) to log-probabilities (..., V + 1), in float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            tokens = (self._scaled(embeddings) @ _table(self.llm).T).float()
            return torch.cat([tokens, self._blank(embeddings)[..., None]], dim=-1).log_softmax(-1)

    def scores(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        """Products, scaled, of embeddings (A, E) with some tokens each (A, C): (A, C), float32."""
        own = _table(self.llm)[tokens].float()
        return torch.einsum("ae,ace->ac", embeddings.float(), own) * self.scale

    def loss(
        self, audio: Sequence[Tensor], labels: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[list[int]]]:
        """Summed CTC loss () in nats of each utterance's tokens, given its embeddings (A, E).

        And the tokens that it says by best path. Every utterance must have room for its tokens
        (`needed_embeddings`). Only the scores of the batch's own labels are ever held whole; all
        others enter through their sum, a chunk at a time. In training SAMPLED of the others stand
        for all of them, drawn anew for each batch by torch's generator.
        """
        rows = torch.cat(list(audio))  # (N, E)
        with torch.autocast(rows.device.type, enabled=False):
            table = _table(self.llm)
            blank = self._blank(rows)
            used = sorted({token for own in labels for token in own})
            scaled = self._scaled(rows)
            chosen, offset = self._choice(used, rows.device)
            total, best, token = _log_sum_exp(
                scaled, table if chosen is None else table[chosen], offset
            )
            token = token if chosen is None else chosen[token]
            path = torch.where(best > blank, token, self.blank)
            normaliser = torch.logaddexp(total, blank)
            own = table[torch.tensor(used, device=rows.device, dtype=torch.long)]  # (K, E)
            scores = (scaled @ own.T).float()  # rounded as in the sum, or they have no total of 1
            log_probs = torch.cat([blank[:, None], scores], dim=1) - normaliser[:, None]
            places = {token: place for place, token in enumerate(used, start=1)}
            targets = [[places[token] for token in one] for one in labels]
            lengths = [len(one) for one in audio]
            said = [collapsed(own.tolist(), self.blank) for own in path.split(lengths)]
            return _restricted_ctc(log_probs.split(lengths), targets), said

    def _choice(
        self, used: list[int], device: torch.device
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The tokens (C,) to sum over in training: those used, and a sample of the others.

        And the logarithm (C,) of how many each stands for. None where all are summed.
        """
        count = self.blank - len(used)
        if not self.training or count <= SAMPLED:
            return None, None
        others = torch.ones(self.blank, dtype=torch.bool)
        others[used] = False
        sample = others.nonzero()[:, 0][torch.randperm(count)[:SAMPLED]]
        offset = torch.zeros(len(used) + SAMPLED)
        offset[len(used) :] = math.log(count / SAMPLED)
        chosen = torch.cat([torch.tensor(used, dtype=torch.long), sample])
        return chosen.to(device), offset.to(device)

    def _scaled(self, embeddings: Tensor) -> Tensor:
        """Embeddings whose products with the table are scores, in its precision."""
        return (embeddings.float() * self.scale).to(_table(self.llm).dtype)

    def _blank(self, embeddings: Tensor) -> Tensor:
        """Scores (...) of the blank."""
        wide = embeddings.float()
        return wide @ self.blank_direction * self.scale + self.blank_bias


class TokenLogProbs:
    """Columns of the log-probabilities (A, V + 1) of an utterance, computed when asked about.

    From its embeddings (A, E), on their device, to the CPU. All of them are 75 MB for 30 s of the
    usual vocabulary, and a search asks about few.
    """

    def __init__(self, ctc: TokenCTC, embeddings: Tensor, log_probs: Tensor):
        self.shape = log_probs.shape
        self._table = _table(ctc.llm)
        self._scaled, self._blank = ctc._scaled(embeddings), ctc._blank(embeddings)[:, None]
        best, unit = log_probs.max(dim=1, keepdim=True)
        self._best, self._largest = best, self._scores(unit[:, 0]).diagonal()[:, None]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: tuple[slice, Tensor]) -> Tensor:
        rows, units = places
        return (self._scores(units) - self._largest + self._best)[rows].cpu()

    def _scores(self, units: Tensor) -> Tensor:
        """Scores (A, C) of units (C,), rounded as those of all."""
        units, blank = units.to(self._scaled.device), len(self._table)
        tokens = units.clamp(max=blank - 1).repeat(-(-COLUMNS // max(1, len(units))))
        scores = (self._scaled @ self._table[tokens].T)[:, : len(units)].float()
        return torch.where(units == blank, self._blank, scores)


def needed_embeddings(tokens: Sequence[int]) -> int:
    """Audio embeddings that CTC needs for tokens: one each, and a blank between two equal ones."""
    return len(tokens) + sum(one == other for one, other in itertools.pairwise(tokens))


def _table(llm: LLM) -> Tensor:
    """The LLM's embeddings (V, E), as they are stored."""
    found = llm.network.get_input_embeddings()
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise IsthmusError(
            f"{type(llm.network).__name__} has no table of token embeddings to compare audio "
            "with. CTC in its tokens needs one: take another LLM, or set train.ctc_weight to 0."
        )
    return weight.detach()


def _restricted_ctc(log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]]) -> Tensor:
    """CTC loss () of targets, given log-probabilities (A, 1 + K) of them and the blank, at 0.

    torch's own loss has the gradient of probabilities that add up to 1, which those of some labels
    do not: it says how likely each label is in each place, and the chain rule does the rest.
    """
    free = [one.detach().requires_grad_() for one in log_probs]
    with torch.enable_grad():
        value = nn.functional.ctc_loss(
            nn.utils.rnn.pad_sequence(free),
            torch.tensor([label for own in targets for label in own], dtype=torch.long),
            torch.tensor([len(one) for one in free]),
            torch.tensor([len(own) for own in targets]),
            reduction="sum",
        )
        gradients = torch.autograd.grad(value, free)
    pairs = zip(log_probs, free, gradients, strict=True)
    said = [((one.exp() - slope) * (own - one)).sum() for own, one, slope in pairs]
    # what is subtracted is 0: it has the gradient alone
    return value.detach() - torch.stack(said).sum()


def _log_sum_exp(
    rows: Tensor, table: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithm (N,) of the sum over tokens of exp(rows @ table.T + offset), in float32.

    And the largest product with a token (N,), and whose it is (N,).
    """
    apply: Any = _LogSumExp.apply
    total, best, token = apply(rows, table, offset, max(1, CHUNK_BYTES // (4 * len(table))))
    return total, best, token


class _LogSumExp(torch.autograd.Function):
    """Its gradient, the mean of the embeddings by their probabilities, is had beside the sum."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, table: Tensor, offset: Tensor | None, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        totals, means, best = [], [], []
        for part in rows.split(chunk):
            scores = (part @ table.T).float()
            best.append(scores.max(dim=1))
            largest = best[-1].values
            scores -= largest[:, None]  # in place: these are passes over much
            if offset is not None:
                scores += offset
            total = scores.exp_().sum(dim=1)
            totals.append(largest + total.log())
            if ctx.needs_input_grad[0]:
                means.append((scores.to(table.dtype) @ table) / total[:, None])
        if means:
            ctx.save_for_backward(torch.cat(means))
        largest, tokens = (torch.cat(parts) for parts in zip(*best, strict=True))
        ctx.mark_non_differentiable(largest, tokens)
        return torch.cat(totals), largest, tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        (means,) = ctx.saved_tensors
        return gradient[:, None] * means, None, None, None
