"""Settings of the search for a text."""

from typing import Literal

from pydantic import Field, model_validator

from isthmus.settings.base import PartSettings


class RecogniserSettings(PartSettings):
    """How audio comes to what recognises it."""

    batch_size: int = Field(8, ge=1)
    """Utterances decoded together; has no influence on the text."""
    gate: Literal["auto", "silero", "energy", "none"] = "auto"
    """What finds the speech: audio without any gives empty text. auto: silero if installed."""
    chunk_seconds: float = Field(30.0, ge=2)
    """Longer recordings are decoded in chunks of at most this (models may set a lower limit)."""


class DecodeSettings(RecogniserSettings):
    """How transcripts are searched for."""

    beam_size: int = Field(4, ge=1)
    """Hypotheses kept; 1 is greedy."""
    length_penalty: float = 1.0
    """Exponent on the length that a hypothesis' score is divided by."""
    tokens_per_second: float = Field(30.0, gt=0)
    """A transcript has at most this many tokens a second of audio, and ..."""
    extra_tokens: int = Field(20, ge=1)
    """... this many more."""
    early_stopping: bool = False
    """Stop as soon as there are `beam_size` finished hypotheses."""
    drafts: bool = True
    """With beam_size 1: a CTC head, if there is one, writes what the LLM then checks."""
    strict: bool = False
    """Each utterance at shapes of its own: slower, the same to the last bit in any company."""
    deadline: float | None = Field(None, gt=0)
    """Seconds after which the search of a batch is broken off."""
    hotwords: tuple[str, ...] = ()
    """Phrases to be expected: names, terms."""
    hotword_bonus: float = Field(1.0, ge=0)
    """Added to a hypothesis for each of their tokens; given back where a phrase breaks off."""
    ngram: str | None = None
    """An n-gram language model, a file in ARPA format (.gz too), that has a say in the search."""
    ngram_weight: float = Field(0.3, ge=0)
    ctc_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """How much of a say a CTC head (the encoder's, or the projector's) has; 0 is none."""
    ctc_delay: float | None = Field(None, allow_inf_nan=False)
    """Seconds that the labels of that head come late, for word times; its type's own unless set."""
    posterior_temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Of the soft tokens of ctc-posterior; above 1 more of the choice is left to the LLM."""
    nbest: int = Field(1, ge=1)
    """Hypotheses to write, the best among them; at most beam_size."""
    instruction: str | None = None
    """Another instruction than the run was trained with."""
    min_confidence: float = Field(0.0, ge=0, le=1)
    """A text with less than this is marked as doubtful, and ..."""
    max_ctc_distance: float = Field(1.0, ge=0, le=1)
    """... one of which the CTC head heard a greater share of letters otherwise."""

    @model_validator(mode="after")
    def _enough_beams(self) -> "DecodeSettings":
        if self.nbest > self.beam_size:
            raise ValueError(f"nbest {self.nbest} is more than beam_size {self.beam_size}")
        return self
