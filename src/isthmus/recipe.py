"""The experiment as one typed, frozen object: YAML in, resolved YAML out.

Each part's settings stand beside the part and build it; plain settings (data, training, decoding)
stand here.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, overload

import torch
import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from transformers import PreTrainedTokenizerFast

from isthmus.errors import IsthmusError
from isthmus.model.conformer import ConformerArchitecture, ConformerCTC
from isthmus.model.encoder import ConformerSettings, EncoderSettings
from isthmus.model.features import LogMelSettings
from isthmus.model.llm import (
    CHAT_TEMPLATE,
    LLM,
    LLMArchitecture,
    LLMSettings,
    character_tokenizer,
)
from isthmus.model.parts import SHIPPED, PartSettings, Source, freeze, resolve, source
from isthmus.model.projector import LinearProjectorSettings, ProjectorSettings
from isthmus.model.prompt import PaperPrompt, PromptSettings
from isthmus.model.qformer import QFormerSettings
from isthmus.model.quantise import quantise
from isthmus.model.speech_llm import SpeechLLM
from isthmus.model.spelling import LETTERS, LetterUnits, UnitSettings
from isthmus.recipe_files import read_recipe
from isthmus.speech.augment import Augmentation, SpecAugment

Fraction = Annotated[float, Field(ge=0, lt=1)]
TAGS = ("type", "template")  # settings that say which of several parts it is
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

    feature_cache: Literal["none", "bfloat16", "float32"] = "none"
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
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrix products in it; frozen weights are held in it, trained ones in float32."""
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
    alignment_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of a second loss, by which audio embeddings come to be like the transcript's tokens'."""

    def masking(self, language: str) -> float:
        """The share of a transcript in that language which is masked."""
        if not isinstance(self.text_masking, dict):
            return self.text_masking
        return self.text_masking.get(language, self.text_masking.get(DEFAULT_LANGUAGE, 0.0))


class DecodeSettings(PartSettings):
    """How transcripts are searched for."""

    beam_size: int = Field(4, ge=1)
    """Hypotheses kept; 1 is greedy."""
    length_penalty: float = 1.0
    """Exponent on the length that a hypothesis' score is divided by."""
    tokens_per_second: float = Field(30.0, gt=0)
    """A transcript has at most this many tokens a second of audio, and ..."""
    extra_tokens: int = Field(20, ge=1)
    """... this many more."""
    batch_size: int = Field(8, ge=1)
    """Utterances decoded together; has no influence on the text."""
    early_stopping: bool = False
    """Stop as soon as there are `beam_size` finished hypotheses."""
    drafts: bool = True
    """With beam_size 1: the encoder's CTC head, if it has one, writes what the LLM then checks."""
    strict: bool = False
    """Each utterance at shapes of its own: slower, the same to the last bit in any company."""
    gate: Literal["auto", "silero", "energy", "none"] = "auto"
    """What finds the speech: audio without any gives empty text. auto: silero if installed."""
    chunk_seconds: float = Field(30.0, ge=2)
    """Longer recordings are decoded in chunks of at most this (models may set a lower limit)."""
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
    """How much of a say the encoder's CTC head has in the search; 0 is none."""
    nbest: int = Field(1, ge=1)
    """Hypotheses to write, the best among them; at most beam_size."""
    instruction: str | None = None
    """Another instruction than the run was trained with."""

    @model_validator(mode="after")
    def _enough_beams(self) -> "DecodeSettings":
        if self.nbest > self.beam_size:
            raise ValueError(f"nbest {self.nbest} is more than beam_size {self.beam_size}")
        return self


class Experiment(PartSettings):
    """What all recipes have."""

    name: str = Field(pattern=r"^[\w.+-]+$")
    """The run folder's name unless another is given."""
    seed: int = Field(0, ge=0)
    train: LoopSettings = LoopSettings()


