"""CTC over the language model's own tokens, read off audio embeddings.

An audio embedding says a token by its product with that token's embedding, or nothing at all: the
blank has a learned direction of its own. Nothing of the language model but its table of embeddings
is used, so a projector can be taught to say transcripts before the language model ever runs
(LegoSLM, arXiv 2505.11352, reads the posteriors of a CTC model with the LLM's vocabulary alike).

Shapes: B batch, T encoder frames, A audio embeddings, N of all utterances together, E LLM width,
V tokens, K labels of a batch.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from isthmus.errors import IsthmusError
from isthmus.model.llm import LLM

SHARPNESS = 4.0  # scores of embeddings that are as long as the tokens', in the root of their width
CHUNK_BYTES = 64 * 2**20  # scores at a time, counted in float32


class TokenCTC(nn.Module):
    """Log-probabilities of the LLM's V tokens, and of the blank behind them, from embeddings."""

    def __init__(self, llm: LLM):
        super().__init__()
        self._llm = (llm,)  # in a tuple: its table stays the LLM's and is no part of this
        size = _table(llm).float().square().mean().sqrt()
        self.scale = SHARPNESS / (float(size) * math.sqrt(llm.dim))
        self.blank_direction = nn.Parameter(torch.zeros(llm.dim))
        self.blank_bias = nn.Parameter(torch.zeros(()))

    @property
    def llm(self) -> LLM:
        return self._llm[0]

    @property
    def blank(self) -> int:
        """The label of no token, V."""
        return len(_table(self.llm))

    def log_probs(self, embeddings: Tensor) -> Tensor:
        """Audio embeddings (..., E) to log-probabilities (..., V + 1), in float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            table = _table(self.llm)
            tokens = (embeddings.to(table.dtype) @ table.T).float() * self.scale
            scores = torch.cat([tokens, self._blank(embeddings)[..., None]], dim=-1)
            return scores.log_softmax(dim=-1)

    def loss(self, audio: Sequence[Tensor], labels: Sequence[Sequence[int]]) -> Tensor:
        """Summed CTC loss () in nats of each utterance's tokens, given its embeddings (A, E).

        Every utterance must have a path (`needed_embeddings`). Only the scores of the batch's own
        labels are ever held whole; all others enter through their sum, a chunk at a time.
        """
        rows = torch.cat(list(audio))  # (N, E)
        with torch.autocast(rows.device.type, enabled=False):
            table = _table(self.llm)
            blank = self._blank(rows)
            normaliser = torch.logaddexp(
                _log_sum_exp(rows.to(table.dtype), table, self.scale), blank
            )
            used = sorted({token for own in labels for token in own})
            own = table[torch.tensor(used, device=rows.device, dtype=torch.long)]  # (K, E)
            scores = (rows.to(table.dtype) @ own.T).float() * self.scale
            log_probs = torch.cat([blank[:, None], scores], dim=1) - normaliser[:, None]
            places = {token: place for place, token in enumerate(used, start=1)}
            targets = [[places[token] for token in one] for one in labels]
            return _restricted_ctc(log_probs.split([len(one) for one in audio]), targets)

    def _blank(self, embeddings: Tensor) -> Tensor:
        """Scores (...) of the blank."""
        wide = embeddings.float()
        return wide @ self.blank_direction * self.scale + self.blank_bias


def needed_embeddings(tokens: Sequence[int]) -> int:
    """Audio embeddings that CTC needs for tokens: one each, and a blank between two equal ones."""
    return len(tokens) + sum(a == b for a, b in zip(tokens, tokens[1:], strict=False))


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


def _log_sum_exp(rows: Tensor, table: Tensor, scale: float) -> Tensor:
    """Logarithm (N,) of the sum over tokens of exp(scale * rows @ table.T), in float32."""
    chunk = max(1, CHUNK_BYTES // (4 * len(table)))
    if torch.is_grad_enabled() and rows.requires_grad:
        apply = cast(Any, _LogSumExp.apply)
        return cast(Tensor, apply(rows, table, scale, chunk))
    parts = [((part @ table.T).float() * scale).logsumexp(dim=1) for part in rows.split(chunk)]
    return torch.cat(parts)


class _LogSumExp(torch.autograd.Function):
    """Its gradient, the mean of the embeddings by their probabilities, is had beside the sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, scale: float, chunk: int) -> Tensor:
        sums, means = [], []
        for part in rows.split(chunk):
            scores = (part @ table.T).float() * scale
            total = scores.logsumexp(dim=1)
            sums.append(total)
            means.append((scores - total[:, None]).exp_().to(table.dtype) @ table)
        ctx.save_for_backward(torch.cat(means))
        ctx.scale = scale
        return torch.cat(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (means,) = ctx.saved_tensors
        return (gradient[:, None] * means.float() * ctx.scale).to(means.dtype), None, None, None
