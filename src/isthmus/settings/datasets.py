"""Settings of what is trained and validated on."""

from typing import Literal

from pydantic import Field

from isthmus.settings.base import PartSettings, Precision
from isthmus.speech.augment import Augmentation, SpecAugment


class Corpus(PartSettings):
    """One manifest or folder of speech."""

    path: str
    """Folder or manifest; `${ISTHMUS_SPEECH}` and other variables are expanded."""
    repeat: int = Field(1, ge=1)
    """How often its utterances come in an epoch."""


class JoinSettings(PartSettings):
    """Training utterances one behind the other, as one."""

    probability: float = Field(0.5, ge=0, le=1)
    """That an utterance is joined to the one before."""
    max_seconds: float = Field(8.0, gt=0)
    """Longest joined utterance."""


class DataSettings(PartSettings):
    """What is trained and validated on."""

    train: tuple[Corpus | str, ...] = ()
    dev: tuple[Corpus | str, ...] = ()
    max_seconds: float = Field(30.0, gt=0)
    """Longer utterances are bad items (encoders may set a lower limit)."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Bad items are counted and skipped up to this fraction; beyond it training stops."""
    augment: Augmentation | None = None
    """On waveforms, in training only."""
    join: JoinSettings | None = None
    """Random concatenation, in training only."""
    languages: tuple[str, ...] | None = Field(None, min_length=1)
    """Only utterances in these, as the corpora write them."""
    language_temperature: float | None = Field(None, ge=1, allow_inf_nan=False)
    """Above 1, training draws rare languages more often: by their share to the power of 1 / it."""


class SpeechDataSettings(DataSettings):
    """The same for a model with a frozen encoder, whose frames can be kept."""

    feature_cache: Precision | Literal["none"] = "none"
    """Keep the frozen encoder's frames on disk, in this precision, and never compute them twice."""
    spec_augment: SpecAugment | None = None
    """On log-mel features, in training only: for a Conformer that is trained too."""


class CTCDataSettings(DataSettings):
    """The same for CTC, which can also mask features."""

    spec_augment: SpecAugment | None = None
    """On log-mel features, in training only."""
