"""Projectors: encoder frames to audio embeddings, the only part that is always trained.

Shapes: B batch, T encoder frames, A audio embeddings, D encoder width, E LLM width, H hidden width.

To add one: a class with the members of Projector and its builder, and its settings class in
isthmus.settings.projectors.
"""

import math

import torch
from torch import Tensor, nn

from isthmus.model import compressor, qformer, units
from isthmus.model.encoder import Encoder
from isthmus.model.llm import LLM
from isthmus.model.posterior import PosteriorProjector
from isthmus.model.projector_base import (
    Projector,
    build_projector,
    check_projector,
    stacked,
    within,
)
from isthmus.model.token_ctc import TokenCTC
from isthmus.settings.encoders import EncoderSettings
from isthmus.settings.projectors import (
    ConvProjectorSettings,
    LinearProjectorSettings,
    PosteriorProjectorSettings,
    TransformerProjectorSettings,
)

# imported for their builders
__all__ = ["Projector", "build_projector", "check_projector", "compressor", "qformer", "units"]


class LinearProjector(Projector):
    """k neighbouring frames side by side, then Linear, ReLU, Linear; the last T mod k are dropped.

    SLAM-ASR (arXiv 2402.08846), equations 2 to 4. Without a hidden width it is one Linear, as in
    Fathullah et al. (arXiv 2307.11795).
    """

    def __init__(self, encoder_dim: int, llm_dim: int, downsample_rate: int, hidden: int | None):
        super().__init__()
        self.downsample_rate = downsample_rate
        self.linear1 = nn.Linear(downsample_rate * encoder_dim, hidden or llm_dim)
        self.linear2 = nn.Linear(hidden, llm_dim) if hidden else None

    def output_length(self, num_frames: int) -> int:
        return num_frames // self.downsample_rate

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.linear1(stacked(frames, self.downsample_rate))
        if self.linear2 is not None:
            embeddings = self.linear2(torch.relu(embeddings))
        return embeddings, num_frames // self.downsample_rate


@check_projector.register
def _(settings: LinearProjectorSettings, encoder: Encoder, heard: EncoderSettings) -> None:
    settings.rate(encoder.frame_rate)


@build_projector.register
def _(settings: LinearProjectorSettings, encoder: Encoder, llm: LLM) -> LinearProjector:
    rate = settings.rate(encoder.frame_rate)
    return LinearProjector(encoder.dim, llm.dim, rate, settings.hidden)


class ConvProjector(Projector):
    """Strided convolutions over time, a ReLU behind each, then Linear; T mod k frames are lost.

    One convolution for each prime factor of the downsampling rate k. Each sees zeros before the
    first frame and behind the last.
    """

    def __init__(self, encoder_dim: int, llm_dim: int, strides: list[int], kernel: int, width: int):
        super().__init__()
        self.downsample_rate = math.prod(strides)
        dims = [encoder_dim] + [width] * len(strides)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(dims[i], width, kernel, stride) for i, stride in enumerate(strides)
        )
        self.linear = nn.Linear(width, llm_dim)

    def output_length(self, num_frames: int) -> int:
        return num_frames // self.downsample_rate

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        lengths = num_frames
        longest = frames.shape[1] // self.downsample_rate
        if longest == 0:
            return frames.new_zeros(len(frames), 0, self.linear.out_features), lengths * 0
        hidden = frames.transpose(1, 2)  # (B, D, T)
        for convolution in self.convolutions:
            assert isinstance(convolution, nn.Conv1d)
            (kernel,), (stride,) = convolution.kernel_size, convolution.stride
            valid = within(lengths, hidden.shape[2])[:, None]
            left = (kernel - stride) // 2
            margins = (left, kernel - stride - left)  # so that T becomes T // stride
            hidden = nn.functional.pad(hidden.masked_fill(~valid, 0.0), margins)
            hidden, lengths = torch.relu(convolution(hidden)), lengths // stride
        return self.linear(hidden.transpose(1, 2)), lengths


@build_projector.register
def _(settings: ConvProjectorSettings, encoder: Encoder, llm: LLM) -> ConvProjector:
    dims = encoder.dim, llm.dim
    return ConvProjector(*dims, settings.strides, settings.kernel_size, settings.hidden)


class TransformerProjector(Projector):
    """k neighbouring frames side by side, through a bidirectional Transformer, then Linear."""

    def __init__(self, encoder_dim: int, llm_dim: int, settings: "TransformerProjectorSettings"):
        super().__init__()
        self.downsample_rate = settings.downsample_rate
        hidden = settings.hidden
        self.linear1 = nn.Linear(self.downsample_rate * encoder_dim, hidden)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden,
                settings.heads,
                4 * hidden,
                settings.dropout,
                "gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.linear2 = nn.Linear(hidden, llm_dim)

    def output_length(self, num_frames: int) -> int:
        return num_frames // self.downsample_rate

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        lengths = num_frames // self.downsample_rate
        hidden = self.linear1(stacked(frames, self.downsample_rate))  # (B, A, H)
        longest = hidden.shape[1]
        hidden = hidden + sinusoids(longest, hidden.shape[2]).to(hidden)
        padding = ~within(lengths, longest)
        for layer in self.layers if longest else ():
            hidden = layer(hidden, src_key_padding_mask=padding)
        return self.linear2(self.norm(hidden)), lengths


@build_projector.register
def _(settings: TransformerProjectorSettings, encoder: Encoder, llm: LLM) -> TransformerProjector:
    return TransformerProjector(encoder.dim, llm.dim, settings)


def sinusoids(length: int, width: int) -> Tensor:
    """Position embeddings (length, width) of Vaswani et al. (arXiv 1706.03762), section 3.5."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


@check_projector.register
def _(settings: PosteriorProjectorSettings, encoder: Encoder, heard: EncoderSettings) -> None:
    check_projector(settings.inner, encoder, heard)


@build_projector.register
def _(settings: PosteriorProjectorSettings, encoder: Encoder, llm: LLM) -> PosteriorProjector:
    return PosteriorProjector(build_projector(settings.inner, encoder, llm), TokenCTC(llm))
