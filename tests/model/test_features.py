"""Log-mel features against Kaldi's, and what they do not depend on."""

import math
from collections.abc import Callable

import kaldi_native_fbank
import pytest
import torch
from torch import Tensor

from isthmus.model.features import LogMel
from isthmus.settings.conformers import LogMelSettings
from isthmus.speech.audio import SAMPLE_RATE

Waves = Callable[..., Tensor]


def kaldi(waveform: Tensor, num_mels: int) -> Tensor:
    """Features (T, F) of kaldi-native-fbank with Kaldi's defaults, without dither."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = num_mels
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(SAMPLE_RATE, (waveform * 32768.0).tolist())
    fbank.input_finished()
    frames = [fbank.get_frame(number) for number in range(fbank.num_frames_ready)]
    return torch.stack([torch.from_numpy(frame.copy()) for frame in frames])


def chirp(seconds: float) -> Tensor:
    """A tone (S,) that rises from 50 Hz to 7.9 kHz."""
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return 0.3 * torch.sin(2 * math.pi * (50.0 * time + 7850.0 / (2 * seconds) * time.square()))


def features(log_mel: LogMel, *waveforms: Tensor, padding: float = 0.0) -> list[Tensor]:
    num_samples = torch.tensor([len(waveform) for waveform in waveforms])
    batch = padding * torch.randn(len(waveforms), int(num_samples.max()))
    for row, waveform in zip(batch, waveforms, strict=True):
        row[: len(waveform)] = waveform
    frames, lengths = log_mel(batch, num_samples)
    return [row[:length] for row, length in zip(frames, lengths.tolist(), strict=True)]


@pytest.mark.parametrize("num_mels", [40, 80])
def test_equals_kaldi(num_mels: int, waves: Waves) -> None:
    log_mel = LogMel(LogMelSettings(num_mels=num_mels))
    noise = 0.03 * torch.randn(32_000, generator=torch.Generator().manual_seed(0))
    # far below a pure tone there is nothing but rounding, in Kaldi's features too
    for waveform in (waves(20_000), waves(400), chirp(2.0) + noise):
        (ours,) = features(log_mel, waveform)
        torch.testing.assert_close(ours, kaldi(waveform, num_mels), atol=1e-3, rtol=0)


@pytest.mark.parametrize("margin", [0.0, 0.12])
@pytest.mark.parametrize("normalise", ["none", "peak"])
def test_what_is_behind_does_not_matter(normalise: str, margin: float, waves: Waves) -> None:
    torch.manual_seed(0)
    settings = LogMelSettings.model_validate({"normalise": normalise, "margin_seconds": margin})
    utterances = [waves(n, seed=n) for n in (1, 399, 5001, 16_000)]
    together = features(LogMel(settings), *utterances, padding=10.0)
    for utterance, found in zip(utterances, together, strict=True):
        (alone,) = features(LogMel(settings), utterance)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_margins_are_silence_around(waves: Waves) -> None:
    margin = torch.zeros(SAMPLE_RATE // 10)
    (inside,) = features(LogMel(LogMelSettings(margin_seconds=0.1)), waves(8000))
    (around,) = features(LogMel(LogMelSettings()), torch.cat([margin, waves(8000), margin]))
    torch.testing.assert_close(inside, around)


@pytest.mark.parametrize("gain", [1e-2, 0.3, 10.0])
def test_peak_does_not_depend_on_the_level(gain: float, waves: Waves) -> None:
    log_mel = LogMel(LogMelSettings(normalise="peak"))
    loud, quiet = features(log_mel, waves(16_000), gain * waves(16_000))
    torch.testing.assert_close(quiet, loud, atol=1e-3, rtol=0)
    assert 0 < loud.max() < 4
    assert loud.min() >= -2 - 1e-6


def test_silence_is_not_made_loud() -> None:
    (frames,) = features(LogMel(LogMelSettings(normalise="peak")), torch.zeros(SAMPLE_RATE))
    assert frames.max() < -1.9
