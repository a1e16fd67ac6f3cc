"""The corpora of the real recipes: nothing held out is in them, and nothing is lost by joining."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

SCRIPT = Path(__file__).parent.parent / "recipes" / "real" / "corpus.py"


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_held_out_is_left_out(corpus: ModuleType) -> None:
    sentences = [
        "She said: turn on the light, in the kitchen!",  # six words in a row of what is held out
        "Turn on the light in the hall.",  # the first six
        "There were 12 of them.",
        "...",
        "Don\u2019t go.",
    ]
    held_out = ["turn on the light in the kitchen please"]
    assert corpus.usable(sentences, held_out) == ["Don\u2019t go."]
    assert corpus.usable(sentences, ["turn on the light in a kitchen"]) == [
        sentences[0],
        sentences[1],
        sentences[4],
    ]


def test_every_utterance_is_in_one_group(corpus: ModuleType) -> None:
    rng = np.random.default_rng(0)
    lines = [{"duration": float(seconds), "text": str(seconds)} for seconds in range(1, 29)]
    groups = list(corpus.joined(lines, rng))
    assert [line for group in groups for line in group] == lines
    assert all(sum(line["duration"] for line in group) <= corpus.LONGEST for group in groups)
    assert max(map(len, groups)) > 1


def test_joined_utterances_are_heard_one_behind_the_other(
    corpus: ModuleType, tmp_path: Path
) -> None:
    group = []
    for number in range(3):
        audio = tmp_path / f"u{number}.flac"
        soundfile.write(audio, np.full(1600 * (number + 1), 0.1 * (number + 1)), 16000)
        line = {"audio": audio, "duration": 0.1 * (number + 1), "text": f"word {number}"}
        group.append(line | {"speaker": "a"})
    corpus.write(tmp_path / "out", [group], np.random.default_rng(0))
    (line,) = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    assert line["text"] == "word 0 word 1 word 2"
    samples, _ = soundfile.read(tmp_path / "out" / line["audio"])
    assert len(samples) == round(line["duration"] * 16000)
    loud = samples[samples > 0.01]
    assert len(loud) == 1600 * 6
    assert (np.diff(loud) >= -1e-3).all()  # in their order
    assert len(samples) > len(loud) + 2 * 0.05 * 16000 - 2  # with pauses between
