"""From any audio file to a 16 kHz mono waveform, or to one clear reason why not.

`load_audio` and `audio_blocks` are the only doors: soundfile reads wav, flac, ogg, opus and mp3;
PyAV (extra `media`) the rest. Files are decoded in blocks and resampled as they come, so memory is
that of the result.
"""

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from isthmus.speech.decoders import (
    DURATION_TOLERANCE,
    AudioCode,
    AudioError,
    AvReader,
    SoundFileReader,
)

__all__ = [
    "DURATION_TOLERANCE",
    "MAX_SECONDS",
    "SAMPLE_RATE",
    "AudioCode",
    "AudioError",
    "AudioInfo",
    "audio_blocks",
    "audio_info",
    "check_samples",
    "load_audio",
]

SAMPLE_RATE = 16_000  # Hz, of every waveform inside isthmus
MAX_SECONDS = 4 * 3600.0
MIN_SOURCE_RATE, MAX_SOURCE_RATE = 1_000, 400_000  # Hz
MAX_CHANNELS = 64
MAGIC = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3", b"FORM", b"caff", b".snd", b"\x1aE\xdf\xa3")
MAX_ABS_SAMPLE = 1e3  # full scale is 1; integers written as floats reach 32768

Reader = SoundFileReader | AvReader


@dataclass(frozen=True)
class AudioInfo:
    """What a file says of itself: `duration` in seconds, `sample_rate` in Hz, `channels`."""

    duration: float
    sample_rate: int
    channels: int


def load_audio(
    source: str | Path | bytes | BinaryIO,
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
    with _open(source) as reader:
        limit = _planned_seconds(reader, start, duration)
        if limit is not None and limit > max_seconds:
            raise _too_long(reader.name, max_seconds)
        if channel is not None and not 0 <= channel < reader.channels:
            raise AudioError(
                "no_channels",
                f"{reader.name}: channel {channel} was asked for, but channels are 0 to "
                f"{reader.channels - 1}. Correct the channel in the manifest.",
            )
        pieces: list[np.ndarray] = []
        num_samples = 0
        for piece in _blocks(reader, start, duration, channel):
            pieces.append(piece)
            num_samples += len(piece)
            if num_samples > max_seconds * SAMPLE_RATE:
                raise _too_long(reader.name, max_seconds)
    return np.concatenate(pieces)


def audio_blocks(source: str | Path | bytes | BinaryIO) -> Iterator[np.ndarray]:
    """Blocks (n,) of the 16 kHz mono waveform that `load_audio` gives in one, of any length.

    Raises AudioError, possibly after the first blocks.
    """
    with _open(source) as reader:
        yield from _blocks(reader, 0.0, None, None)


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


def audio_info(source: str | Path | bytes | BinaryIO) -> AudioInfo:
    """Duration, sample rate and channels from the header alone where it has them.

    A file without a duration in its header (a browser's webm) is decoded and counted.
    Raises AudioError.
    """
    with _open(source) as reader:
        num_frames = reader.num_frames
        if num_frames is None:
            num_frames = sum(len(block) for block in reader.blocks(0.0, None))
        if num_frames == 0:
            raise _nothing(reader, 0.0)
        reader.check_complete()
        return AudioInfo(num_frames / reader.sample_rate, reader.sample_rate, reader.channels)


@contextmanager
def _open(source: str | Path | bytes | BinaryIO) -> Iterator[Reader]:
    """A checked reader of any source; closes what it opened and nothing else."""
    with ExitStack() as stack:
        handle, name = _handle(source, stack)
        reader = _reader(handle, name)
        stack.callback(reader.close)
        _check_header(reader)
        yield reader


def _handle(source: str | Path | bytes | BinaryIO, stack: ExitStack) -> tuple[BinaryIO, str]:
    """A seekable binary file and the name that errors call it by."""
    if isinstance(source, bytes):
        handle: BinaryIO = io.BytesIO(source)
        name = f"audio of {len(source)} bytes"
    elif isinstance(source, (str, Path)):
        name = str(source)
        handle = stack.enter_context(_open_file(Path(source), name))
    else:
        name = str(getattr(source, "name", "audio file"))
        handle = source if source.seekable() else io.BytesIO(source.read())
    if handle.seek(0, io.SEEK_END) == 0:
        raise AudioError(
            "empty", f"{name}: the file is empty (0 bytes). Copy it again, or remove it."
        )
    return handle, name


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


def _reader(handle: BinaryIO, name: str) -> Reader:
    """soundfile where it knows the content, else PyAV where it is installed."""
    try:
        return SoundFileReader(handle, name)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: a `.raw` without header
        pass
    try:
        import av
    except ModuleNotFoundError as error:
        raise AudioError(
            "unreadable",
            f"{name}: {_unknown(handle)} For m4a, webm and video install the extra that reads "
            "them: pip install 'isthmus[media]'.",
        ) from error
    try:
        return AvReader(handle, name)
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError("unreadable", f"{name}: {_unknown(handle)}") from error


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


def _check_header(reader: Reader) -> None:
    if not MIN_SOURCE_RATE <= reader.sample_rate <= MAX_SOURCE_RATE:
        raise AudioError(
            "bad_rate",
            f"{reader.name}: the sample rate is {reader.sample_rate} Hz; {MIN_SOURCE_RATE} to "
            f"{MAX_SOURCE_RATE} Hz are read. The header is likely damaged; convert the file again.",
        )
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


def _to_mono(block: np.ndarray, channel: int | None, name: str) -> np.ndarray:
    """(n,) float32 of an (n, channels) block; refuses samples that no microphone gave."""
    if block.shape[1] == 0:
        raise AudioError("no_channels", f"{name}: decoding gives 0 channels.")
    check_samples(block, name)
    if channel is not None:
        return np.ascontiguousarray(block[:, channel])
    mono: np.ndarray = block.mean(axis=1, dtype=np.float32)
    return mono


def _blocks(
    reader: Reader, start: float, duration: float | None, channel: int | None
) -> Iterator[np.ndarray]:
    """(n,) blocks of a part as 16 kHz mono, at least one sample; refuses what is not complete."""
    blocks = reader.blocks(start, duration)
    mono = (_to_mono(block, channel, reader.name) for block in blocks)
    num_samples = 0
    for piece in _resampled(mono, reader.sample_rate):
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
