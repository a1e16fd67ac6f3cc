"""Every way to train faster or in less memory keeps the numbers of the plain way."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from isthmus.build import build_model
from isthmus.errors import IsthmusError
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import Recipe
from isthmus.runs import feature_cache
from isthmus.training import runs
from isthmus.training.loop import METRICS
from isthmus.training.runs import Opening, train

STEPS = 6
TEXTS = ("go left", "stop now and then", "one two", "yes", "a longer sentence", "no")


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Six noises of 0.4 to 1.4 s."""
    folder = tmp_path / "speech"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, text in enumerate(TEXTS):
        soundfile.write(folder / f"u{i}.flac", rng.normal(0, 0.1, 6400 + 3200 * i), 16000)
        (folder / f"u{i}.txt").write_text(text)
    return folder


@pytest.fixture
def make(
    speech: Path, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Recipe]:
    """The plain recipe with changes: `data={...}`, `train={...}`, `llm={...}`, `prompt={...}`."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(speech.parent / "cache"))

    def recipe(encoder: str = "whisper", **changes: dict[str, Any]) -> Recipe:
        plain = {
            "encoder": {"type": encoder, "path": str(model_folder(encoder))},
            "projector": {"downsample_rate": 5, "hidden": 16},
            "llm": {"path": str(model_folder("llama"))},
            "prompt": {"template": "paper"},
            "data": {"train": [str(speech)], "dev": [str(speech)]},
            "train": {"steps": STEPS, "learning_rate": 1e-2, "warmup_steps": 2, "packing": False}
            | {"batch_size": 4, "eval_every": 3},
        }
        for name, values in changes.items():
            plain[name] = {**plain[name], **values}
        if "max_tokens" in plain["train"]:
            del plain["train"]["batch_size"]
        return Recipe.model_validate({"name": "fast", **plain})

    return recipe


def curve(recipe: Recipe, folder: Path) -> list[float]:
    """Training and validation losses."""
    train(recipe, folder)
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "dev_loss") if key in line]


LORA = {"tune": "lora", "lora": {"targets": ["q_proj", "v_proj"], "dropout": 0.0}}
FASTER: dict[str, dict[str, dict[str, Any]]] = {
    "packed": {"train": {"packing": True}},
    "packed-lora": {"train": {"packing": True}, "llm": LORA},
    "packed-full": {"train": {"packing": True}, "llm": {"tune": "full"}},
    "packed-audio-first": {"train": {"packing": True}, "prompt": {"template": "slam-llm"}},
    "packed-bare": {"train": {"packing": True}, "prompt": {"template": "bare"}},
    "cached": {"data": {"feature_cache": "float32"}},
    "checkpointed": {"train": {"checkpointing": True}, "llm": LORA},
    "workers": {"train": {"workers": 2}},
    "all": {
        "train": {"packing": True, "checkpointing": True, "workers": 1},
        "data": {"feature_cache": "float32"},
    },
}


@pytest.mark.parametrize("name", FASTER)
def test_the_curve_is_that_of_the_plain_way(
    name: str, make: Callable[..., Recipe], tmp_path: Path
) -> None:
    faster = FASTER[name]
    plain = {part: values for part, values in faster.items() if part in ("llm", "prompt")}
    expected = curve(make(**plain), tmp_path / "plain")
    found = curve(make(**faster), tmp_path / "faster")
    assert len(found) == STEPS + 2
    assert np.ptp(expected) > 0.05, "nothing was learnt, so nothing was compared"
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_another_number_would_be_seen(make: Callable[..., Recipe], tmp_path: Path) -> None:
    """A cache in bfloat16 is rounding enough."""
    expected = curve(make(), tmp_path / "plain")
    found = curve(make(data={"feature_cache": "bfloat16"}), tmp_path / "rounded")
    assert not np.allclose(found, expected, rtol=1e-5, atol=0)
    np.testing.assert_allclose(found, expected, rtol=1e-2)


def test_from_the_second_epoch_on_the_encoder_rests(
    make: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    alone = SpeechLLM.encode_alone

    def counting(model: SpeechLLM, waveform: torch.Tensor) -> torch.Tensor:
        encoded.append(len(waveform))
        return alone(model, waveform)

    monkeypatch.setattr(SpeechLLM, "encode_alone", counting)
    cached = {"feature_cache": "float32"}
    curve(make(data=cached), tmp_path / "first")
    assert len(encoded) == len(TEXTS)  # training and validation are on the same recordings
    curve(make(data=cached), tmp_path / "second")
    assert len(encoded) == len(TEXTS)
    speech = tmp_path / "speech"
    (speech / "u1.flac").write_bytes((speech / "u2.flac").read_bytes())
    curve(make(data=cached), tmp_path / "third")
    assert len(encoded) == len(TEXTS)  # what is heard is known, under another name
    soundfile.write(speech / "u1.flac", np.ones(8000) * 0.1, 16000)
    curve(make(data=cached), tmp_path / "fourth")
    assert len(encoded) == len(TEXTS) + 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"augment": {"gain": {}}}}, "data.augment changes the audio"),
        ({"data": {"join": {}}}, "data.join changes the audio"),
        ({"encoder": {"tune": "full"}}, "the encoder is trained"),
    ],
    ids=["augment", "join", "tune"],
)
def test_the_cache_turns_itself_off(
    changes: dict[str, dict[str, Any]],
    reason: str,
    make: Callable[..., Recipe],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = make(data={"feature_cache": "float32"} | changes.pop("data", {}))
    if changes:
        encoder = recipe.encoder.model_copy(update=changes["encoder"])
        recipe = recipe.model_copy(update={"encoder": encoder})
    with caplog.at_level(logging.WARNING):
        train(
            recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 1})}),
            tmp_path / "run",
        )
    assert f"feature cache: off, because {reason}" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_a_disk_without_room_for_the_cache_does_not_end_training(
    make: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = curve(make(data={"feature_cache": "float32"}), tmp_path / "run")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "full"))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache._Writer, "append", full)
    with caplog.at_level(logging.WARNING):
        found = curve(make(data={"feature_cache": "float32"}), tmp_path / "other")
    assert found == expected
    assert caplog.text.count("No space left") == 1


def test_packed_batches_have_no_padding(make: Callable[..., Recipe], tmp_path: Path) -> None:
    shares = {}
    for packing in (True, False):
        folder = tmp_path / str(packing)
        train(make(train={"packing": packing}), folder)
        lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        shares[packing] = max(line["padding"] for line in lines)
    assert shares[True] == 0.0 < shares[False]


def test_a_budget_of_positions_is_kept_and_no_utterance_lost(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make(train={"max_tokens": 220, "packing": True})
    model = build_model(recipe)
    data, _ = runs.speech_data(recipe, model)
    assert data.positions is not None
    for epoch in range(3):
        plan = data.plan(recipe.train, epoch)
        groups = [group for batch in plan for group in batch]
        assert sorted(groups) == [(index,) for index in range(len(TEXTS))]
        for batch in plan:
            sizes = [data.positions([data.durations[i]], TEXTS[i]) for (i,) in batch]
            assert sum(sizes) <= 220
    with pytest.raises(IsthmusError, match=r"train\.max_tokens allows 40 a batch"):
        runs.speech_data(make(train={"max_tokens": 40}), model)


def test_frozen_weights_are_held_in_half_precision(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make(train={"precision": "bfloat16", "packing": True})
    model = build_model(recipe)
    dtypes = {name: {v.dtype for v in part.parameters()} for name, part in model.named_children()}
    half, full = {torch.bfloat16}, {torch.float32}
    assert dtypes == {"encoder": half, "projector": full, "llm": half}
    expected = curve(make(), tmp_path / "plain")
    found = curve(recipe, tmp_path / "half")
    np.testing.assert_allclose(found, expected, rtol=0.05)
    stated = make(train={"precision": "bfloat16"}, llm={"dtype": "float32"})
    assert build_model(stated).llm.dtype == torch.float32


def test_a_quantised_model_still_learns(make: Callable[..., Recipe], tmp_path: Path) -> None:
    expected = curve(make(), tmp_path / "plain")
    found = curve(make(llm={"quantise": "int8"}, train={"packing": True}), tmp_path / "int8")
    np.testing.assert_allclose(found, expected, rtol=0.05)
    with pytest.raises(IsthmusError, match="takes frozen weights"):
        build_model(make(llm={"quantise": "int8", "tune": "full"}))


def test_a_recording_that_breaks_during_training_is_counted_and_left_out(
    make: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (tmp_path / "speech/u5.flac").read_bytes()
    (tmp_path / "speech/u5.flac").write_bytes(whole[: len(whole) // 2])  # its header is sound
    recipe = make(data={"max_bad_fraction": 0.2, "dev": []}, train={"batch_size": 1})
    with caplog.at_level(logging.WARNING):
        train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    bad = [line for line in lines if "rejected" in line]
    assert len(bad) == STEPS // len(TEXTS)  # once an epoch
    assert all("u5" in line["rejected"][0] and line["units"] == 0 for line in bad)
    assert "left out: " in caplog.text
    strict = make(data={"max_bad_fraction": 0.0, "dev": []})
    with pytest.raises(IsthmusError, match="1 of the epoch's 6 utterances could not be loaded"):
        train(strict, tmp_path / "strict")


def test_the_command_fills_the_cache_and_finds_what_is_broken(
    make: Callable[..., Recipe],
    isthmus: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(runs.dump_recipe(make()))
    code, _, err = isthmus("cache", file)
    assert (code, "data.feature_cache=bfloat16" in err) == (1, True)
    arguments = ("cache", file, "data.feature_cache=bfloat16", "--json")
    assert json.loads(isthmus(*arguments)[1])["sound"] == len(TEXTS)
    (shard,) = (tmp_path / "cache").rglob("*.bin")
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    found = json.loads(isthmus(*arguments, "--verify")[1])
    assert (found["sound"], found["broken"]) == (len(TEXTS) - 1, 1)
    found = json.loads(isthmus(*arguments)[1])
    assert found["sound"] == len(TEXTS)


def test_evaluation_reads_the_cache_that_training_filled(
    make: Callable[..., Recipe],
    isthmus: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(make(data={"feature_cache": "float32"}), tmp_path / "run")
    expected = json.loads(isthmus("evaluate", tmp_path / "run", tmp_path / "speech", "--json")[1])

    def fail(*arguments: Any) -> None:
        raise AssertionError("the encoder is at work")

    monkeypatch.setattr(SpeechLLM, "encode", fail)
    code, out, _ = isthmus("evaluate", tmp_path / "run", tmp_path / "speech", "--json")
    assert code == 0
    assert json.loads(out)["wer"] == expected["wer"]


def test_resuming_with_another_number_of_workers_is_a_change_to_be_allowed(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    whole = curve(make(), tmp_path / "whole")
    train(make(train={"steps": 4}), tmp_path / "run")
    changed = make(train={"workers": 1})
    with pytest.raises(IsthmusError, match=r"--allow-change train\.workers"):
        train(changed, tmp_path / "run", Opening(resume=True))
    found = Opening(resume=True, allow_change=("train",))
    train(changed, tmp_path / "run", found)
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [line["loss"] for line in lines[4:]] == [
        line["loss"] for line in map(json.loads, (tmp_path / "whole" / METRICS).open())
    ][4:]
    assert len(whole) == STEPS + 2
