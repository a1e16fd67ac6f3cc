"""Every way a file can be wrong has one code, and a sound file gives its samples."""

import io
import pickle
import shutil
import struct
import tempfile
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
import soundfile
import soxr

from isthmus.speech.audio import (
    SAMPLE_RATE,
    AudioCode,
    AudioError,
    audio_blocks,
    audio_info,
    load_audio,
)

FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAV", "ULAW"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("W64", "PCM_16"),
    ("RF64", "PCM_16"),
    ("NIST", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


def noise(seconds: float, rate: int = SAMPLE_RATE, channels: int = 1) -> np.ndarray:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * rate), channels))
    return samples.astype(np.float32)


def encoded(
    samples: np.ndarray, rate: int = SAMPLE_RATE, form: str = "WAV", subtype: str = "FLOAT"
) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=form, subtype=subtype)
    return stream.getvalue()


def code_of(source: str | Path | bytes, **options: float) -> str:
    with pytest.raises(AudioError) as caught:
        load_audio(source, **options)
    assert caught.value.code in get_args(AudioCode)
    return str(caught.value.code)


@pytest.mark.parametrize(("form", "subtype"), FORMATS)
def test_every_format_gives_mono_float32_of_its_length(form: str, subtype: str) -> None:
    waveform = load_audio(encoded(noise(1.0), form=form, subtype=subtype))
    assert waveform.dtype == np.float32
    assert waveform.shape == (SAMPLE_RATE,)


def test_path_bytes_and_open_file_give_the_same_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    samples = noise(0.5)
    path.write_bytes(encoded(samples))
    with path.open("rb") as handle:
        from_handle = load_audio(handle)
        assert not handle.closed
    for waveform in (from_handle, load_audio(path), load_audio(str(path))):
        np.testing.assert_array_equal(waveform, samples[:, 0])


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 96_000])
def test_any_rate_is_resampled_as_in_one_piece(rate: int) -> None:
    # More than one block, so that an error at a border would show.
    samples = noise(70.0 if rate == 48_000 else 1.3, rate)
    expected = soxr.resample(samples[:, 0], rate, SAMPLE_RATE, quality="VHQ")
    np.testing.assert_array_equal(load_audio(encoded(samples, rate)), expected)


