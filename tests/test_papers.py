"""Every recipe of the papers, built without weights at its true size; all run by a tiny twin.

A twin is the recipe with tiny random models of the same kind, four sounds for data, and few steps.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

from isthmus.build import build_model
from isthmus.model.presets import on_meta
from isthmus.model.units import Units
from isthmus.recipe import CTCRecipe, checked_settings, load_recipe
from isthmus.recipe_files import read_recipe, shipped_recipes

NAMES = sorted(name for name in shipped_recipes() if not name.startswith("tiny/"))
PRETRAINING = {"fathullah/conformer"}
SYSTEMS = sorted(set(NAMES) - PRETRAINING)
PAPERS = [name for name in SYSTEMS if not name.startswith("real/")]
LANGUAGES = ["en", "de"]
TEXTS = ("go left", "stop", "one two", "yes")
TWINS = {"whisper": "whisper", "hubert": "hubert-layer", "wavlm": "wavlm-layer"}
BATCHES = ("batch_size", "max_duration", "max_tokens")

Run = Callable[..., tuple[int, str, str]]
Folder = Callable[[str], Path]


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A manifest of four sounds in two languages."""
    lines = []
    for i, text in enumerate(TEXTS):
        time = np.arange(16000 + 1600 * i) / 16000
        sound = 0.3 * np.sin(2 * np.pi * (200 + 300 * i) * time * (1 + i * time))
        soundfile.write(tmp_path / f"u{i}.flac", sound, 16000)
        about = {"id": f"u{i}", "audio": f"u{i}.flac", "duration": len(sound) / 16000}
        lines.append(json.dumps(about | {"text": text, "language": LANGUAGES[i % 2]}) + "\n")
    manifest = tmp_path / "speech.jsonl"
    manifest.write_text("".join(lines))
    return manifest


def small(values: dict[str, Any], speech: Path) -> dict[str, Any]:
    """The recipe's own settings but for what is only a matter of size."""
    languages = {"languages": LANGUAGES} if "languages" in values["data"] else {}
    train = {key: value for key, value in values["train"].items() if key not in BATCHES}
    few = {"steps": 2, "warmup_steps": 1, "batch_size": 2, "eval_every": 2, "save_every": 2}
    return values | {
        "start_from": None,
        "data": values["data"] | languages | {"train": [str(speech)], "dev": [str(speech)]},
        "train": train | few,
    }


def tiny_encoder(values: dict[str, Any], model_folder: Folder) -> dict[str, Any]:
    if values["type"] == "pair":
        parts = {name: tiny_encoder(values[name], model_folder) for name in ("first", "second")}
        return values | parts
    kind = TWINS.get(values["type"], values["type"])
    return values | {"path": str(model_folder(kind))}


@pytest.mark.parametrize("name", PAPERS)
def test_a_system_is_built_at_its_true_size(name: str, tmp_path: Path) -> None:
    units = tmp_path / "units.safetensors"
    Units(torch.zeros(1000, 768), "facebook/hubert-base-ls960", "0" * 64).save(units)
    _, values = read_recipe(name, [])
    changes = ["encoder.path=conformer:18"] if values["encoder"]["type"] == "conformer" else []
    changes += [f"projector.path={units}"] if values["projector"]["type"] == "units" else []
    with on_meta():
        model = build_model(load_recipe(name, changes))
    sizes = {n: sum(p.numel() for p in part.parameters()) for n, part in model.named_children()}
    assert sizes["encoder"] > 9e7
    assert sizes["llm"] > 1e9
    assert 1e5 < sizes["projector"] < 1e8


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_twin_trains_resumes_and_reads(
    name: str, speech: Path, tmp_path: Path, model_folder: Folder, isthmus: Run
) -> None:
    _, values = read_recipe(name, [])
    twin = small(values, speech)
    twin["encoder"] = tiny_encoder(values["encoder"], model_folder)
    twin["llm"] = values["llm"] | {"path": str(model_folder("llama"))}
    twin["decode"] = values.get("decode", {}) | {
        "tokens_per_second": 4,
        "extra_tokens": 4,
        "gate": "none",
    }
    file, run = tmp_path / "twin.yaml", tmp_path / "run"
    if values["projector"]["type"] == "units":
        units = tmp_path / "units.safetensors"
        twin["projector"] = values["projector"] | {"path": str(units)}
        file.write_text(yaml.safe_dump(twin))
        assert isthmus("units", file, "--clusters", 8, "--output", units)[0] == 0
    file.write_text(yaml.safe_dump(twin))

    code, _, errors = isthmus("train", file, "-o", run)
    assert code == 0, errors
    more = ["--resume", "--allow-change", "train.steps"]
    assert isthmus("train", file, "train.steps=4", "-o", run, *more)[0] == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    code, _, errors = isthmus("transcribe", speech.parent / "u0.flac", "--model", run, "--json")
    assert code == 0, errors


@pytest.mark.parametrize("name", sorted(PRETRAINING))
def test_the_twin_of_an_encoder(name: str, speech: Path, tmp_path: Path, isthmus: Run) -> None:
    _, values = read_recipe(name, [])
    checked_settings(CTCRecipe, values, name)
    twin = small(values, speech)
    few = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    twin["architecture"] = values["architecture"] | few | {"intermediate_size": 32}
    twin["units"] = values["units"] | {"size": 16}
    file, run = tmp_path / "twin.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(twin))
    code, _, errors = isthmus("pretrain-ctc", file, "-o", run)
    assert code == 0, errors
    assert (run / "model" / "config.json").is_file()
