"""Strict mode: the same tokens and scores to the last bit, whoever else is in the batch."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.build import build_model
from isthmus.decoding.recogniser import Speech
from isthmus.decoding.transcriber import Transcriber
from isthmus.decoding.transcript import Segment
from isthmus.recipe import Recipe

SAMPLE_RATE = 16_000


@pytest.fixture
def transcriber(model_folder: Callable[[str], Path]) -> Transcriber:
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "encoder": {"type": "conformer", "path": str(model_folder("conformer"))},
            "projector": {"downsample_rate": 4, "hidden": 16},
            "llm": {"path": str(model_folder("llama"))},
            "decode": {"tokens_per_second": 2, "extra_tokens": 4, "gate": "none", "strict": True},
        }
    )
    torch.manual_seed(0)
    return Transcriber(build_model(recipe), recipe.decode)


def test_no_company_changes_a_bit(
    transcriber: Transcriber, count: Callable[[int, int], int]
) -> None:
    rng = np.random.default_rng(0)
    seconds = rng.uniform(0.1, 5.0, count(12, 200))
    speech = [Speech(rng.normal(0, 0.1, int(s * SAMPLE_RATE)).astype(np.float32)) for s in seconds]

    def heard(batch: list[Speech]) -> list[Segment]:
        return transcriber._hear(batch, words=False)

    alone = {id(one): heard([one])[0] for one in speech}
    draw = random.Random(0)
    for _ in range(count(2, 10)):
        order = draw.sample(speech, len(speech))
        while order:
            batch = [order.pop() for _ in range(min(len(order), draw.choice([1, 2, 3, 8])))]
            for one, segment in zip(batch, heard(batch), strict=True):
                assert segment == alone[id(one)]
