"""Augmentation for training only: of waveforms (numpy), and of features (SpecAugment, torch).

Every effect is a frozen settings object that is called with a waveform (S,), float32 at 16 kHz in
[-1, 1], and a numpy Generator, and returns a new waveform of float32. Only `Speed` changes S. All
draws come from the generator, so the same generator state gives the same waveform.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import soxr
from numpy.fft import irfft, rfft
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat

from isthmus.speech.audio import SAMPLE_RATE

if TYPE_CHECKING:  # features are torch tensors, but waveforms must not cost the import of torch
    from torch import Tensor

Rng = np.random.Generator
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
NoiseColour = Literal["white", "pink", "brown", "hum", "babble"]


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"a range is (least, greatest), not {bounds}")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_ascending)]
PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Padding(_Settings):
    """Put silence before and behind: recordings that are cut tightly all begin alike."""

    seconds: Range = (0.0, 0.25)  # at each end

    def __call__(self, waveform: np.ndarray, rng: Rng) -> np.ndarray:
        before, behind = (int(SAMPLE_RATE * rng.uniform(*self.seconds)) for _ in range(2))
        return np.pad(waveform, (before, behind))


class Speed(_Settings):
    """Play faster or slower, pitch included (Ko et al. 2015, "Audio augmentation").

    The waveform of S samples becomes one of about S / factor samples.
    """

    factors: PositiveRange = (0.85, 1.15)

    def __call__(self, waveform: np.ndarray, rng: Rng) -> np.ndarray:
        factor = rng.uniform(*self.factors)
        return _resample(waveform, SAMPLE_RATE * factor, SAMPLE_RATE)


class Gain(_Settings):
    """Make louder or quieter; what would exceed full scale is only raised up to it."""

    decibels: Range = (-20.0, 6.0)

    def __call__(self, waveform: np.ndarray, rng: Rng) -> np.ndarray:
        gain = 10 ** (rng.uniform(*self.decibels) / 20)
        peak = float(np.abs(waveform).max(initial=0.0))
        return waveform * np.float32(min(gain, max(1.0, 1 / peak)) if peak > 0 else gain)


class Noise(_Settings):
    """Add synthetic noise at a random signal-to-noise ratio (decibels, of mean powers)."""

    snr: Range = (5.0, 30.0)
    colours: tuple[NoiseColour, ...] = ("white", "pink", "brown", "hum", "babble")

    def __call__(self, waveform: np.ndarray, rng: Rng) -> np.ndarray:
        snr = rng.uniform(*self.snr)
        noise = _noise(self.colours[int(rng.integers(len(self.colours)))], len(waveform), rng)
        wanted = _power(waveform) / 10 ** (snr / 10)
        return waveform + noise * np.float32(np.sqrt(wanted / max(_power(noise), 1e-20)))


class Telephone(_Settings):
    """Narrow to the telephone's band by way of 8 kHz, with mu-law coding in some calls."""

    band: PositiveRange = (300.0, 3400.0)  # Hz
    mu_law: Probability = 0.5

    def __call__(self, waveform: np.ndarray, rng: Rng) -> np.ndarray:
        coded = rng.random() < self.mu_law
        low, high = self.band
        narrow = _resample(waveform, SAMPLE_RATE, 8000)
        size = _fast_size(len(narrow) + 800)  # room for the filter's ringing
        frequencies = np.fft.rfftfreq(size, 1 / 8000)
        # Butterworth magnitudes of order 4: steep enough for a line, without ringing
        response = 1 / np.sqrt(1 + (low / np.maximum(frequencies, 1)) ** 8)
        response /= np.sqrt(1 + (frequencies / high) ** 16)
        narrow = irfft(rfft(narrow, size) * response.astype(np.float32), size)[: len(narrow)]
        if coded:
            narrow = _mu_law(narrow)
        return _fit(_resample(narrow, 8000, SAMPLE_RATE), len(waveform))


class Equaliser(_Settings):
    """Colour the spectrum gently by a tilt and a few broad peaks or dips."""

    tilt: Annotated[float, Field(ge=0)] = 3.0  # greatest slope, decibels an octave about 1 kHz
    peak: Annotated[float, Field(ge=0)] = 8.0  # greatest height of a peak, decibels
    peaks: Count = 3

    def __call__(self, waveform: np.ndarray, rng: Rng) -> np.ndarray:
        bands = np.linspace(-5, 3, 65)  # octaves from 1 kHz: 31 Hz .. 8 kHz
        decibels = rng.uniform(-self.tilt, self.tilt) * bands
        for _ in range(self.peaks):
            centre, width = rng.uniform(-3.5, 3), rng.uniform(0.3, 1.5)
            height = rng.uniform(-self.peak, self.peak)
            decibels += height * np.exp(-0.5 * ((bands - centre) / width) ** 2)
        size = _fast_size(len(waveform) + 1600)
        response = np.interp(_octaves(size), bands, 10 ** (decibels.clip(-30, 30) / 20))
        equal = irfft(rfft(waveform, size) * response.astype(np.float32), size)[: len(waveform)]
        return equal * np.float32(np.sqrt(_power(waveform) / max(_power(equal), 1e-20)))


