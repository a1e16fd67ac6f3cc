"""What reads where no system is named, and why it is the lesser one."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from isthmus import files
from isthmus.decoding.transcriber import load
from isthmus.errors import IsthmusError
from isthmus.lab.synthesis import Voice, speak
from isthmus.model import fetch
from isthmus.recipe import dump_recipe, load_recipe
from isthmus.recipe_files import parse_yaml
from isthmus.runs.folder import (
    BASE,
    SHIPPED_RUNS,
    TINY,
    default_system,
    local_run,
    local_system,
)

Isthmus = Callable[..., tuple[int, str, str]]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A system base that ships: tiny, which says that it is made of parts that are fetched."""
    folder = tmp_path / "assets" / BASE
    shutil.copytree(SHIPPED_RUNS[TINY], folder)
    monkeypatch.setitem(SHIPPED_RUNS, BASE, folder)
    monkeypatch.setenv("ISTHMUS_PARTS", str(tmp_path / "parts"))
    default_system.cache_clear()
    yield folder
    default_system.cache_clear()


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    spoken, _ = speak("seven", Voice("en-us", rate=140))
    soundfile.write(tmp_path / "seven.wav", np.pad(spoken, 4000), 16_000)
    return tmp_path / "seven.wav"


def bring_parts(tmp_path: Path) -> None:
    for name in fetch.SYSTEMS[BASE]:
        (tmp_path / "parts" / name).mkdir(parents=True)


def test_base_reads_where_its_parts_are(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bring_parts(tmp_path)
    assert local_run("default") == base
    assert not caplog.records


def test_tiny_reads_where_base_does_not_ship(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(base)
    assert local_run("default") == SHIPPED_RUNS[TINY]
    assert not caplog.records
    with pytest.raises(IsthmusError, match="No run folder 'base'"):
        local_run("base")


def test_tiny_reads_where_the_parts_of_base_are_not_to_be_had(
    base: Path,
    tmp_path: Path,
    isthmus: Isthmus,
    recording: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With one line that says what it knows, and how to get the other; decided once."""
    code, out, err = isthmus("transcribe", recording)
    assert (code, out.strip(), err) == (0, "seven", "")
    (said,) = caplog.messages
    for fact in ("tiny", "digits", "isthmus fetch base", "ISTHMUS_OFFLINE"):
        assert fact in said
    assert "\n" not in said
    bring_parts(tmp_path)
    assert default_system() == TINY


def test_parts_of_base_are_fetched_if_they_can_be(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(fetch, "require_parts", asked.extend)
    assert default_system() == BASE
    assert asked == [*fetch.SYSTEMS[BASE]]


def test_tiny_reads_where_there_is_no_room_for_base(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("ISTHMUS_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetch, "_a_source_answers", lambda: True)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    assert default_system() == TINY
    (said,) = caplog.messages
    assert "MB free" in said


def test_who_names_base_gets_no_other(base: Path, isthmus: Isthmus, recording: Path) -> None:
    recipe = base / "recipe.yaml"
    text = recipe.read_text().replace("isthmus/tiny-conformer", "isthmus/whisper-base")
    recipe.write_text(text.replace("type: conformer", "type: whisper"))
    code, out, err = isthmus("transcribe", recording, "--model", "base")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "isthmus fetch whisper-base" in err


def test_nothing_is_fetched_for_what_cannot_be_read(base: Path, isthmus: Isthmus) -> None:
    code, _, err = isthmus("transcribe", "nowhere.wav")
    assert (code, err.count("\n")) == (1, 1)
    assert "nowhere.wav" in err


def test_parts_of_another_version_are_refused_with_the_difference(base: Path) -> None:
    parts = json.loads((base / "parts.json").read_text())
    now = parts["llm"]["sha256"]["tokenizer.json"]
    parts["llm"]["sha256"]["tokenizer.json"] = "0" * 64
    (base / "parts.json").write_text(json.dumps(parts))
    with pytest.raises(IsthmusError, match=r"tiny-llama-chat.*tokenizer\.json") as raised:
        load(base)
    assert "0" * 64 in str(raised.value)
    assert now in str(raised.value)
    assert "model.safetensors" not in str(raised.value)


@pytest.mark.parametrize("file", ["recipe.yaml", "config.json", "model/config.json"])
def test_a_folder_named_like_a_shipped_system_is_told(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    file: str,
) -> None:
    """Once, and how to name each; who names no system hears nothing."""
    monkeypatch.chdir(tmp_path)
    for name in SHIPPED_RUNS:
        shutil.copytree(base, name)
        (tmp_path / name / "recipe.yaml").rename(tmp_path / name / "recipe")
        (tmp_path / name / "model").mkdir()
        (tmp_path / name / "recipe").rename(tmp_path / name / file)
    bring_parts(tmp_path)
    assert local_system("default") == base
    assert not caplog.records
    for name, shipped in SHIPPED_RUNS.items():
        assert local_system(name) == local_run(name) == shipped
        assert str(local_system(f"./{name}")).startswith(name)
    line = "{0} is the system that ships with isthmus; the folder here is named ./{0}."
    assert caplog.messages == [line.format(name) for name in SHIPPED_RUNS]
    recipe = load_recipe("tiny/quickstart", ["start_from=[tiny, ./tiny]"])
    stored = parse_yaml(dump_recipe(recipe))
    assert stored["start_from"] == ["tiny", str(tmp_path / "tiny")]


def test_a_run_that_went_on_from_another_is_no_pretraining(base: Path) -> None:
    with (base / "recipe.yaml").open("a") as recipe:
        recipe.write("start_from: tiny\n")
    assert local_system(base) == base
