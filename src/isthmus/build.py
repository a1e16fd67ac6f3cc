"""From a recipe to its model, which torch's generator gives what is not pretrained."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from isthmus.model.conformer import ConformerCTC
from isthmus.model.encoder import Encoder, build_encoder
from isthmus.model.llm import CHAT_TEMPLATE, LLM, build_llm, character_tokenizer, new_llm
from isthmus.model.parts import Source, freeze, resolve, source, sources
from isthmus.model.projector import Projector, build_projector, check_projector
from isthmus.model.quantise import quantise
from isthmus.model.speech_llm import SpeechLLM
from isthmus.model.spelling import learn_units
from isthmus.model.token_ctc import TokenCTC
from isthmus.recipe import CTCRecipe, LanguageRecipe, Pretraining, Recipe
from isthmus.settings.base import PartSettings
from isthmus.settings.conformers import LETTERS, LetterUnits
from isthmus.settings.llms import LLMSettings


def build(settings: PartSettings, *parts: Any) -> Any:
    """What settings of any kind describe: a recipe's model, or one part. Raises IsthmusError."""
    if isinstance(settings, Recipe):
        return build_model(settings)
    if isinstance(settings, CTCRecipe):
        return build_conformer(settings, *parts)
    if isinstance(settings, LanguageRecipe):
        return build_language_model(settings)
    if isinstance(settings, LLMSettings):
        return build_llm(settings)
    return build_projector(settings, *parts) if parts else build_encoder(settings)


def build_model(recipe: Recipe) -> SpeechLLM:
    """The model: pretrained parts loaded, the projector random. Raises IsthmusError."""
    encoder = encoder_of(recipe)
    check_projector(recipe.projector, encoder, recipe.encoder)
    llm = llm_of(recipe)
    model = SpeechLLM(
        encoder,
        projector_of(recipe, encoder, llm),
        llm,
        recipe.prompt,
        {"encoder": recipe.encoder.tune, "llm": recipe.llm.tune},
    )
    encoder.spec_augment = recipe.data.spec_augment
    return model


def encoder_of(recipe: Recipe) -> Encoder:
    """The encoder alone, its weights as training holds them."""
    encoder = build_encoder(recipe.encoder)
    encoder.store(getattr(torch, recipe.weight_precision(recipe.encoder.tune)))
    return encoder


def projector_of(recipe: Recipe, encoder: Encoder, llm: LLM) -> Projector:
    """The projector between the two, random, with the CTC head that is trained beside it."""
    projector = build_projector(recipe.projector, encoder, llm)
    if recipe.train.ctc_weight and projector.ctc is None:
        projector.ctc = TokenCTC(llm)
    return projector


def llm_of(recipe: Recipe) -> LLM:
    """The language model alone, its weights as training holds them."""
    settings = recipe.llm
    if settings.dtype == "auto":
        precision = recipe.weight_precision(settings.tune)
        settings = settings.model_copy(update={"dtype": precision})
    llm = build_llm(settings)
    if recipe.llm.tune == "frozen":
        freeze(llm)
    if recipe.llm.quantise != "none":
        quantise(llm.network, recipe.llm.quantise)
    return llm


def build_conformer(
    recipe: CTCRecipe, units: PreTrainedTokenizerFast | None = None
) -> ConformerCTC:
    """The model of `start_from`, or one with random weights.

    `units`: those learnt for `recipe.units`.
    """
    if recipe.start_from:
        return ConformerCTC.load(resolve(recipe.start_from)).float()
    assert recipe.architecture is not None
    assert recipe.front_end is not None
    if units is None:
        letters = LetterUnits(letters=recipe.letters or LETTERS)
        units = learn_units(recipe.units or letters, [])
    return ConformerCTC.initial(recipe.architecture, units, recipe.front_end)


def build_language_model(recipe: LanguageRecipe) -> LLM:
    """The model of `start_from`, or one with random weights."""
    if recipe.start_from is None:
        assert recipe.architecture is not None
        return new_llm(recipe.architecture, character_tokenizer(recipe.chat))
    llm = build_llm(LLMSettings(path=recipe.start_from, dtype="float32"))
    if recipe.chat:
        llm.tokenizer.chat_template = CHAT_TEMPLATE
    return llm


@sources.register
def _(recipe: Pretraining) -> dict[str, Source]:
    return {"start_from": source(recipe.start_from)} if recipe.start_from else {}
