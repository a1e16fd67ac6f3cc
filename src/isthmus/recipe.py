"""The experiment as one typed, frozen object: YAML in, resolved YAML out.

Each part's settings stand beside the part and build it; plain settings (data, training, decoding)
stand here.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, overload

import torch
import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from isthmus.errors import IsthmusError
from isthmus.model.conformer import ConformerArchitecture, ConformerCTC, letter_tokenizer
from isthmus.model.encoder import EncoderSettings
from isthmus.model.features import LogMelSettings
from isthmus.model.llm import (
    CHAT_TEMPLATE,
    LLM,
    LLMArchitecture,
    LLMSettings,
    character_tokenizer,
)
from isthmus.model.parts import SHIPPED, PartSettings, PretrainedSettings, Source, resolve, source
from isthmus.model.projector import LinearProjectorSettings, ProjectorSettings
from isthmus.model.prompt import PaperPrompt, PromptSettings
from isthmus.model.quantise import quantise
from isthmus.model.speech_llm import SpeechLLM
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


class SpeechDataSettings(DataSettings):
    """The same for a model with a frozen encoder, whose frames can be kept."""

    feature_cache: Literal["none", "bfloat16", "float32"] = "none"
    """Keep the frozen encoder's frames on disk, in this precision, and never compute them twice."""


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
                raise ValueError(f"give one of {', '.join(cls.MEASURES)}, not {len(given)}")
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
    nbest: int = Field(1, ge=1)
    """Hypotheses to write, the best among them; at most beam_size."""

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

    def sources(self) -> dict[str, Source]:
        """Where the pretrained parts come from, with checksums of their weights."""
        return {}


class Recipe(Experiment):
    """A speech encoder and a language model, joined by a trained projector."""

    encoder: EncoderSettings = Field(discriminator="type")
    projector: ProjectorSettings = LinearProjectorSettings()
    llm: LLMSettings
    data: SpeechDataSettings = SpeechDataSettings()
    train: SpeechTrainSettings = SpeechTrainSettings()
    prompt: PromptSettings = Field(default=PaperPrompt(), discriminator="template")
    decode: DecodeSettings = DecodeSettings()

    def build(self) -> SpeechLLM:
        """The model: pretrained parts loaded, the projector random (torch's generator)."""
        encoder, llm = self.encoder.build(), self.llm.build()
        if self.train.precision == "bfloat16":
            if self.encoder.tune == "frozen":
                encoder.store(torch.bfloat16)
            if self.llm.tune != "full" and self.llm.dtype == "auto":
                llm.store(torch.bfloat16)
        model = SpeechLLM(
            encoder,
            self.projector.build(encoder.dim, llm.dim),
            llm,
            self.prompt,
            {"encoder": self.encoder.tune, "llm": self.llm.tune},
        )
        if self.llm.quantise != "none":
            quantise(llm.network, self.llm.quantise)
        return model

    def sources(self) -> dict[str, Source]:
        parts = {"encoder": self.encoder, "llm": self.llm}
        return {
            name: source(part.path, part.revision)
            for name, part in parts.items()
            if isinstance(part, PretrainedSettings)
        }


