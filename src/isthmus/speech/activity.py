"""Where in a recording somebody speaks: what keeps noise and silence away from the LLM.

Two detectors. `silero` is Silero VAD, a small network (extra `vad`). `energy` is our own and needs
numpy alone: it takes for speech what is louder than the recording's noise floor and changes the
shape of its spectrum as fast as syllables do. Hum, tones, held chords, clicks and noise of any
colour keep their shape; a chirp moves its spectrum, but its envelope is constant, as no voice's is.
What the energy detector takes for speech though it is none: music in fast movement, noise that
swells and fades several times a second, claps, dialling tones, birds, barking and other lively
sounds. For recordings with many of these use `silero`.
"""

import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from threading import Lock
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from isthmus.errors import IsthmusError, suggest
from isthmus.speech.audio import SAMPLE_RATE

Detector: TypeAlias = Literal["auto", "silero", "energy"]
Region: TypeAlias = tuple[float, float]  # start and end, seconds

SHORTEST_SECONDS = 0.1  # of audio that can hold a word
PADDING_SECONDS = 0.2  # added around speech: quiet beginnings and ends of words
PAUSE_SECONDS = 0.5  # speech with a shorter pause in it is one region

WINDOW, HOP = 512, 160  # samples: 32 and 10 ms
FRAME_RATE = SAMPLE_RATE // HOP
BAND_EDGES_HZ = (100, 4000)  # telephone speech fills it, mains hum mostly lies below
NUM_BANDS = 14
QUIETEST = -75.0  # dBFS within the bands; a frame below it holds no speech
DYNAMIC_RANGE = 40.0  # dB; what lies deeper below a frame's level is rounding, not sound
ABOVE_FLOOR = 6.0  # dB, of speech over the recording's noise floor
BELOW_PEAK = 18.0  # dB; in a recording without a pause the floor is itself speech
SMOOTHING = 9  # frames over which power is averaged: noise varies less, syllables still do
LAG = 2  # frames: the spectrum is compared 20 ms before and after
LARGEST_CHANGE = 4.0  # dB that count; a rare leap, as from chord to chord, is not speech
ENVELOPE_VARIATION = 0.1  # relative; below it one sinusoid makes up the sound
CHANGE = 1.0  # dB, mean over the loud frames of half a second; noise and chords stay below 0.92
CHANGE_FRAMES = 50  # that half second
FEWEST_LOUD = 12  # frames; fewer than these have to change the more
BLOCK_FRAMES = 4096  # at a time, to bound memory

SILERO_THRESHOLD = 0.3  # its own default of 0.5 loses quiet words
SILERO_SHORTEST_MS = 60
SILERO_LEAD_IN_SECONDS = 0.3

_silero_lock = Lock()  # the network carries its state from frame to frame


def speech_regions(waveform: np.ndarray, detector: Detector = "auto") -> list[Region]:
    """(start, end) in seconds of each stretch with speech, in order, padding included.

    `waveform` (S,) is 16 kHz mono float32, full scale 1. `auto` is silero where it is installed,
    else energy. Raises IsthmusError for an unknown or missing detector.
    """
    if detector not in get_args(Detector):
        raise IsthmusError(
            f"Unknown voice activity detector {detector!r}; known are "
            f"{', '.join(get_args(Detector))}.{suggest(detector, get_args(Detector))}"
        )
    assert waveform.ndim == 1, waveform.shape
    if len(waveform) < SHORTEST_SECONDS * SAMPLE_RATE:
        return []
    if detector == "silero" or (detector == "auto" and importlib.util.find_spec("silero_vad")):
        spoken = _silero_regions(waveform)
    else:
        spoken = _energy_regions(waveform)
    return _padded(spoken, len(waveform) / SAMPLE_RATE)


def has_speech(waveform: np.ndarray, detector: Detector = "auto") -> bool:
    """Whether anybody speaks in a waveform (S,): nobody does in less than 0.1 s."""
    return bool(speech_regions(waveform, detector))


