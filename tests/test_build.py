"""Settings know what they are of: `build` makes it, whatever kind they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.build import build
from isthmus.model.encoder import Encoder
from isthmus.model.llm import LLM
from isthmus.model.projector import Projector
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import Recipe
from isthmus.settings.conformers import LetterUnits
from isthmus.settings.llms import LLMSettings


def test_every_kind_of_settings_builds(
    encoder_settings: Callable[[str], Any], model_folder: Callable[[str], Path]
) -> None:
    llm = {"path": str(model_folder("llama"))}
    recipe = Recipe(name="all", encoder=encoder_settings("fbank"), llm=LLMSettings(**llm))
    encoder, language_model = recipe.encoder.build(), recipe.llm.build()
    assert isinstance(encoder, Encoder)
    assert isinstance(language_model, LLM)
    assert isinstance(recipe.projector.build(encoder, language_model), Projector)
    assert isinstance(recipe.build(), SpeechLLM)
    with pytest.raises(TypeError, match="LetterUnits"):
        build(LetterUnits())
