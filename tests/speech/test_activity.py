"""Speech passes the gate, however quiet; silence, noise, hum, tones and clicks do not."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from isthmus.errors import IsthmusError
from isthmus.speech import activity
from isthmus.speech.activity import Detector, has_speech, speech_regions
from isthmus.speech.audio import SAMPLE_RATE

SILERO = importlib.util.find_spec("silero_vad") is not None
needs_silero = pytest.mark.skipif(not SILERO, reason="no silero-vad (vad)")
by_energy = pytest.mark.parametrize("detector", ["energy"])
# The energy detector was tuned on parts of the train manifests of other speakers.
SETS = {
    "en_barista/dev": 47,
    "en_keywords/dev": 30,
    "de_kerstin/dev": 10,
    "ar_commands/dev": 40,
    "en_speech_commands/dev": 36,
    "nl_nathalie/dev": 12,
    "en_kathleen/dev": 19,
    "multi_misc/dev": 6,
}
QUIET = 10 ** (-35 / 20)


def coloured(generator: np.random.Generator, num_samples: int, slope: float) -> np.ndarray:
    """(S,) noise of level 1 whose power falls by 3 * `slope` dB an octave."""
    spectrum = np.fft.rfft(generator.standard_normal(max(num_samples, 16)))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** (slope / 2)
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, max(num_samples, 16))[:num_samples]
    return noise / max(1e-9, float(noise.std())) if num_samples else noise


def sines(time: np.ndarray, *frequencies: float) -> np.ndarray:
    waves = [np.sin(2 * np.pi * f * time + f) for f in frequencies]
    return 0.3 * np.sum(waves, axis=0) / len(waves)


def without_speech(seconds: float) -> Iterator[tuple[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    num_samples = round(seconds * SAMPLE_RATE)
    time = np.arange(num_samples) / SAMPLE_RATE
    yield "silence", np.zeros(num_samples)
    for name, slope in (("white", 0.0), ("pink", 1.0), ("brown", 2.0)):
        for level in (-70, -60, -50, -40, -30, -20):
            noise = coloured(generator, num_samples, slope)
            yield f"{name} noise at {level} dBFS", noise * 10 ** (level / 20)
    yield "hum of 50 Hz", sines(time, 50, 100, 150, 250)
    yield "hum of 60 Hz", sines(time, 60, 120, 180, 300)
    for frequency in (100, 440, 3000):
        yield f"tone of {frequency} Hz", sines(time, frequency)
    for rate in (1, 20):
        clicks = np.zeros(num_samples)
        clicks[:: SAMPLE_RATE // rate] = 0.8
        yield f"{rate} clicks a second", clicks
    rise = (7000 - 100) / max(seconds, 1e-3)
    yield "chirp", 0.3 * np.sin(2 * np.pi * (100 * time + rise * time**2 / 2))
    sawtooth = time % 1
    yield "siren", 0.3 * np.sin(2 * np.pi * (300 * sawtooth + 1500 * sawtooth**2))
    yield "direct current", np.full(num_samples, 0.2)
    yield "chord", sines(time, 261.6, 329.6, 392.0)
    roots = np.array([1.0, 1.12, 1.33, 1.5])[(2 * time).astype(int) % 4]
    phase = np.cumsum(roots) / SAMPLE_RATE
    yield "chords", sines(phase, 261.6, 329.6, 392.0)


CLIPS = {
    f"{name}, {seconds} s": wave.astype(np.float32)
    for seconds in (0, 1 / SAMPLE_RATE, 0.01, 0.1, 1.0, 10.0)
    for name, wave in without_speech(seconds)
}


def test_there_are_enough_clips() -> None:
    assert len(CLIPS) >= 140


@pytest.mark.parametrize("clip", CLIPS)
def test_what_is_not_speech_does_not_pass(clip: str) -> None:
    assert not has_speech(CLIPS[clip], "energy")


def test_minutes_of_noise_hold_no_speech() -> None:
    noise = coloured(np.random.default_rng(1), 200 * SAMPLE_RATE, 1.0) * 0.03
    assert speech_regions(noise.astype(np.float32), "energy") == []


@pytest.mark.parametrize(
    ("protection", "without", "clip"),
    [
        ("CHANGE", 0.0, "white noise at -30 dBFS"),
        ("ENVELOPE_VARIATION", 0.0, "siren"),
        ("LARGEST_CHANGE", 100.0, "chords"),
    ],
)
def test_each_cue_is_needed(
    protection: str, without: float, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waveform = dict(without_speech(10.0))[clip].astype(np.float32)
    assert not has_speech(waveform, "energy")
    monkeypatch.setattr(activity, protection, without)
    assert has_speech(waveform, "energy")


@pytest.fixture(scope="module")
def utterances() -> list[tuple[str, np.ndarray]]:
    """200 texts with their waveforms, each at -35 dBFS."""
    folder = os.environ.get("ISTHMUS_SPEECH")
    if not folder:
        pytest.skip("ISTHMUS_SPEECH names no speech")
    found: list[tuple[str, np.ndarray]] = []
    for name, count in SETS.items():
        manifest = Path(folder) / f"{name}.jsonl"
        for line in manifest.read_text().splitlines()[:count]:
            entry = json.loads(line)
            waveform, rate = soundfile.read(manifest.parent / entry["audio"], dtype="float32")
            waveform = soxr.resample(waveform, rate, SAMPLE_RATE).astype(np.float32)
            found.append((entry["text"], waveform * (QUIET / np.sqrt(np.mean(waveform**2)))))
    assert len(found) == 200
    return found


@by_energy
def test_quiet_speech_passes(utterances: list[tuple[str, np.ndarray]], detector: Detector) -> None:
    num_words = sum(len(text.split()) for text, _ in utterances)
    lost = [text for text, waveform in utterances if not has_speech(waveform, detector)]
    assert sum(len(text.split()) for text in lost) <= 0.001 * num_words, lost


@by_energy
def test_speech_in_noise_passes(
    utterances: list[tuple[str, np.ndarray]], detector: Detector
) -> None:
    """At a signal-to-noise ratio of 10 dB; single words may be lost, sentences may not."""
    generator = np.random.default_rng(2)
    for text, waveform in utterances[:87]:
        noise = coloured(generator, len(waveform), 0.0) * QUIET * 10 ** (-10 / 20)
        if len(text.split()) > 3:
            assert has_speech((waveform + noise).astype(np.float32), detector), text


@by_energy
def test_regions_lie_where_speech_is(
    utterances: list[tuple[str, np.ndarray]], detector: Detector
) -> None:
    spoken = next(wave for text, wave in utterances if len(text.split()) > 6)
    silence = np.random.default_rng(0).normal(0, 1e-4, 3 * SAMPLE_RATE).astype(np.float32)
    waveform = np.concatenate([silence, spoken, silence, spoken, silence])
    seconds = len(spoken) / SAMPLE_RATE
    regions = speech_regions(waveform, detector)
    assert all(start < end for start, end in regions)
    assert all(a[1] <= b[0] for a, b in pairwise(regions))
    times = np.arange(len(waveform) // 160) / 100
    covered = np.any([(times >= a) & (times < b) for a, b in regions], axis=0)
    outside = (times < 2.5) | ((times > 3.5 + seconds) & (times < 5.5 + seconds))
    assert not covered[outside].any()
    inside = (times > 3) & (times < 3 + seconds)
    assert covered[inside].mean() > 0.7


@by_energy
def test_the_level_of_a_recording_does_not_matter(
    utterances: list[tuple[str, np.ndarray]], detector: Detector
) -> None:
    for _, waveform in utterances[:5]:
        assert has_speech(waveform * 10 ** (-15 / 20), detector)
        assert has_speech(np.clip(waveform * 30, -1, 1), detector)


@needs_silero
def test_silero_does_all_this_too(request: pytest.FixtureRequest) -> None:
    passed = [name for name, waveform in CLIPS.items() if has_speech(waveform, "silero")]
    assert not passed
    utterances = request.getfixturevalue("utterances")
    test_quiet_speech_passes(utterances, "silero")
    test_speech_in_noise_passes(utterances, "silero")
    test_regions_lie_where_speech_is(utterances, "silero")
    test_the_level_of_a_recording_does_not_matter(utterances, "silero")


def test_an_unknown_detector_names_the_known() -> None:
    with pytest.raises(IsthmusError, match=r"Did you mean 'energy'\?"):
        speech_regions(np.zeros(16_000, np.float32), "enegry")  # type: ignore[arg-type] # wrong


@pytest.mark.skipif(SILERO, reason="silero-vad is installed")
def test_a_missing_silero_is_said_and_auto_does_without() -> None:
    with pytest.raises(IsthmusError, match=r"pip install 'isthmus\[vad\]'"):
        speech_regions(np.zeros(16_000, np.float32), "silero")
    assert speech_regions(np.zeros(16_000, np.float32), "auto") == []


@needs_silero
def test_silero_leaves_the_number_of_threads() -> None:
    """In a process of its own: it is the first import that sets it."""
    program = (
        "import numpy as np, torch; torch.set_num_threads(3);"
        "from isthmus.speech.activity import has_speech;"
        "has_speech(np.zeros(16_000, np.float32), 'silero'); assert torch.get_num_threads() == 3"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_it_loads_no_torch() -> None:
    program = "import sys, isthmus.speech.activity; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