def _padded(spoken: list[Region], seconds: float) -> list[Region]:
    """Regions with padding; those that a short pause divides are one."""
    regions: list[Region] = []
    for start, end in spoken:
        start, end = max(0.0, start - PADDING_SECONDS), min(seconds, end + PADDING_SECONDS)
        if regions and start - regions[-1][1] < PAUSE_SECONDS - 2 * PADDING_SECONDS:
            start = regions.pop()[0]
        regions.append((start, end))
    return regions


def _silero_regions(waveform: np.ndarray) -> list[Region]:
    # Its state starts from nothing: a word at the very beginning needs a lead-in to be found.
    lead_in = round(SILERO_LEAD_IN_SECONDS * SAMPLE_RATE)
    with _silero_lock:
        find, model = _load_silero()
        found = find(
            np.pad(waveform.astype(np.float32, copy=False), lead_in),
            model,
            threshold=SILERO_THRESHOLD,
            min_speech_duration_ms=SILERO_SHORTEST_MS,
            speech_pad_ms=0,
        )
    ends = ((one["start"] - lead_in, one["end"] - lead_in) for one in found)
    inside = ((max(0, start), min(len(waveform), end)) for start, end in ends)
    return [(start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in inside if start < end]


@lru_cache(maxsize=1)
def _load_silero() -> tuple[Any, Any]:
    """Its function and its network: through onnxruntime where that is installed, else torch."""
    import torch

    num_threads = torch.get_num_threads()
    try:
        import silero_vad
    except ModuleNotFoundError as error:
        raise IsthmusError(
            "The voice activity detector `silero` is not installed. Install the extra: "
            "pip install 'isthmus[vad]', or choose `energy`."
        ) from error
    finally:
        torch.set_num_threads(num_threads)  # importing silero_vad sets it to 1 for everybody
    if importlib.util.find_spec("onnxruntime") is None:
        return silero_vad.get_speech_timestamps, silero_vad.load_silero_vad()
    # One call for many frames: ten times as fast, and no state is left in the network.
    return silero_vad.get_speech_timestamps_sequence, silero_vad.load_silero_vad(sequence=True)


def _energy_regions(waveform: np.ndarray) -> list[Region]:
    """Loud runs of frames in which the spectrum changes as in speech; no padding yet."""
    blocks = [_frame_features(block) for block in _frame_blocks(waveform)]
    bands = np.concatenate([band for band, _ in blocks])  # (T, NUM_BANDS) power
    variation = np.concatenate([one for _, one in blocks])  # (T,)
    bands = _running_mean(bands, SMOOTHING)
    level = _decibel(bands.sum(axis=1))
    loud = level > _threshold(level)
    change = np.minimum(_change(bands, level, loud), LARGEST_CHANGE)
    change[~loud | (variation < ENVELOPE_VARIATION)] = 0
    num_loud = np.maximum(_running_sum(loud, CHANGE_FRAMES), FEWEST_LOUD)
    spoken = loud & (_running_sum(change, CHANGE_FRAMES) > CHANGE * num_loud)
    return [
        (begin / FRAME_RATE, (end - 1) / FRAME_RATE + WINDOW / SAMPLE_RATE)
        for begin, end in _runs(loud, round(PAUSE_SECONDS * FRAME_RATE))
        if spoken[begin:end].any()
    ]


def _frame_blocks(waveform: np.ndarray) -> Iterator[np.ndarray]:
    """(n, WINDOW) frames every HOP samples."""
    padded = np.pad(waveform, (0, max(0, WINDOW - len(waveform))))
    frames = sliding_window_view(padded, WINDOW)[::HOP]
    for begin in range(0, len(frames), BLOCK_FRAMES):
        yield frames[begin : begin + BLOCK_FRAMES]


def _frame_features(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (n, WINDOW) frames: power in the bands (n, NUM_BANDS), variation of the envelope (n,)."""
    window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    centred = frames - frames.mean(axis=1, keepdims=True, dtype=np.float32)
    spectrum = np.fft.rfft(centred * window)
    power = 2 * (spectrum.real**2 + spectrum.imag**2) / (WINDOW * (window**2).sum())
    edges = _band_edges()
    bands = np.add.reduceat(power[:, : edges[-1]], edges[:-1], axis=1)
    # One-sided, the spectrum is that of the analytic signal, whose magnitude is the envelope;
    # of its lower half it gives every second sample.
    analytic = spectrum[:, : WINDOW // 2]
    analytic[:, : edges[0]] = 0
    middle = slice(WINDOW // 8, 3 * WINDOW // 8)  # where the window can be divided out
    envelope = np.abs(np.fft.ifft(analytic))[:, middle] / window[::2][middle]
    return bands, envelope.std(axis=1) / (envelope.mean(axis=1) + 1e-9)


def _band_edges() -> np.ndarray:
    """(NUM_BANDS + 1,) bins of the spectrum, evenly spaced on the mel scale."""
    low, high = 2595 * np.log10(1 + np.array(BAND_EDGES_HZ) / 700)
    hertz = 700 * (10 ** (np.linspace(low, high, NUM_BANDS + 1) / 2595) - 1)
    edges: np.ndarray = np.round(hertz / SAMPLE_RATE * WINDOW).astype(int)
    return edges


def _threshold(level: np.ndarray) -> float:
    """dBFS of the least level (T,) of speech in this recording."""
    sounding = level[level > QUIETEST]
    if not len(sounding):
        return QUIETEST
    floor, peak = np.quantile(sounding, (0.1, 0.95))
    return max(QUIETEST, float(min(floor + ABOVE_FLOOR, peak - BELOW_PEAK)))


def _change(bands: np.ndarray, level: np.ndarray, loud: np.ndarray) -> np.ndarray:
    """(T,) dB by which the shape of the spectrum differs before and after each frame.

    The mean over bands is taken out, so that level alone never counts; nor does the passage from
    silence to sound.
    """
    shape = np.maximum(_decibel(bands), (level - DYNAMIC_RANGE)[:, None])
    shape = np.maximum(shape, QUIETEST - 10)  # a band has about a tenth of the power of all
    frames = np.arange(len(bands))
    before, after = np.maximum(frames - LAG, 0), np.minimum(frames + LAG, len(bands) - 1)
    weights = np.diff(_band_edges()) / np.diff(_band_edges()).sum()  # a wide band varies less
    difference = shape[after] - shape[before]
    difference -= (difference @ weights)[:, None]
    change: np.ndarray = np.sqrt(difference**2 @ weights)
    return np.where(loud[before] & loud[after], change, 0.0)


def _decibel(power: np.ndarray) -> np.ndarray:
    decibel: np.ndarray = 10 * np.log10(power + 1e-12)
    return decibel


def _running_sum(values: np.ndarray, num_frames: int) -> np.ndarray:
    """Sums (T, ...) over `num_frames` frames around each of (T, ...)."""
    before = num_frames // 2
    edges = ((before + 1, num_frames - before - 1), *[(0, 0)] * (values.ndim - 1))
    total = np.cumsum(np.pad(values.astype(np.float64), edges), axis=0)
    sums: np.ndarray = total[num_frames:] - total[:-num_frames]
    return sums


def _running_mean(values: np.ndarray, num_frames: int) -> np.ndarray:
    """Means (T, ...) over `num_frames` frames around each, fewer at the edges."""
    counts = _running_sum(np.ones(len(values)), num_frames)
    mean: np.ndarray = _running_sum(values, num_frames) / counts[:, None]
    return mean


def _runs(active: np.ndarray, gap: int) -> list[tuple[int, int]]:
    """[begin, end) of the runs of True; those less than `gap` frames apart are one."""
    steps = np.flatnonzero(np.diff(active.astype(np.int8), prepend=0, append=0))
    runs: list[tuple[int, int]] = []
    for begin, end in zip(steps[::2].tolist(), steps[1::2].tolist(), strict=True):
        if runs and begin - runs[-1][1] < gap:
            begin = runs.pop()[0]
        runs.append((begin, end))
    return runs
