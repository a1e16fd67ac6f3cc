"""A Conformer with CTC: its sizes, its front end and its spelling units."""

from typing import Literal

from pydantic import Field

from isthmus.settings.base import PartSettings

LETTERS = "abcdefghijklmnopqrstuvwxyz' "


class ConformerArchitecture(PartSettings):
    """Sizes of a Conformer (transformers' ParakeetEncoderConfig)."""

    hidden_size: int = 512
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    conv_kernel_size: int = 11
    subsampling_factor: int = 8
    """Feature frames of 10 ms to an encoder frame; a power of two."""
    subsampling_conv_channels: int = 256
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    layerdrop: float = 0.0


class LogMelSettings(PartSettings):
    """Front end of the FBank and Conformer encoders; stored beside the weights."""

    num_mels: int = Field(80, gt=0)
    normalise: Literal["none", "peak"] = "none"
    """`peak`: relative to the loudest frame, so that the recording level does not matter."""
    range_db: float = Field(70.0, gt=0)
    """With `peak`: what lies this far below the loudest frame is silence."""
    margin_seconds: float = Field(0.0, ge=0)
    """Silence put before and after each utterance: room for CTC to spell very short words."""


class LetterUnits(PartSettings):
    """Single letters."""

    type: Literal["letters"] = "letters"
    letters: str = Field(LETTERS, min_length=1)


class SentencePieceUnits(PartSettings):
    """Pieces of words by a unigram model (Kudo 2018, arXiv 1804.10959) of the training texts."""

    type: Literal["sentencepiece"]
    size: int = Field(500, ge=3)
    """Units at most, blank and unknown among them; few texts give fewer."""


UnitSettings = LetterUnits | SentencePieceUnits