class Recipe(Experiment):
    """A speech encoder and a language model, joined by a trained projector."""

    encoder: EncoderSettings = Field(discriminator="type")
    projector: ProjectorSettings = Field(default=LinearProjectorSettings(), discriminator="type")
    llm: LLMSettings
    data: SpeechDataSettings = SpeechDataSettings()
    train: SpeechTrainSettings = SpeechTrainSettings()
    prompt: PromptSettings = Field(default=PaperPrompt(), discriminator="template")
    decode: DecodeSettings = DecodeSettings()

    @model_validator(mode="after")
    def _features_to_mask(self) -> "Recipe":
        encoder = self.encoder
        trained = isinstance(encoder, ConformerSettings) and encoder.tune == "full"
        if self.data.spec_augment is not None and not trained:
            raise ValueError(
                "data.spec_augment masks the features of a Conformer that is trained, and this is "
                f"encoder.type {encoder.type} with encoder.tune {encoder.tune}: leave it out, or "
                "set them to conformer and full"
            )
        return self

    @model_validator(mode="after")
    def _windows_are_filled(self) -> "Recipe":
        projector, longest = self.projector, self.data.max_seconds
        if isinstance(projector, QFormerSettings) and projector.window_seconds > longest:
            raise ValueError(
                f"projector.window_seconds {projector.window_seconds:g} is longer than any "
                f"utterance, which data.max_seconds {longest:g} limits: lower the one or raise the "
                "other"
            )
        return self

    def build(self) -> SpeechLLM:
        """The model: pretrained parts loaded, the projector random (torch's generator)."""
        encoder = self.encoder.build()
        self.projector.check(encoder, self.encoder)
        llm = self.build_llm()
        if self.train.precision == "bfloat16" and self.encoder.tune == "frozen":
            encoder.store(torch.bfloat16)
        model = SpeechLLM(
            encoder,
            self.projector.build(encoder, llm),
            llm,
            self.prompt,
            {"encoder": self.encoder.tune, "llm": self.llm.tune},
        )
        encoder.spec_augment = self.data.spec_augment
        return model

    def build_llm(self) -> LLM:
        """The language model alone, its weights as training holds them."""
        llm = self.llm.build()
        if self.llm.tune == "frozen":
            freeze(llm)
        narrow = self.train.precision == "bfloat16" and self.llm.dtype == "auto"
        if narrow and self.llm.tune != "full":
            llm.store(torch.bfloat16)
        if self.llm.quantise != "none":
            quantise(llm.network, self.llm.quantise)
        return llm

    @field_validator("projector", mode="before")
    @classmethod
    def _linear_by_default(cls, values: Any) -> Any:
        return {"type": "linear", **values} if isinstance(values, dict) else values


class Pretraining(Experiment):
    """A model with random weights, or one to go on from."""

    OF_NEW_MODELS: ClassVar[dict[str, Any]]
    """Settings that a model to go on from brings along, with their defaults."""
    INSTEAD: ClassVar[Mapping[str, str]] = {}
    """Which of them have no default where another one is given."""
    start_from: str | None = None
    """A model to go on from, instead of random weights."""

    @model_validator(mode="before")
    @classmethod
    def _new_or_continued(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = [name for name in cls.OF_NEW_MODELS if values.get(name) is not None]
        if values.get("start_from") is None:
            other = {name for name, instead in cls.INSTEAD.items() if instead in given}
            new = cls.OF_NEW_MODELS.items()
            return values | {n: v for n, v in new if n not in given and n not in other}
        if given:
            raise ValueError(f"start_from brings its own {', '.join(given)}: leave out one or both")
        return values

    def sources(self) -> dict[str, Source]:
        return {"start_from": source(self.start_from)} if self.start_from else {}


class CTCRecipe(Pretraining):
    """Pretraining of a Conformer encoder with CTC."""

    OF_NEW_MODELS = {  # noqa: RUF012
        "architecture": ConformerArchitecture(),
        "front_end": LogMelSettings(),
        "letters": LETTERS,
        "units": None,
    }
    INSTEAD = {"letters": "units"}  # noqa: RUF012
    architecture: ConformerArchitecture | None = None
    front_end: LogMelSettings | None = None
    letters: str | None = Field(None, min_length=1)
    """The spelling units, where they are letters; the same as units of type letters."""
    units: UnitSettings | None = Field(None, discriminator="type")
    """Other spelling units."""
    data: CTCDataSettings = CTCDataSettings()
    train: TrainSettings = TrainSettings()

    @model_validator(mode="after")
    def _one_spelling(self) -> "CTCRecipe":
        if self.letters is not None and self.units is not None:
            raise ValueError("letters and units are two ways to say the same: give one of them")
        return self

    def build(self, units: PreTrainedTokenizerFast | None = None) -> ConformerCTC:
        """The model of `start_from`, or one with random weights (torch's generator).

        `units`: those learnt for `self.units`.
        """
        if self.start_from:
            return ConformerCTC.load(resolve(self.start_from)).float()
        assert self.architecture is not None
        assert self.front_end is not None
        if units is None:
            units = (self.units or LetterUnits(letters=self.letters or LETTERS)).tokenizer([])
        return ConformerCTC.initial(self.architecture, units, self.front_end)


class LanguageRecipe(Pretraining):
    """Training of a small language model on text made on the spot."""

    OF_NEW_MODELS = {"architecture": LLMArchitecture()}  # noqa: RUF012
    architecture: LLMArchitecture | None = None
    domains: dict[str, float] | None = None
    """Weights of the kinds of text (isthmus.speech.sentences)."""
    sentences: int = Field(5000, ge=1)
    """Examples of an epoch; each epoch has new ones."""
    tokens_per_batch: int = Field(4000, ge=1)
    chat: bool = False
    """Also teach it to follow instructions to repeat what is said."""
    raw_share: float = Field(0.1, ge=0, le=1)
    """Chat: share of examples that are raw text."""
    noise: float = Field(0.2, ge=0, le=1)
    """Chat: greatest share of letters that are misheard in an utterance to be repeated."""
    embedding_noise: float = Field(0.0, ge=0)
    """NEFTune's alpha."""

    def build(self) -> LLM:
        """The model of `start_from`, or one with random weights (torch's generator)."""
        if self.start_from is None:
            assert self.architecture is not None
            return self.architecture.build(character_tokenizer(self.chat))
        llm = LLMSettings(path=self.start_from, dtype="float32").build()
        if self.chat:
            llm.tokenizer.chat_template = CHAT_TEMPLATE
        return llm


AnyRecipe = TypeVar("AnyRecipe", bound=Experiment)


@overload
def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe: ...


@overload
def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, kind: type[AnyRecipe]
) -> AnyRecipe: ...


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, kind: type[Experiment] = Recipe
) -> Experiment:
    """Read a recipe file, or a shipped recipe by name, and apply `a.b=c` overrides.

    Raises IsthmusError naming the file, the key, the value, and what would be right.
    """
    file, values = read_recipe(path, overrides)
    changed = f" with {' '.join(overrides)}" if overrides else ""
    try:
        return checked_settings(kind, values, f"{file}{changed} is not a valid recipe")
    except IsthmusError as error:
        hints = _retyped(overrides, str(error))
        raise IsthmusError("\n  ".join([str(error), *hints])) from error


