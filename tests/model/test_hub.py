"""Parts come from the hub: every family, at the commit that was asked for, whole or not at all."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.errors import IsthmusError
from isthmus.model.encoder import build_encoder
from isthmus.model.llm import build_llm
from isthmus.model.parts import resolve, source, sources
from isthmus.settings.llms import LLMSettings
from tests.hub import TOKEN, StandInHub
from tests.layouts import write_gguf, write_layout, write_sentencepiece

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
    """Downloaded files by their paths in the repository."""
    (snapshot,) = (tmp_path / "cache").glob("*/snapshots/*")
    files = [file for file in snapshot.rglob("*") if not file.is_dir()]
    return {file.relative_to(snapshot).as_posix() for file in files}


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
    loaded = build_encoder(local.model_copy(update={"path": f"someone/{name}"})).eval()
    batch, lengths = waves(16_000)[None], torch.tensor([16_000])
    with torch.no_grad():
        frames, num_frames = loaded(batch, lengths)
        expected, expected_frames = build_encoder(local).eval()(batch, lengths)
    assert torch.equal(num_frames, expected_frames)
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LLMS)
def test_a_language_model_of_every_family(
    hub: StandInHub, model_folder: ModelFolder, name: str
) -> None:
    hub.publish(f"someone/{name}", model_folder(name))
    llm = build_llm(LLMSettings(path=f"someone/{name}")).eval()
    tokens = torch.tensor([llm.tokenizer.encode("what is heard", add_special_tokens=False)])
    network = AutoModelForCausalLM.from_pretrained(model_folder(name)).eval()
    with torch.no_grad():
        mask, keep = torch.ones_like(tokens), torch.arange(tokens.shape[1])
        logits = llm.logits(llm.embed(tokens), mask, keep)
        torch.testing.assert_close(logits, network(tokens).logits, atol=1e-5, rtol=0)
    assert llm.tokenizer.decode(tokens[0]) == "what is heard"


# What lies beside the weights in repositories of the flagships, and is not to be downloaded.
SPARE = (
    "original/consolidated.00.pth",
    "consolidated.safetensors",
    "model.fp32-00001-of-00002.safetensors",
    "pytorch_model.fp32-00001-of-00002.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "training_args.bin",
    "modeling_own.py",
    "onnx/model.onnx",
    "ggml-model-q4_0.gguf",
)
WANTED = {
    "safetensors": {"model.safetensors"},
    "sharded-safetensors": {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)},
    "bin": {"pytorch_model.bin"},
    "sharded-bin": {f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)},
}


def publish(hub: StandInHub, folder: Path, target: Path, layouts: Sequence[str]) -> str:
    """A repository of a model as flagships' are: one or more layouts, and much besides."""
    for layout in layouts:
        written = write_layout(folder, target.parent / f"of-{layout}", layout)
        shutil.copytree(written, target, dirs_exist_ok=True)
    for name in SPARE:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(b"not to be read")
    for name in ("generation_config.json", "preprocessor_config.json"):
        (target / name).unlink(missing_ok=True)
    return hub.publish("someone/flagship", target)


@pytest.mark.parametrize(
    "layouts",
    [
        ["safetensors"],
        ["sharded-safetensors"],
        ["bin"],
        ["sharded-bin"],
        ["safetensors", "bin"],
        ["sharded-safetensors", "sharded-bin"],
    ],
    ids="+".join,
)
def test_what_is_read_is_downloaded_and_nothing_else(
    hub: StandInHub, model_folder: ModelFolder, tmp_path: Path, layouts: list[str]
) -> None:
    folder = model_folder("llama-tied")
    publish(hub, folder, tmp_path / "published", layouts)
    llm = build_llm(LLMSettings(path="someone/flagship"))
    expected = build_llm(LLMSettings(path=str(folder))).network.state_dict()
    for name, value in llm.network.state_dict().items():
        assert torch.equal(value, expected[name])
    got = {name for name in cached_files(tmp_path) if not name.endswith((".json", ".jinja"))}
    assert got == WANTED[layouts[0]]
    asked = {request.rpartition("/")[2] for request in hub.requests}
    assert got <= asked
    assert not {name.rpartition("/")[2] for name in (*SPARE, "README.md")} & asked
    before = hub.requests.total()
    build_llm(LLMSettings(path="someone/flagship"))
    assert hub.requests.total() - before <= 2  # whether `main` has moved; no file again


