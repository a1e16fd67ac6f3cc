"""The contract of projectors: what all of them promise, and how they are built from settings.

Shapes: B batch, T encoder frames, A audio embeddings, D encoder width, E LLM width.
"""

from abc import abstractmethod
from functools import singledispatch

import torch
from torch import Tensor, nn

from isthmus.model.encoder import Encoder
from isthmus.model.llm import LLM
from isthmus.model.token_ctc import TokenCTC
from isthmus.settings.base import PartSettings
from isthmus.settings.encoders import EncoderSettings


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


@singledispatch
def check_projector(settings: PartSettings, encoder: Encoder, heard: EncoderSettings) -> None:
    """Raise IsthmusError if it cannot be behind that encoder, whose settings are `heard`.

    Called before the LLM loads. Most projectors fit any encoder.
    """


@singledispatch
def build_projector(settings: PartSettings, encoder: Encoder, llm: LLM) -> Projector:
    """A projector with random weights between the two; neither becomes a part of it."""
    raise TypeError(f"{type(settings).__name__} has no builder here")


def within(lengths: Tensor, longest: int) -> Tensor:
    """Which places of rows are before their lengths (B,): bool (B, longest).

    The first place always counts as one: attention to nothing at all would be no number.
    """
    return torch.arange(longest, device=lengths.device) < lengths.clamp(min=1)[:, None]


def stacked(frames: Tensor, count: int) -> Tensor:
    """`count` neighbouring frames (B, T, D) side by side: (B, T // count, count D)."""
    batch, length, dim = frames.shape
    return frames[:, : length // count * count].reshape(batch, length // count, count * dim)
