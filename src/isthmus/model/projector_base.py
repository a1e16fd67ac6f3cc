"""The contract of projectors: what all of them promise, and what their settings do.

Shapes: B batch, T encoder frames, A audio embeddings, D encoder width, E LLM width.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from isthmus.model.encoder import Encoder, EncoderSettings
from isthmus.model.llm import LLM
from isthmus.model.parts import PartSettings
from isthmus.model.token_ctc import TokenCTC


class Projector(nn.Module):
    """Frames (B, T, D) with their lengths to embeddings (B, A, E) with theirs.

    What lies behind an utterance's length has no influence, nor has its company.
    """

    exact: bool = True  # False: the length depends on what is heard

    def __init__(self) -> None:
        super().__init__()
        self.ctc: TokenCTC | None = None
        """What reads the LLM's tokens off the embeddings of `spoken`, where it is taught to."""

    @abstractmethod
    def output_length(self, num_frames: int) -> int:
        """Embeddings of an utterance of `num_frames`; the most there can be, if not `exact`."""

    @abstractmethod
    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]: ...

    def spoken(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings (B, A, E), with their lengths, that `ctc` reads: forward's first half.

        All of it, unless the LLM is given something else than what is read.
        """
        found: tuple[Tensor, Tensor] = self(frames, num_frames)
        return found

    def spoken_length(self, num_frames: int) -> int | None:
        """Embeddings that `spoken` makes of frames; None if that depends on what is heard."""
        return self.output_length(num_frames) if self.exact else None

    def audio(
        self, spoken: Tensor, lengths: Tensor, log_probs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The audio embeddings that come of `spoken`, with their lengths: the second half.

        `log_probs` (B, A, V + 1) are what `ctc` reads, where that is known already.
        """
        return spoken, lengths


class ProjectorBase(PartSettings):
    """Settings of a projector, which asks the encoder and the LLM for all that they know."""

    def check(self, encoder: Encoder, settings: EncoderSettings) -> None:
        """Raises IsthmusError if it cannot be behind that encoder; called before the LLM loads."""

    @abstractmethod
    def build(self, encoder: Encoder, llm: LLM) -> Projector:
        """A projector with random weights between the two; neither becomes a part of it."""


def within(lengths: Tensor, longest: int) -> Tensor:
    """Which places of rows are before their lengths (B,): bool (B, longest).

    The first place always counts as one: attention to nothing at all would be no number.
    """
    return torch.arange(longest, device=lengths.device) < lengths.clamp(min=1)[:, None]


def stacked(frames: Tensor, count: int) -> Tensor:
    """`count` neighbouring frames (B, T, D) side by side: (B, T // count, count D)."""
    batch, length, dim = frames.shape
    return frames[:, : length // count * count].reshape(batch, length // count, count * dim)


def check_heads(hidden: int, heads: int) -> None:
    """Raises ValueError for a width that cannot be shared out among the heads."""
    if hidden % heads:
        raise ValueError(f"hidden {hidden} is not a multiple of heads {heads}")
