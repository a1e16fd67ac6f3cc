"""From any audio file to a 16 kHz mono waveform, or to one clear reason why not.

`load_audio` and `audio_blocks` are the only doors. Headers estimate and the data decide: a file is
read to its end, in the time of a player. Files are decoded in blocks and resampled as they come, so
memory is that of the result.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import soundfile
import soxr

from isthmus.speech.containers import Untagged, promise
from isthmus.speech.decoders import (
    DURATION_TOLERANCE,
    AudioCode,
    AudioError,
    AvReader,
    Block,
    SoundFileReader,
    tell,
)

__all__ = [
    "DURATION_TOLERANCE",
    "MAX_SECONDS",
    "SAMPLE_RATE",
    "AudioCode",
    "AudioError",
    "AudioInfo",
    "Recording",
    "audio_blocks",
    "audio_info",
    "check_samples",
    "load_audio",
]

SAMPLE_RATE = 16_000  # Hz, of every waveform inside isthmus
MAX_SECONDS = 4 * 3600.0
MIN_SOURCE_RATE, MAX_SOURCE_RATE = 1_000, 400_000  # Hz
MAX_CHANNELS = 64
LINEAR = (b"RIFF", b"RF64", b"BW64", b"riff", b"FORM", b"caff", b".snd", b"NIST")
MAGIC = (*LINEAR, b"fLaC", b"OggS", b"ID3", b"\x1aE\xdf\xa3")
MAX_ABS_SAMPLE = 1e3  # full scale is 1; integers written as floats reach 32768
OPPOSITE = 0.01  # power of the channels' mean, of theirs, below which they cancel each other

Reader = SoundFileReader | AvReader


Source = str | Path | bytes | BinaryIO


@dataclass(frozen=True)
class Recording:
    """A file and what of it is heard: a `channel`, else the mean of all; a `track`, else the first.

    Both count from 0; a video may have several audio tracks.
    """

    source: Source
    channel: int | None = None
    track: int | None = None

    def __str__(self) -> str:
        return _name(self.source)


@dataclass(frozen=True)
class AudioInfo:
    """What a file holds: `duration` in seconds, and its first `sample_rate` (Hz) and `channels`."""

    duration: float
    sample_rate: int
    channels: int


def load_audio(
    source: Source | Recording,
    *,
    start: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
    max_seconds: float = MAX_SECONDS,
) -> np.ndarray:
    """(S,) float32 mono waveform at 16 kHz of a file, of its bytes or of an open binary file.

    `start` and `duration` (seconds) select a part; where the file ends earlier the result is
    shorter. Channels are averaged unless `channel` (from 0) picks one. Raises AudioError, also
    when the result would last longer than `max_seconds`.
    """
    _check_range(start, duration)
    recording = source if isinstance(source, Recording) else Recording(source, channel)
    with _open(recording) as reader:
        limit = _planned_seconds(reader, start, duration)
        if limit is not None and limit > max_seconds:
            raise _too_long(reader.name, max_seconds)
        pieces: list[np.ndarray] = []
        num_samples = 0
        for piece in _blocks(reader, start, duration, recording.channel):
            pieces.append(piece)
            num_samples += len(piece)
            if num_samples > max_seconds * SAMPLE_RATE:
                raise _too_long(reader.name, max_seconds)
    return np.concatenate(pieces)


def audio_blocks(source: Source | Recording) -> Iterator[np.ndarray]:
    """Blocks (n,) of the 16 kHz mono waveform that `load_audio` gives in one, of any length.

    Raises AudioError, possibly after the first blocks.
    """
    recording = source if isinstance(source, Recording) else Recording(source)
    with _open(recording) as reader:
        yield from _blocks(reader, 0.0, None, recording.channel)


def check_samples(samples: np.ndarray, name: str) -> None:
    """Raise AudioError for samples of any shape that no microphone gave; `name` is whose."""
    peak = float(np.abs(samples).max(initial=0.0))
    if not math.isfinite(peak):
        raise AudioError(
            "non_finite", f"{name}: has samples that are NaN or infinite. Convert it again."
        )
    if peak > MAX_ABS_SAMPLE:
        raise AudioError(
            "out_of_range",
            f"{name}: has a sample of {peak:.3g}; full scale is 1. Divide the samples by their "
            "full scale (32768 for 16 bits).",
        )


def audio_info(source: Source | Recording, *, exact: bool = True) -> AudioInfo:
    """Duration, sample rate and channels, from the header alone where it counts samples.

    Where it estimates them (mp3) or pads them (m4a), the file is decoded and counted, unless
    `exact` is false and an estimate does. Raises AudioError.
    """
    recording = source if isinstance(source, Recording) else Recording(source)
    with _open(recording) as reader:
        seconds = reader.estimated_seconds
        if reader.num_frames is not None:
            seconds = reader.num_frames / reader.sample_rate
        elif exact or seconds is None:
            seconds = sum(len(block) / rate for block, rate in reader.blocks(0.0, None))
        if not seconds:
            raise _nothing(reader, 0.0)
        reader.check_complete()
        return AudioInfo(seconds, reader.sample_rate, reader.channels)


@contextmanager
def _open(recording: Recording) -> Iterator[Reader]:
    """A checked reader of any source; closes what it opened and nothing else."""
    with ExitStack() as stack:
        handle = _handle(recording.source, stack)
        name = str(recording)
        if handle.seek(0, io.SEEK_END) == 0:
            raise AudioError(
                "empty", f"{name}: the file is empty (0 bytes). Copy it again, or remove it."
            )
        reader = _reader(io.BufferedReader(Untagged(handle)), name, recording.track)
        stack.callback(reader.close)
        _check_header(reader)
        channel = recording.channel
        if channel is not None and not 0 <= channel < reader.channels:
            raise AudioError(
                "no_channels",
                f"{name}: channel {channel} was asked for, but channels are 0 to "
                f"{reader.channels - 1}. Name one of these.",
            )
        yield reader


def _name(source: Source) -> str:
    """What errors call it by."""
    if isinstance(source, bytes):
        return f"audio of {len(source)} bytes"
    if isinstance(source, (str, Path)):
        return str(source)
    return str(getattr(source, "name", "audio file"))


def _handle(source: Source, stack: ExitStack) -> BinaryIO:
    """A seekable binary file."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, (str, Path)):
        return stack.enter_context(_open_file(Path(source), str(source)))
    return source if source.seekable() else io.BytesIO(source.read())


