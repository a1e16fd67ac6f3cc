"""Any Whisper with any Llama, in the hub's layout, by the commands a user types."""

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file

from isthmus.errors import IsthmusError
from isthmus.files import verify_folder
from isthmus.recipe import load_recipe
from isthmus.runs.loading import load_run
from isthmus.training import loop
from isthmus.training.runs import train

TEXTS = ("go left", "stop", "one two", "yes")


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Four different sounds with transcripts."""
    folder = tmp_path / "speech"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        time = np.arange(8000 + 1600 * i) / 16000
        sound = 0.3 * np.sin(2 * np.pi * (200 + 300 * i) * time * (1 + i * time))
        soundfile.write(folder / f"u{i}.flac", sound, 16000)
        (folder / f"u{i}.txt").write_text(text)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, speech: Path, model_folder: Callable[[str], Path]) -> Path:
    values = {
        "name": "whisper-llama",
        "encoder": {"type": "whisper", "path": str(model_folder("whisper"))},
        "projector": {"downsample_rate": 5, "hidden": 16},
        "llm": {"path": str(model_folder("llama"))},
        "data": {"train": [str(speech)], "dev": [str(speech)]},
        "train": {"steps": 4, "batch_size": 2, "eval_every": 2, "save_every": 1, "warmup_steps": 1},
        "decode": {"tokens_per_second": 5, "extra_tokens": 5, "batch_size": 3, "gate": "none"},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def curve(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {"step_seconds", "tflops", "memory_gb"}
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


def test_train_decode_score_transcribe(
    isthmus: Callable[..., tuple[int, str, str]], recipe: Path, speech: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    assert isthmus("train", recipe, "-o", whole)[0] == 0

    # --- only the projector is stored; frozen parts by name and checksum
    stored = load_file(whole / "best" / "trainable.safetensors")
    assert {name.split(".")[0] for name in stored} == {"projector"}
    sources = json.loads((whole / "parts.json").read_text())
    assert all(len(sums) == 64 for part in sources.values() for sums in part["sha256"].values())

    # --- decode and score
    code, out, _ = isthmus("evaluate", whole, speech, "--json", "-o", tmp_path / "decoded")
    assert code == 0
    report = json.loads(out)
    for figures in (report, report["sets"]["speech"]):
        assert {"wer", "cer", "sub", "ins", "del", "words", "interval"} <= figures.keys()
        assert figures["words"] == 6
    assert report["decode"]["beam_size"] == 4
    rows = [json.loads(line) for line in (tmp_path / "decoded/speech.jsonl").open()]
    assert {row["text"] for row in rows} == set(TEXTS)

    reference = tmp_path / "ref.jsonl"
    reference.write_text(
        "".join(json.dumps({"id": r["id"], "text": r["text"]}) + "\n" for r in rows)
    )
    code, out, _ = isthmus("score", reference, tmp_path / "decoded/speech.jsonl", "--json")
    assert code == 0
    assert json.loads(out)["wer"] == report["wer"]

    # --- a recording that cannot be read does not stop the others
    (tmp_path / "bad.wav").write_bytes(b"RIFF nothing")
    files = [speech / "u0.flac", tmp_path / "bad.wav", speech / "u1.flac"]
    code, out, err = isthmus("transcribe", *files, "--model", whole)
    assert code == 1
    assert len(out.splitlines()) == 2
    assert "bad.wav" in err


def test_killed_in_mid_epoch_and_resumed(
    isthmus: Callable[..., tuple[int, str, str]],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isthmus("train", recipe, "train.steps=6", "-o", tmp_path / "whole")[0] == 0
    step, calls = loop._step, []

    def dying(*arguments: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", dying)
    killed = load_recipe(recipe, ["train.steps=6"])
    with pytest.raises(KeyboardInterrupt):
        train(killed, tmp_path / "killed")
    monkeypatch.setattr(loop, "_step", step)
    torch.manual_seed(1234)
    assert isthmus("train", recipe, "train.steps=6", "-o", tmp_path / "killed", "--resume")[0] == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


def test_four_utterances_are_learnt_by_heart_and_the_text_follows_the_audio(
    isthmus: Callable[..., tuple[int, str, str]], recipe: Path, speech: Path, tmp_path: Path
) -> None:
    changes = ["llm.tune=full", "train.steps=250", "train.learning_rate=1e-2", "train.batch_size=4"]
    changes += ["train.save_every=250", "train.eval_every=50", "train.patience=100"]
    changes += ["projector.downsample_rate=2"]
    run = tmp_path / "run"
    assert isthmus("train", recipe, *changes, "-o", run)[0] == 0
    _, out, _ = isthmus("evaluate", run, speech, "--json")
    assert json.loads(out)["wer"] == 0.0
    for i, j in ((0, 1), (2, 3)):
        swap = tmp_path / f"u{i}-as-u{j}.flac"
        swap.write_bytes((speech / f"u{i}.flac").read_bytes())
        _, out, _ = isthmus("transcribe", swap, "--model", run)
        assert out.strip() == TEXTS[i] != TEXTS[j]


def test_runs_are_never_overwritten_unasked(
    isthmus: Callable[..., tuple[int, str, str]], recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert isthmus("train", recipe, "train.steps=1", "-o", run)[0] == 0
    before = (run / "best/trainable.safetensors").read_bytes()
    code, _, err = isthmus("train", recipe, "train.steps=1", "seed=5", "-o", run)
    assert code == 1
    assert "--resume" in err
    assert (run / "best/trainable.safetensors").read_bytes() == before
    code, _, err = isthmus("train", recipe, "train.steps=2", "-o", run, "--resume")
    assert code == 1
    assert "train.steps: 1 then, 2 now" in err
    assert "--allow-change train.steps" in err
    allowed = ("--resume", "--allow-change", "train.steps")
    assert isthmus("train", recipe, "train.steps=2", "-o", run, *allowed)[0] == 0
    assert len(curve(run)) == 2
    assert isthmus("train", recipe, "train.steps=1", "seed=5", "-o", run, "--overwrite")[0] == 0
    other = tmp_path / "notes"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    code, _, err = isthmus("train", recipe, "-o", other, "--overwrite")
    assert code == 1
    assert "no run folder" in err
    assert (other / "thesis.txt").exists()


def test_overwriting_removes_nothing_but_a_run(
    isthmus: Callable[..., tuple[int, str, str]],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    for name in ("recipe.yaml", "thesis.txt"):
        Path(name).write_text(recipe.read_text())
    arguments = ("train", recipe, "train.steps=1", "-o", ".", "--overwrite")
    assert isthmus(*arguments)[0] == 1
    Path("thesis.txt").unlink()  # a recipe alone is no run either
    assert isthmus(*arguments)[0] == 1
    assert Path("recipe.yaml").read_text() == recipe.read_text()
    Path("recipe.yaml").unlink()
    assert isthmus(*arguments)[0] == 0
    Path("model.bak").write_text("years of work")
    code, _, err = isthmus(*arguments)
    assert (code, "holds model.bak beside a run" in err) == (1, True)
    assert Path("best").is_dir()
    Path("model.bak").rename(tmp_path / "model.bak")
    Path(".best.partial").mkdir()
    assert isthmus(*arguments)[0] == 0
    assert not Path(".best.partial").exists()


def test_resuming_on_other_data_is_refused(
    isthmus: Callable[..., tuple[int, str, str]], recipe: Path, speech: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert isthmus("train", recipe, "train.steps=1", "-o", run)[0] == 0
    (speech / "u0.txt").write_text("go right")
    code, _, err = isthmus("train", recipe, "train.steps=1", "-o", run, "--resume")
    assert (code, "--allow-change data" in err) == (1, True)
    (speech / "u0.txt").write_text(TEXTS[0])
    assert isthmus("train", recipe, "train.steps=1", "-o", run, "--resume")[0] == 0


def test_what_was_allowed_to_change_is_in_the_history_of_the_run(
    isthmus: Callable[..., tuple[int, str, str]], recipe: Path, speech: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    history = run / "changes.jsonl"
    assert isthmus("train", recipe, "train.steps=1", "-o", run)[0] == 0
    assert isthmus("train", recipe, "train.steps=1", "-o", run, "--resume")[0] == 0
    assert not history.exists()
    more = ["train.steps=2", "-o", run, "--resume"]
    assert isthmus("train", recipe, *more)[0] == 1
    assert not history.exists()  # it was refused
    assert isthmus("train", recipe, *more, "--allow-change", "train.steps")[0] == 0
    (speech / "u0.txt").write_text("go right")
    assert isthmus("train", recipe, *more, "--allow-change", "data")[0] == 0
    steps, data = (json.loads(line) for line in history.read_text().splitlines())
    assert datetime.fromisoformat(steps.pop("date")).tzinfo is not None
    assert steps == {"step": 1, "key": "train.steps", "before": 1, "after": 2}
    assert (data["step"], data["key"]) == (2, "data")
    assert data["before"] != data["after"] == json.loads((run / "data.json").read_text())
    assert isthmus("train", recipe, "train.steps=1", "-o", run, "--overwrite")[0] == 0
    assert not history.exists()  # it was that of another run


def test_a_run_that_was_never_validated_can_be_decoded_with(
    isthmus: Callable[..., tuple[int, str, str]], recipe: Path, speech: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = ["train.steps=2", "data.dev=[]"]
    assert isthmus("train", recipe, *changes, "-o", run)[0] == 0
    best = load_run(run)[0].trained_state()
    shutil.rmtree(run / "best")
    newest = load_run(run)[0].trained_state()
    assert all(torch.equal(value, newest[name]) for name, value in best.items())
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(IsthmusError, match="no trained weights yet"):
        load_run(run)


def test_pretrained_models_are_sealed_and_gone_on_from(
    isthmus: Callable[..., tuple[int, str, str]], speech: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    train = {"steps": 1, "warmup_steps": 0}
    ctc = {
        "architecture": sizes | {"subsampling_factor": 4},
        "data": {"train": [str(speech)]},
        "train": train,
    }
    lm = {"architecture": sizes, "sentences": 4, "train": train}
    for verb, values in (("pretrain-ctc", ctc), ("pretrain-lm", lm)):
        file = tmp_path / f"{verb}.yaml"
        file.write_text(yaml.safe_dump(values | {"name": verb}))
        first, second = tmp_path / f"{verb}-1", tmp_path / f"{verb}-2"
        assert isthmus(verb, file, "-o", first)[0] == 0
        verify_folder(first / "model")
        on = [f"start_from={first / 'model'}", "architecture=null", "-o", second]
        assert isthmus(verb, file, *on)[0] == 0
        assert "start_from" in json.loads((second / "parts.json").read_text())
        weights = first / "model/model.safetensors"
        weights.write_bytes(weights.read_bytes() + b" ")
        code, _, err = isthmus(verb, file, *on, "--resume")
        assert (code, "other files of the start_from" in err) == (1, True)


def test_damaged_unfinished_and_foreign_runs_are_refused(
    isthmus: Callable[..., tuple[int, str, str]],
    recipe: Path,
    speech: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    assert isthmus("train", recipe, "train.steps=1", "-o", run)[0] == 0
    audio = speech / "u0.flac"
    weights = run / "best/trainable.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-3])
    code, _, err = isthmus("transcribe", audio, "--model", run)
    assert (code, "damaged" in err) == (1, True)
    weights.write_bytes(sound)
    parts = json.loads((run / "parts.json").read_text())
    parts["llm"]["sha256"] = {"model.safetensors": "0" * 64}
    (run / "parts.json").write_text(json.dumps(parts))
    code, _, err = isthmus("transcribe", audio, "--model", run)
    assert (code, "other files of the llm" in err) == (1, True)
    (run / "best/MANIFEST.json").unlink()
    (run / "parts.json").unlink()
    code, _, err = isthmus("transcribe", audio, "--model", run)
    assert (code, "parts.json is missing" in err) == (1, True)
    code, _, err = isthmus("transcribe", audio, "--model", tmp_path / "nothing")
    assert (code, "No run folder" in err) == (1, True)


def test_bad_utterances_are_counted_skipped_or_stop_the_run(
    isthmus: Callable[..., tuple[int, str, str]], recipe: Path, speech: Path, tmp_path: Path
) -> None:
    (speech / "u9.flac").write_bytes(b"not audio")
    (speech / "u9.txt").write_text("never heard")
    code, _, err = isthmus("train", recipe, "-o", tmp_path / "a")
    assert code == 1
    assert "u9" in err
    changes = ["data.max_bad_fraction=0.5", "train.steps=1"]
    assert isthmus("train", recipe, *changes, "-o", tmp_path / "b")[0] == 0
    assert isthmus("check", speech)[0] == 1
