"""What a recipe names as data: repeated, counted, and no more than the model can take."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from isthmus.build import build_model
from isthmus.errors import IsthmusError
from isthmus.model.conformer import ConformerCTC
from isthmus.model.encoder import build_encoder
from isthmus.model.llm import build_llm
from isthmus.model.projector import build_projector
from isthmus.model.prompt import PaperPrompt
from isthmus.model.speech_llm import SpeechLLM
from isthmus.model.spelling import letter_tokenizer
from isthmus.recipe import CTCRecipe, Recipe
from isthmus.settings.conformers import ConformerArchitecture, LogMelSettings
from isthmus.settings.datasets import Corpus, DataSettings, JoinSettings
from isthmus.settings.llms import LLMSettings
from isthmus.settings.projectors import LinearProjectorSettings
from isthmus.speech.augment import Augmentation, Padding, Speed
from isthmus.training.batches import SpeechData, join_utterances
from isthmus.training.training_data import fits_model, load_cuts, speech_data


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
        train, dev = speech_data(few, build_model(few))
    assert [cut.id for cut in train.cuts] == ["a", "b"]
    assert dev is None
    assert "utterance 'long': it takes" in caplog.text
    assert "does_not_fit" in caplog.text


def test_more_than_the_stated_fraction_stops(
    speech: Path, model_folder: Callable[[str], Path]
) -> None:
    none = recipe(speech, model_folder("llama"), 0.1)
    with pytest.raises(IsthmusError, match=r"1 of 3 utterances do not fit .*'long'"):
        speech_data(none, build_model(none))


@pytest.fixture
def whisper_llama(
    model_folder: Callable[[str], Path], encoder_settings: Callable[[str], Any]
) -> SpeechLLM:
    """30 s of audio at most; 256 positions."""
    llm = build_llm(LLMSettings(path=str(model_folder("llama"))))
    encoder = build_encoder(encoder_settings("whisper"))
    projector = build_projector(LinearProjectorSettings(downsample_rate=10, hidden=8), encoder, llm)
    return SpeechLLM(encoder, projector, llm, PaperPrompt())


def test_beyond_the_encoders_limit_is_left_out(speech: Path, whisper_llama: SpeechLLM) -> None:
    data = DataSettings(max_seconds=100, max_bad_fraction=0.5)
    cuts = load_cuts([str(speech)], data, fits_model(whisper_llama))
    assert [cut.id for cut in cuts] == ["a", "b"]


def test_what_augmentation_would_make_too_long_does_not_fit(whisper_llama: SpeechLLM) -> None:
    slowed = fits_model(whisper_llama, Augmentation(speed=Speed(factors=(0.85, 1.15))))
    assert fits_model(whisper_llama)([29.9], "yes") is None
    assert "35.2 s of audio are more than the 30 s" in str(slowed([29.9], "yes"))
    assert slowed([25.4], "yes") is None
    assert "positions" in str(slowed([25.4], "yes " * 40))
    padded = fits_model(whisper_llama, Augmentation(padding=Padding(seconds=(0.0, 0.25))))
    assert padded([29.4], "yes") is None
    assert "30.1 s of audio" in str(padded([29.6], "yes"))
    assert "30.1 s of audio" in str(padded([14.55, 14.55], "yes"))  # each has its own silence


@pytest.mark.parametrize("factor", [0.85, 0.9001, 1.0, 1.2])
def test_no_draw_is_longer_than_what_was_checked(factor: float) -> None:
    effects = Augmentation(
        speed=Speed(factors=(factor, factor)), speed_probability=1, padding=Padding()
    )
    for num_samples in (1_600, 100_003, 479_999):
        for seed in range(3):
            heard = effects(np.zeros(num_samples, np.float32), np.random.default_rng(seed))
            assert len(heard) <= 16_000 * effects.longest(num_samples / 16_000)
    assert Augmentation().longest(3.0) == 3.0


def test_joined_utterances_fit_the_model_too(whisper_llama: SpeechLLM) -> None:
    seconds, text = [9.0] * 12, "some words of a transcript"
    fits = fits_model(whisper_llama, Augmentation(speed=Speed(factors=(0.85, 1.0))))

    def group_fits(group: Sequence[int]) -> bool:
        return fits([9.0] * len(group), " ".join([text] * len(group))) is None

    join = JoinSettings(probability=1.0, max_seconds=60)
    groups = join_utterances(seconds, join, seed=0, epoch=0, fits=group_fits)
    assert {len(group) for group in groups} == {2}  # three are 31.8 s
    assert sorted(index for group in groups for index in group) == list(range(12))


def test_training_data_are_planned_within_the_models_limits(
    speech: Path, model_folder: Callable[[str], Path]
) -> None:
    values = recipe(speech, model_folder("llama"), 0.5).model_dump()
    values["encoder"] = {"type": "whisper", "path": str(model_folder("whisper"))}
    values["data"]["augment"] = {"speed": {"factors": [0.08, 1.0]}}  # 2 s become 25
    values["data"]["join"] = {"probability": 1.0, "max_seconds": 60}
    slow = Recipe.model_validate(values)
    train, _ = speech_data(slow, build_model(slow))
    groups = [group for batch in train.plan(slow.train, 0) for group in batch]
    assert sorted(groups) == [(0,), (1,)]  # together they could be 37 s
    values["data"]["augment"] = None
    plain = Recipe.model_validate(values)
    train, _ = speech_data(plain, build_model(plain))
    assert sum(len(group) for group in train.plan(plain.train, 0)[0]) == 2
    assert len(train.plan(plain.train, 0)[0]) == 1


# --- CTC


def conformer() -> ConformerCTC:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    architecture = ConformerArchitecture(
        **sizes, intermediate_size=16, subsampling_factor=8, subsampling_conv_channels=4
    )
    return ConformerCTC.initial(architecture, letter_tokenizer("abces "), LogMelSettings())


def test_ctc_needs_letters_it_knows_and_a_frame_for_each() -> None:
    fits = fits_model(conformer())
    assert fits([1.0], "a bee sees") is None
    assert fits([1.0], "A bee sees 2") == "its text has '2', 'A', not among the letters"
    assert fits([0.3], "abc") is None  # four frames
    assert fits([0.3], "aab") is None
    assert fits([0.3], "aabb") == "its text needs 6 frames for CTC, the audio has 4"


def test_such_texts_are_bad_items(speech: Path) -> None:
    (speech / "a.txt").write_text("yes!")
    values: dict[str, Any] = {"name": "ctc", "letters": "abcdefghijklmnopqrstuvwxyz "}
    values["data"] = {"train": [str(speech)], "max_seconds": 100, "max_bad_fraction": 0.5}
    few = CTCRecipe.model_validate(values)
    model = ConformerCTC.initial(
        ConformerArchitecture(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        letter_tokenizer(values["letters"]),
        LogMelSettings(),
    )
    # 80 s have 1,000 frames of 80 ms, too few for 2,699 letters
    with pytest.raises(IsthmusError, match=r"2 of 3 utterances .* 'a': its text has '!'"):
        speech_data(few, model)
    values["data"]["max_bad_fraction"] = 0.7
    train, _ = speech_data(CTCRecipe.model_validate(values), model)
    assert [cut.id for cut in train.cuts] == ["b"]


def test_a_corpus_can_come_several_times(speech: Path) -> None:
    data = DataSettings(max_seconds=100)
    cuts = load_cuts([Corpus(path=str(speech), repeat=3)], data)
    assert len(cuts) == 9


def test_nothing_to_train_on_is_said() -> None:
    with pytest.raises(IsthmusError, match=r"data\.train is empty"):
        speech_data(CTCRecipe(name="nothing"), conformer())


def test_the_digest_knows_ids_durations_and_texts(speech: Path) -> None:
    def digest() -> str:
        return SpeechData(load_cuts([str(speech)], DataSettings(max_seconds=100))).digest()

    before = digest()
    assert digest() == before
    (speech / "a.txt").write_text("yes.")
    changed = digest()
    assert changed != before
    soundfile.write(speech / "b.flac", np.full(16000, 0.1), 16000)
    assert digest() not in (before, changed)
