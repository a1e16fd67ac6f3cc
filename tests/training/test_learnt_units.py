"""CTC with sentence pieces: what fits, the same units after a resume, and times for words."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer
from torch import Tensor

from isthmus.build import build_conformer
from isthmus.decoding.timestamps import align_words
from isthmus.errors import IsthmusError
from isthmus.model.conformer import ConformerCTC
from isthmus.model.spelling import for_ctc, learn_units
from isthmus.recipe import CTCRecipe
from isthmus.runs.checkpoint import WEIGHTS
from isthmus.settings.conformers import (
    LETTERS,
    ConformerArchitecture,
    LogMelSettings,
    SentencePieceUnits,
)
from isthmus.training import learnt_units
from isthmus.training.learnt_units import UNITS, run_units, texts_of
from isthmus.training.parallel import Ranks
from isthmus.training.runs import Opening, pretrain_ctc
from isthmus.training.training_data import fits_model

TEXTS = ["eins zwei drei", "fünf sechs", "one two three", "müde żółw"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 16, "subsampling_conv_channels": 4}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = []
    for number, text in enumerate(TEXTS):
        audio = np.random.default_rng(number).normal(0, 0.1, 40000)
        soundfile.write(tmp_path / f"u{number}.wav", audio, 16000)
        row = {"audio": f"u{number}.wav", "text": text, "language": "en" if number == 2 else "xx"}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(lines))
    return tmp_path / "train.jsonl"


def recipe(corpus: Path, **changes: Any) -> CTCRecipe:
    values: dict[str, Any] = {"architecture": SIZES, "data": {"train": [str(corpus)]}}
    values["units"] = {"type": "sentencepiece", "size": 40}
    values["train"] = {"steps": 4, "batch_size": 2, "warmup_steps": 0, "save_every": 1}
    return CTCRecipe.model_validate({"name": "pieces", **values, **changes})


def conformer() -> ConformerCTC:
    units = learn_units(SentencePieceUnits(type="sentencepiece", size=40), TEXTS)
    torch.manual_seed(0)
    return ConformerCTC.initial(
        ConformerArchitecture.model_validate(SIZES), units, LogMelSettings()
    ).eval()


def test_what_fits() -> None:
    model = conformer()
    fits = fits_model(model)
    assert fits([3.0], "drei müde") is None
    assert fits([3.0], "jein müde") == "its text has 'j', not among the letters"
    units = model.tokenizer.encode("zwei zwei", add_special_tokens=False)
    needed = len(units) + sum(a == b for a, b in pairwise(units))
    shortest = next(n for n in range(100) if model.output_length(n * 1280) >= needed) * 0.08
    assert fits([shortest], "zwei zwei") is None
    assert "frames for CTC" in str(fits([shortest - 0.08], "zwei zwei"))


def test_a_resumed_run_writes_with_the_same_units(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    short = {"steps": 2, "batch_size": 2, "warmup_steps": 0, "save_every": 1}
    pretrain_ctc(recipe(corpus, train=short), parts)
    units = (parts / UNITS / "tokenizer.json").read_bytes()
    learnt = for_ctc(Tokenizer.from_str(units.decode()))

    def never(*arguments: Any) -> None:
        raise AssertionError("units are learnt once")

    monkeypatch.setattr(learnt_units, "learn_units", never)
    pretrain_ctc(recipe(corpus), parts, Opening(resume=True, allow_change=["train.steps"]))
    monkeypatch.setattr(learnt_units, "learn_units", lambda *arguments: learnt)
    pretrain_ctc(recipe(corpus), whole)
    for name in (UNITS, "model"):
        assert (parts / name / "tokenizer.json").read_bytes() == units
    last = Path("checkpoints") / "step-000004" / WEIGHTS
    assert (parts / last).read_bytes() == (whole / last).read_bytes()
    shutil.rmtree(parts / UNITS)
    with pytest.raises(IsthmusError, match=r"units is missing.*--overwrite"):
        pretrain_ctc(recipe(corpus), parts, Opening(resume=True))
    model = ConformerCTC.load(parts / "model")
    assert len(model.tokenizer) <= 40
    assert model.greedy(torch.randn(1, 5, len(model.tokenizer)), torch.tensor([5]))


def test_pieces_are_learnt_from_the_languages_that_are_trained(corpus: Path) -> None:
    assert texts_of(recipe(corpus)) == TEXTS
    only = {"train": [str(corpus)], "languages": ["en"]}
    assert texts_of(recipe(corpus, data=only)) == ["one two three"]
    with pytest.raises(IsthmusError, match="no text to learn"):
        texts_of(recipe(corpus, data={"train": []}))


def test_an_unknown_language_is_said_before_pieces_are_learnt(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("minutes, for nothing")

    monkeypatch.setattr(learnt_units, "learn_units", never)
    wrong = recipe(corpus, data={"train": [str(corpus)], "languages": ["en", "de"]})
    with pytest.raises(IsthmusError, match=r"data\.languages names 'de'"):
        pretrain_ctc(wrong, tmp_path / "run")


class Follower(Ranks):
    """The second of two processes; the first has learnt `lines`."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.rank, self.lines = 1, lines

    def gather(self, lines: list[str]) -> list[str]:
        return self.lines + lines


def test_only_the_leading_process_learns(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = recipe(corpus).units
    assert units is not None
    learnt = learn_units(units, TEXTS)

    def never(*arguments: Any) -> None:
        raise AssertionError("learnt by the other")

    monkeypatch.setattr(learnt_units, "learn_units", never)
    follower = Follower([learnt.backend_tokenizer.to_str()])
    found = run_units(recipe(corpus), tmp_path, follower, resumed=False)
    assert found is not None
    assert found.get_vocab() == learnt.get_vocab()


def test_words_have_times(waves: Callable[..., Tensor]) -> None:
    model, waveform = conformer(), waves(48000)
    with torch.no_grad():
        frames, lengths = model(waveform[None], torch.tensor([48000]))
        log_probs = model.log_probs(frames)[0, : int(lengths[0])]
    words = align_words(log_probs, "zwei müde drei", model, waveform.numpy())
    assert [word.text for word in words] == ["zwei", "müde", "drei"]
    assert all(word.start < word.end for word in words)
    assert all(a.end <= b.start for a, b in pairwise(words))


def test_one_way_to_spell(corpus: Path) -> None:
    assert recipe(corpus).letters is None
    plain = recipe(corpus, units=None)
    assert (plain.letters, plain.units) == (LETTERS, None)
    assert recipe(corpus, units=None, letters="abc").letters == "abc"
    assert CTCRecipe.model_validate(recipe(corpus).model_dump()) == recipe(corpus)
    with pytest.raises(ValueError, match="letters and units are two ways"):
        recipe(corpus, letters="abc")
    with pytest.raises(ValueError, match="start_from brings its own units"):
        recipe(corpus, architecture=None, start_from="isthmus/tiny-conformer")
    letters = build_conformer(recipe(corpus, units={"type": "letters", "letters": "abc "}))
    assert len(letters.tokenizer) == 6
