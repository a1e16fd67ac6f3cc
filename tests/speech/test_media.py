"""What the world's recorders and editors leave: a header is a hint, and time is a player's."""

import io
import logging
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from isthmus.speech.audio import SAMPLE_RATE, AudioError, Recording, audio_info, load_audio
from isthmus.speech.decoders import tell

ID3_FRONT = b"ID3\x04\0\0\0\0\x02\0" + bytes(256)
ID3_BEHIND = b"TAG" + bytes(125)
Track = tuple[float, np.ndarray]  # where it begins (s), samples (n,)


def tone(seconds: float, hertz: float = 300.0, rate: int = SAMPLE_RATE) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def written(samples: np.ndarray, form: str, subtype: str, rate: int = SAMPLE_RATE) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=form, subtype=subtype)
    return stream.getvalue()


def muxed(
    folder: Path, form: str, codec: str, *tracks: Sequence[Track], rate: int = SAMPLE_RATE
) -> bytes:
    """A container of tracks, each of pieces that begin at a time; a picture from 0 on beside."""
    path = folder / "muxed"
    with av.open(str(path), "w", format=form) as container:
        timed = form in ("matroska", "mp4")
        if timed:
            video = container.add_stream("mpeg4", rate=25)
            video.width = video.height = 16
        streams = [container.add_stream(codec, rate=rate, layout="mono") for _ in tracks]
        if timed:
            for number in range(50):
                picture = av.VideoFrame.from_ndarray(np.zeros((24, 16), np.uint8), "yuv420p")
                picture.pts = number
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
        for stream, pieces in zip(streams, tracks, strict=True):
            for begin, samples in pieces:
                for place in range(0, len(samples), 1024):
                    block = np.ascontiguousarray(samples[None, place : place + 1024])
                    if codec.startswith("pcm") or "flac" in codec:
                        block = (block * 32767).astype(np.int16)
                    form_of = "s16" if block.dtype == np.int16 else "fltp"
                    frame = av.AudioFrame.from_ndarray(block, format=form_of, layout="mono")
                    frame.sample_rate = rate
                    frame.pts = round(begin * rate) + place
                    container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path.read_bytes()


