"""What a recipe names as data: repeated, counted, and no more than the model can take."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from isthmus.errors import IsthmusError
from isthmus.recipe import Corpus, DataSettings, Recipe
from isthmus.training.data import load_cuts, speech_data


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Two short utterances, and one whose audio and text fill more than 2,048 positions."""
    rng = np.random.default_rng(0)
    for name, seconds, text in (("a", 1, "yes"), ("b", 2, "no"), ("long", 80, "so " * 900)):
        samples = rng.normal(0, 0.1, 16000 * seconds)
        soundfile.write(tmp_path / f"{name}.flac", samples, 16000)
        (tmp_path / f"{name}.txt").write_text(text.strip())
    return tmp_path


def recipe(folder: Path, llm: Path, max_bad_fraction: float) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "fbank",
            "encoder": {"type": "fbank"},
            "projector": {"downsample_rate": 10, "hidden": 8},
            "llm": {"path": str(llm)},
            "data": {
                "train": [str(folder)],
                "max_seconds": 100,
                "max_bad_fraction": max_bad_fraction,
            },
        }
    )


def test_what_does_not_fit_the_model_is_left_out_and_named(
    speech: Path, model_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    few = recipe(speech, model_folder("llama"), 0.5)
    with caplog.at_level(logging.INFO):
        train, dev = speech_data(few, few.build())
    assert [cut.id for cut in train.cuts] == ["a", "b"]
    assert dev is None
    assert "utterance 'long' takes" in caplog.text
    assert "too_long_for_the_model" in caplog.text


def test_more_than_the_stated_fraction_stops(
    speech: Path, model_folder: Callable[[str], Path]
) -> None:
    none = recipe(speech, model_folder("llama"), 0.1)
    with pytest.raises(IsthmusError, match="1 of 3 utterances do not fit: utterance 'long'"):
        speech_data(none, none.build())


def test_beyond_the_encoders_limit_is_left_out(speech: Path) -> None:
    data = DataSettings(max_seconds=100, max_bad_fraction=0.5)
    assert [cut.id for cut in load_cuts([str(speech)], data, max_seconds=30.0)] == ["a", "b"]


def test_a_corpus_can_come_several_times(speech: Path) -> None:
    data = DataSettings(max_seconds=100)
    cuts = load_cuts([Corpus(path=str(speech), repeat=3)], data)
    assert len(cuts) == 9


def test_nothing_to_train_on_is_said(speech: Path, model_folder: Callable[[str], Path]) -> None:
    values = recipe(speech, model_folder("llama"), 0.1).model_dump()
    values["data"]["train"] = []
    with pytest.raises(IsthmusError, match=r"data\.train is empty"):
        speech_data(Recipe.model_validate(values))
