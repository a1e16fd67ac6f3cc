"""Where a model's files come from, and what is refused."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

from isthmus.errors import IsthmusError
from isthmus.model.parts import freeze, resolve, source
from isthmus.settings.base import SHIPPED, PretrainedSettings


def test_a_folder_is_taken_as_it_is(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    assert resolve(str(folder)) == folder


def test_home_is_expanded(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llama")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(f"~/{folder.name}") == folder


def test_no_such_folder() -> None:
    with pytest.raises(IsthmusError, match=r"\./nowhere: no such folder"):
        resolve("./nowhere")


def test_unknown_shipped_name() -> None:
    with pytest.raises(IsthmusError, match=r"Did you mean 'isthmus/tiny-llama'\?.* Known: "):
        resolve("isthmus/tiny-lama")
    assert "isthmus/tiny-llama" in SHIPPED


def test_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"has no config\.json.*save_pretrained"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", [None, "model.pt", "last.ckpt", "adapter_model.safetensors"])
def test_folder_without_weights(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "config.json").write_text("{}")
    if name:
        (tmp_path / name).write_bytes(b"of another kind")
    with pytest.raises(IsthmusError, match=r"no weights: .*model\.safetensors.*save_pretrained"):
        resolve(str(tmp_path))


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*asked: object, **more: object) -> str:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        IsthmusError, match=r"someone/some-llm at revision 'v2'.*no route to anywhere\)"
    ):
        resolve("someone/some-llm", "v2")


def test_source_records_checksums(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    weights = (folder / "model.safetensors").read_bytes()
    found = source(str(folder))
    assert found.commit is None
    assert found.sha256["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert found.to_dict() == {"name": str(folder), "commit": None, "sha256": found.sha256}


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "merges.txt"],
)
def test_every_file_that_is_read_has_a_checksum(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "notes.md").write_text("not read")
    before = source(str(tmp_path)).sha256
    (tmp_path / name).write_text("changed")
    (tmp_path / "notes.md").write_text("changed")
    after = source(str(tmp_path)).sha256
    assert {file for file in after if after[file] != before.get(file)} == {name}


def test_a_run_is_loaded_at_the_commit_it_recorded(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = "0" * 40, "1" * 40
    for commit in (old, new):
        (tmp_path / commit).symlink_to(model_folder("llama"))

    def download(name: str, revision: str | None, **more: object) -> str:
        return str(tmp_path / (revision or new))

    settings = PretrainedSettings(path="someone/some-llm", revision=old)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    recorded = source(settings.path, settings.revision)
    assert recorded.commit == old
    now = PretrainedSettings(path="someone/some-llm")
    assert source(now.path, now.at(recorded.commit).revision) == recorded
    assert source(now.path, now.at(None).revision).commit == new


def test_source_knows_the_commit(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    commit = "0123456789" * 4
    (tmp_path / commit).symlink_to(model_folder("llama"))
    assert source(str(tmp_path / commit)).commit == commit


def test_freeze() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    freeze(module)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(part.training for part in module.modules())