@pytest.mark.parametrize("layout", ["sharded-safetensors", "sharded-bin"])
def test_offline_with_shards(
    hub: StandInHub,
    model_folder: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    commit = publish(hub, model_folder("llama"), tmp_path / "published", [layout])
    build_llm(LLMSettings(path="someone/flagship"))
    offline(monkeypatch)
    asked = hub.requests.total()
    build_llm(LLMSettings(path="someone/flagship"))
    assert source("someone/flagship").commit == commit
    assert hub.requests.total() == asked


def test_a_tokenizer_of_sentencepiece_alone(
    hub: StandInHub, model_folder: ModelFolder, tmp_path: Path
) -> None:
    """As Vicuna's: `tokenizer.model` and its settings, and pickles."""
    folder = tmp_path / "llm"
    shutil.copytree(model_folder("llama"), folder)
    count = write_sentencepiece(folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    network.resize_token_embeddings(count)
    network.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    publish(hub, folder, tmp_path / "published", ["sharded-bin"])
    tokenizer = build_llm(LLMSettings(path="someone/flagship")).tokenizer
    assert len(tokenizer) == count
    assert tokenizer.tokenize("the b\u00e9") == ["\u2581the", "\u2581", "b", "<0xC3>", "<0xA9>"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert "tokenizer.model" in cached_files(tmp_path)


def test_a_repository_of_gguf_files(hub: StandInHub, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = tmp_path / "published"
    (folder / "Q8").mkdir(parents=True)
    write_gguf(folder / "Q8" / "tiny.gguf")
    write_gguf(folder / "tiny-f32.gguf", quantise=False)
    commit = hub.publish("someone/tiny-gguf", folder)
    settings = LLMSettings(path="someone/tiny-gguf", gguf="Q8/tiny.gguf")
    assert build_llm(settings).rows == 259
    assert cached_files(tmp_path) == {"Q8/tiny.gguf"}
    (found,) = sources(settings).values()
    digest = hashlib.sha256((folder / "Q8" / "tiny.gguf").read_bytes()).hexdigest()
    assert (found.commit, found.sha256) == (commit, {"tiny.gguf": digest})
    with pytest.raises(IsthmusError, match=r"someone/tiny-gguf has no file tiny\.gguf"):
        build_llm(LLMSettings(path="someone/tiny-gguf", gguf="tiny.gguf"))


def test_an_index_of_a_file_that_the_repository_lacks(
    hub: StandInHub, model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = write_layout(model_folder("llama"), tmp_path / "published", "sharded-safetensors")
    (folder / "model-00002-of-00003.safetensors").unlink()
    hub.publish("someone/llama", folder)
    with pytest.raises(IsthmusError, match=r"names 3 files, of which model-00002.* is not there"):
        build_llm(LLMSettings(path="someone/llama"))


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_a_download_with_another_sum(
    hub: StandInHub,
    model_folder: ModelFolder,
    tmp_path: Path,
    layout: str,
) -> None:
    hub.publish("someone/llama", write_layout(model_folder("llama"), tmp_path / "llm", layout))
    weights = resolve("someone/llama") / WANTED[layout].copy().pop()
    blob = weights.resolve()
    content = bytearray(blob.read_bytes())
    content[-300] ^= 1
    blob.write_bytes(content)
    with pytest.raises(IsthmusError, match=r"SHA-256.*Delete") as caught:
        sources(LLMSettings(path="someone/llama"))
    assert str(blob) in str(caught.value)
    blob.unlink()
    assert source("someone/llama").sha256[weights.name] == blob.name


def test_a_hub_that_never_answers(
    hub: StandInHub, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.publish("someone/llama", model_folder("llama"))
    folder = resolve("someone/llama")
    hub.silent.set()
    assert resolve("someone/llama") == folder  # what is there is taken
    with pytest.raises(IsthmusError, match=r"someone/other.*[Tt]imed? ?out.*again") as caught:
        resolve("someone/other")
    assert "\n" not in str(caught.value)


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


def test_offline_with_a_filled_cache(
    hub: StandInHub, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.publish("someone/llama", model_folder("llama"))
    online = source("someone/llama")
    asked = hub.requests.total()
    offline(monkeypatch)
    build_llm(LLMSettings(path="someone/llama"))
    assert source("someone/llama") == source("someone/llama", commit) == online
    assert hub.requests.total() == asked


def test_offline_without(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(IsthmusError, match=r"someone/llama.*HF_HUB_OFFLINE") as caught:
        build_llm(LLMSettings(path="someone/llama"))
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
        build_llm(LLMSettings(path="someone/llama"))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob(WEIGHTS))
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
        build_llm(LLMSettings(path="someone/llama"))
    assert "\n" not in str(caught.value)


def test_a_gated_repository_with_a_token(
    hub: StandInHub, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("someone/llama", model_folder("llama"))
    hub.repositories["someone/llama"].gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert build_llm(LLMSettings(path="someone/llama")).dim == 16


def test_a_missing_repository(hub: StandInHub) -> None:
    with pytest.raises(IsthmusError, match=r"someone/lama.*Correct the name.*private") as caught:
        build_llm(LLMSettings(path="someone/lama"))
    assert "\n" not in str(caught.value)


def test_a_missing_revision(hub: StandInHub, model_folder: ModelFolder) -> None:
    hub.publish("someone/llama", model_folder("llama"))
    with pytest.raises(IsthmusError, match=r"someone/llama at revision 'v9'.*no such revision"):
        build_llm(LLMSettings(path="someone/llama", revision="v9"))


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
        "from isthmus.build import build_model;"
        "from isthmus.training.parallel import Ranks;"
        "from isthmus.training.runs import Opening, RunFolder;"
        "recipe = Recipe.model_validate_json(sys.argv[1]); build_model(recipe)\n"
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
