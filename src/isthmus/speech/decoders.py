"""Two decoders, soundfile and PyAV: blocks of samples, or what is wrong with a file."""

import itertools
import math
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np
import soundfile

from isthmus.errors import IsthmusError
from isthmus.speech.containers import missing_fraction

DURATION_TOLERANCE = 0.025  # s, that a file or cut may lack or have in excess
_BLOCK_SAMPLES = 1 << 20  # over all channels: 4 MiB as float32
_UNKNOWN_FRAMES = 1 << 60  # libsndfile's "no idea" is near 2 ** 63
# AAC and Opus pad the first and the last packet; containers differ in whether they count that.
_AV_TOLERANCE = 0.1  # s
# Demuxers PyAV may use: containers libsndfile lacks, and none that opens other files or addresses.
_AV_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aac,mp3,ogg,amr,asf,avi,flv,mpegts,mpeg"

AudioCode = Literal[
    "missing",  # no such file
    "not_a_file",  # a directory, a device
    "unreadable",  # no decoder knows the content, or the file may not be read
    "empty",  # zero bytes, or a header without one sample
    "truncated",  # fewer samples than the header promises, or decoding stops half-way
    "non_finite",  # NaN or infinite samples
    "out_of_range",  # samples beyond +-1000, where full scale is +-1
    "bad_rate",  # below 1 kHz or above 400 kHz
    "no_channels",  # no audio stream, or none of the channel asked for
    "too_many_channels",  # more than 64
    "past_end",  # `start` lies at or behind the end
    "bad_range",  # `start` or `duration` is negative or not a number
    "too_long",  # more than `max_seconds` of output
    "wrong_duration",  # a cut's duration is not that of its audio (load_cut)
    "unsupported",  # a cut that names no plain file: pipe, address, mix (load_cut)
]


class AudioError(IsthmusError):
    """Audio that cannot be used; `code` is the reason, one of `AudioCode`."""

    def __init__(self, code: AudioCode, message: str) -> None:
        super().__init__(message)
        self.code: AudioCode = code

    def __reduce__(self) -> tuple[type["AudioError"], tuple[AudioCode, str]]:
        return AudioError, (self.code, str(self))  # both arguments survive a worker process


class SoundFileReader:
    """Blocks of a file that libsndfile can decode."""

    def __init__(self, handle: BinaryIO, name: str) -> None:
        self.name = name
        self._missing_fraction = missing_fraction(handle)
        handle.seek(0)
        self._file = soundfile.SoundFile(handle)
        self.sample_rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        frames: int = self._file.frames
        self.num_frames: int | None = frames if frames < _UNKNOWN_FRAMES else None

    def blocks(self, start: float, duration: float | None) -> Iterator[np.ndarray]:
        """(n, channels) float32 blocks of the part asked for."""
        begin = round(start * self.sample_rate)
        if self.num_frames is not None and begin >= self.num_frames:
            return
        left = math.inf if duration is None else max(1, round(duration * self.sample_rate))
        if self.num_frames is not None:
            left = min(left, self.num_frames - begin)
        block_frames = max(1, _BLOCK_SAMPLES // self.channels)
        done = 0
        try:
            if begin:
                self._file.seek(begin)
            while left > done:
                block = self._file.read(
                    int(min(block_frames, left - done)), dtype="float32", always_2d=True
                )
                if not len(block):
                    break
                done += len(block)
                yield block
        except soundfile.LibsndfileError as error:
            at = start + done / self.sample_rate
            raise _truncated(self.name, f"decoding stops after {at:.3f} s") from error
        if math.isfinite(left) and self.num_frames is not None:
            missing = (left - done) / self.sample_rate
            if missing > DURATION_TOLERANCE:
                raise _truncated(self.name, f"{missing:.3f} s promised by the header are missing")

    def check_complete(self) -> None:
        """Raise if the container promises more than 25 ms beyond what the file holds."""
        fraction = self._missing_fraction
        held = (self.num_frames or 0) / self.sample_rate
        if fraction >= 1.0 or held * fraction / (1 - fraction) > DURATION_TOLERANCE:
            raise _truncated(self.name, "the container is not complete")

    def close(self) -> None:
        self._file.close()


class AvReader:
    """Blocks of a file that FFmpeg can decode, through PyAV."""

    def __init__(self, handle: BinaryIO, name: str) -> None:
        import av

        self.name = name
        self._missing_fraction = missing_fraction(handle)
        handle.seek(0)
        # An open file and a list of formats: playlists can reach neither the disk nor the network.
        self._container = av.open(handle, "r", options={"format_whitelist": _AV_FORMATS})
        self._errors = (av.FFmpegError, ValueError)
        self._resampler = av.AudioResampler(format="fltp")
        streams = self._container.streams
        if not streams.audio:
            raise AudioError("no_channels", f"{name}: there is no audio stream in it.")
        self._frames = self._container.decode(streams.audio[0])
        first = next(self._frames, None)
        if first is None:
            raise AudioError("empty", f"{name}: there is no audio in it. Remove it.")
        self._first = first
        self.sample_rate: int = first.sample_rate
        self.channels: int = len(first.layout.channels)
        self._declared = self._declared_seconds()
        self.num_frames = round(self._declared * self.sample_rate) if self._declared else None

    def _declared_seconds(self) -> float | None:
        """The header's duration where it is exact: not estimated from a bit rate, nor a video's."""
        name = self._container.format.name
        stream = self._container.streams.audio[0]
        if "mov" not in name and "matroska" not in name:
            return None
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        if self._container.duration is not None and len(self._container.streams) == 1:
            return self._container.duration / 1e6
        return None

    def blocks(self, start: float, duration: float | None) -> Iterator[np.ndarray]:
        """(n, channels) float32 blocks of the part asked for, decoding from the beginning."""
        begin = round(start * self.sample_rate)
        end = math.inf if duration is None else begin + max(1, round(duration * self.sample_rate))
        position = 0
        try:
            for frame in itertools.chain([self._first], self._frames):
                for piece in self._resampler.resample(frame):
                    block = piece.to_ndarray().T  # (n, channels)
                    chosen = block[
                        max(0, begin - position) : int(min(len(block), max(0, end - position)))
                    ]
                    position += len(block)
                    if len(chosen):
                        yield chosen
                if position >= end:
                    return
        except self._errors as error:
            at = position / self.sample_rate
            raise _truncated(self.name, f"decoding stops after {at:.3f} s") from error
        missing = (self._declared or 0.0) - position / self.sample_rate
        if missing > _AV_TOLERANCE:
            raise _truncated(self.name, f"{missing:.3f} s promised by the header are missing")

    def check_complete(self) -> None:
        """Raise if the container says of itself that its end is missing."""
        if self._missing_fraction > 0:
            raise _truncated(self.name, "the container is not complete")

    def close(self) -> None:
        self._container.close()


def _truncated(name: str, what: str) -> AudioError:
    return AudioError("truncated", f"{name}: cut short: {what}. Copy it again, or remove it.")
