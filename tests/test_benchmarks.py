"""The benchmarks run, at tiny sizes, and compare what is the same; no speed is asserted."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.recipe import Recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """benchmarks/training.py, imported as the script finds its neighbours."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("training")
    monkeypatch.setenv(module.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(module, "WORDS", 500)
    return module


@pytest.fixture
def folder(training: ModuleType, tmp_path: Path) -> Path:
    """Tiny models, and four utterances of unlike lengths."""
    training.write_models(training.QUICK, tmp_path)
    training.write_speech([0.6, 1.1, 2.3, 1.7], np.random.default_rng(0), tmp_path)
    return tmp_path


def test_time_and_padding_are_measured(training: ModuleType, tmp_path: Path) -> None:
    rows = training.measure_time(training.QUICK, 1, tmp_path)
    assert [row.floor for row in rows] == [0.55, 0.25, 0.01]
    assert all(row.measured > 0 for row in rows[:2])
    assert rows[2].measured == 0  # packed: no padding at all


def test_both_sides_do_the_same_work(training: ModuleType, folder: Path) -> None:
    """The same mean loss of the same batch, before and after a step."""
    recipe = training.recipe_of(folder, training.QUICK, "float32")
    slow, fast = training.Slow(recipe), training.Fast(recipe)
    losses: list[list[float]] = []
    for way in (slow, fast):
        losses.append([step() for number in (1, 2) for step in way.epoch(number)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][1]
    assert slow.padding > 0


def test_the_padding_of_the_baseline_is_two_sided(training: ModuleType, folder: Path) -> None:
    slow = training.Slow(training.recipe_of(folder, training.QUICK, "float32"))
    waveforms = [np.zeros(16_000, np.float32), np.zeros(32_000, np.float32)]
    words = [training.word(1), training.word(2)]
    batch = slow.trainer.collate(waveforms, [" ".join(words), words[0]])
    (first, second), left = batch.attention_mask.tolist(), 10  # embeddings the first lacks
    assert first == [0] * left + [1] * (len(first) - left)
    assert second == [1] * (len(second) - 1) + [0]
    assert [(row >= 0).sum().item() for row in batch.labels] == [3, 2]  # and the end token
    assert batch.modality_mask.sum(dim=1).tolist() == [9, 19]


def test_a_wrong_mask_would_be_seen(training: ModuleType, folder: Path) -> None:
    """The comparison of losses notices a baseline that attends to its padding."""
    recipe = training.recipe_of(folder, training.QUICK, "float32")
    slow, fast = training.Slow(recipe), training.Fast(recipe)
    collate = slow.trainer.collate

    def careless(*arguments: Any) -> Any:
        batch = collate(*arguments)
        batch.attention_mask.fill_(1)
        return batch

    slow.trainer.collate = careless
    (one,), (other,) = slow.epoch(1), fast.epoch(1)
    assert one() != pytest.approx(other(), rel=1e-5)


def test_the_peak_of_memory_is_that_of_the_tensors(
    training: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def step() -> float:
        first = torch.zeros(1000, 1000)
        del first
        return float(torch.zeros(500, 1000).sum())

    assert 4_000_000 <= training.peak_bytes(step) < 4_010_000
    training.print_peak("fp32", folder)
    assert json.loads(capsys.readouterr().out)["bytes"] > 1_000_000


def test_the_loss_curves_are_equal(training: ModuleType, tmp_path: Path) -> None:
    (row,) = training.measure_curve(training.QUICK, 3, tmp_path)
    assert row.measured <= row.floor


def test_durations_are_those_of_librispeech(training: ModuleType) -> None:
    drawn = training.durations(5000, np.random.default_rng(0))
    assert 12.1 < np.mean(drawn) < 12.7
    assert max(drawn) < 25


@pytest.fixture
def real(training: ModuleType) -> ModuleType:
    return importlib.import_module("real")


def test_the_ways_on_real_parts_do_the_same_work(
    real: ModuleType, training: ModuleType, folder: Path
) -> None:
    """Where nothing is padded to 30 s, all have one loss, before and after a step."""
    recipe = training.recipe_of(folder, training.QUICK, "bfloat16", precision="bfloat16")
    steps = real.ways(recipe)
    losses = {name: [own[0](), own[0]()] for name, own in steps.items()}
    for found in losses.values():
        assert found == pytest.approx(losses[real.THEIRS], rel=5e-3)
        assert found[0] != found[1]


def test_whisper_keeps_its_padding_in_the_baseline(
    real: ModuleType, training: ModuleType, folder: Path, model_folder: Callable[[str], Path]
) -> None:
    recipe = training.recipe_of(folder, training.QUICK, "float32")
    encoder = {"type": "whisper", "path": str(model_folder("whisper"))}
    values = recipe.model_dump(exclude={"encoder"}, exclude_defaults=True)
    trainer = real.theirs(Recipe.model_validate(values | {"encoder": encoder}), None)
    batch = trainer.collate([np.zeros(16_000, np.float32)], [training.word(1)])
    assert batch.modality_mask.sum() == 1500 // 5
    assert trainer.step(batch)[0] > 0


def test_time_on_real_parts_is_measured(
    real: ModuleType, training: ModuleType, folder: Path
) -> None:
    half = {"precision": "bfloat16"}
    recipe = training.recipe_of(folder, training.QUICK, "bfloat16", **half)
    *ratios, outside = real.measure_step(recipe, 1)
    assert [row.floor for row in ratios] == [0.6, 0.07, 0.12]
    assert all(row.measured > 0 for row in ratios)
    assert 0 < outside.measured < 1
    steps = dict.fromkeys(("steps", "save_every", "eval_every"), 20)
    recipe = training.recipe_of(folder, training.QUICK, "bfloat16", **half, **steps)
    (row,) = real.measure_level(recipe, folder)
    assert row.measured > 0


def test_full_size_runs_tiny(
    training: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full_size = importlib.import_module("full_size")
    output = tmp_path / "result.json"
    options = {"sizes": "tiny", "device": "cpu", "tokens": 200, "steps": 1, "output": output}
    given = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["full_size.py", *given])
    full_size.main()
    result = json.loads(output.read_text())
    assert len(result["ways"]) == 5
    assert all(way["audio_seconds_per_second"] > 0 for way in result["ways"])
    assert result["mfu"]["measured"] is None  # the peak of a CPU is not known
    assert "| frames cached, checkpointing |" in capsys.readouterr().out


def test_full_size_decodes_tiny(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_size = importlib.import_module("full_size")
    output = tmp_path / "result.json"
    options = {"sizes": "tiny", "device": "cpu", "utterances": 5, "batch-size": 2, "output": output}
    given = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["full_size.py", "--decode", *given])
    full_size.main()
    result = json.loads(output.read_text())
    assert result["utterances"] == 5
    assert 0 <= result["same_texts"] <= 5  # random weights in bfloat16 tie
    assert result["rtfx"]["measured"] > 0
    assert result["times_generate"]["measured"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_full_size_says_that_it_needs_a_gpu(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["full_size.py"])
    importlib.import_module("full_size").main()
    assert capsys.readouterr().out == "skipped: needs a CUDA GPU\n"
