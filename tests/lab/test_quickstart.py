"""The second act of the quickstart, and what its first ends with."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from isthmus.decoding.transcriber import load
from isthmus.lab import quickstart, quickstart_real
from isthmus.lab.synthesis import synthesise_corpus
from isthmus.recipe import load_recipe
from isthmus.runs.folder import BASE, SHIPPED_RUNS, default_system
from isthmus.runs.loading import load_run
from isthmus.speech.corpora import read_corpus
from isthmus.speech.cuts import (
    transcript,
)
from isthmus.training.runs import train

Isthmus = Callable[..., tuple[int, str, str]]
WORDS = ["one", "two", "three", "four", "five"]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "speech"
    synthesise_corpus(folder, [f"{a} {b}" for a in WORDS for b in WORDS], seed=0)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, speech: Path) -> Path:
    """What stands in for base: ears that have hardly begun to hear, between tiny models."""
    folder = tmp_path_factory.mktemp("base") / "run"
    inner = "{type: linear, downsample_rate: 1, hidden: 256}"
    changes = [
        f"data.train=['{speech}']",
        f"projector={{type: ctc-posterior, inner: {inner}}}",
        "train={steps: 20, learning_rate: 1e-3, warmup_steps: 0, llm_weight: 0, ctc_weight: 1}",
        "decode.chunk_seconds=10",
    ]
    train(load_recipe("tiny/quickstart", changes), folder)
    return folder


@pytest.fixture
def base(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setitem(SHIPPED_RUNS, BASE, trained)
    default_system.cache_clear()
    yield trained
    default_system.cache_clear()


def test_ears_for_ones_own_recordings(
    base: Path, speech: Path, tmp_path: Path, isthmus: Isthmus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quickstart_real.TRAINING, "learning_rate", 3e-3)
    lines = [json.loads(line) for line in (speech / "manifest.jsonl").open()]
    shouted = [line | {"text": line["text"].upper() + "!"} for line in lines]
    mine = speech / "mine.jsonl"
    mine.write_text("".join(json.dumps(line) + "\n" for line in shouted))
    folder = tmp_path / "real"
    code, out, _ = isthmus("quickstart", "--real", mine, "-o", folder, "--json")
    figures = json.loads(out)
    assert code == 0
    assert figures["after"]["wer"] < figures["before"]["wer"]
    parts = [list(read_corpus(folder / f"speech/{n}.jsonl")) for n in ("trained-on", "held-out")]
    texts = [sorted(map(transcript, part)) for part in parts]
    assert [len(part) for part in texts] == [20, 5]
    assert sorted(texts[0] + texts[1]) == sorted(line["text"] for line in lines)
    before, (after, recipe) = load_run(base)[0], load_run(folder / "run")
    assert recipe.start_from == (BASE,)
    for name, value in after.trained_state().items():
        assert torch.equal(value, before.trained_state()[name]) != name.startswith("projector.")


def test_too_few_recordings_are_an_error(
    base: Path, speech: Path, tmp_path: Path, isthmus: Isthmus
) -> None:
    few = speech / "few.jsonl"
    few.write_text("".join((speech / "manifest.jsonl").open().readlines()[:9]))
    code, _, err = isthmus("quickstart", "--real", few, "-o", tmp_path / "real")
    assert (code, err.count("\n")) == (1, 1)
    assert "9 utterances" in err
    assert not (tmp_path / "real").exists()


def test_real_needs_corpora_and_base(
    tmp_path: Path, isthmus: Isthmus, speech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--real needs" in isthmus("quickstart", "--real", "-o", tmp_path / "real")[2]
    monkeypatch.setitem(SHIPPED_RUNS, BASE, tmp_path / "none")
    assert "no system base" in isthmus("quickstart", "--real", speech, "-o", tmp_path / "real")[2]


def test_what_ships_reads_the_recording_that_ships() -> None:
    """Tiny was not made for it, and says so."""
    console = Console(record=True, width=200)
    (sample,) = read_corpus(quickstart.SAMPLE)
    own = load("tiny").load(quickstart.SAMPLE.with_name("kathleen.flac"))
    found = quickstart._read("tiny", {"mine.wav": own}, console)
    assert [*found] == [sample.id, "mine.wav"]
    said = console.export_text()
    assert transcript(sample) in said
    assert said.count("out of its depth") == 2


def test_the_recording_that_ships_says_where_it_is_from() -> None:
    (row,) = map(json.loads, quickstart.SAMPLE.open())
    assert row["licence"] == "CC0 1.0"
    assert row["source"].partition(":")[0] in quickstart.SAMPLE.with_name("README.md").read_text()