def test_channels_are_averaged_or_picked() -> None:
    samples = noise(0.1, channels=6)
    data = encoded(samples)
    np.testing.assert_allclose(load_audio(data), samples.mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(load_audio(data, channel=4), samples[:, 4])
    assert code_of(data, channel=6) == "no_channels"


@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3"])
def test_part_is_the_same_part_of_the_whole(form: str) -> None:
    subtype = {"WAV": "FLOAT", "FLAC": "PCM_16", "MP3": "MPEG_LAYER_III"}[form]
    data = encoded(noise(2.0), form=form, subtype=subtype)
    part = load_audio(data, start=0.5, duration=0.25)
    np.testing.assert_allclose(part, load_audio(data)[8_000:12_000], atol=1e-3)
    assert len(load_audio(data, start=1.9, duration=5.0)) == 1_600


def test_part_decodes_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    read = soundfile.SoundFile.read

    def counting(self: soundfile.SoundFile, frames: int = -1, **options: object) -> np.ndarray:
        nonlocal decoded
        block: np.ndarray = read(self, frames, **options)
        decoded += len(block)
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    load_audio(encoded(noise(10.0)), start=5.0, duration=0.5)
    assert decoded == 8_000


@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_one_sample_is_audio(rate: int) -> None:
    waveform = load_audio(encoded(np.full(1, 0.25, np.float32), rate))
    assert len(waveform) >= 1
    assert np.isfinite(waveform).all()


@pytest.mark.parametrize(("form", "subtype"), FORMATS)
def test_truncation_never_passes(form: str, subtype: str) -> None:
    whole = encoded(noise(1.0), form=form, subtype=subtype)
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.96):
        assert code_of(whole[: int(len(whole) * share)]) in ("truncated", "unreadable", "empty")
    if form not in ("CAF", "OGG"):  # libsndfile itself refuses these where most is missing
        assert code_of(whole[: len(whole) // 2]) == "truncated"


def test_a_few_missing_samples_are_forgiven() -> None:
    whole = encoded(noise(1.0), subtype="PCM_16")
    assert len(load_audio(whole[:-400])) == SAMPLE_RATE - 200  # 12.5 ms
    assert code_of(whole[:-1_000]) == "truncated"  # 31 ms


@pytest.mark.parametrize(
    "size", [0, 1_000, 1 << 30, 0x7FFF_FFDB, 0x7FFF_FFFF, 1 << 31, 0xFFFF_FFD3, 0xFFFF_FFFF]
)
def test_size_of_a_wav_that_is_unknown_or_too_small_is_not_believed(size: int) -> None:
    data = patched_wav(40, "<I", size)
    np.testing.assert_array_equal(load_audio(data), load_audio(patched_wav(36, "4s", b"data")))
    assert audio_info(data).duration == 0.5


def patched_wav(offset: int, form: str, value: int | bytes) -> bytes:
    data = bytearray(encoded(noise(0.5), subtype="PCM_16"))
    struct.pack_into(form, data, offset, value)
    return bytes(data)


def with_sample(value: float) -> bytes:
    samples = noise(0.1)
    samples[700] = value
    return encoded(samples)


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        (b"", {"empty"}),
        (b"RIFF", {"unreadable"}),
        (b"this is no audio at all " * 99, {"unreadable"}),
        (bytes(5_000), {"unreadable"}),
        (encoded(noise(0.0)), {"empty"}),
        (patched_wav(40, "<I", 300_000_000), {"truncated"}),
        (patched_wav(24, "<I", 0), {"bad_rate", "unreadable"}),
        (patched_wav(24, "<I", 1), {"bad_rate"}),
        (patched_wav(24, "<I", 655_350), {"bad_rate"}),
        (patched_wav(22, "<H", 0), {"no_channels", "unreadable", "empty"}),
        (encoded(noise(0.01, channels=65)), {"too_many_channels"}),
        (encoded(noise(0.01, channels=255)), {"too_many_channels"}),
        (with_sample(float("nan")), {"non_finite"}),
        (with_sample(float("inf")), {"non_finite"}),
        (with_sample(-1e30), {"out_of_range"}),
        (encoded(noise(0.5) * 32_768), {"out_of_range"}),
    ],
    ids=[
        "nothing",
        "RIFF",
        "text",
        "zeros",
        "no-samples",
        "claims-300-MB",
        "rate-0",
        "rate-1",
        "rate-655350",
        "channels-0",
        "channels-65",
        "channels-255",
        "nan",
        "infinity",
        "huge",
        "16-bit-scale",
    ],
)
def test_each_fault_has_its_code(data: bytes, codes: set[str]) -> None:
    assert code_of(data) in codes


@pytest.mark.parametrize("level", [0.0, 0.9, 1.0])
def test_silence_offset_and_clipping_are_audio(level: float) -> None:
    assert len(load_audio(encoded(np.full(1_600, level, np.float32)))) == 1_600


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert code_of(tmp_path / "none.wav") == "missing"
    assert code_of("http://localhost/a.wav") == "missing"
    assert code_of(tmp_path) == "not_a_file"
    assert code_of("a\0b.wav") == "unreadable"


def test_range_is_checked() -> None:
    data = encoded(noise(0.5))
    assert code_of(data, start=0.5) == "past_end"
    assert code_of(data, start=-1.0) == "bad_range"
    assert code_of(data, duration=0.0) == "bad_range"
    assert code_of(data, start=float("nan")) == "bad_range"


def test_bomb_is_refused_by_its_header() -> None:
    data = encoded(np.zeros((60 * SAMPLE_RATE, 1), np.float32), form="FLAC", subtype="PCM_16")
    assert len(data) < 10_000
    assert code_of(data, max_seconds=10.0) == "too_long"
    assert len(load_audio(data, duration=10.0, max_seconds=10.0)) == 10 * SAMPLE_RATE