class Reverb(_Settings):
    """Put into a room: convolve with decaying noise. The length and the power stay the same."""

    decay: PositiveRange = (0.1, 0.7)  # seconds until the echo has fallen by 60 dB (RT60)
    direct: Range = (-3.0, 12.0)  # decibels of the direct sound over the echo

    def __call__(self, waveform: np.ndarray, rng: Rng) -> np.ndarray:
        decay = rng.uniform(*self.decay)
        ratio = 10 ** (rng.uniform(*self.direct) / 20)
        num_taps = int(decay * SAMPLE_RATE)
        echo = rng.standard_normal(num_taps, dtype=np.float32)
        echo *= np.exp(np.arange(num_taps, dtype=np.float32) * np.float32(-6.9 / num_taps))
        delay = int(rng.uniform(0.001, 0.01) * SAMPLE_RATE)  # the first wall is metres away
        echo[:delay] = 0
        echo /= np.sqrt(max(float(echo @ echo), 1e-20)) * ratio
        echo[0] = 1
        size = _fast_size(len(waveform) + num_taps)
        wet = irfft(rfft(waveform, size) * rfft(echo, size), size)[: len(waveform)]
        return wet * np.float32(np.sqrt(_power(waveform) / max(_power(wet), 1e-20)))


class Clip(_Settings):
    """Cut the peaks off, as an overdriven microphone does."""

    levels: PositiveRange = (0.3, 0.9)  # of the peak

    def __call__(self, waveform: np.ndarray, rng: Rng) -> np.ndarray:
        level = rng.uniform(*self.levels) * float(np.abs(waveform).max(initial=0.0))
        return waveform.clip(-level, level)


class Augmentation(_Settings):
    """Effects in the order in which sound meets them: speaker, room, noise, microphone, line.

    An effect that is None is off; one that is set happens with its probability.
    """

    padding: Padding | None = None
    padding_probability: Probability = 0.5
    speed: Speed | None = None
    speed_probability: Probability = 0.5
    reverb: Reverb | None = None
    reverb_probability: Probability = 0.3
    noise: Noise | None = None
    noise_probability: Probability = 0.5
    equaliser: Equaliser | None = None
    equaliser_probability: Probability = 0.5
    clip: Clip | None = None
    clip_probability: Probability = 0.05
    telephone: Telephone | None = None
    telephone_probability: Probability = 0.2
    gain: Gain | None = None
    gain_probability: Probability = 0.8

    @classmethod
    def all(cls) -> "Augmentation":
        """Return every effect with its default settings and probability."""
        return cls(
            padding=Padding(),
            speed=Speed(),
            reverb=Reverb(),
            noise=Noise(),
            equaliser=Equaliser(),
            clip=Clip(),
            telephone=Telephone(),
            gain=Gain(),
        )

    def longest(self, seconds: float) -> float:
        """Seconds that an utterance of `seconds` may last afterwards, at most."""
        if self.padding is not None:
            seconds += 2 * self.padding.seconds[1]
        if self.speed is not None:
            seconds *= max(1.0, 1.001 / self.speed.factors[0])  # a little, as resampling rounds
        return seconds

    def __call__(self, waveform: np.ndarray, rng: Rng) -> np.ndarray:
        """Augment a waveform (S,); the result is a new float32 array within [-1, 1]."""
        if waveform.ndim != 1 or not len(waveform):
            raise ValueError(f"augmentation takes a waveform (S,), S > 0, not {waveform.shape}")
        effects = (
            (self.padding, self.padding_probability),
            (self.speed, self.speed_probability),
            (self.reverb, self.reverb_probability),
            (self.noise, self.noise_probability),
            (self.equaliser, self.equaliser_probability),
            (self.clip, self.clip_probability),
            (self.telephone, self.telephone_probability),
            (self.gain, self.gain_probability),
        )
        chances = rng.random(len(effects))
        augmented = waveform.astype(np.float32)
        for (effect, probability), chance in zip(effects, chances, strict=True):
            if effect is not None and chance < probability:
                augmented = effect(augmented, rng)
        return augmented.clip(-1, 1)


