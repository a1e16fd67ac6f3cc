"""Causes of a plateau: each is found where it is planted, and none where there is none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from isthmus.errors import IsthmusError
from isthmus.lab import plateau
from isthmus.lab.plateau import (
    Evidence,
    Metrics,
    PlateauWatch,
    diagnose,
    expected_step,
    on_plateau,
)
from isthmus.model.encoder import build_encoder
from isthmus.model.llm import LLM
from isthmus.model.projector import LinearProjector
from isthmus.model.prompt import PaperPrompt, Prompt
from isthmus.model.speech_llm import SpeechLLM
from isthmus.settings.encoders import FBankSettings
from isthmus.settings.optimisation import SpeechTrainSettings
from isthmus.speech.corpora import read_corpus
from isthmus.training.speech_task import SpeechTask

TEXTS = ("go left", "stop", "one two", "yes", "turn it on", "no")
SETTINGS = SpeechTrainSettings(steps=1000, warmup_steps=50)


def curve(steps: int, accuracy: float = 0.3, **given: float) -> list[Metrics]:
    """Lines of a run that learns nothing."""
    noise = np.random.default_rng(0).normal(0, 0.01, (steps, 2))
    usual = {"gradient_norm": 1.0, "learning_rate": 1e-4, "padding": 0.0} | given
    return [
        usual | {"step": step + 1, "accuracy": accuracy + a, "loss": 3.0 + b}
        for step, (a, b) in enumerate(noise.tolist())
    ]


def corpus(folder: Path, texts: tuple[str, ...]) -> Any:
    folder.mkdir()
    for place, text in enumerate(texts):
        sound = 0.3 * np.random.default_rng(place).normal(size=12_000 + 800 * place)
        soundfile.write(folder / f"u{place}.wav", sound, 16_000)
        (folder / f"u{place}.txt").write_text(text)
    return list(read_corpus(folder))


def build(llm: LLM, prompt: Prompt | None = None, downsample_rate: int = 5) -> SpeechLLM:
    torch.manual_seed(0)
    encoder = build_encoder(FBankSettings())
    projector = LinearProjector(encoder.dim, llm.dim, downsample_rate, 16)
    return SpeechLLM(encoder, projector, llm, prompt or PaperPrompt())


@pytest.fixture
def innocent(load_llm: Callable[..., LLM], tmp_path: Path) -> Evidence:
    """A run with nothing wrong about it, but for its accuracy."""
    model = build(load_llm("llama"))
    return Evidence(model, SETTINGS, corpus(tmp_path / "speech", TEXTS), curve(100), 1e-3)


def test_nothing_is_found_where_nothing_is(innocent: Evidence) -> None:
    head, line = diagnose(innocent)
    assert head.startswith("step 100: next-token accuracy stays at 30%")
    assert "None of the known causes was found" in line
    assert "upper case" in line


def found(evidence: Evidence) -> str:
    """The one cause that is named."""
    _, line = diagnose(evidence)
    return line


def words(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer that has words of lower case only: others fall into letters."""
    letters = [chr(number) for number in range(32, 127)]
    whole = [f" {word}" for word in text.split()] + text.split()
    vocabulary = {name: n for n, name in enumerate(["<s>", "</s>", "<unk>", *letters, *whole])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.model.continuing_subword_prefix = ""  # type: ignore[attr-defined]  # it has one
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_upper_case_that_costs_tokens(innocent: Evidence, tmp_path: Path) -> None:
    loud = corpus(tmp_path / "loud", tuple(text.upper() for text in TEXTS))
    evidence = replace(innocent, cuts=loud)
    assert plateau.upper_case(evidence) is None  # to letters case makes no difference
    innocent.model.llm.tokenizer = words(" ".join(TEXTS))
    assert plateau.upper_case(innocent) is None
    line = plateau.upper_case(evidence)
    assert line is not None
    assert "transcripts are in upper case, 1.00 tokens a letter, and would be 0." in line


def test_an_end_that_is_the_unknown_token(innocent: Evidence) -> None:
    innocent.model.end_token = innocent.model.llm.tokenizer.unk_token_id
    assert "is the tokenizer's unknown token" in found(innocent)


@pytest.mark.parametrize("factor", [1e4, 1e-5])
def test_embeddings_out_of_scale(innocent: Evidence, factor: float) -> None:
    with torch.no_grad():
        for value in innocent.model.projector.linear2.parameters():
            value *= factor
    assert "audio embeddings have norm" in found(innocent)


def test_a_loss_that_falls_needs_time(innocent: Evidence) -> None:
    falling = [one | {"loss": one["loss"] * 0.998 ** one["step"]} for one in innocent.recent]
    assert "the loss still falls" in found(replace(innocent, recent=falling))
    assert found(replace(innocent, recent=falling[::-1])).startswith("  None")


@pytest.mark.parametrize(("update", "what"), [(1e-7, "too small"), (0.5, "too large")])
def test_a_learning_rate_out_of_range(innocent: Evidence, update: float, what: str) -> None:
    assert f"is {what}" in found(replace(innocent, update=update))


def test_gradients_that_spike(innocent: Evidence) -> None:
    spiked = [
        one | {"gradient_norm": 50.0 if one["step"] % 20 == 0 else 1.0} for one in innocent.recent
    ]
    assert "in 5 of 100 steps" in found(replace(innocent, recent=spiked))
    once = [one | {"gradient_norm": 50.0 if one["step"] == 9 else 1.0} for one in innocent.recent]
    assert found(replace(innocent, recent=once)).startswith("  None")


def test_a_stride_too_long(innocent: Evidence, load_llm: Callable[..., LLM]) -> None:
    line = found(replace(innocent, model=build(load_llm("llama"), downsample_rate=60)))
    assert "the stride is too long" in line


def test_transcripts_without_letters(innocent: Evidence, tmp_path: Path) -> None:
    empty = corpus(tmp_path / "empty", (*TEXTS, "...", " - "))
    assert "2 of 8 transcripts hold no letter" in found(replace(innocent, cuts=empty))


def test_transcripts_that_are_all_the_same(innocent: Evidence, tmp_path: Path) -> None:
    same = corpus(tmp_path / "same", (*TEXTS, "stop", "stop", "stop"))
    assert "4 of 9 transcripts are 'stop'" in found(replace(innocent, cuts=same))


def test_recordings_with_several_transcripts(innocent: Evidence) -> None:
    first, second, *_ = innocent.cuts
    contrary = [*innocent.cuts, replace(first, id="more", supervisions=second.supervisions)]
    line = found(replace(innocent, cuts=contrary))
    assert "1 of 6 recordings have several transcripts" in line
    again = [*innocent.cuts, replace(first, id="more")]  # repeated, as data.train may have it
    assert found(replace(innocent, cuts=again)).startswith("  None")


def test_padding_where_nothing_is_packed(innocent: Evidence) -> None:
    padded = replace(innocent, recent=curve(100, padding=0.6))
    assert "60% of the language model's positions are padding" in found(padded)
    innocent.model.pack()
    assert found(padded).startswith("  None")


def test_the_model_is_left_as_it_was(innocent: Evidence) -> None:
    innocent.model.train()
    before = {name: value.clone() for name, value in innocent.model.state_dict().items()}
    diagnose(innocent)
    assert innocent.model.training
    assert all(torch.equal(value, before[n]) for n, value in innocent.model.state_dict().items())


def test_what_cannot_be_checked_is_said(
    innocent: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> Any:
        raise IsthmusError("u0.wav is gone.")

    monkeypatch.setattr(plateau, "load_cut", broken)
    lines = diagnose(innocent)
    assert lines[-1] == "  not checked (scale of embeddings): u0.wav is gone."


def test_one_of_many_prompts_is_looked_at(innocent: Evidence, load_llm: Callable[..., LLM]) -> None:
    several = PaperPrompt(instruction=("Say it.", "", "Write."))
    line = found(replace(innocent, model=build(load_llm("llama"), several)))
    assert line.startswith("  None")


# --- when


def test_a_jump_is_expected_after_warm_up_and_a_tenth() -> None:
    def of(steps: int, warmup: int) -> int:
        return expected_step(SpeechTrainSettings(steps=steps, warmup_steps=warmup))

    assert (of(1000, 0), of(100_000, 1000), of(5000, 1000)) == (200, 10_000, 3000)


def test_what_a_plateau_is() -> None:
    assert on_plateau(curve(100))
    assert not on_plateau(curve(100, accuracy=0.7))
    rising = [one | {"accuracy": 0.2 + one["step"] / 1000} for one in curve(100)]
    assert not on_plateau(rising)


@pytest.fixture
def watch(innocent: Evidence) -> tuple[PlateauWatch, list[str]]:
    said: list[str] = []
    watch = PlateauWatch(SETTINGS, said.append)
    data = SimpleNamespace(cuts=innocent.cuts)
    watch.watch(cast(SpeechTask, SimpleNamespace(module=innocent.model, train=data)))
    return watch, said


def test_it_is_said_once_with_the_measured_update(
    watch: tuple[PlateauWatch, list[str]], innocent: Evidence
) -> None:
    observe, said = watch
    for line in curve(600):
        with torch.no_grad():  # a step of an optimiser that goes much too far
            for value in innocent.model.projector.parameters():
                value.mul_(1.1 if line["step"] % 2 else 1 / 1.1)
        observe(line)
    assert [line.split(":")[0] for line in said if line.startswith("step")] == ["step 201"]
    assert any("is too large" in line for line in said)


def test_a_fault_of_the_diagnosis_ends_no_training(
    watch: tuple[PlateauWatch, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*given: Any) -> Any:
        raise AssertionError("never thought of\nat all")

    monkeypatch.setattr(plateau, "CAUSES", (broken,))
    observe, said = watch
    for line in curve(600):
        observe(line)
    assert said == []
    (record,) = caplog.records
    assert record.message == (
        "why accuracy does not jump cannot be looked into: AssertionError: never thought of"
    )


def test_nothing_is_said_after_a_jump(watch: tuple[PlateauWatch, list[str]]) -> None:
    observe, said = watch
    for low, high in zip(curve(600, accuracy=0.1), curve(600, accuracy=0.5), strict=True):
        observe(low if low["step"] < 80 else high)
    assert said == []


def test_a_short_run_is_left_in_peace(watch: tuple[PlateauWatch, list[str]]) -> None:
    observe, said = watch
    for line in curve(199):
        observe(line)
    assert said == []


def test_the_verb_watches(
    isthmus: Callable[..., tuple[int, str, str]],
    model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    corpus(tmp_path / "speech", TEXTS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: stuck\nencoder: {type: fbank}\nprojector: {downsample_rate: 60, hidden: 8}\n"
        f"llm: {{path: {model_folder('llama')}}}\ndata: {{train: [{tmp_path / 'speech'}]}}\n"
        "train: {steps: 9, learning_rate: 1e-12, warmup_steps: 0, batch_size: 3}\n"
    )
    monkeypatch.setattr(plateau, "EARLIEST", 8)
    assert isthmus("train", recipe, "-o", tmp_path / "run")[0] == 0
    assert "step 9: next-token accuracy stays at" in caplog.text
    assert "the stride is too long" in caplog.text
    assert "is too small" in caplog.text
