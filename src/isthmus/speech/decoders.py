"""Two decoders, soundfile and PyAV: blocks of samples, or what is wrong with a file.

soundfile reads samples that stand in a file as they are (WAV, AIFF, CAF and their like) and finds
any of them at once; FFmpeg, through PyAV, everything that is compressed. A block is (n, channels)
float32 with its own sample rate: streams that were joined change it, and the number of channels.
"""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator
from functools import cache
from typing import BinaryIO, Literal

import av
import numpy as np
import soundfile
from av.audio.frame import AudioFrame

from isthmus.errors import IsthmusError
from isthmus.speech.containers import Promise

DURATION_TOLERANCE = 0.025  # s, that a file or cut may lack or have in excess
_BLOCK_SAMPLES = 1 << 20  # over all channels: 4 MiB as float32
_GATHERED_SAMPLES = 1 << 16  # a channel
_LINEAR = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
# AAC and Opus pad the first and the last packet; containers differ in whether they count that.
_PADDING = 0.1  # s
_GAP = 0.1  # s without sound, by the packets' times, that are heard as silence
_LONGEST_GAP = 24 * 3600.0  # s; beyond, the times are wrong
_PREROLL = 1.0  # s decoded before a part, until a decoder knows what was before
_BAD_PACKETS = 0.01  # share of packets that may be damaged before a file counts as cut short
# Demuxers that open no other file or address; a playlist is none of them.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aac,mp3,ogg,flac,amr,amrnb,amrwb,asf,avi,flv,mpegts,"
    "mpeg,wav,w64,aiff,caf,au,nistsphere,ac3,eac3,tta,wv,ape,mpc,mpc8,tak,dts,dtshd,truehd,mlp,"
    "loas,voc,sox,ircam,dsf,iff,oma,rm,shn,aptx,qcp,xwma,gsm,sbc,mxf,nut,wtv,swf"
)
_TIMED = {
    "mov",
    "matroska",
    "asf",
    "avi",
    "flv",
    "mpegts",
    "mpeg",
    "mxf",
    "nut",
}  # packets have times
_SCALES = {"u1": (1 << 7, 1 << 7), "i2": (0, 1 << 15), "i4": (0, 1 << 31), "i8": (0, 1 << 63)}
_SEEKABLE = {"mov", "matroska", "flac", "ogg"}  # and after a seek these are exact

AudioCode = Literal[
    "missing",  # no such file
    "not_a_file",  # a directory, a device
    "unreadable",  # no decoder knows the content, or the file may not be read
    "empty",  # zero bytes, or a header without one sample
    "truncated",  # fewer samples than the header promises, or decoding stops half-way
    "non_finite",  # NaN or infinite samples
    "out_of_range",  # samples beyond +-1000, where full scale is +-1
    "bad_rate",  # below 1 kHz or above 400 kHz
    "no_channels",  # no audio stream, or none of the channel or track asked for
    "too_many_channels",  # more than 64
    "past_end",  # `start` lies at or behind the end
    "bad_range",  # `start` or `duration` is negative or not a number
    "too_long",  # more than `max_seconds` of output
    "wrong_duration",  # a cut's duration is not that of its audio (load_cut)
    "unsupported",  # a cut that names no plain file: pipe, address, mix (load_cut)
]

log = logging.getLogger(__name__)
Block = tuple[np.ndarray, int]  # (n, channels) float32, Hz


class AudioError(IsthmusError):
    """Audio that cannot be used; `code` is the reason, one of `AudioCode`."""

    def __init__(self, code: AudioCode, message: str) -> None:
        super().__init__(message)
        self.code: AudioCode = code

    def __reduce__(self) -> tuple[type["AudioError"], tuple[AudioCode, str]]:
        return AudioError, (self.code, str(self))  # both arguments survive a worker process


@cache
def tell(message: str) -> None:
    """Warn of something about a file, once in a process."""
    log.warning(message)