class SpecAugment(_Settings):
    """Mask random bands of time and frequency (Park et al. 2019, arXiv 1904.08779, section 2)."""

    time_masks: Count = 2
    time_width: Count = 40  # greatest width of a mask, frames
    time_fraction: Probability = 0.2  # greatest width of a mask, of the utterance's length
    frequency_masks: Count = 2
    frequency_width: Count = 27  # greatest width of a mask, bins

    def __call__(self, features: "Tensor", lengths: "Tensor", rng: Rng) -> "Tensor":
        """Return a copy of features (B, T, F) with masked parts 0, their mean after normalisation.

        Masks of time lie within the lengths (B,), in frames.
        """
        if features.ndim != 3 or lengths.shape != features.shape[:1]:
            raise ValueError(
                "SpecAugment takes features (B, T, F) and lengths (B,), not "
                f"{tuple(features.shape)} and {tuple(lengths.shape)}"
            )
        masked = features.clone()
        for utterance, length in zip(masked, lengths.tolist(), strict=True):
            for _ in range(self.time_masks):
                widest = min(self.time_width, int(length * self.time_fraction))
                start, end = _span(length, widest, rng)
                utterance[start:end] = 0
            for _ in range(self.frequency_masks):
                start, end = _span(features.shape[2], self.frequency_width, rng)
                utterance[:, start:end] = 0
        return masked


def _span(size: int, widest: int, rng: Rng) -> tuple[int, int]:
    """Draw a span of 0..widest within 0..size."""
    width = int(rng.integers(min(widest, size) + 1))
    start = int(rng.integers(size - width + 1))
    return start, start + width


def _resample(waveform: np.ndarray, source: float, target: float) -> np.ndarray:
    # "quick" and "low" leave audible images above 3.4 kHz; "medium" costs 1 ms for 3 s
    resampled: np.ndarray = soxr.resample(waveform, source, target, quality="MQ")
    return resampled


def _fit(waveform: np.ndarray, num_samples: int) -> np.ndarray:
    return np.pad(waveform[:num_samples], (0, max(0, num_samples - len(waveform))))


def _power(waveform: np.ndarray) -> float:
    return float(waveform @ waveform) / max(1, len(waveform))


def _fast_size(size: int) -> int:
    """Return an even size, a little larger, with small prime factors."""
    shift = max(1, (size - 1).bit_length() - 4)  # 9 to 16 times a power of two
    return (((size - 1) >> shift) + 1) << shift


def _mu_law(waveform: np.ndarray) -> np.ndarray:
    """Code in 8 bits and back (ITU-T G.711 in its continuous form, mu = 255)."""
    scale = np.float32(np.log1p(255.0))
    compressed = np.sign(waveform) * np.log1p(255 * np.abs(waveform.clip(-1, 1))) / scale
    quantised = np.round(compressed * 127) / 127
    expanded: np.ndarray = np.sign(quantised) * np.expm1(np.abs(quantised) * scale) / 255
    return expanded.astype(np.float32)


@lru_cache(maxsize=8)
def _octaves(size: int) -> np.ndarray:
    """Return the frequencies of an rfft of `size` in octaves from 1 kHz."""
    octaves: np.ndarray = np.log2(np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 1) / 1000)
    return octaves


def _noise(colour: NoiseColour, num_samples: int, rng: Rng) -> np.ndarray:
    """Draw noise (S,), float32, of arbitrary power."""
    if colour == "white":
        return rng.standard_normal(num_samples, dtype=np.float32)
    if colour == "hum":
        return _hum(num_samples, rng)
    size = _fast_size(num_samples)
    spectrum = rng.standard_normal(size + 2, dtype=np.float32).view(np.complex64)  # (size / 2 + 1,)
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32), 20)
    if colour == "brown":
        return irfft(spectrum / frequencies, size)[:num_samples]
    pink = spectrum / np.sqrt(frequencies)
    if colour == "pink":
        return irfft(pink, size)[:num_samples]
    # babble: the long-term spectrum of speech, swelling at the rate of syllables
    speech = irfft(pink / (1 + (frequencies / 800) ** 2) * (frequencies > 100), size)[:num_samples]
    syllables = rng.gamma(1.5, size=num_samples // 2000 + 3)  # one each 125 ms
    places = np.arange(num_samples) / 2000 + rng.random()
    return speech * np.interp(places, np.arange(len(syllables)), syllables).astype(np.float32)


def _hum(num_samples: int, rng: Rng) -> np.ndarray:
    """Sum the mains' harmonics, over a little white noise."""
    mains = 50 if rng.random() < 0.5 else 60
    seconds = np.arange(num_samples, dtype=np.float32) / SAMPLE_RATE
    hum = 0.02 * rng.standard_normal(num_samples, dtype=np.float32)
    for harmonic in range(1, 6):
        phase, level = rng.uniform(0, 2 * np.pi), rng.random() / harmonic
        hum += np.float32(level) * np.sin(
            np.float32(2 * np.pi * mains * harmonic) * seconds + np.float32(phase)
        )
    return hum