def heard(waveform: np.ndarray) -> np.ndarray:
    """Which tenths of a second of a waveform are not silent."""
    tenths = waveform[: len(waveform) // 1600 * 1600].reshape(-1, 1600)
    return np.flatnonzero(np.abs(tenths).max(axis=1) > 0.1)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    tell.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize(
    ("form", "codec"), [("mp3", "libmp3lame"), ("adts", "aac"), ("flac", "flac")]
)
@pytest.mark.parametrize("front", [b"", ID3_FRONT])
@pytest.mark.parametrize("behind", [b"", ID3_BEHIND])
def test_tags_are_no_audio(
    form: str, codec: str, front: bytes, behind: bytes, tmp_path: Path
) -> None:
    data = muxed(tmp_path, form, codec, [(0.0, tone(2.0))])
    np.testing.assert_array_equal(load_audio(front + data + behind), load_audio(data))


def test_tags_around_a_wav_are_no_audio() -> None:
    data = written(tone(1.0), "WAV", "PCM_16")
    np.testing.assert_array_equal(load_audio(ID3_FRONT + data + ID3_BEHIND), load_audio(data))


@pytest.mark.parametrize(
    ("form", "codec"), [("mp3", "libmp3lame"), ("adts", "aac"), ("ogg", "libopus")]
)
def test_streams_that_were_joined_are_all_read(form: str, codec: str, tmp_path: Path) -> None:
    rate = 48_000 if codec == "libopus" else SAMPLE_RATE
    data = muxed(tmp_path, form, codec, [(0.0, tone(2.0, rate=rate))], rate=rate)
    waveform = load_audio(data + data)
    assert len(waveform) / SAMPLE_RATE == pytest.approx(4.0, abs=0.25)
    assert len(heard(waveform)) >= 39
    assert audio_info(data + data).duration == pytest.approx(len(waveform) / SAMPLE_RATE, abs=1e-3)


@pytest.mark.parametrize(("form", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16")])
def test_what_is_not_read_of_joined_files_is_said(
    form: str, subtype: str, said: pytest.LogCaptureFixture
) -> None:
    data = written(tone(1.0), form, subtype)
    load_audio(data)
    assert not said.records
    load_audio(data + data)
    assert len(said.records) == 1


def test_flac_from_a_pipe_does_not_know_its_length(tmp_path: Path) -> None:
    data = bytearray(written(tone(1.0), "FLAC", "PCM_16"))
    whole = load_audio(bytes(data))
    data[21] &= 0xF0  # 36 bits that count the samples: 0 is not known
    data[22:26] = bytes(4)
    np.testing.assert_array_equal(load_audio(bytes(data)), whole)
    assert audio_info(bytes(data)).duration == 1.0


def test_mp3_without_a_count_of_its_frames_is_read_to_its_end(tmp_path: Path) -> None:
    data = muxed(tmp_path, "mp3", "libmp3lame", [(0.0, tone(12.0, rate=44_100))], rate=44_100)
    first = data.index(b"Info") - 21 if b"Info" in data[:500] else data.index(b"Xing") - 21
    second = data.index(data[first : first + 2], first + 4)
    bare = load_audio(data[second:])
    assert len(bare) / SAMPLE_RATE == pytest.approx(12.0, abs=0.15)
    assert audio_info(data[second:]).duration == pytest.approx(len(bare) / SAMPLE_RATE, abs=1e-3)


@pytest.mark.parametrize(
    ("form", "codec"),
    [("wav", "libmp3lame"), ("wav", "adpcm_ima_wav"), ("caf", "alac"), ("ac3", "ac3")],
)
def test_codecs_in_unusual_containers(form: str, codec: str, tmp_path: Path) -> None:
    rate = 48_000 if codec == "ac3" else SAMPLE_RATE
    if codec in ("adpcm_ima_wav", "alac"):
        data = written(tone(2.0), form.upper(), {"alac": "ALAC_16"}.get(codec, "IMA_ADPCM"))
    else:
        data = muxed(tmp_path, form, codec, [(0.0, tone(2.0, rate=rate))], rate=rate)
    assert len(load_audio(data)) / SAMPLE_RATE == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("subtype", ["GSM610", "IMA_ADPCM", "MS_ADPCM"])
def test_part_of_a_codec_that_cannot_seek(subtype: str) -> None:
    data = written(tone(3.0), "WAV", subtype)
    part = load_audio(data, start=1.0, duration=0.5)
    np.testing.assert_array_equal(part, load_audio(data)[16_000:24_000])


@pytest.mark.parametrize(
    ("form", "codec"), [("ipod", "aac"), ("matroska", "aac"), ("flac", "flac"), ("ogg", "libopus")]
)
def test_part_far_in_is_that_of_the_whole(form: str, codec: str, tmp_path: Path) -> None:
    rate = 48_000 if codec == "libopus" else SAMPLE_RATE
    sweep = tone(8.0, rate=rate) * np.linspace(0, 1, 8 * rate, dtype=np.float32)
    data = muxed(tmp_path, form, codec, [(0.0, sweep)], rate=rate)
    part = load_audio(data, start=5.25, duration=0.5)
    whole = load_audio(data)[84_000:92_000]
    np.testing.assert_allclose(part[200:-200], whole[200:-200], atol=2e-3)


@pytest.mark.parametrize("form", ["matroska", "mp4"])
def test_time_is_that_of_a_player(form: str, tmp_path: Path) -> None:
    codec = "aac" if form == "mp4" else "pcm_s16le"
    late = load_audio(muxed(tmp_path, form, codec, [(1.0, tone(1.0))]))
    assert heard(late).min() == 10
    assert len(late) / SAMPLE_RATE == pytest.approx(2.0, abs=0.1)


def test_gap_between_packets_is_silence(tmp_path: Path) -> None:
    data = muxed(tmp_path, "matroska", "pcm_s16le", [(0.0, tone(1.0)), (3.0, tone(1.0))])
    np.testing.assert_array_equal(heard(load_audio(data)), [*range(10), *range(30, 40)])
    np.testing.assert_array_equal(heard(load_audio(data, start=2.5)), range(5, 15))


def test_tracks_are_said_and_chosen(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    silent, voice = [(0.0, 0 * tone(1.0))], [(0.0, tone(1.0))]
    data = muxed(tmp_path, "matroska", "pcm_s16le", silent, voice)
    assert not len(heard(load_audio(data)))
    assert "2 audio tracks" in said.text
    assert len(heard(load_audio(Recording(data, track=1)))) == 10
    with pytest.raises(AudioError, match="track 2 was asked for"):
        load_audio(Recording(data, track=2))


def test_channels_that_cancel_each_other(said: pytest.LogCaptureFixture) -> None:
    voice = tone(1.0)
    np.testing.assert_array_equal(
        load_audio(written(np.stack([voice, -voice], axis=1), "WAV", "FLOAT")), voice
    )
    assert "opposite" in said.text
    said.clear()
    load_audio(written(np.stack([voice, 0 * voice], axis=1), "WAV", "FLOAT"))
    assert not said.records


@pytest.mark.parametrize(("form", "codec"), [("adts", "aac"), ("mp3", "libmp3lame")])
def test_rate_that_changes_in_a_stream(form: str, codec: str, tmp_path: Path) -> None:
    pieces = [
        muxed(tmp_path, form, codec, [(0.0, tone(2.0, rate=rate))], rate=rate)
        for rate in (44_100, 22_050)
    ]
    waveform = load_audio(b"".join(pieces))
    assert len(waveform) / SAMPLE_RATE == pytest.approx(4.0, abs=0.25)
    spectrum = np.abs(np.fft.rfft(waveform[-24_000:-8_000]))
    assert np.argmax(spectrum) == pytest.approx(300, abs=2)  # not an octave higher
