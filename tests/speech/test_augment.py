"""Augmentation: deterministic, of the promised lengths, levels and bands, and fast."""

import time

import numpy as np
import pytest
from pydantic import ValidationError

from isthmus.speech.audio import SAMPLE_RATE
from isthmus.speech.augment import (
    Augmentation,
    Clip,
    Equaliser,
    Gain,
    Noise,
    NoiseColour,
    Reverb,
    SpecAugment,
    Speed,
    Telephone,
)

COLOURS: tuple[NoiseColour, ...] = ("white", "pink", "brown", "hum", "babble")
EFFECTS = [
    Speed(),
    Gain(),
    Telephone(mu_law=0),
    Telephone(mu_law=1),
    Equaliser(),
    Reverb(),
    Clip(),
    *(Noise(colours=(colour,)) for colour in COLOURS),
    Augmentation.all(),
]


def noise(seconds: float = 1.0, level: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (level * rng.standard_normal(int(seconds * SAMPLE_RATE))).astype(np.float32)


def tone(frequency: float, seconds: float = 1.0) -> np.ndarray:
    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * frequency * times)).astype(np.float32)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """Return the power of one waveform over another's."""
    return float(10 * np.log10(np.mean(one.astype(float) ** 2) / np.mean(other.astype(float) ** 2)))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("effect", EFFECTS, ids=repr)
@pytest.mark.parametrize("num_samples", [1, 2, 161, 16_000, 30_001])
def test_contract(effect: Augmentation, num_samples: int) -> None:
    waveform = noise(3)[:num_samples]
    kept = waveform.copy()
    for seed in range(5):
        augmented = effect(waveform, rng(seed))
        assert augmented.dtype == np.float32
        assert np.isfinite(augmented).all()
        assert np.array_equal(augmented, effect(waveform, rng(seed)))
        if not isinstance(effect, Speed | Augmentation):
            assert augmented.shape == waveform.shape
    assert np.array_equal(waveform, kept)


@pytest.mark.parametrize("effect", EFFECTS, ids=repr)
def test_effects_change_sound_differently_each_time_and_leave_silence_finite(
    effect: Augmentation,
) -> None:
    waveform = noise()
    if isinstance(effect, Telephone):
        assert not np.array_equal(effect(waveform, rng(0)), waveform)
    else:
        one, other = effect(waveform, rng(0)), effect(waveform, rng(2))
        assert not (one.shape == other.shape and np.array_equal(one, other))
    assert not effect(np.zeros(8000, np.float32), rng(0)).any()


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.15])
def test_speed_changes_length_and_pitch(factor: float) -> None:
    augmented = Speed(factors=(factor, factor))(tone(1000), rng())
    assert len(augmented) == pytest.approx(SAMPLE_RATE / factor, abs=2)
    peak = np.abs(np.fft.rfft(augmented)).argmax() * SAMPLE_RATE / len(augmented)
    assert peak == pytest.approx(1000 * factor, abs=2)


def test_gain_is_in_decibels_and_does_not_clip() -> None:
    assert decibels(Gain(decibels=(-6, -6))(noise(), rng()), noise()) == pytest.approx(-6, abs=0.01)
    loud = Gain(decibels=(40, 40))(noise(), rng())
    assert np.abs(loud).max() == pytest.approx(1)
    assert np.corrcoef(loud, noise())[0, 1] == pytest.approx(1)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("snr", [0.0, 20.0])
def test_noise_has_its_ratio(colour: NoiseColour, snr: float) -> None:
    waveform = noise()
    augmented = Noise(snr=(snr, snr), colours=(colour,))(waveform, rng())
    assert decibels(waveform, augmented - waveform) == pytest.approx(snr, abs=0.1)


def test_colours_slope_as_they_should() -> None:
    def slope(colour: NoiseColour) -> float:
        """Return the fall from 500 Hz to 1 kHz in decibels."""
        waveform = noise(4)
        added = Noise(snr=(0, 0), colours=(colour,))(waveform, rng()) - waveform
        power = np.abs(np.fft.rfft(added)) ** 2
        low, high = (power[4 * hertz - 400 : 4 * hertz + 400].mean() for hertz in (500, 1000))
        return float(10 * np.log10(low / high))

    for colour, fall in (("white", 0), ("pink", 3), ("brown", 6)):
        assert slope(colour) == pytest.approx(fall, abs=1.2)


@pytest.mark.parametrize(
    ("frequency", "least", "most"),
    [(100, -99, -20), (1000, -1, 1), (3000, -3, 1), (4500, -99, -40), (7000, -99, -40)],
)
def test_telephone_passes_its_band_only(frequency: float, least: float, most: float) -> None:
    augmented = Telephone(mu_law=0)(tone(frequency), rng())
    assert least < decibels(augmented, tone(frequency)) < most


def test_telephone_keeps_time() -> None:
    augmented = Telephone(mu_law=0)(noise(), rng())
    lags = np.fft.irfft(np.fft.rfft(augmented) * np.conj(np.fft.rfft(noise())))
    assert min(lags.argmax(), len(lags) - lags.argmax()) <= 3  # samples


def test_mu_law_adds_the_noise_of_eight_bits() -> None:
    coded, plain = (Telephone(mu_law=chance)(tone(1000), rng()) for chance in (1.0, 0.0))
    assert 30 < decibels(plain, coded - plain) < 45