def _retyped(overrides: Sequence[str], fault: str) -> Iterator[str]:
    """How to be rid of what a part still says of its old type, where the type alone was changed."""
    for override in overrides:
        key, _, value = override.partition("=")
        part, _, tag = key.rpartition(".")
        if part and tag in TAGS and f"unknown key {part}." in fault:
            yield f'To change its {tag}, replace the whole part: {part}="{{{tag}: {value}}}"'


Settings = TypeVar("Settings", bound=PartSettings)


def checked_settings(kind: type[Settings], values: object, fault: str) -> Settings:
    """`values` as settings of a kind; raises IsthmusError: `fault`, and a line for each."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [f"  {line}" for line in _explain(error, kind, values)]
        raise IsthmusError("\n".join([f"{fault}:", *lines])) from error


def change_settings(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """`settings` with some replaced. Raises IsthmusError for one that is unknown or not valid."""
    values = settings.model_dump() | dict(changes)
    try:
        return type(settings).model_validate(values)
    except ValidationError as error:
        raise IsthmusError(" ".join(_explain(error, type(settings), values))) from error


def dump_recipe(recipe: Experiment) -> str:
    """The resolved recipe as YAML: every default written out, local models by their full path."""
    values = recipe.model_dump(mode="json")
    for part, key in named_models(values):
        if part[key] not in SHIPPED and Path(part[key]).expanduser().exists():
            part[key] = str(Path(part[key]).expanduser().absolute())
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def named_models(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a dumped recipe names models and other files of parts: the settings, and the key.

    Corpora are not among them: they stand in lists.
    """
    for key, value in values.items():
        if isinstance(value, dict):
            yield from named_models(value)
        elif value and key in ("path", "start_from"):
            yield values, key


def _explain(error: ValidationError, kind: type[BaseModel], values: object) -> Iterator[str]:
    """One line a fault of `values`: the key, what is wrong, the nearest known key."""
    for fault in error.errors():
        location = [str(part) for part in fault["loc"]]
        key = ".".join(_written(fault["loc"], values, fault["type"] == "missing"))
        if fault["type"] == "extra_forbidden":
            known = sorted(_known_keys(kind, location[:-1]))
            near = difflib.get_close_matches(location[-1], known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
            yield f"unknown key {key}. {hint}"
        elif fault["type"] == "missing":
            yield f"{key} is missing."
        else:
            value = "" if isinstance(fault["input"], dict) else f", got {fault['input']!r}"
            yield f"{key or 'recipe'}: {fault['msg'].removeprefix('Value error, ')}{value}."


def _written(location: Sequence[str | int], values: Any, missing: bool) -> Iterator[str]:
    """A fault's location without the tags that pydantic adds to say which of a union it took.

    They are no keys of what was written; nor is, as the last, the one that is `missing`.
    """
    for place, part in enumerate(location):
        items = range(len(values)) if isinstance(values, (list, tuple)) else ()
        if part in (values if isinstance(values, dict) else items):
            values = values[part]
        elif not missing or place < len(location) - 1:
            continue
        yield str(part)


def _known_keys(kind: type[BaseModel], location: Sequence[str]) -> set[str]:
    """Fields at `location` of the recipe, through the tagged unions."""
    models: list[type[BaseModel]] = [kind]
    for name in location:
        below = []
        for model in models:
            if name in model.model_fields:
                below += list(_models_in(model.model_fields[name].annotation))
        tagged = [model for model in models if _has_tag(model, name)]
        models = below or tagged or models  # a list's index is no field: stay
    return {name for model in models for name in model.model_fields}


def _has_tag(model: type[BaseModel], tag: str) -> bool:
    """Whether a union of parts knows this one by the tag."""
    fields = [model.model_fields.get(name) for name in TAGS]
    return any(tag in get_args(field.annotation) for field in fields if field)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
