"""Plain settings of recipes: what is trained on, how it is optimised, how texts are searched for.

Those of a part of the model stand beside the part.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from isthmus.errors import IsthmusError
from isthmus.model.parts import PartSettings
from isthmus.speech.augment import Augmentation, SpecAugment

Precision = Literal["float32", "bfloat16"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
DEFAULT_LANGUAGE = "default"  # stands for those that a mapping by language does not name


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


class LoopSettings(PartSettings):
    """Optimisation; the defaults are those of SLAM-ASR (section 3.3)."""

    steps: int = Field(100_000, ge=1)
    """Optimiser steps at most."""
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(1000, ge=0)
    """Steps in which the rate rises linearly."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient."""
    precision: Precision = "float32"
    """Of products and frozen weights, whatever the files have; trained weights are in float32."""
    accumulate: int = Field(1, ge=1)
    """Batches of an optimiser step (of each process, where there are several)."""
    workers: int | None = Field(None, ge=0)
    """Processes that load audio ahead; unless given 4 on a GPU, none on a CPU."""
    eval_every: int = Field(1000, ge=1)
    """Steps between validations."""
    patience: int = Field(3, ge=1)
    """Validations without a lower loss before training stops early."""
    save_every: int = Field(1000, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1)
    """Checkpoints that are kept."""

    def batches(self, processes: int) -> int:
        """Batches of an optimiser step, of all processes together."""
        return self.accumulate * processes

    def warmup_fault(self) -> str | None:
        """A line where training ends before the rate has risen to the one that is asked for."""
        if self.warmup_steps < self.steps or self.warmup_steps <= 1:
            return None
        return (
            f"train.warmup_steps {self.warmup_steps:,} is not less than train.steps "
            f"{self.steps:,}: the last step has the highest rate, "
            f"{self.steps / self.warmup_steps:.1%} of train.learning_rate. Lower warmup_steps."
        )


class TrainSettings(LoopSettings):
    """Optimisation on speech."""

    batch_size: int | None = Field(None, ge=1)
    """Utterances of a batch; 6 unless max_duration is given."""
    max_duration: float | None = Field(None, gt=0)
    """Padded seconds of a batch at most, instead of batch_size."""

    global_batch_size: int | None = Field(None, ge=1)
    """Utterances of an optimiser step, of all processes together; instead of accumulate."""

    MEASURES: ClassVar[tuple[str, ...]] = ("batch_size", "max_duration")

    @model_validator(mode="before")
    @classmethod
    def _one_batch_measure(cls, values: Any) -> Any:
        if isinstance(values, dict):
            given = [name for name in cls.MEASURES if values.get(name) is not None]
            if len(given) > 1:
                raise ValueError(
                    f"give one of {', '.join(cls.MEASURES)}, not {len(given)}: set the other to "
                    "null"
                )
            if not given:
                return {**values, "batch_size": 6}
        return values

    @model_validator(mode="after")
    def _global_batch_is_whole(self) -> Self:
        if self.global_batch_size is None:
            return self
        if self.batch_size is None or self.global_batch_size % self.batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of batch_size "
                f"{self.batch_size}: change one, or set global_batch_size to null"
            )
        if self.accumulate != 1:
            raise ValueError(
                f"give one of accumulate ({self.accumulate}) and global_batch_size "
                f"({self.global_batch_size}), which says how many batches are accumulated"
            )
        return self

    def batches(self, processes: int) -> int:
        """Raises IsthmusError where they cannot share the global batch evenly."""
        if self.global_batch_size is None:
            return super().batches(processes)
        assert self.batch_size is not None
        own, rest = divmod(self.global_batch_size, processes)
        if rest or own % self.batch_size:
            sizes = [size for size in range(1, own + 1) if own % size == 0]
            remedy = f"train.batch_size to one of {', '.join(map(str, sizes))}"
            if rest:
                remedy = f"it to a multiple of {processes}, or start another number of processes"
            raise IsthmusError(
                f"train.global_batch_size {self.global_batch_size} in batches of "
                f"{self.batch_size} cannot be shared by {processes} processes: set {remedy}."
            )
        return self.global_batch_size // self.batch_size


class SpeechTrainSettings(TrainSettings):
    """Optimisation of a projector between two large models."""

    MEASURES = ("batch_size", "max_duration", "max_tokens")
    max_tokens: int | None = Field(None, ge=1)
    """LLM positions of a batch at most (prompt, audio and transcript), instead of batch_size."""
    packing: bool = True
    """Utterances in one row without padding, where the LLM is found able; the numbers are equal."""
    checkpointing: bool = False
    """Keep the LLM's activations of block borders only: less memory, about 1.35 times the time."""
    compile: bool = False
    """torch.compile of the blocks of encoder and LLM."""
    shard: bool = False
    """Spread the frozen LLM over the processes (FSDP2)."""
    text_masking: Fraction | dict[str, Fraction] = 0.0
    """Share of the transcript's tokens that the LLM is not shown; or one for each language."""
    llm_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Of the LLM's loss; 0 trains by CTC alone, and the LLM never runs."""
    ctc_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of CTC over the LLM's tokens, by which audio embeddings come to say the transcript."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> "SpeechTrainSettings":
        if self.llm_weight == 0 and self.ctc_weight == 0:
            raise ValueError("llm_weight and ctc_weight are both 0: set one, or there is no loss")
        return self

    def masking(self, language: str) -> float:
        """The share of a transcript in that language which is masked."""
        if not isinstance(self.text_masking, dict):
            return self.text_masking
        return self.text_masking.get(language, self.text_masking.get(DEFAULT_LANGUAGE, 0.0))


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
