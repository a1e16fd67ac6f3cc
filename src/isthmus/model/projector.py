"""Projectors: encoder frames to audio embeddings, the only part that is always trained.

Shapes: B batch, T encoder frames, A audio embeddings, D encoder width, E LLM width.

To add one: a class here with the same three members, its settings class, and its name in
ProjectorSettings below.
"""

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus.model.parts import PartSettings


class Projector(nn.Module):
    """Frames (B, T, D) with their lengths to embeddings (B, A, E) with theirs."""

    @abstractmethod
    def output_length(self, num_frames: int) -> int:
        """Embeddings of an utterance of `num_frames`."""

    @abstractmethod
    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]: ...


class LinearProjector(Projector):
    """k neighbouring frames side by side, then Linear, ReLU, Linear.

    SLAM-ASR (arXiv 2402.08846), equations 2 to 4. The last T mod k frames are dropped.
    """

    def __init__(self, encoder_dim: int, llm_dim: int, downsample_rate: int, hidden: int):
        super().__init__()
        self.downsample_rate = downsample_rate
        self.linear1 = nn.Linear(downsample_rate * encoder_dim, hidden)
        self.linear2 = nn.Linear(hidden, llm_dim)

    def output_length(self, num_frames: int) -> int:
        return num_frames // self.downsample_rate

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, dim = frames.shape
        k = self.downsample_rate
        stacked = frames[:, : length // k * k].reshape(batch, length // k, k * dim)  # (B, A, k D)
        return self.linear2(torch.relu(self.linear1(stacked))), num_frames // k


class LinearProjectorSettings(PartSettings):
    """The projector of SLAM-ASR."""

    type: Literal["linear"] = "linear"
    downsample_rate: int = Field(5, ge=1)
    """Encoder frames to an audio embedding (the paper's k)."""
    hidden: int = Field(2048, ge=1)

    def build(self, encoder_dim: int, llm_dim: int) -> LinearProjector:
        return LinearProjector(encoder_dim, llm_dim, self.downsample_rate, self.hidden)


ProjectorSettings = LinearProjectorSettings  # a union tagged by `type`, once there are more
