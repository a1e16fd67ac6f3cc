"""Settings of speech encoders; `model.encoder` builds them.

To add one: a settings class here with its name in EncoderSettings, and there the encoder with its
builder.
"""

from typing import Literal

from pydantic import Field, model_validator

from isthmus.settings.base import PartSettings, PretrainedSettings

EncoderTune = Literal["frozen", "full"]


class WhisperSettings(PretrainedSettings):
    """Whisper's encoder, any size."""

    type: Literal["whisper"] = "whisper"
    tune: EncoderTune = "frozen"
    pad_to_30s: bool = True
    """False: utterances at their own length, which Whisper was not trained on."""
    keep_padding: bool = False
    """The frames of the padding too, as the authors of SLAM-ASR have it: 1500, however short."""

    @model_validator(mode="after")
    def _padding_to_keep(self) -> "WhisperSettings":
        if self.keep_padding and not self.pad_to_30s:
            raise ValueError(
                "keep_padding is true and pad_to_30s false, so there is no padding to keep: leave "
                "out one of them"
            )
        return self


class SelfSupervisedSettings(PretrainedSettings):
    """wav2vec 2.0, HuBERT or WavLM, any size; the CTC head of a fine-tuned one stays at hand."""

    type: Literal["wav2vec2", "hubert", "wavlm"]
    tune: EncoderTune = "frozen"


class ConformerSettings(PretrainedSettings):
    """A Conformer of `isthmus pretrain-ctc`, or a Parakeet CTC model of the hub."""

    type: Literal["conformer"] = "conformer"
    tune: EncoderTune = "frozen"


class FBankSettings(PartSettings):
    """Log-mel features without an encoder."""

    type: Literal["fbank"] = "fbank"
    tune: Literal["frozen"] = "frozen"
    num_mels: int = Field(80, ge=1)


SingleEncoderSettings = WhisperSettings | SelfSupervisedSettings | ConformerSettings | FBankSettings


class PairSettings(PartSettings):
    """Two encoders side by side."""

    type: Literal["pair"] = "pair"
    first: SingleEncoderSettings = Field(discriminator="type")
    """It gives the frame rate."""
    second: SingleEncoderSettings = Field(discriminator="type")

    @model_validator(mode="after")
    def _tuned_alike(self) -> "PairSettings":
        if self.first.tune != self.second.tune:
            raise ValueError(
                f"first.tune is {self.first.tune}, second.tune {self.second.tune}: tune both alike"
            )
        return self

    @property
    def tune(self) -> EncoderTune:
        return self.first.tune


EncoderSettings = SingleEncoderSettings | PairSettings
