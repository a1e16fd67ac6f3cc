"""Synthetic speech: timings, letters, repeatability, and corpora that are whole or absent."""

import builtins
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from isthmus.errors import IsthmusError
from isthmus.lab.synthesis import (
    HELD_OUT_VARIANTS,
    VARIANTS,
    SynthesisError,
    Voice,
    random_voice,
    speak,
    synthesise_corpus,
)
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.speech.augment import Augmentation

pytest.importorskip("espeakng_loader", reason="needs the synth extra")

TEXTS = ["make me a small mocha", "a b c", "nine", "i'll be there at half past two"]


def test_speech_is_a_waveform_with_word_timings() -> None:
    text = "i'd like a lot of milk in the evening"
    waveform, words = speak(text, Voice("en-us"))
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert 0.05 < np.abs(waveform).max() <= 1
    assert [word.text for word in words] == text.split()
    assert words[0].start == 0
    assert words[-1].end == pytest.approx(len(waveform) / SAMPLE_RATE, abs=0.001)
    assert all(word.start < word.end for word in words)
    assert all(one.end == two.start for one, two in pairwise(words))


def test_word_timings_point_at_their_words() -> None:
    """What the timings cut out of a sentence is as long as the word alone, give or take."""
    _, words = speak("seven extraordinary cats", Voice("en-us"))
    lengths = [word.end - word.start for word in words]
    assert lengths[1] > 1.4 * max(lengths[0], lengths[2])


def test_timings_count_characters_not_bytes() -> None:
    waveform, words = speak("café éé one two", Voice("en-us"))
    alone = len(speak("one two", Voice("en-us"))[0]) / SAMPLE_RATE
    spoken = len(waveform) / SAMPLE_RATE - words[2].start
    assert spoken == pytest.approx(alone, rel=0.25)


def test_a_is_a_letter_where_it_is_spelled_and_an_article_elsewhere() -> None:
    def seconds_of_a(text: str) -> float:
        words = speak(text, Voice("en-us"))[1]
        return next(word.end - word.start for word in words if word.text == "a")

    assert seconds_of_a("a") > 0.2
    for spelled in ("b a d", "a five", "eight a m now"):
        assert seconds_of_a(spelled) > 0.1
    for article in ("make me a mocha", "i want a cup"):
        assert seconds_of_a(article) < 0.08


def test_speech_does_not_depend_on_what_was_said_before() -> None:
    rng = np.random.default_rng(0)
    for voice in [Voice("en-us+Reed"), *(random_voice(rng) for _ in range(12))]:
        first, _ = speak("hello there sister", voice)
        speak("something quite different", random_voice(rng))
        assert np.array_equal(speak("hello there sister", voice)[0], first), voice


def test_every_variant_speaks_without_clipping() -> None:
    for variant in VARIANTS + HELD_OUT_VARIANTS:
        waveform, _ = speak("hello", Voice(f"en-gb-x-rp+{variant}"))
        assert 0.02 < np.abs(waveform).max() < 1, variant


@pytest.mark.parametrize(
    ("setting", "slow", "fast"),
    [("rate", 110, 190), ("word_gap", 20, 0)],
)
def test_settings_of_a_voice_are_heard(setting: str, slow: int, fast: int) -> None:
    def num_samples(value: int) -> int:
        settings: dict[str, Any] = {setting: value}
        return len(speak("make me a small mocha", Voice("en-us", **settings))[0])

    assert num_samples(slow) > 1.2 * num_samples(fast)


def test_pitch_is_heard() -> None:
    low, high = (speak("hello", Voice("en-us", pitch=pitch))[0] for pitch in (15, 85))
    assert not np.array_equal(low, high)


def test_held_out_voices_share_no_variant_with_training_voices() -> None:
    def variants(held_out: bool) -> set[str]:
        rng = np.random.default_rng(0)
        return {random_voice(rng, held_out).name.split("+")[1] for _ in range(500)}

    assert variants(False) <= set(VARIANTS)
    assert variants(True) <= set(HELD_OUT_VARIANTS)
    assert not set(VARIANTS) & set(HELD_OUT_VARIANTS)
    assert min(len(variants(False)), len(variants(True))) >= 8