def test_bomb_without_a_length_is_counted_while_decoding() -> None:
    data = m4a(noise(3.0), form="matroska", codec="pcm_s16le", live=True)
    assert audio_info(data).duration == pytest.approx(3.0, abs=0.05)
    assert code_of(data, max_seconds=2.0) == "too_long"


def m4a(
    samples: np.ndarray, *, form: str = "ipod", codec: str = "aac", live: bool = False
) -> bytes:
    """`samples` (n, 1) in a container that needs PyAV."""
    # A file, not a stream: to put the index first, the muxer opens its output once more.
    path = Path(tempfile.mkdtemp()) / "audio"
    options = {"live": "1"} if live else {"movflags": "faststart"}
    with av.open(str(path), "w", format=form, options=options) as container:
        track = container.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
        wanted, values = ("s16", (samples * 32_767).astype(np.int16))
        if codec == "aac":
            wanted, values = ("fltp", samples)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(values.T), format=wanted, layout="mono"
        )
        frame.sample_rate = SAMPLE_RATE
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    data = path.read_bytes()
    shutil.rmtree(path.parent)
    return data


def test_m4a_goes_through_pyav_and_its_truncation_shows() -> None:
    data = m4a(noise(3.0))
    assert len(load_audio(data)) / SAMPLE_RATE == pytest.approx(3.0, abs=0.1)
    assert len(load_audio(data, start=1.0, duration=0.5)) == 8_000
    info = audio_info(data)
    assert (info.sample_rate, info.channels) == (SAMPLE_RATE, 1)
    assert info.duration == pytest.approx(3.0, abs=0.1)
    assert code_of(data, start=9.0) == "past_end"
    assert code_of(data[: len(data) // 2]) == "truncated"


def test_playlist_reaches_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(encoded(noise(0.2)))
    listing = f"ffconcat version 1.0\nfile '{tmp_path / 'secret.wav'}'\n"
    (tmp_path / "a.ffconcat").write_text(listing)
    assert code_of(tmp_path / "a.ffconcat") == "unreadable"


# libsndfile may seek before the beginning of a damaged file; soundfile then warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_mutated_files_are_refused_or_finite() -> None:
    random = np.random.default_rng(0)
    originals = [encoded(noise(0.2), form=f, subtype=s) for f, s in FORMATS]
    for _ in range(300):
        data = bytearray(originals[random.integers(len(originals))])
        for _ in range(random.integers(1, 6)):
            data[random.integers(min(len(data), 200))] = random.integers(256)
        try:
            waveform = load_audio(bytes(data), max_seconds=60.0)
        except AudioError:
            continue
        assert len(waveform) > 0
        assert np.isfinite(waveform).all()


def test_chunk_beyond_any_file_is_no_crash() -> None:
    data = bytearray(encoded(noise(0.1), form="CAF", subtype="PCM_16"))
    data[12:20] = b"\x7f" + 7 * b"\xff"
    assert code_of(bytes(data)) in ("unreadable", "truncated", "empty")


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 1)])
def test_blocks_of_a_file_are_the_file(rate: int, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (rate * 90, channels))
    soundfile.write(path, samples, rate)
    blocks = list(audio_blocks(path))
    assert len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate(blocks), load_audio(path))


def test_blocks_are_refused_as_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    for samples, code in ((np.zeros(0), "empty"), (np.full(9, np.nan), "non_finite")):
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
        with pytest.raises(AudioError) as caught:
            list(audio_blocks(path))
        assert caught.value.code == code


def test_info_reads_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(1.5, 44_100, 2), 44_100)
    info = audio_info(path)
    assert (info.duration, info.sample_rate, info.channels) == (1.5, 44_100, 2)


def test_error_survives_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(AudioError("empty", "a.wav: nothing")))
    assert (error.code, str(error)) == ("empty", "a.wav: nothing")
