"""Parts come from the hub: every family, at the commit that was asked for, whole or not at all."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.errors import IsthmusError
from isthmus.model.llm import LLMSettings
from isthmus.model.parts import resolve, source
from tests.hub import TOKEN, StandInHub

ModelFolder = Callable[[str], Path]
ENCODERS = ["whisper", "hubert-group", "hubert-layer", "wavlm-group", "wav2vec2-layer", "parakeet"]
LLMS = ["llama", "phi", "bloom", "qwen2", "gpt-neox", "gemma"]
WEIGHTS = "model.safetensors"


@pytest.fixture
def other_weights(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a model folder whose weights differ."""

    def changed(folder: Path) -> Path:
        copy = tmp_path / "other"
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        weights = {name: value + 1 for name, value in load_file(folder / WEIGHTS).items()}
        save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
        return copy

    return changed


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def cached_files(tmp_path: Path) -> set[str]:
    return {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_of_every_family(
    hub: StandInHub,
    model_folder: ModelFolder,
    encoder_settings: Callable[[str], Any],
    waves: Callable[..., Tensor],
    name: str,
) -> None:
    """The folder gives the frames of transformers (test_encoder.py), and the hub those of it."""
    hub.publish(f"someone/{name}", model_folder(name))
    local = encoder_settings(name)
    loaded = local.model_copy(update={"path": f"someone/{name}"}).build().eval()
    batch, lengths = waves(16_000)[None], torch.tensor([16_000])
    with torch.no_grad():
        frames, num_frames = loaded(batch, lengths)
        expected, expected_frames = local.build().eval()(batch, lengths)
    assert torch.equal(num_frames, expected_frames)
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LLMS)
def test_a_language_model_of_every_family(
    hub: StandInHub, model_folder: ModelFolder, name: str
) -> None:
    hub.publish(f"someone/{name}", model_folder(name))
    llm = LLMSettings(path=f"someone/{name}").build().eval()
    tokens = torch.tensor([llm.tokenizer.encode("what is heard", add_special_tokens=False)])
    network = AutoModelForCausalLM.from_pretrained(model_folder(name)).eval()
    with torch.no_grad():
        mask, keep = torch.ones_like(tokens), torch.arange(tokens.shape[1])
        logits = llm.logits(llm.embed(tokens), mask, keep)
        torch.testing.assert_close(logits, network(tokens).logits, atol=1e-5, rtol=0)
    assert llm.tokenizer.decode(tokens[0]) == "what is heard"