@pytest.mark.parametrize("text", ["", "  ", "..."])
def test_silence_is_refused(text: str) -> None:
    with pytest.raises(SynthesisError):
        speak(text, Voice("en-us"))


def test_unknown_voices_are_refused() -> None:
    with pytest.raises(SynthesisError, match="no voice 'xx'"):
        speak("hello", Voice("xx"))
    with pytest.raises(SynthesisError, match=r"'bellinda' .*Did you mean 'belinda'"):
        speak("hello", Voice("en-us+bellinda"))


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *rest: Any) -> Any:
        if name == "espeakng_loader":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *rest)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"isthmus\[synth\]"):
        speak("hello", Voice("en-us"))


def test_import_loads_no_espeak() -> None:
    code = "import sys, isthmus.lab.synthesis; sys.exit('espeakng_loader' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_corpus_is_the_same_with_any_number_of_workers(tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        synthesise_corpus(
            tmp_path / name, TEXTS, 7, workers=workers, augmentation=Augmentation.all()
        )
    assert everything(tmp_path / "one") == everything(tmp_path / "two")


def test_an_utterance_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    synthesise_corpus(tmp_path / "all", TEXTS, 7)
    synthesise_corpus(tmp_path / "other", ["other", *TEXTS[1:3]], 7)
    synthesise_corpus(tmp_path / "seed", TEXTS, 8)
    audio = [everything(tmp_path / name) for name in ("all", "other", "seed")]
    for index in (1, 2):
        name = f"audio/synthetic_7_{index:06d}.flac"
        assert audio[0][name] == audio[1][name]
        assert audio[0][name] != audio[2][name.replace("_7_", "_8_")]


def test_the_same_text_is_said_differently(tmp_path: Path) -> None:
    synthesise_corpus(tmp_path, ["nine"] * 4, 7)
    assert len(set(everything(tmp_path).values())) == 5


def test_the_manifest_describes_its_audio(tmp_path: Path) -> None:
    manifest = synthesise_corpus(tmp_path, TEXTS, 1, held_out=True)
    entries = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [entry["text"] for entry in entries] == TEXTS
    assert len({entry["id"] for entry in entries}) == len(TEXTS)
    for entry in entries:
        info = soundfile.info(tmp_path / entry["audio"])
        assert (info.samplerate, info.channels, info.subtype) == (SAMPLE_RATE, 1, "PCM_16")
        assert entry["duration"] == pytest.approx(info.duration)
        assert entry["speaker"].split("+")[1].split("-")[0] in HELD_OUT_VARIANTS
        assert entry["language"] == "en"
        words = entry["words"]
        assert [word for word, _, _ in words] == entry["text"].split()
        lead, tail = words[0][1], entry["duration"] - words[-1][2]
        assert 0.049 <= lead <= 0.501
        assert 0.049 <= tail <= 0.501
        waveform, _ = soundfile.read(tmp_path / entry["audio"])
        assert not waveform[: int(lead * SAMPLE_RATE) - 16].any()
        assert waveform[int(lead * SAMPLE_RATE) :].any()


def test_word_timings_follow_a_change_of_speed(tmp_path: Path) -> None:
    plain, slow = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (
            synthesise_corpus(tmp_path / "plain", TEXTS[:1], 1),
            synthesise_corpus(tmp_path / "slow", TEXTS[:1], 1, augmentation=twice_as_long),
        )
    )
    assert slow[0]["duration"] == pytest.approx(2 * plain[0]["duration"])
    for (_, start, end), (_, slow_start, slow_end) in zip(
        plain[0]["words"], slow[0]["words"], strict=True
    ):
        assert (slow_start, slow_end) == pytest.approx((2 * start, 2 * end), abs=0.002)


def twice_as_long(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.repeat(waveform, 2)


def test_an_existing_manifest_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text("kept")
    with pytest.raises(IsthmusError, match=r"manifest\.jsonl"):
        synthesise_corpus(tmp_path, TEXTS, 1)
    assert (tmp_path / "manifest.jsonl").read_text() == "kept"


def test_an_interrupted_corpus_has_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SynthesisError):
        synthesise_corpus(tmp_path, [*TEXTS, "..."], 1)
    assert not list(tmp_path.glob("manifest*"))

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        synthesise_corpus(tmp_path, TEXTS[:1], 1)
    assert not (tmp_path / "manifest.jsonl").exists()