class Pretraining(Experiment):
    """A model with random weights, or one to go on from."""

    OF_NEW_MODELS: ClassVar[dict[str, Any]]
    """Settings that a model to go on from brings along, with their defaults."""
    start_from: str | None = None
    """A model to go on from, instead of random weights."""

    @model_validator(mode="before")
    @classmethod
    def _new_or_continued(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = [name for name in cls.OF_NEW_MODELS if values.get(name) is not None]
        if values.get("start_from") is None:
            return values | {n: v for n, v in cls.OF_NEW_MODELS.items() if n not in given}
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
        "letters": "abcdefghijklmnopqrstuvwxyz' ",
    }
    architecture: ConformerArchitecture | None = None
    front_end: LogMelSettings | None = None
    letters: str | None = Field(None, min_length=1)
    """The spelling units."""
    data: CTCDataSettings = CTCDataSettings()
    train: TrainSettings = TrainSettings()

    def build(self) -> ConformerCTC:
        """The model of `start_from`, or one with random weights (torch's generator)."""
        if self.start_from:
            return ConformerCTC.load(resolve(self.start_from)).float()
        assert self.architecture is not None
        assert self.letters is not None
        assert self.front_end is not None
        units = letter_tokenizer(self.letters)
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


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everyone but YAML 1.1 believes."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Raises IsthmusError for what is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise IsthmusError(f"{text[:60]!r} is not valid YAML: {where}.") from error


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
    file = find_recipe(str(path))
    try:
        values = parse_yaml(file.read_text(encoding="utf-8")) or {}
    except IsthmusError as error:
        raise IsthmusError(f"{file}: {error}") from error
    if not isinstance(values, dict):
        raise IsthmusError(f"{file} holds no settings (key: value lines).")
    for override in overrides:
        _override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [f"  {line}" for line in _explain(error, kind)]
        raise IsthmusError("\n".join([f"{file} is not a valid recipe:", *lines])) from error


Settings = TypeVar("Settings", bound=PartSettings)


def change_settings(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """`settings` with some replaced. Raises IsthmusError for one that is unknown or not valid."""
    try:
        return type(settings).model_validate(settings.model_dump() | dict(changes))
    except ValidationError as error:
        raise IsthmusError(" ".join(_explain(error, type(settings)))) from error


def dump_recipe(recipe: Experiment) -> str:
    """The resolved recipe as YAML: every default written out, local models by their full path."""
    values = recipe.model_dump(mode="json")
    parts = [(values.get(name, {}), "path") for name in ("encoder", "llm")]
    for part, key in [(values, "start_from"), *parts]:
        name = part.get(key)
        if name and name not in SHIPPED and Path(name).expanduser().is_dir():
            part[key] = str(Path(name).expanduser().absolute())
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with isthmus, by name such as `tiny/projector`."""
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent.parent / "recipes"):
        if folder.is_dir():
            files = sorted(folder.rglob("*.yaml"))
            return {str(file.relative_to(folder).with_suffix("")): file for file in files}
    return {}


def find_recipe(name: str) -> Path:
    """The file `name`, or the shipped recipe of that name."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    if short in shipped:
        return shipped[short]
    near = difflib.get_close_matches(short, shipped, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else " `isthmus recipes` lists the shipped ones."
    raise IsthmusError(f"No recipe {name!r}: neither a file nor shipped.{hint}")


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise IsthmusError(f"{override!r} is not an override. Write key.subkey=value.")
    *path, last = key.split(".")
    for name in path:
        below = values.setdefault(name, {})
        if not isinstance(below, dict):
            raise IsthmusError(f"{override!r}: {name} is a value, it has no key {last!r}.")
        values = below
    values[last] = parse_yaml(text)


def _explain(error: ValidationError, kind: type[BaseModel]) -> Iterator[str]:
    """One line a fault: the key, what is wrong, the nearest known key."""
    for fault in error.errors():
        location = [str(part) for part in fault["loc"]]
        key = ".".join(location)
        if fault["type"] == "extra_forbidden":
            known = sorted(_known_keys(kind, location[:-1]))
            near = difflib.get_close_matches(location[-1], known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
            yield f"unknown key {key}. {hint}"
        elif fault["type"] == "missing":
            yield f"{key} is missing."
        else:
            value = "" if isinstance(fault["input"], dict) else f", got {fault['input']!r}"
            yield f"{key or 'recipe'}: {fault['msg']}{value}."


def _known_keys(kind: type[BaseModel], location: Sequence[str]) -> set[str]:
    """Fields at `location` of the recipe, through the tagged unions."""
    models: list[type[BaseModel]] = [kind]
    for name in location:
        below = []
        for model in models:
            if name in model.model_fields:
                below += list(_models_in(model.model_fields[name].annotation))
        models = below or models  # a union's tag or a list's index is no field: stay
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
