"""Cross-entropy without the logits of a whole batch: a few rows at a time.

With a vocabulary of 150,000, the logits of 4,000 positions are 2.4 GB, and their gradient as much
again. Here both exist for a chunk only: its gradient to the hidden states is computed beside its
loss, and the backward pass merely scales it.

Shapes: N supervised positions, E width of the LLM, V tokens.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 32 * 2**20  # logits at a time, counted in float32


class Head(Protocol):
    """Hidden states (N, E) to logits (N, V); a module, or what holds one."""

    def __call__(self, hidden: Tensor) -> Tensor: ...
    def parameters(self) -> Iterable[nn.Parameter]: ...


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Head, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy () in nats of targets (N,), and how many () are the likeliest token.

    Rows whose target is -100 count for nothing. Gradients reach `hidden` (N, E) and the parameters
    of `head` that want them.
    """
    vocabulary = head(hidden[:0]).shape[-1]
    rows = max(1, chunk_bytes // (4 * vocabulary))
    trained = [value for value in head.parameters() if value.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        apply: Any = _Chunked.apply
        loss, correct = apply(hidden, targets, head, rows, *trained)
        return loss, correct
    loss, correct = hidden.new_zeros((), dtype=torch.float32), targets.new_zeros(())
    for chunk, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        part, hits = _chunk(chunk, wanted, head)
        loss, correct = loss + part, correct + hits
    return loss, correct


def _chunk(hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss, (logits.detach().argmax(dim=-1) == targets).sum()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, rows: int, *trained: nn.Parameter
    ) -> tuple[Tensor, Tensor]:
        loss, correct = hidden.new_zeros((), dtype=torch.float32), targets.new_zeros(())
        gradients = [torch.zeros_like(value) for value in (hidden, *trained)]
        for start in range(0, len(hidden), rows):
            chunk = hidden[start : start + rows].detach().requires_grad_()
            with torch.enable_grad():
                part, hits = _chunk(chunk, targets[start : start + rows], head)
                pieces = torch.autograd.grad(part, [chunk, *trained])
            loss, correct = loss + part.detach(), correct + hits
            gradients[0][start : start + rows] = pieces[0]
            for total, piece in zip(gradients[1:], pieces[1:], strict=True):
                total += piece
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss: Tensor, correct: Tensor) -> tuple[Tensor | None, ...]:
        # in float32: a loss scale can lie outside the range of half precision, a mean off its grid
        scaled = ((value.float() * loss).to(value.dtype) for value in ctx.saved_tensors)
        hidden, *trained = scaled
        return hidden, None, None, None, *trained
