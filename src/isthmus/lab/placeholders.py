"""What a recipe names and is yet to be made: models of recipes that were not run, files of units.

It is put into a folder without weights, in the size that it will have, to plan with.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerFast

from isthmus.build import build_conformer, build_language_model
from isthmus.model.conformer import FRONT_END_FILE, ConformerCTC, initial_config
from isthmus.model.encoder import build_encoder
from isthmus.model.llm import LLM
from isthmus.model.spelling import learn_units, letter_tokenizer
from isthmus.model.units import Units
from isthmus.recipe import (
    CTCRecipe,
    Experiment,
    LanguageRecipe,
    Pretraining,
    load_any_recipe,
    named_models,
)
from isthmus.recipe_files import shipped_recipes
from isthmus.settings.conformers import LETTERS, LetterUnits
from isthmus.settings.encoders import EncoderSettings

UNITS = 1000  # SpeechGPT's clusters (arXiv 2305.11000)
AnyRecipe = TypeVar("AnyRecipe", bound=Experiment)
Producers = Mapping[str, Pretraining]  # recipes, by where the model that they make will be
Pretrained = ConformerCTC | LLM


@lru_cache
def shipped_producers() -> Producers:
    """Recipes of pretraining that ship, by their run folders and by the models of sweeps."""
    found: dict[str, Pretraining] = {}
    for name in shipped_recipes():
        recipe = load_any_recipe(name)
        if isinstance(recipe, Pretraining):
            found[f"runs/{recipe.name}/model"] = recipe
            found.setdefault(f"${{SWEEP}}/models/{Path(name).name}/model", recipe)
    return found


def missing_models(recipe: Experiment, producers: Producers) -> Iterator[str]:
    """Models and files of units that the recipe names, are not here, and have placeholders."""
    for part, key in named_models(recipe.model_dump(mode="json")):
        known = part[key] in producers or part.get("type") == "units"
        if known and not Path(part[key]).expanduser().exists():
            yield part[key]


def with_placeholders(recipe: AnyRecipe, folder: Path, producers: Producers) -> AnyRecipe:
    """The recipe with placeholders in `folder` for what is missing; called within `on_meta`."""
    names = {*missing_models(recipe, producers)}
    values = recipe.model_dump(mode="json")
    for part, key in named_models(values):
        if part[key] in names:
            place = folder / part[key].strip("/").replace("/", "--")
            if part[key] in producers:
                part[key] = _model(
                    with_placeholders(producers[part[key]], folder, producers), place
                )
            else:  # of the frames of the encoder, which comes before the projector
                settings: TypeAdapter[EncoderSettings] = TypeAdapter(EncoderSettings)
                dim = build_encoder(settings.validate_python(values["encoder"])).dim
                Units(torch.zeros(UNITS, dim), "", "").save(place)
                part[key] = str(place)
    return type(recipe).model_validate(values)


def build_sized(recipe: CTCRecipe | LanguageRecipe, folder: Path) -> Pretrained:
    """The model of the recipe on the meta device; to be called within `on_meta`."""
    made = recipe.model_copy(update={"start_from": _model(recipe, folder)})
    if isinstance(made, CTCRecipe):
        return build_conformer(made)
    return build_language_model(made)


def _model(recipe: Pretraining, folder: Path) -> str:
    """Where a model is of the sizes that the recipe makes; a new one is put into `folder`."""
    if recipe.start_from:
        return recipe.start_from
    folder.mkdir()
    tokenizer: Any
    if isinstance(recipe, LanguageRecipe):
        with torch.device("meta"):
            llm = build_language_model(recipe)
        config, tokenizer = llm.network.config, llm.tokenizer
    else:
        assert isinstance(recipe, CTCRecipe)
        assert recipe.architecture is not None
        assert recipe.front_end is not None
        tokenizer = _units(recipe)
        config = initial_config(recipe.architecture, tokenizer, recipe.front_end)
        (folder / FRONT_END_FILE).write_text(recipe.front_end.model_dump_json())
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _units(recipe: CTCRecipe) -> PreTrainedTokenizerFast:
    """Spelling units; in the place of those to be learnt as many letters."""
    units = recipe.units or LetterUnits(letters=recipe.letters or LETTERS)
    if isinstance(units, LetterUnits):
        return learn_units(units, [])
    first = 0x4E00  # of very many letters
    return letter_tokenizer("".join(map(chr, range(first, first + units.size - 2))))
