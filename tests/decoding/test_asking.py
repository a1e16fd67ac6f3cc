"""The prompt of an utterance hangs on that utterance alone; another than in training is said."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.build import build_model
from isthmus.decoding.asking import prompt_for, prompts_to_ask, tokens_beyond
from isthmus.decoding.transcriber import Transcriber
from isthmus.errors import IsthmusError
from isthmus.recipe import Recipe

Waves = Callable[..., Tensor]
Build = Callable[..., Transcriber]
INSTRUCTIONS = ["Say it.", "", "Write down what is said in this recording."]


@pytest.fixture
def build(model_folder: Callable[[str], Path]) -> Build:
    def transcriber(prompt: dict[str, Any], batch: int = 3, **decode: Any) -> Transcriber:
        recipe = Recipe.model_validate(
            {
                "name": "asked",
                "encoder": {"type": "conformer", "path": str(model_folder("conformer"))},
                "projector": {"downsample_rate": 2, "hidden": 16},
                "llm": {"path": str(model_folder("llama"))},
                "prompt": prompt,
                "decode": {"tokens_per_second": 4, "extra_tokens": 6, "gate": "none"}
                | {"batch_size": batch, "beam_size": 2, **decode},
            }
        )
        torch.manual_seed(0)
        return Transcriber(build_model(recipe), recipe.decode)

    return transcriber


def several(template: str = "paper") -> dict[str, Any]:
    return {"template": template, "instruction": INSTRUCTIONS}


@pytest.mark.parametrize("template", ["paper", "chat"])
def test_neighbours_and_order_have_no_influence(template: str, build: Build, waves: Waves) -> None:
    audio = [waves(6000 + 500 * i, seed=i).numpy() for i in range(6)]
    transcriber = build(several(template))
    chosen = [prompt_for(transcriber.prompts, one).instruction for one in audio]
    assert len(set(chosen)) > 1
    texts = [one.text for one in transcriber.transcribe(audio)]
    assert texts == [one.text for one in transcriber.transcribe(audio[::-1])][::-1]
    assert texts == [build(several(template), batch=1).transcribe(one).text for one in audio]


def test_each_has_the_text_of_its_own_prompt(build: Build, waves: Waves) -> None:
    audio = [waves(6000 + 500 * i, seed=i).numpy() for i in range(4)]
    transcriber = build(several())
    for one, found in zip(audio, transcriber.transcribe(audio), strict=True):
        words = prompt_for(transcriber.prompts, one).instruction
        alone = build({"template": "paper", "instruction": words})
        assert found.text == alone.transcribe(one).text


def test_the_choice_is_of_the_samples_not_of_their_place_in_memory() -> None:
    prompts: Any = list(range(1000))
    samples = np.random.default_rng(0).normal(size=64).astype(np.float32)
    spread = np.stack([samples, samples], axis=1)[:, 0]
    assert prompt_for(prompts, samples) == prompt_for(prompts, spread)
    assert prompt_for(prompts, samples) != prompt_for(prompts, samples * 0.5)


def test_an_instruction_that_was_not_trained_is_said(
    build: Build, waves: Waves, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        build(several(), instruction="Say it.")
        assert not caplog.records
        other = build(several(), instruction="Translate.")
    assert "'Translate.' is not what the run was trained with ('Say it.', ''" in caplog.text
    heard = waves(9000).numpy()
    plain = build({"template": "paper", "instruction": "Translate."})
    assert other.transcribe(heard).text == plain.transcribe(heard).text


def test_a_longer_instruction_leaves_less_room(build: Build) -> None:
    plain = build({"template": "paper"})
    longer = build({"template": "paper"}, instruction="Transcribe speech to text. " * 4)
    assert tokens_beyond(longer.model, longer.prompts) == 4 * 27 - 26
    assert tokens_beyond(plain.model, plain.prompts) == 0
    assert longer.longest < plain.longest


def test_no_place_for_an_instruction(build: Build) -> None:
    with pytest.raises(IsthmusError, match=r"decode\.instruction is 'Hi'.*template: bare"):
        build({"template": "bare"}, instruction="Hi")
    bare = build({"template": "bare"}).model
    assert prompts_to_ask(bare, None) == bare.prompts
