"""Settings of projectors; the modules of `model` that have the projectors build them.

To add one: a settings class here with its name in ProjectorSettings at the end, and there the
projector with its builder.
"""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from isthmus.errors import IsthmusError
from isthmus.settings.base import PartSettings

CTCMode = Literal["average", "drop"]


class LinearProjectorSettings(PartSettings):
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

    def rate(self, frame_rate: float) -> int:
        """Frames of an embedding, of so many frames a second. Raises IsthmusError."""
        if self.downsample_rate is not None:
            return self.downsample_rate
        assert self.stride_ms is not None
        exact = self.stride_ms * frame_rate / 1000
        rate = max(1, round(exact))
        if not math.isclose(exact, rate, rel_tol=1e-6):
            frame = 1000 / frame_rate
            near = ", ".join(f"{n * frame:g}" for n in range(max(1, rate - 2), rate + 3))
            raise IsthmusError(
                f"projector.stride_ms is {self.stride_ms:g}, but a frame of this encoder is "
                f"{frame:g} ms, and a stride is a whole number of them: {near}, ..."
            )
        return rate


class ConvProjectorSettings(PartSettings):
    """Strided convolutions over time."""

    type: Literal["conv1d"] = "conv1d"
    downsample_rate: int = Field(5, ge=1)
    """Encoder frames to an audio embedding."""
    kernel_size: int = Field(5, ge=1)
    """Frames that a convolution sees."""
    hidden: int = Field(2048, ge=1)

    @model_validator(mode="after")
    def _sees_every_frame(self) -> "ConvProjectorSettings":
        if self.kernel_size < max(self.strides):
            raise ValueError(
                f"kernel_size {self.kernel_size} is less than the stride {max(self.strides)}: "
                "frames in between would not be seen"
            )
        return self

    @property
    def strides(self) -> list[int]:
        """The prime factors of the rate, in rising order."""
        factors, rest = [], self.downsample_rate
        while rest > 1:
            factors.append(next(n for n in range(2, rest + 1) if rest % n == 0))
            rest //= factors[-1]
        return factors or [1]


class QFormerSettings(PartSettings):
    """Learnt queries that attend to windows of frames."""

    type: Literal["qformer"] = "qformer"
    layers: int = Field(2, ge=1)
    heads: int = Field(12, ge=1)
    hidden: int = Field(768, ge=1)
    """Width of the queries; that of the feed-forward layers is four times as much."""
    queries: int = Field(1, ge=1)
    """Audio embeddings of a window."""
    window_seconds: float = Field(0.33, gt=0)
    """Length of a window, rounded to whole frames."""
    segment_positions: bool = False
    """A learnt embedding for each window's frames, for long windows."""

    @model_validator(mode="after")
    def _shared_out(self) -> "QFormerSettings":
        check_heads(self.hidden, self.heads)
        return self

    def window(self, frame_rate: float, limit: float | None) -> int:
        """Frames of a window, of so many frames a second, of at most `limit` seconds.

        Raises IsthmusError.
        """
        frame = 1 / frame_rate
        if self.window_seconds < frame:
            fault = f"shorter than a frame of this encoder ({frame:g} s)"
        elif limit is not None and self.window_seconds > limit:
            fault = f"longer than this encoder hears ({limit:g} s)"
        else:
            return int(self.window_seconds / frame + 0.5)
        raise IsthmusError(
            f"projector.window_seconds is {self.window_seconds:g}, {fault}. "
            f"Take one from {frame:g} to {limit or 30.0:g} s."
        )


class TransformerProjectorSettings(PartSettings):
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


class CTCProjectorSettings(PartSettings):
    """The CTC compressor; for an encoder with a CTC head."""

    type: Literal["ctc"] = "ctc"
    mode: CTCMode = "average"
    """Average the frames of one label, or drop those of the blank."""
    hidden: int = Field(2048, ge=1)


class UnitProjectorSettings(PartSettings):
    """Discrete units as new tokens; `isthmus units` makes their file."""

    type: Literal["units"] = "units"
    path: str
    """File of centroids."""
    deduplicate: bool = True
    """Neighbouring frames of one unit give one embedding."""

    @property
    def file(self) -> Path:
        """Raises IsthmusError if there is none."""
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise IsthmusError(
                f"projector.path: there is no file {file}. Make it with: "
                f"isthmus units RECIPE --output {file}"
            )
        return file


InnerProjectorSettings = (
    LinearProjectorSettings | ConvProjectorSettings | TransformerProjectorSettings
)


class PosteriorProjectorSettings(PartSettings):
    """Soft tokens: CTC over the LLM's own vocabulary, behind another projector."""

    type: Literal["ctc-posterior"] = "ctc-posterior"
    inner: InnerProjectorSettings = Field(LinearProjectorSettings(), discriminator="type")
    """The projector whose embeddings say tokens."""


ProjectorSettings = (
    LinearProjectorSettings
    | ConvProjectorSettings
    | QFormerSettings
    | TransformerProjectorSettings
    | CTCProjectorSettings
    | UnitProjectorSettings
    | PosteriorProjectorSettings
)


def check_heads(hidden: int, heads: int) -> None:
    """Raises ValueError for a width that cannot be shared out among the heads."""
    if hidden % heads:
        raise ValueError(f"hidden {hidden} is not a multiple of heads {heads}")
