"""Settings of the training loop."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from isthmus.errors import IsthmusError
from isthmus.settings.base import DEFAULT_LANGUAGE, PartSettings, Precision

Fraction = Annotated[float, Field(ge=0, lt=1)]


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
