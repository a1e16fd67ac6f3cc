"""Runs written for other machines: small, whole, and without a path of this one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isthmus.errors import IsthmusError
from isthmus.files import file_sha256, verify_folder
from isthmus.lab.synthesis import synthesise_corpus
from isthmus.model import fetch
from isthmus.recipe import load_recipe
from isthmus.runs.export import export_run
from isthmus.runs.folder import BEST, SHIPPED_RUNS
from isthmus.runs.loading import load_run
from isthmus.settings.base import SHIPPED
from isthmus.training.runs import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on speech and with a language model that lie in folders of this machine."""
    folder = tmp_path_factory.mktemp("machine")
    synthesise_corpus(folder / "made/up", ["one", "two"], seed=0)
    shutil.copytree(SHIPPED["isthmus/tiny-llama-chat"], folder / "llm")
    recipe = load_recipe(
        "tiny/quickstart",
        [
            f"data.train=[{{path: '{folder}/made/up', repeat: 2}}]",
            f"data.dev=['{folder}/made/up']",
            f"llm.path={folder}/llm",
            f"start_from={SHIPPED_RUNS['tiny']}",
            "projector.hidden=512",
            "train.steps=1",
            "train.max_duration=null",
            "train.batch_size=2",
        ],
    )
    train(recipe, folder / "run")
    return folder / "run"


@pytest.fixture
def known(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """isthmus fetch knows that language model."""
    folder = run.parent / "llm"
    sums = {file.name: file_sha256(file) for file in folder.iterdir() if file.suffix != ".md"}
    (tmp_path / "given").mkdir()
    (tmp_path / "given/sha256.json").write_text(json.dumps({"tiny": sums}))
    monkeypatch.setattr(fetch, "GIVEN", tmp_path / "given")
    for module in ("isthmus.model.fetch", "isthmus.model.parts"):
        monkeypatch.setattr(f"{module}.FETCHED", {"isthmus/tiny": "tiny"})
    monkeypatch.setenv("ISTHMUS_PARTS", str(tmp_path / "parts"))
    shutil.copytree(folder, tmp_path / "parts/tiny")


@pytest.mark.usefixtures("known")
def test_it_reads_where_nothing_of_this_machine_is(
    run: Path, tmp_path: Path, isthmus: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "out"
    code, said, _ = isthmus("export-run", run, out, "--json")
    stored = load_file(out / BEST / "trainable.safetensors")
    num_bytes = sum(value.nbytes for value in stored.values())
    assert (code, json.loads(said)) == (0, {"run": str(out), "bytes": num_bytes})
    verify_folder(out / BEST)
    assert not any(str(run.parent) in file.read_text() for file in out.glob("*.*"))
    environment = json.loads((run / "environment.json").read_text())
    assert json.loads((out / "environment.json").read_text()) == {
        name: value for name, value in environment.items() if name != "command"
    }
    parts = [json.loads((folder / "parts.json").read_text()) for folder in (run, out)]
    assert parts[1]["start_from.0"] == parts[0]["start_from.0"] | {"name": "tiny"}
    before, after = load_run(run)[0].trained_state(), load_run(out)[0].trained_state()
    for name, value in before.items():
        assert stored[name].dtype == torch.bfloat16
        assert after[name].dtype == value.dtype == torch.float32
        assert torch.equal(after[name], value.bfloat16().float())
    assert json.loads((out / "parts.json").read_text())["llm"]["name"] == "isthmus/tiny"
    recipe = load_recipe(out / "recipe.yaml")
    assert recipe.start_from == ()
    assert [getattr(one, "path", one) for one in recipe.data.train] == ["made/up"]
    with pytest.raises(IsthmusError, match="exists"):
        export_run(run, out)


def test_a_part_that_nobody_else_has_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"llm\.path.*llm"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_corpora_of_the_speech_folder_are_named_from_there(
    run: Path, known: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_SPEECH", str(run.parent))
    export_run(run, tmp_path / "out")
    recipe = load_recipe(tmp_path / "out/recipe.yaml")
    assert [getattr(one, "path", one) for one in recipe.data.dev] == ["${ISTHMUS_SPEECH}/made/up"]