class SoundFileReader:
    """Blocks of a file whose samples stand in it as they are.

    Raises ValueError where they do not, and soundfile's own errors.
    """

    def __init__(self, handle: BinaryIO, name: str, promised: Promise) -> None:
        self.name = name
        handle.seek(0)
        self._file = soundfile.SoundFile(handle)
        linear = self._file.subtype.startswith(_LINEAR)
        if not linear or promised.beyond:
            self._file.close()
            raise ValueError(f"{name}: not for soundfile")
        self._missing = promised.missing
        self.sample_rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        self.num_frames: int | None = self._file.frames
        self.estimated_seconds: float | None = None

    def blocks(self, start: float, duration: float | None) -> Iterator[Block]:
        """Blocks of the part asked for, in seconds."""
        begin = round(start * self.sample_rate)
        left = self._file.frames - begin
        if duration is not None:
            left = min(left, max(1, round(duration * self.sample_rate)))
        if left <= 0:
            return
        block_frames = max(1, _BLOCK_SAMPLES // self.channels)
        done = 0
        try:
            self._file.seek(begin)
            while left > done:
                block = self._file.read(
                    min(block_frames, left - done), dtype="float32", always_2d=True
                )
                if not len(block):
                    break
                done += len(block)
                yield block, self.sample_rate
        except soundfile.LibsndfileError as error:
            at = start + done / self.sample_rate
            raise truncated(self.name, f"decoding stops after {at:.3f} s") from error
        missing = (left - done) / self.sample_rate
        if missing > DURATION_TOLERANCE:
            raise truncated(self.name, f"{missing:.3f} s promised by the header are missing")

    def check_complete(self) -> None:
        """Raise if the container promises more than 25 ms beyond what the file holds."""
        seconds = _missing_seconds(self._missing, self._file.frames / self.sample_rate)
        if self._missing == 1 or seconds > DURATION_TOLERANCE:
            raise truncated(self.name, "the container is not complete")

    def close(self) -> None:
        self._file.close()


class AvReader:
    """Blocks of a file that FFmpeg can decode, in the time of a player.

    Sound that begins behind the picture, and gaps between packets, become silence. `track` counts
    the file's audio streams from 0. Raises AudioError, and PyAV's own errors.
    """

    def __init__(
        self, handle: BinaryIO, name: str, promised: Promise, track: int | None = None
    ) -> None:
        self.name = name
        self._missing = promised.missing
        handle.seek(0)
        # An open file and a list of formats: playlists can reach neither the disk nor the network.
        options = {"format_whitelist": _FORMATS}
        if promised.beyond:
            options["ignore_length"] = "1"
        self._container = av.open(handle, "r", options=options, metadata_errors="ignore")
        self._kinds = set(self._container.format.name.split(","))
        self._stream = self._track(track)
        self._bad: list[float] = []  # where packets could not be decoded, s
        self._packets = 0
        self._ends_badly = False
        self._frames = self._decoded()
        first = next(self._frames, None)
        if first is None:
            raise AudioError("empty", f"{name}: there is no audio in it. Remove it.")
        self._first = first
        self._origin = (self._container.start_time or 0) / 1e6
        self.sample_rate: int = first.sample_rate
        self.channels: int = len(first.layout.channels)
        self.num_frames = self._declared_frames() if "flac" in self._kinds else None
        length = self._container.duration
        self.estimated_seconds = length / 1e6 if length else None

    def _track(self, track: int | None) -> av.AudioStream:
        tracks = self._container.streams.audio
        if not tracks:
            raise AudioError("no_channels", f"{self.name}: there is no audio stream in it.")
        if track is None and len(tracks) > 1:
            tell(
                f"{self.name}: has {len(tracks)} audio tracks; the first, track 0, is read. Choose "
                "another with --track (in Python: track=)."
            )
        if track is not None and not 0 <= track < len(tracks):
            raise AudioError(
                "no_channels",
                f"{self.name}: track {track} was asked for, but tracks are 0 to {len(tracks) - 1}.",
            )
        return tracks[track or 0]

    def _decoded(self) -> Iterator[AudioFrame]:
        """Frames as they come; damaged packets are counted and left out."""
        for packet in self._container.demux(self._stream):
            try:
                frames = packet.decode()
            except (av.FFmpegError, ValueError):
                self._bad.append(float((packet.pts or 0) * (packet.time_base or 0)))
                self._ends_badly = True
                continue
            if packet.size:  # the last, empty, fetches what the decoder still holds
                self._packets += 1
                self._ends_badly = False
            yield from frames

    def _declared_frames(self) -> int | None:
        """Samples a channel by a header that counts them; None where it estimates or is silent."""
        stream = self._stream
        if not self._kinds & {"mov", "matroska", "flac"}:
            return None
        if stream.duration and stream.time_base is not None:
            return round(stream.duration * stream.time_base * self.sample_rate)
        if self._container.duration and len(self._container.streams) == 1:
            return round((self._container.duration / 1e6 - self._origin) * self.sample_rate)
        return None

    def blocks(self, start: float, duration: float | None) -> Iterator[Block]:
        """Blocks of the part asked for, in seconds."""
        return _gathered(self._part(start, duration))

    def _part(self, start: float, duration: float | None) -> Iterator[Block]:
        """The part as it comes, a frame of a few milliseconds at a time."""
        end = math.inf if duration is None else start + duration
        time = 0.0
        for time, samples, rate in self._timed(start):
            begin = max(0, round((start - time) * rate))
            stop = len(samples)
            if duration is not None:  # at least one sample of a part
                stop = min(stop, max(round((end - time) * rate), begin + (time <= start)))
            if stop > begin:
                yield samples[begin:stop], rate
            time += len(samples) / rate
            if time >= end:
                return
        self._check_end(time)

    def _timed(self, start: float) -> Iterator[tuple[float, np.ndarray, int]]:
        """Time (s), samples (n, channels) and rate of each frame and of the silence before it."""
        time, frames = self._frames_from(start)
        for frame in frames:
            samples, rate = _samples(frame), frame.sample_rate
            gap = self._time(frame) - time if self._kinds & _TIMED else 0.0
            if _GAP < gap < _LONGEST_GAP:
                most = _BLOCK_SAMPLES // samples.shape[1]
                left = round(gap * rate)
                for length in [most] * (left // most) + [left % most]:
                    yield time, np.zeros((length, samples.shape[1]), np.float32), rate
                    time += length / rate
            yield time, samples, rate
            time += len(samples) / rate

    def _frames_from(self, start: float) -> tuple[float, Iterator[AudioFrame]]:
        """Frames from `start` (s) or earlier, and the time of the first."""
        base = self._stream.time_base
        if start <= 2 * _PREROLL or base is None or not self._kinds & _SEEKABLE:
            return 0.0, itertools.chain([self._first], self._frames)
        self._container.seek(int((start - _PREROLL + self._origin) / base), stream=self._stream)
        frames = self._decoded()
        first = next(frames, None)
        if first is not None and first.time is not None and self._time(first) <= start:
            return self._time(first), itertools.chain([first], frames)
        self._container.seek(0)
        return 0.0, self._decoded()

    def _time(self, frame: AudioFrame) -> float:
        """Seconds from the beginning of the file, by the packets' times."""
        return (frame.time or 0.0) - self._origin

    def _check_end(self, held: float) -> None:
        """Raise where decoding ended early; warn of what could not be decoded on the way."""
        frames = self._declared_frames()
        declared = held if frames is None else frames / self.sample_rate
        missing = max(declared - held, _missing_seconds(self._missing, held))
        if missing > (_PADDING if self._kinds & _TIMED else DURATION_TOLERANCE):
            raise truncated(self.name, f"{missing:.3f} s promised by the header are missing")
        ends_early = self._ends_badly and self._missing is None and frames is None
        if ends_early or len(self._bad) > max(1, _BAD_PACKETS * self._packets):
            raise truncated(self.name, f"decoding stops after {self._bad[0]:.3f} s")
        if self._bad:
            tell(f"{self.name}: a piece at {self._bad[0]:.3f} s cannot be decoded and is left out.")
        if "flac" in self._kinds and held - declared > DURATION_TOLERANCE:
            tell(f"{self.name}: streams were joined; a little is lost where they meet.")

    def check_complete(self) -> None:
        """Raise if the container says of itself that its end is missing."""
        if self._missing == 1:
            raise truncated(self.name, "the container is not complete")

    def close(self) -> None:
        self._container.close()


def _gathered(frames: Iterable[Block]) -> Iterator[Block]:
    """Blocks of many frames each, as far as their rates and channels are the same."""
    kept: list[np.ndarray] = []
    kind, size = (0, 0), 0
    for samples, rate in frames:
        if kept and (kind != (rate, samples.shape[1]) or size >= _GATHERED_SAMPLES):
            yield np.concatenate(kept), kind[0]
            kept, size = [], 0
        kept.append(samples)
        kind, size = (rate, samples.shape[1]), size + len(samples)
    if kept:
        yield np.concatenate(kept), kind[0]


def _samples(frame: AudioFrame) -> np.ndarray:
    """(n, channels) float32 of a frame, full scale 1."""
    values: np.ndarray = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, len(frame.layout.channels))
    zero, full = _SCALES.get(values.dtype.str[1:], (0, 1))
    return (values.astype(np.float32) - np.float32(zero)) / np.float32(full)


def _missing_seconds(missing: float | None, held: float) -> float:
    """Seconds that are not there, of a file that holds `held` and lacks a share of its bytes."""
    return held * missing / (1 - missing) if missing and missing < 1 else 0.0


def truncated(name: str, what: str) -> AudioError:
    """The error of a recording that ends early."""
    return AudioError("truncated", f"{name}: cut short: {what}. Copy it again, or remove it.")