def _open_file(path: Path, name: str) -> BinaryIO:
    try:
        if path.is_file() or not path.exists():
            return path.open("rb")
    except FileNotFoundError as error:
        raise AudioError(
            "missing",
            f"{name}: no such file. Correct the path (in a manifest: relative to it).",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise AudioError("unreadable", f"{name!r}: cannot be opened ({error}).") from error
    raise AudioError("not_a_file", f"{name}: not a file. Name an audio file inside it.")


def _reader(handle: BinaryIO, name: str, track: int | None) -> Reader:
    """soundfile for samples as they are, PyAV for all else, soundfile for what PyAV lacks."""
    handle.seek(0)
    linear = handle.read(4) in LINEAR
    promised = promise(handle)
    if promised.joined:
        tell(f"{name}: another recording begins behind its end; it is not read. Cut it apart.")
    readers: list[Callable[[], Reader]] = [lambda: AvReader(handle, name, promised, track)]
    if not track:
        readers.insert(0 if linear else 1, lambda: SoundFileReader(handle, name, promised))
    failure: Exception | None = None
    for reader in readers:
        try:
            return reader()
        except AudioError:
            raise
        except (av.FFmpegError, soundfile.LibsndfileError, TypeError, ValueError) as error:
            failure = error  # TypeError: soundfile wants to be told the rate of a `.raw`
    raise AudioError("unreadable", f"{name}: {_unknown(handle)}") from failure


def _unknown(handle: BinaryIO) -> str:
    """What is said of content that no decoder takes."""
    handle.seek(0)
    head = handle.read(12)
    if head.startswith(MAGIC) or head[4:8] == b"ftyp":
        return "cut short or damaged: no decoder can read on. Copy it again, or remove it."
    return "not audio: no decoder knows it. If it plays elsewhere, convert it to wav or flac."


def _check_range(start: float, duration: float | None) -> None:
    if not (math.isfinite(start) and start >= 0):
        raise AudioError("bad_range", f"start is {start} s; give 0 or a positive number.")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise AudioError("bad_range", f"duration is {duration} s; give a positive number or None.")


def _check_rate(rate: int, name: str) -> None:
    if not MIN_SOURCE_RATE <= rate <= MAX_SOURCE_RATE:
        raise AudioError(
            "bad_rate",
            f"{name}: the sample rate is {rate} Hz; {MIN_SOURCE_RATE} to {MAX_SOURCE_RATE} Hz are "
            "read. The header is likely damaged; convert the file again.",
        )


def _check_header(reader: Reader) -> None:
    _check_rate(reader.sample_rate, reader.name)
    if reader.channels < 1:
        raise AudioError("no_channels", f"{reader.name}: the header claims 0 channels.")
    if reader.channels > MAX_CHANNELS:
        raise AudioError(
            "too_many_channels",
            f"{reader.name}: {reader.channels} channels; at most {MAX_CHANNELS} are read. Extract "
            "the channel with the speech.",
        )


def _planned_seconds(reader: Reader, start: float, duration: float | None) -> float | None:
    """Length of the result by the header; None when only decoding can tell."""
    if reader.num_frames is None:
        return duration
    left = max(0.0, reader.num_frames / reader.sample_rate - start)
    return left if duration is None else min(left, duration)


def _mono(blocks: Iterable[Block], channel: int | None, name: str) -> Iterator[Block]:
    """Blocks (n,) of one channel, or of the mean of all where they do not cancel each other."""
    loud = left = 0.0
    for block, rate in blocks:
        if block.shape[1] <= (channel or 0):
            raise AudioError("no_channels", f"{name}: decoding gives {block.shape[1]} channels.")
        check_samples(block, name)
        if channel is not None:
            yield np.ascontiguousarray(block[:, channel]), rate
            continue
        mono: np.ndarray = block.mean(axis=1, dtype=np.float32)
        loud += float(np.square(block).mean()) * len(block)
        left += float(np.square(mono).sum())
        if left < OPPOSITE * loud:
            tell(f"{name}: the channels are one sound of opposite sign; the first of them is read.")
            mono = np.ascontiguousarray(block[:, 0])
        yield mono, rate


def _blocks(
    reader: Reader, start: float, duration: float | None, channel: int | None
) -> Iterator[np.ndarray]:
    """(n,) blocks of a part as 16 kHz mono, at least one sample; refuses what is not complete."""
    blocks = _mono(reader.blocks(start, duration), channel, reader.name)
    num_samples = 0
    for rate, run in itertools.groupby(blocks, key=lambda block: block[1]):
        _check_rate(rate, reader.name)
        for piece in _resampled((block for block, _ in run), rate):
            num_samples += len(piece)
            yield piece
    if not num_samples:
        raise _nothing(reader, start)
    reader.check_complete()


def _resampled(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """(n,) float32 at 16 kHz of (n,) blocks at `rate`; equal to resampling them in one piece."""
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="VHQ")
    head = np.zeros(0, np.float32)
    num_samples = 0
    for block in blocks:
        head = head if len(head) else block[:1].copy()
        piece = stream.resample_chunk(block)
        num_samples += len(piece)
        yield piece
    # The last chunk is fed empty: only the end of the blocks tells that it was the last.
    piece = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    # One sample at 48 kHz is a third of one at 16 kHz: it must not vanish.
    yield piece if num_samples + len(piece) else head


def _nothing(reader: Reader, start: float) -> AudioError:
    if start > 0 and (reader.num_frames is None or reader.num_frames > 0):
        held = (
            "" if reader.num_frames is None else f" of {reader.num_frames / reader.sample_rate} s"
        )
        return AudioError(
            "past_end",
            f"{reader.name}: start {start} s lies behind the end{held}. Correct the start.",
        )
    try:
        reader.check_complete()
    except AudioError as truncated:
        return truncated
    return AudioError(
        "empty", f"{reader.name}: there is no sample in it. Record it again, or remove it."
    )


def _too_long(name: str, max_seconds: float) -> AudioError:
    return AudioError(
        "too_long",
        f"{name}: lasts longer than the limit of {max_seconds:g} s. Cut it up, or raise the limit.",
    )
