"""Log-mel filterbank features in torch, equal to Kaldi's within rounding.

Shapes: B batch, S samples, F mel bins, T feature frames.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.settings.conformers import LogMelSettings
from isthmus.speech.audio import SAMPLE_RATE

FRAME_SAMPLES = SAMPLE_RATE * 25 // 1000  # 400: a window of 25 ms
HOP_SAMPLES = SAMPLE_RATE // 100  # 160: a frame each 10 ms
FFT_SAMPLES = 512  # next power of two
PREEMPHASIS = 0.97
LOWEST_HZ = 20.0
KALDI_SCALE = 32768.0  # Kaldi's waveforms are 16-bit integers
QUIETEST_PEAK = 1.0  # mean energy of a frame; the rounding of 16-bit audio alone has more


def padded(waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Waveforms (S,), padded at the end to one tensor (B, S) float32, and their lengths (B,)."""
    lengths = [len(waveform) for waveform in waveforms]
    rows = torch.zeros(len(waveforms), max(lengths, default=0))
    for row, waveform in zip(rows, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return rows, torch.tensor(lengths, dtype=torch.long)


class LogMel(nn.Module):
    """Waveforms (B, S) with their lengths to log-mel features (B, T, F) with theirs.

    25 ms Povey windows each 10 ms, DC removed and 0.97 pre-emphasis within each window, power
    spectrum of 512 points, triangular mel filters from 20 Hz to 8 kHz, natural logarithm: the
    defaults of Kaldi's compute-fbank-feats with `snip_edges`, without dither. Whatever stands
    behind an utterance's own samples has no influence on its frames.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, settings: LogMelSettings):
        super().__init__()
        self.settings = settings
        self.margin = round(settings.margin_seconds * SAMPLE_RATE)
        hann = torch.hann_window(FRAME_SAMPLES, periodic=False, dtype=torch.float64)
        self.register_buffer("window", hann.pow(0.85).float(), persistent=False)
        self.register_buffer("filters", mel_filters(settings.num_mels), persistent=False)

    def output_length(self, num_samples: int) -> int:
        """Frames of an utterance of `num_samples`; shorter ones are padded to one window."""
        return (
            1 + (max(num_samples + 2 * self.margin, FRAME_SAMPLES) - FRAME_SAMPLES) // HOP_SAMPLES
        )

    @torch.no_grad()
    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        valid = torch.arange(waveforms.shape[1], device=waveforms.device) < num_samples[:, None]
        waveforms = waveforms.float().masked_fill(~valid, 0.0)
        short = max(0, FRAME_SAMPLES - waveforms.shape[1] - 2 * self.margin)
        waveforms = nn.functional.pad(waveforms, (self.margin, self.margin + short))
        windows = waveforms.unfold(1, FRAME_SAMPLES, HOP_SAMPLES) * KALDI_SCALE  # (B, T, 400)
        windows = windows - windows.mean(dim=2, keepdim=True)
        previous = torch.cat([windows[..., :1], windows[..., :-1]], dim=2)
        windows = (windows - PREEMPHASIS * previous) * self.window
        power = torch.fft.rfft(windows, n=FFT_SAMPLES).abs().square()  # (B, T, 257)
        with without_autocast(power.device):
            mels = power @ self.filters  # (B, T, F)
        features = mels.clamp_min(torch.finfo(torch.float32).eps).log()
        lengths = [self.output_length(n) for n in num_samples.tolist()]
        num_frames = torch.tensor(lengths, device=waveforms.device)
        if self.settings.normalise == "peak":
            features = self._relative_to_peak(features, mels, num_frames)
        return features, num_frames

    def _relative_to_peak(self, features: Tensor, mels: Tensor, num_frames: Tensor) -> Tensor:
        """Scale to about [-2, 2]: 2 is the mean energy of the loudest frame, -2 is silence."""
        valid = torch.arange(features.shape[1], device=features.device) < num_frames[:, None]
        energy = mels.mean(dim=2).masked_fill(~valid, 0.0)  # (B, T)
        peak = energy.amax(dim=1).clamp_min(QUIETEST_PEAK).log()  # all silence stays silence
        span = self.settings.range_db * math.log(10.0) / 10.0
        relative = (features - peak[:, None, None]).clamp_min(-span)
        return relative * (4.0 / span) + 2.0


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Everything in the precision it is in: front ends lose digits in bfloat16, or even fail."""
    return torch.autocast(device.type, enabled=False)


def mel_filters(num_mels: int) -> Tensor:
    """Kaldi's triangular filters, (257, F): triangles are linear on the mel scale, not in Hz."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    bins = torch.arange(FFT_SAMPLES // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / FFT_SAMPLES
    limits = mel(torch.tensor([LOWEST_HZ, SAMPLE_RATE / 2], dtype=torch.float64))
    edges = torch.linspace(float(limits[0]), float(limits[1]), num_mels + 2, dtype=torch.float64)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (mel(bins)[:, None] - left) / (centre - left)
    falling = (right - mel(bins)[:, None]) / (right - centre)
    filters = torch.minimum(rising, falling).clamp_min(0.0)
    return filters.float()