def test_equaliser_and_reverb_keep_the_power() -> None:
    for effect in (Equaliser(), Reverb()):
        for seed in range(5):
            assert decibels(effect(noise(), rng(seed)), noise()) == pytest.approx(0, abs=0.01)


def test_equaliser_tilts() -> None:
    augmented = Equaliser(tilt=6, peak=0, peaks=0)(noise(), np.random.default_rng(3))
    power = np.abs(np.fft.rfft(augmented)) ** 2 / np.abs(np.fft.rfft(noise())) ** 2
    slope = 10 * np.log10(np.median(power[3900:4100]) / np.median(power[480:520])) / 3
    assert 0.5 < abs(slope) <= 6.2


def test_reverb_rings_on_after_the_sound_and_never_before() -> None:
    waveform = np.zeros(SAMPLE_RATE, np.float32)
    waveform[4000] = 0.5
    echo = Reverb(decay=(0.4, 0.4))(waveform, rng())
    assert np.abs(echo[:3999]).max() < 1e-4
    assert echo.argmax() == 4000
    early, late = echo[4200:5800], echo[8800:10400]  # 0.29 s apart: 43 dB
    assert decibels(early, late) == pytest.approx(43, abs=4)


def test_clip_cuts_peaks() -> None:
    augmented = Clip(levels=(0.5, 0.5))(noise(), rng())
    assert np.abs(augmented).max() == pytest.approx(np.abs(noise()).max() / 2)
    small = np.abs(noise()) < np.abs(augmented).max()
    assert np.array_equal(augmented[small], noise()[small])


def test_augmentation_is_off_unless_asked_for() -> None:
    assert np.array_equal(Augmentation()(noise(), rng()), noise())
    never = Augmentation(gain=Gain(), gain_probability=0)
    assert np.array_equal(never(noise(), rng()), noise())


def test_augmentation_applies_effects_as_often_as_asked() -> None:
    augmentation = Augmentation(clip=Clip(), clip_probability=0.3)
    source = rng()
    times = sum(
        not np.array_equal(augmentation(noise(0.1), source), noise(0.1)) for _ in range(500)
    )
    assert 110 < times < 190


def test_augmentation_stays_within_full_scale() -> None:
    augmentation = Augmentation(noise=Noise(snr=(-10, -10)), noise_probability=1)
    assert np.abs(augmentation(noise(level=0.5), rng())).max() <= 1


@pytest.mark.parametrize("shape", [(0,), (2, 16_000)])
def test_augmentation_refuses_what_is_no_waveform(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"waveform \(S,\)"):
        Augmentation.all()(np.zeros(shape, np.float32), rng())


def test_settings_are_checked_and_frozen() -> None:
    with pytest.raises(ValidationError, match="least, greatest"):
        Gain(decibels=(3, -3))
    with pytest.raises(ValidationError):
        Augmentation.model_validate({"speed_probability": 1.5})
    with pytest.raises(ValidationError):
        Augmentation.model_validate({"speeed": {}})
    with pytest.raises(ValidationError):
        Speed(factors=(0.0, 1.0))
    with pytest.raises(ValidationError):
        Gain().decibels = (0, 0)  # type: ignore[misc]  # this is what must fail
    assert Augmentation.model_validate(Augmentation.all().model_dump()) == Augmentation.all()


def test_augmentation_of_three_seconds_takes_milliseconds() -> None:
    augmentation, waveform, source = Augmentation.all(), noise(3), rng()
    augmentation(waveform, source)
    start = time.process_time()
    for _ in range(50):
        augmentation(waveform, source)
    assert (time.process_time() - start) / 50 < 0.015  # 2 to 3 ms on an idle core


def test_spec_augment_masks_within_lengths() -> None:
    torch = pytest.importorskip("torch")
    features = torch.ones(2, 100, 80)
    lengths = torch.tensor([100, 30])
    masked = SpecAugment(time_masks=1, frequency_masks=0)(features, lengths, rng(1))
    assert features.eq(1).all()
    assert masked[0, :, 0].eq(0).any()
    for utterance in masked:
        assert utterance.eq(utterance[:, :1]).all()  # whole frames
    widest = 0
    for seed in range(200):
        masked = SpecAugment(time_masks=1, frequency_masks=0)(features, lengths, rng(seed))
        assert masked[1, 30:].eq(1).all()
        widest = max(widest, int(masked[1, :, 0].eq(0).sum()))
    assert widest == 6  # 0.2 of 30


def test_spec_augment_masks_bands() -> None:
    torch = pytest.importorskip("torch")
    features = torch.ones(1, 100, 80)
    settings = SpecAugment(time_masks=0, frequency_masks=1, frequency_width=10)
    widths = set()
    for seed in range(300):
        masked = settings(features, torch.tensor([100]), rng(seed))
        assert masked.eq(masked[:, :1]).all()
        widths.add(int(masked[0, 0].eq(0).sum()))
    assert widths == set(range(11))


def test_spec_augment_off_repeats_and_refuses() -> None:
    torch = pytest.importorskip("torch")
    features, lengths = torch.randn(2, 50, 20), torch.tensor([50, 20])
    off = SpecAugment(time_masks=0, frequency_masks=0)(features, lengths, rng())
    assert torch.equal(off, features)
    one, other = (SpecAugment()(features, lengths, rng(5)) for _ in range(2))
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"\(50, 20\)"):
        SpecAugment()(features[0], lengths, rng())
