"""Precision is what the recipe says, whatever the files have, and for every part."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForCTC

from isthmus.build import build_model
from isthmus.decoding.transcriber import load
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import Recipe
from isthmus.runs.feature_cache import (
    feature_cache,
)
from isthmus.speech.corpora import read_corpus
from isthmus.training.parallel import Ranks
from isthmus.training.runs import cache_features, train
from isthmus.training.speech_task import arithmetic

Make = Callable[..., Recipe]
CLASSES = {"whisper": AutoModel, "parakeet": AutoModelForCTC, "llama": AutoModelForCausalLM}


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32], ids=str)
def stored(
    request: pytest.FixtureRequest, model_folder: Callable[[str], Path], tmp_path: Path
) -> Callable[[str], str]:
    """A tiny model's folder, its weights stored in each precision in turn."""

    def folder(name: str) -> str:
        path = tmp_path / name
        if not path.exists():
            kept = (file for file in model_folder(name).iterdir() if file.suffix != ".safetensors")
            path.mkdir()
            for file in kept:
                (path / file.name).write_bytes(file.read_bytes())
            network = CLASSES[name].from_pretrained(model_folder(name))
            network.to(request.param).save_pretrained(path)
        return str(path)

    return folder


@pytest.fixture
def make(stored: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A recipe of a precision and changes, such as `llm={...}`; three noises to train on."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    (tmp_path / "speech").mkdir()
    for i, text in enumerate(("go left", "stop now", "no")):
        samples = rng.normal(0, 0.1, 9_000 + 5_000 * i)
        soundfile.write(tmp_path / f"speech/u{i}.flac", samples, 16_000)
        (tmp_path / f"speech/u{i}.txt").write_text(text)

    def recipe(precision: str, encoder: dict[str, Any] | None = None, **llm: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "name": "exact",
                "encoder": {"type": "whisper", "path": stored("whisper")} | (encoder or {}),
                "projector": {"downsample_rate": 5, "hidden": 16},
                "llm": {"path": stored("llama")} | llm,
                "data": {"train": [str(tmp_path / "speech")], "feature_cache": "float32"},
                "train": {"steps": 2, "batch_size": 3, "precision": precision},
            }
        )

    return recipe


def dtypes(part: torch.nn.Module, trained: bool) -> set[torch.dtype]:
    return {value.dtype for value in part.parameters() if value.requires_grad == trained}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_part_is_held_in_it(
    make: Make, stored: Callable[[str], str], precision: str, tmp_path: Path
) -> None:
    """Frozen weights are; those that are trained are in float32."""
    said = getattr(torch, precision)
    lora = {"tune": "lora", "lora": {"targets": ["q_proj"]}}
    encoders = [{}, {"tune": "full"}, {"type": "conformer", "path": stored("parakeet")}]
    for encoder, llm in itertools.product(encoders, ({}, lora, {"tune": "full"})):
        recipe = make(precision, encoder, **llm)
        model = build_model(recipe)
        for part in (model.encoder, model.llm, model.projector):
            assert dtypes(part, trained=False) <= {said}
            assert dtypes(part, trained=True) <= {torch.float32}
        held = {name: str(p.dtype) for name, p in model.named_parameters()}
        encoder_says = next(v for k, v in held.items() if k.startswith("encoder."))
        (line, _) = arithmetic(model, recipe, Ranks())
        for words in (f"encoder in {encoder_says}", f"LLM in {model.llm.dtype}"):
            assert words.replace("torch.", "") in line


def in_company(model: SpeechLLM, waveform: Tensor) -> Tensor:
    """Frames (T, D) of a waveform (S,) that is encoded beside a longer one."""
    longer = torch.nn.functional.pad(waveform, (3_000, 5_000))
    batch = torch.nn.utils.rnn.pad_sequence([waveform, longer], batch_first=True)
    return model.encode(batch, torch.tensor([len(waveform), len(longer)]))[0]


@pytest.mark.filterwarnings("ignore:encoder.pad_to_30s")
@pytest.mark.parametrize("stored", [torch.float16], indirect=True, ids=str)
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_frames_are_the_same_whoever_computes_them(
    make: Make, precision: str, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: `isthmus cache`, training in batches and decoding; not if it were in company."""
    recipe = make(precision, {"pad_to_30s": False})
    corpus, run = tmp_path / "speech", tmp_path / "run"
    found = []
    for maker in ("cache", "training", "decoding"):
        monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / maker))
        if maker == "cache":
            cache_features(recipe, lambda done, total: None)
        elif maker == "training":
            with monkeypatch.context() as patch:
                if not alone:
                    patch.setattr(SpeechLLM, "encode_alone", in_company)
                train(recipe, run)
        else:
            load(run, cached=True, gate="none").transcribe(list(read_corpus(corpus)))
        cache = feature_cache(recipe, build_model(recipe))
        assert cache is not None
        assert cache.verify().sound == 3
        found.append([cache.get(cache.key(cut)) for cut in read_corpus(corpus)])
    first, second, third = found
    assert all(map(torch.equal, first, third))
    assert all(map(torch.equal, first, second)) == alone