def test_only_what_is_read_is_downloaded(
    hub: StandInHub, model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    for file in model_folder("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "modeling_own.py").write_text("raise SystemExit('foreign code ran')")
    hub.publish("someone/llama", folder)
    LLMSettings(path="someone/llama").build()
    asked = {request.rpartition("/")[2] for request in hub.requests}
    assert WEIGHTS in cached_files(tmp_path) & asked
    assert not {"pytorch_model.bin", "modeling_own.py", "README.md"} & (
        cached_files(tmp_path) | asked
    )
    before = hub.requests.total()
    LLMSettings(path="someone/llama").build()
    assert hub.requests.total() - before <= 2  # whether `main` has moved; no file again


def test_a_pinned_revision_is_kept(
    hub: StandInHub,
    model_folder: ModelFolder,
    other_weights: Callable[[Path], Path],
) -> None:
    old = hub.publish("someone/llama", model_folder("llama"))
    hub.publish("someone/llama", model_folder("llama"), "v1")
    new = hub.publish("someone/llama", other_weights(model_folder("llama")))
    assert old != new
    sums = {}
    for revision, commit in ((None, new), (old, old), ("v1", old), (new, new)):
        found = source("someone/llama", revision)
        assert found.commit == commit
        weights = resolve("someone/llama", revision) / WEIGHTS
        assert found.sha256[WEIGHTS] == hashlib.sha256(weights.read_bytes()).hexdigest()
        sums[commit] = found.sha256[WEIGHTS]
    assert sums[old] != sums[new]


def test_a_pull_requests_weights(hub: StandInHub, model_folder: ModelFolder) -> None:
    """Where the converter of the hub leaves safetensors of old models."""
    commit = hub.publish("someone/llama", model_folder("llama"), "refs/pr/3")
    assert source("someone/llama", "refs/pr/3").commit == commit


def test_pickles_are_refused(hub: StandInHub, model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    for file in model_folder("llama").glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    hub.publish("someone/llama", folder)
    with pytest.raises(IsthmusError, match=r"no safetensors weights.*revision.*refs/pr/"):
        LLMSettings(path="someone/llama").build()
    assert "pytorch_model.bin" not in cached_files(tmp_path)


def test_offline_with_a_filled_cache(
    hub: StandInHub, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.publish("someone/llama", model_folder("llama"))
    online = source("someone/llama")
    asked = hub.requests.total()
    offline(monkeypatch)
    LLMSettings(path="someone/llama").build()
    assert source("someone/llama") == source("someone/llama", commit) == online
    assert hub.requests.total() == asked


def test_offline_without(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(IsthmusError, match=r"someone/llama.*HF_HUB_OFFLINE") as caught:
        LLMSettings(path="someone/llama").build()
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_gone_leaves_the_cache(
    hub: StandInHub, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("someone/llama", model_folder("llama"))
    folder = resolve("someone/llama")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert resolve("someone/llama") == folder
    with pytest.raises(IsthmusError, match=r"someone/other.*[Cc]onnection"):
        resolve("someone/other")


def test_a_broken_download_goes_on(
    hub: StandInHub, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.publish("someone/llama", model_folder("llama"))
    hub.cuts[WEIGHTS] = 2
    found = source("someone/llama")
    assert found.sha256 == source(str(model_folder("llama"))).sha256
    assert hub.cuts[WEIGHTS] == 0


def test_a_download_that_stays_broken(
    hub: StandInHub, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.publish("someone/llama", model_folder("llama"))
    hub.cuts[WEIGHTS], hub.cut_at = 100, 0.0
    with pytest.raises(IsthmusError, match=r"someone/llama.*again") as caught:
        LLMSettings(path="someone/llama").build()
    assert "\n" not in str(caught.value)
    assert WEIGHTS not in cached_files(tmp_path)
    with monkeypatch.context() as patch:
        offline(patch)
        with pytest.raises(IsthmusError, match="someone/llama"):  # what is there is not taken
            resolve("someone/llama")
    hub.cuts.clear()
    assert source("someone/llama").sha256 == source(str(model_folder("llama"))).sha256


@pytest.mark.parametrize("token", [None, "hf_of_someone_else"])
def test_a_gated_repository(
    hub: StandInHub,
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
) -> None:
    hub.publish("someone/llama", model_folder("llama"))
    hub.repositories["someone/llama"].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        IsthmusError, match=r"someone/llama.*terms at .*/someone/llama.*hf auth login"
    ) as caught:
        LLMSettings(path="someone/llama").build()
    assert "\n" not in str(caught.value)


def test_a_gated_repository_with_a_token(
    hub: StandInHub, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("someone/llama", model_folder("llama"))
    hub.repositories["someone/llama"].gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert LLMSettings(path="someone/llama").build().dim == 16


def test_a_missing_repository(hub: StandInHub) -> None:
    with pytest.raises(IsthmusError, match=r"someone/lama.*Correct the name.*private") as caught:
        LLMSettings(path="someone/lama").build()
    assert "\n" not in str(caught.value)


def test_a_missing_revision(hub: StandInHub, model_folder: ModelFolder) -> None:
    hub.publish("someone/llama", model_folder("llama"))
    with pytest.raises(IsthmusError, match=r"someone/llama at revision 'v9'.*no such revision"):
        LLMSettings(path="someone/llama", revision="v9").build()


def test_a_run_records_what_it_downloaded(
    hub: StandInHub,
    model_folder: ModelFolder,
    other_weights: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    """The real command line in a process of its own, with nothing but the environment set."""
    commits = {
        "encoder": hub.publish("someone/hubert", model_folder("hubert-layer")),
        "llm": hub.publish("someone/llama", model_folder("llama")),
    }
    hub.publish("someone/llama", other_weights(model_folder("llama")))  # main has moved on
    recipe = {
        "name": "downloaded",
        "encoder": {"type": "hubert", "path": "someone/hubert"},
        "llm": {"path": "someone/llama", "revision": commits["llm"]},
    }
    program = (
        "import json, sys; from pathlib import Path; from isthmus.recipe import Recipe;"
        "from isthmus.training.parallel import Ranks;"
        "from isthmus.training.runs import Opening, RunFolder;"
        "recipe = Recipe.model_validate_json(sys.argv[1]); recipe.build()\n"
        "with Ranks() as ranks:\n"
        "    with RunFolder(recipe, Path(sys.argv[2]), Opening(), ranks) as run: run.begin()"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment["HF_HUB_OFFLINE"] = "0"
    run = tmp_path / "run"
    command = [sys.executable, "-c", program, json.dumps(recipe), str(run)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    parts = json.loads((run / "parts.json").read_text())
    for name, folder in (("encoder", "hubert-layer"), ("llm", "llama")):
        assert parts[name]["commit"] == commits[name]
        content = (model_folder(folder) / WEIGHTS).read_bytes()
        assert parts[name]["sha256"][WEIGHTS] == hashlib.sha256(content).hexdigest()
