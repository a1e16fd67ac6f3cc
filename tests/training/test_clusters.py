"""k-means, the making of units, and a run with each projector."""

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
from isthmus.errors import IsthmusError
from isthmus.model.parts import sources
from isthmus.model.units import Units, files_digest
from isthmus.recipe import Recipe, dump_recipe, load_recipe
from isthmus.runs.loading import load_run
from isthmus.training.clusters import kmeans, make_units
from isthmus.training.runs import Opening, train

SMALL = {"heads": 2, "hidden": 8}
RUNS: dict[str, dict[str, Any]] = {
    "linear": {"stride_ms": 80, "hidden": None},  # the type may be left out
    "conv1d": {"type": "conv1d", "hidden": 8},
    "qformer": {"type": "qformer", **SMALL, "segment_positions": True},
    "transformer": {"type": "transformer", **SMALL},
    "ctc": {"type": "ctc", "hidden": 8},
    "units": {"type": "units"},
}


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Three sounds of different pitch."""
    folder = tmp_path / "speech"
    folder.mkdir()
    for i in range(3):
        time = np.arange(16_000 + 1600 * i) / 16_000
        sound = 0.3 * np.sin(2 * np.pi * 300 * (1 + i) * time * (1 + time))
        soundfile.write(folder / f"u{i}.flac", sound, 16_000)
        (folder / f"u{i}.txt").write_text("abc"[i])
    return folder


@pytest.fixture
def recipe(speech: Path, model_folder: Callable[[str], Path]) -> Callable[..., Recipe]:
    def build(projector: dict[str, Any], **changes: Any) -> Recipe:
        values = {
            "name": "small",
            "encoder": {"type": "conformer", "path": str(model_folder("conformer"))},
            "projector": projector,
            "llm": {"path": str(model_folder("llama"))},
            "data": {"train": [str(speech)]},
            "train": {"steps": 2, "batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-2},
        }
        return Recipe.model_validate(values | changes)

    return build


def test_kmeans_finds_what_is_apart() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    frames = (centres[:, None] + torch.randn(4, 50, 2)).flatten(0, 1)
    found = kmeans(frames, 4, seed=1)
    assert torch.cdist(centres, found).min(dim=1).values.max() < 0.5
    torch.manual_seed(5)
    assert torch.equal(kmeans(frames, 4, seed=1), found)
    assert not all(torch.equal(kmeans(frames, 4, seed=seed), found) for seed in range(6))
    assert kmeans(torch.ones(5, 2), 3, seed=0).isfinite().all()  # fewer different ones than asked


def test_units_are_made_of_training_data_and_trained_with(
    isthmus: Callable[..., tuple[int, str, str]], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    file, other, written = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "recipe"))
    settings = recipe({"type": "units", "path": str(file)})
    written.write_text(dump_recipe(settings))
    code, out, _ = isthmus("units", written, "--clusters", 6, "--output", file, "--json")
    assert code == 0
    frames = sum(build_model(recipe({})).encoder.output_length(16_000 + 1600 * i) for i in range(3))
    assert json.loads(out) == {"file": str(file), "clusters": 6, "frames": frames}
    make_units(settings, other, 6)
    assert file.read_bytes() == other.read_bytes()
    units = Units.load(file)
    assert units.centroids.shape == (6, 16)
    assert units.sha256 == files_digest(sources(settings.encoder))
    assert build_model(settings).projector.output_length(7) == 7
    with pytest.raises(IsthmusError, match=r"exists\. Name another file"):
        make_units(settings, file, 6)
    with pytest.raises(IsthmusError, match=f"gives {frames} frames, too few for 1000 units"):
        make_units(settings, tmp_path / "c.safetensors", 1000)


def test_data_are_looked_up_before_the_encoder(
    recipe: Callable[..., Recipe], tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    absent = {"type": "conformer", "path": "nowhere/to-be-found"}
    file = tmp_path / "units.safetensors"
    lost = recipe({}, encoder=absent, data={"train": [str(tmp_path / "lost.jsonl")]})
    with pytest.raises(IsthmusError, match=r"lost\.jsonl"):
        make_units(lost, file, 6)
    data = dict(lost.data) | {"train": recipe({}).data.train, "languages": ["en"]}
    with pytest.raises(IsthmusError, match=r"data\.languages names 'en'"):
        make_units(recipe({}, encoder=absent, data=data), file, 6)


def test_what_the_encoder_cannot_take(
    recipe: Callable[..., Recipe], speech: Path, tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    soundfile.write(speech / "long.flac", np.zeros(31 * 16_000), 16_000)
    (speech / "long.txt").write_text("d")
    whisper = {"type": "whisper", "path": str(model_folder("whisper"))}
    data = {"train": [str(speech)], "max_seconds": 40}
    file = tmp_path / "units.safetensors"
    with pytest.raises(IsthmusError, match=r"1 of 4 utterances of data\.train are longer than"):
        make_units(recipe({}, encoder=whisper, data=data), file, 6)
    some = recipe({}, encoder=whisper, data=data | {"max_bad_fraction": 0.3})
    assert make_units(some, file, 6) == 50 + 55 + 60  # of the other three


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_each_projector(
    name: str,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = {"path": "units.safetensors"} if name == "units" else {}
    chosen = recipe(RUNS[name] | path)
    if name == "units":
        make_units(chosen, Path("units.safetensors"), 6)
    run = tmp_path / "run"
    train(chosen, run)
    monkeypatch.chdir("/")  # what the run was made of is found from anywhere
    model, again = load_run(run)
    assert again.projector.type == name
    torch.manual_seed(0)
    untrained = build_model(
        chosen.model_copy(update={"projector": again.projector})
    ).projector.eval()
    state = model.projector.state_dict()
    assert state.keys() == untrained.state_dict().keys()
    torch.manual_seed(1)
    frames = torch.randn(30, 16)
    with torch.no_grad():
        (audio,) = model.project([frames])
        untrained.load_state_dict(state)
        expected, (count,) = untrained(frames[None], torch.tensor([30]))
    assert torch.equal(audio, expected[0, :count])
    with pytest.raises(IsthmusError, match="holds a run already"):
        train(again, run)
    train(again, run, Opening(resume=True))  # nothing differs that would be refused


def test_a_run_knows_its_units(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    file, run = tmp_path / "units.safetensors", tmp_path / "run"
    chosen = recipe({"type": "units", "path": str(file)})
    make_units(chosen, file, 6)
    train(chosen, run)
    parts = json.loads((run / "parts.json").read_text())
    assert parts.keys() == {"encoder", "projector", "llm"}
    file.unlink()
    make_units(chosen, file, 5)
    with pytest.raises(IsthmusError, match="other files of the projector"):
        load_run(run)


def test_what_does_not_fit_is_said_before_the_llm_is_loaded(recipe: Callable[..., Recipe]) -> None:
    chosen = recipe({"stride_ms": 50}, llm={"path": "nowhere/to-be-found"})
    with pytest.raises(IsthmusError, match=r"projector\.stride_ms is 50"):
        build_model(chosen)


def test_a_run_knows_both_encoders(
    recipe: Callable[..., Recipe], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    parts = {
        "first": {"type": "conformer", "path": str(model_folder("conformer"))},
        "second": {"type": "whisper", "path": str(model_folder("whisper"))},
    }
    chosen = recipe({"hidden": 8}, encoder={"type": "pair", **parts})
    run = tmp_path / "run"
    train(chosen, run)
    recorded = json.loads((run / "parts.json").read_text())
    assert recorded.keys() == {"encoder.first", "encoder.second", "llm"}
    recorded["encoder.second"]["commit"] = "c0ffee"  # as if it were of the hub
    (run / "parts.json").write_text(json.dumps(recorded))
    model, again = load_run(run)
    assert model.encoder.dim == 32
    assert (again.encoder.first.revision, again.encoder.second.revision) == (None, "c0ffee")
    recorded["encoder.second"]["sha256"]["config.json"] = "0" * 64
    (run / "parts.json").write_text(json.dumps(recorded))
    with pytest.raises(IsthmusError, match=r"other files of the encoder\.second"):
        load_run(run)


def test_type_of_a_recipe_file_may_be_left_out(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    values = yaml.safe_load(dump_recipe(recipe({})))
    del values["projector"]["type"]
    file.write_text(yaml.safe_dump(values))
    assert load_recipe(file).projector.type == "linear"
    changed = load_recipe(file, ["projector={type: ctc, mode: drop}"])
    assert changed.projector.type == "ctc"
