"""A training does not see in which files its parts came."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from isthmus import files
from isthmus.errors import IsthmusError
from isthmus.model.weights import sha256
from isthmus.recipe import Recipe
from isthmus.runs.folder import PARTS
from isthmus.runs.loading import load_run
from isthmus.training.loop import METRICS
from isthmus.training.runs import train
from tests.layouts import dequantised, write_gguf, write_layout

STEPS = 10
LAYOUTS = ["bin", "sharded-bin", "sharded-safetensors"]
TEXTS = ("go left", "stop now and then", "one two", "yes")


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Four noises of 0.4 to 1 s."""
    folder = tmp_path / "speech"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, text in enumerate(TEXTS):
        soundfile.write(folder / f"u{i}.flac", rng.normal(0, 0.1, 6400 + 3200 * i), 16000)
        (folder / f"u{i}.txt").write_text(text)
    return folder


@pytest.fixture
def losses(speech: Path, tmp_path: Path) -> Callable[..., list[float]]:
    """The losses of ten steps with these parts, and a run folder named so."""

    def of(name: str, llm: Path, encoder: dict[str, Any], **more: Any) -> list[float]:
        recipe = Recipe.model_validate(
            {
                "name": name,
                "encoder": encoder,
                "projector": {"downsample_rate": 5, "hidden": 16},
                "llm": {"path": str(llm)},
                "prompt": {"template": "paper"},
                "data": {"train": [str(speech)]},
                "train": {"steps": STEPS, "learning_rate": 1e-2, "warmup_steps": 2}
                | {"batch_size": 2},
                **more,
            }
        )
        train(recipe, tmp_path / name)
        lines = (tmp_path / name / METRICS).read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    return of


def whisper(folder: Path) -> dict[str, Any]:
    return {"type": "whisper", "path": str(folder)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_the_single_safetensors(
    layout: str,
    model_folder: Callable[[str], Path],
    losses: Callable[..., list[float]],
    tmp_path: Path,
) -> None:
    llm, encoder = model_folder("llama-tied"), model_folder("whisper")
    expected = losses("single", llm, whisper(encoder))
    others = [write_layout(part, tmp_path / part.name, layout) for part in (llm, encoder)]
    found = losses(layout, others[0], whisper(others[1]))
    assert len(found) == STEPS
    assert np.ptp(expected) > 0.05, "nothing was learnt, so nothing was compared"
    assert found == expected
    parts = json.loads((tmp_path / layout / PARTS).read_text())
    for name, folder in zip(("llm", "encoder"), others, strict=True):
        weights = [file for kind in ("*.bin", "*.safetensors") for file in folder.glob(kind)]
        assert {file.name: sha256(file) for file in weights}.items() <= parts[name][
            "sha256"
        ].items()
        assert ("converted" in parts[name]) == layout.endswith("bin")
    model, _ = load_run(tmp_path / layout)
    assert not model.training


def test_losses_of_gguf_are_those_of_its_dequantised_folder(
    model_folder: Callable[[str], Path], losses: Callable[..., list[float]], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    file, encoder = tmp_path / "tiny.gguf", whisper(model_folder("whisper"))
    write_gguf(file)
    expected = losses("folder", dequantised(file, tmp_path / "dequantised"), encoder)
    assert losses("gguf", file, encoder) == expected
    assert np.ptp(expected) > 0.05
    parts = json.loads((tmp_path / "gguf" / PARTS).read_text())
    assert parts["llm"]["sha256"] == {"tiny.gguf": sha256(file)}
    write_gguf(file, seed=1)
    with pytest.raises(IsthmusError, match="other files of the llm"):
        load_run(tmp_path / "gguf")


@pytest.mark.slow
def test_losses_with_real_parts(
    parts: Path, losses: Callable[..., list[float]], tmp_path: Path
) -> None:
    llm, encoder = parts / "smollm2-135m-instruct", {"type": "fbank"}
    other = write_layout(llm, tmp_path / "llm", "sharded-bin")
    assert losses("sharded-bin", other, encoder) == losses("single", llm, encoder)


def test_letters_that_the_llm_cannot_spell(
    model_folder: Callable[[str], Path],
    losses: Callable[..., list[float]],
    speech: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (speech / "u1.txt").write_text("käse über straße")
    with caplog.at_level(logging.WARNING):
        losses("unspelt", model_folder("llama"), {"type": "fbank"})
    (said,) = [record.message for record in caplog.records if "spell" in record.message]
    for fact in ("ß ä ü", "25.0 %", "1 of 4", "<unk>"):
        assert fact in said


def test_an_llm_that_could_not_be_decoded_with(
    model_folder: Callable[[str], Path], losses: Callable[..., list[float]], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    config = AutoConfig.for_model("mamba", vocab_size=len(tokenizer), **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(IsthmusError, match=r"llm\.path: .*mamba.*not decoded"):
        losses("refused", tmp_path / "mamba", {"type": "fbank"})
    assert not (tmp_path / "refused").exists()


def test_a_run_whose_weights_are_no_numbers(
    model_folder: Callable[[str], Path],
    losses: Callable[..., list[float]],
    tmp_path: Path,
    isthmus: Callable[..., tuple[int, str, str]],
    speech: Path,
) -> None:
    losses("run", model_folder("llama"), {"type": "fbank"})
    best = tmp_path / "run" / "best"
    trained = load_file(best / "trainable.safetensors")
    name = min(trained)
    trained[name].view(-1)[0] = torch.nan

    def fill(folder: Path) -> None:
        save_file(trained, folder / "trainable.safetensors")
        (folder / "state.json").write_text((best / "state.json").read_text())

    files.write_folder(best, fill)
    code, out, err = isthmus("transcribe", "--model", tmp_path / "run", speech / "u0.flac")
    assert (code, out) == (1, "")
    assert "NaN" in err
    assert name in err
    with pytest.raises(IsthmusError, match="NaN"):
        load_run(tmp_path / "run")
