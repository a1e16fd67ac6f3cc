"""Projectors: encoder frames to audio embeddings, the only part that is always trained.

Shapes: B batch, T encoder frames, A audio embeddings, D encoder width, E LLM width, H hidden width.

To add one: a class with the members of Projector, its settings class, and its name in
ProjectorSettings at the end of this file.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.model.compressor import CTCProjectorSettings
from isthmus.model.encoder import Encoder, EncoderSettings
from isthmus.model.llm import LLM
from isthmus.model.posterior import PosteriorProjector
from isthmus.model.projector_base import Projector, ProjectorBase, check_heads, stacked, within
from isthmus.model.qformer import QFormerSettings
from isthmus.model.token_ctc import TokenCTC
from isthmus.model.units import UnitProjectorSettings

__all__ = ["LinearProjector", "LinearProjectorSettings", "Projector", "ProjectorSettings"]


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


class LinearProjectorSettings(ProjectorBase):
    """The projector of SLAM-ASR, or of Fathullah et al."""

    type: Literal["linear"] = "linear"
    downsample_rate: int | None = Field(None, ge=1)
    """Encoder frames to an audio embedding (the paper's k); 5 unless stride_ms is given."""
    stride_ms: float | None = Field(None, gt=0)
    """Milliseconds of audio to an audio embedding, instead of downsample_rate."""
    hidden: int | None = Field(2048, ge=1)
    """Width in between; null is a single Linear."""

    @model_validator(mode="before")
    @classmethod
    def _one_stride(cls, values: Any) -> Any:
        if isinstance(values, dict):
            rate, stride = values.get("downsample_rate"), values.get("stride_ms")
            if rate is not None and stride is not None:
                raise ValueError(
                    "give one of downsample_rate, stride_ms, not both: set the other to null"
                )
            if rate is None and stride is None:
                return {**values, "downsample_rate": 5}
        return values

    def check(self, encoder: Encoder, settings: EncoderSettings) -> None:
        self._rate(encoder)

    def build(self, encoder: Encoder, llm: LLM) -> LinearProjector:
        return LinearProjector(encoder.dim, llm.dim, self._rate(encoder), self.hidden)

    def _rate(self, encoder: Encoder) -> int:
        if self.downsample_rate is not None:
            return self.downsample_rate
        assert self.stride_ms is not None
        exact = self.stride_ms * encoder.frame_rate / 1000
        rate = max(1, round(exact))
        if not math.isclose(exact, rate, rel_tol=1e-6):
            frame = 1000 / encoder.frame_rate
            near = ", ".join(f"{n * frame:g}" for n in range(max(1, rate - 2), rate + 3))
            raise IsthmusError(
                f"projector.stride_ms is {self.stride_ms:g}, but a frame of this encoder is "
                f"{frame:g} ms, and a stride is a whole number of them: {near}, ..."
            )
        return rate


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


class ConvProjectorSettings(ProjectorBase):
    """Strided convolutions over time."""

    type: Literal["conv1d"] = "conv1d"
    downsample_rate: int = Field(5, ge=1)
    """Encoder frames to an audio embedding."""
    kernel_size: int = Field(5, ge=1)
    """Frames that a convolution sees."""
    hidden: int = Field(2048, ge=1)

    @model_validator(mode="after")
    def _sees_every_frame(self) -> "ConvProjectorSettings":
        if self.kernel_size < max(self._strides()):
            raise ValueError(
                f"kernel_size {self.kernel_size} is less than the stride {max(self._strides())}: "
                "frames in between would not be seen"
            )
        return self

    def build(self, encoder: Encoder, llm: LLM) -> ConvProjector:
        return ConvProjector(encoder.dim, llm.dim, self._strides(), self.kernel_size, self.hidden)

    def _strides(self) -> list[int]:
        """The prime factors of the rate, in rising order."""
        factors, rest = [], self.downsample_rate
        while rest > 1:
            factors.append(next(n for n in range(2, rest + 1) if rest % n == 0))
            rest //= factors[-1]
        return factors or [1]


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


class TransformerProjectorSettings(ProjectorBase):
    """A small bidirectional Transformer over stacked frames."""

    type: Literal["transformer"] = "transformer"
    downsample_rate: int = Field(5, ge=1)
    """Encoder frames to an audio embedding."""
    layers: int = Field(2, ge=1)
    heads: int = Field(12, ge=1)
    hidden: int = Field(768, ge=2, multiple_of=2)
    """Width of the Transformer; that of its feed-forward layers is four times as much."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """In training."""

    @model_validator(mode="after")
    def _shared_out(self) -> "TransformerProjectorSettings":
        check_heads(self.hidden, self.heads)
        return self

    def build(self, encoder: Encoder, llm: LLM) -> TransformerProjector:
        return TransformerProjector(encoder.dim, llm.dim, self)


def sinusoids(length: int, width: int) -> Tensor:
    """Position embeddings (length, width) of Vaswani et al. (arXiv 1706.03762), section 3.5."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


InnerProjectorSettings = (
    LinearProjectorSettings | ConvProjectorSettings | TransformerProjectorSettings
)


class PosteriorProjectorSettings(ProjectorBase):
    """Soft tokens: CTC over the LLM's own vocabulary, behind another projector."""

    type: Literal["ctc-posterior"] = "ctc-posterior"
    inner: InnerProjectorSettings = Field(LinearProjectorSettings(), discriminator="type")
    """The projector whose embeddings say tokens."""

    def check(self, encoder: Encoder, settings: EncoderSettings) -> None:
        self.inner.check(encoder, settings)

    def build(self, encoder: Encoder, llm: LLM) -> PosteriorProjector:
        return PosteriorProjector(self.inner.build(encoder, llm), TokenCTC(llm))


ProjectorSettings = (
    LinearProjectorSettings
    | ConvProjectorSettings
    | QFormerSettings
    | TransformerProjectorSettings
    | CTCProjectorSettings
    | UnitProjectorSettings
    | PosteriorProjectorSettings
)
