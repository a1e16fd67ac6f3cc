"""The experiment as one typed, frozen object: YAML in, resolved YAML out.

Nothing here loads torch: what a recipe says is known, and refused, at once. The model of one is
made by isthmus.build.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, overload

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from isthmus.errors import IsthmusError
from isthmus.model.prompt import PaperPrompt, PromptSettings
from isthmus.recipe_files import read_recipe
from isthmus.settings.base import ASSETS, SHIPPED, PartSettings, Precision, Tune
from isthmus.settings.conformers import LETTERS, ConformerArchitecture, LogMelSettings, UnitSettings
from isthmus.settings.datasets import CTCDataSettings, SpeechDataSettings
from isthmus.settings.encoders import ConformerSettings, EncoderSettings
from isthmus.settings.llms import LLMArchitecture, LLMSettings
from isthmus.settings.optimisation import LoopSettings, SpeechTrainSettings, TrainSettings
from isthmus.settings.projectors import LinearProjectorSettings, ProjectorSettings, QFormerSettings
from isthmus.settings.search import DecodeSettings

TAGS = ("type", "template")  # settings that say which of several parts it is


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
    start_from: tuple[str, ...] = ()
    """Runs whose trained weights this one begins with, as far as it has them; the last wins."""
    decode: DecodeSettings = DecodeSettings()

    @field_validator("start_from", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value or ()

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
    def _tokens_stay(self) -> "Recipe":
        says = self.projector.type == "ctc-posterior" or self.train.ctc_weight > 0
        if self.llm.tune == "full" and says:
            raise ValueError(
                "llm.tune full moves the token embeddings that CTC compares audio with: tune the "
                "LLM by lora, or set train.ctc_weight to 0 and take another projector"
            )
        return self

    @model_validator(mode="after")
    def _blank_is_learnt(self) -> "Recipe":
        if self.projector.type == "ctc-posterior" and not (
            self.train.ctc_weight or self.start_from
        ):
            raise ValueError(
                "projector.type ctc-posterior learns from CTC alone what is no token: set "
                "train.ctc_weight, or start_from a run that has learnt it"
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

    def weight_precision(self, tune: Tune) -> Precision:
        """What the weights of a part are held in, whatever its files have.

        Small steps get lost in half precision, so a part that is trained whole has float32.
        """
        return "float32" if tune == "full" else self.train.precision

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


class LanguageRecipe(Pretraining):
    """Training of a small language model on text made on the spot."""

    OF_NEW_MODELS = {"architecture": LLMArchitecture()}  # noqa: RUF012
    architecture: LLMArchitecture | None = None
    domains: dict[str, float] | None = None
    """Weights of the kinds of text (isthmus.lab.sentences)."""
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


def load_any_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """A recipe of any kind, as its keys tell. Raises IsthmusError as `load_recipe` does."""
    return load_recipe(path, overrides, kind=kind_of(read_recipe(path, overrides)[1]))


def kind_of(values: Mapping[str, Any]) -> type[Recipe | CTCRecipe | LanguageRecipe]:
    """The kind of recipe that has such keys: a model to go on from may stand for all others."""
    if "encoder" in values or "llm" in values:
        return Recipe
    return CTCRecipe if "data" in values else LanguageRecipe


def _retyped(overrides: Sequence[str], fault: str) -> Iterator[str]:
    """How to be rid of what a part still says of its old type, where the type alone was changed."""
    for override in overrides:
        key, _, value = override.partition("=")
        part, _, tag = key.rpartition(".")
        below = re.search(rf"unknown key {re.escape(part)}\.\S", fault)
        if part and tag in TAGS and below:
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
        part[key] = _absolute(part[key])
    if isinstance(recipe, Recipe):
        shipped = {weights.parent.name for weights in ASSETS.glob("*/best")}  # whatever lies here
        values["start_from"] = [r if r in shipped else _absolute(r) for r in recipe.start_from]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def _absolute(path: str) -> str:
    """A local model's full path; any other name as it is."""
    local = Path(path).expanduser()
    return str(local.absolute()) if path not in SHIPPED and local.exists() else path


def named_models(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a dumped recipe names models and other files of parts: the settings, and the key.

    Corpora are not among them: they stand in lists.
    """
    for key, value in values.items():
        if isinstance(value, dict):
            yield from named_models(value)
        elif isinstance(value, str) and key in ("path", "start_from"):
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
