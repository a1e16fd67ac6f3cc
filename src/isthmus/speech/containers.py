"""What a container says of the length of its audio, held against the bytes that are there.

A header is a hint: writers that are killed or write to a pipe leave sizes that mean nothing, sizes
beyond 4 GiB wrap round, and streams are joined one behind the other. So a promise counts only
where the bytes bear it out; one that they fall short of says that the file was cut.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

# Sizes near these stand for "not known", less a header or a rounding to whole blocks.
_UNKNOWN_SIZES = (1 << 30, 1 << 31, 1 << 32, 1 << 63, 1 << 64)
_UNKNOWN_WITHIN = 4096
_ID3_SHIFTS = (21, 14, 7, 0)
_MAX_CHUNKS = 1000  # a hostile file may hold millions of empty chunks
_OGG_TAIL_BYTES = 1 << 17  # two of the largest pages (65,307 bytes) fit
_ChunkHeader = Callable[[BinaryIO], tuple[bytes, int, int]]


@dataclass(frozen=True, slots=True)
class Promise:
    """What a container promises of its audio, against what is there.

    `missing` is the share of it that is not in the file, from 0 (complete) to 1, None without one;
    `beyond` is whether audio goes on behind the end that the header names; `joined` whether another
    file begins there.
    """

    missing: float | None = None
    beyond: bool = False
    joined: bool = False


class Untagged(io.RawIOBase):
    """An open file without the ID3 tags that stand in front of its audio and behind it."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._end = handle.seek(0, io.SEEK_END)
        if self._end > 128 and handle.seek(self._end - 128) and handle.read(3) == b"TAG":
            self._end -= 128
        self._begin = self._place = 0
        handle.seek(0)
        while (tag := handle.read(10))[:3] == b"ID3" and len(tag) == 10:
            size = sum(
                (byte & 0x7F) << shift for byte, shift in zip(tag[6:], _ID3_SHIFTS, strict=True)
            )
            self._begin = handle.seek(self._begin + 10 + size + (10 if tag[5] & 0x10 else 0))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._place, self._end - self._begin)[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._handle.seek(self._begin + self._place)
        data = self._handle.read(max(0, min(len(buffer), self._end - self._begin - self._place)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def promise(handle: BinaryIO) -> Promise:
    """The promise of an open file; nothing is promised by containers without sizes."""
    handle.seek(0)
    head = handle.read(40)
    size = handle.seek(0, io.SEEK_END)
    if head[:4] == b"OggS":
        return Promise(missing=0.0 if _ogg_is_complete(handle, size) else 1.0)
    span = _data_span(handle, head)
    if span is None:
        return Promise()
    begin, length = span
    end = begin + length
    if any(abs(length - unknown) <= _UNKNOWN_WITHIN for unknown in _UNKNOWN_SIZES):
        return Promise()
    if end > size:
        return Promise(missing=min(1.0, (end - size) / length))
    if head[:4] != b"RIFF":
        return Promise(0.0 if length else None, beyond=length == 0 and end < size)
    handle.seek(end + length % 2)
    joined = handle.read(4) == b"RIFF"
    return Promise(
        beyond=not joined and not _chunks_follow(handle, end + length % 2), joined=joined
    )


def _data_span(handle: BinaryIO, head: bytes) -> tuple[int, int] | None:
    """Where the data begins and how many bytes it promises; None if it promises nothing."""
    if head[:4] == b"RIFF":
        return _find_chunk(handle, b"data", 12, _little_endian_chunk)
    if head[:4] in (b"RF64", b"BW64"):
        span = _find_chunk(handle, b"data", 12, _little_endian_chunk)
        # The real size is in the ds64 chunk: RIFF size, then data size, 64 bits each.
        return (span[0], int.from_bytes(head[28:36], "little")) if span else None
    if head[:4] == b"FORM":
        return _find_chunk(handle, b"SSND", 12, _big_endian_chunk)
    if head[:4] == b"caff":
        return _find_chunk(handle, b"data", 8, _core_audio_chunk)
    if head[:4] == b".snd":
        return int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
    if head[:4] == b"riff":  # W64: the size of the whole file follows a 16-byte name
        return 0, int.from_bytes(head[16:24], "little")
    if head[:7] == b"NIST_1A":
        return _nist_span(handle)
    if head[:1] == b"\xff":
        return _mp3_span(handle)
    return None


def _little_endian_chunk(handle: BinaryIO) -> tuple[bytes, int, int]:
    return handle.read(4), (size := int.from_bytes(handle.read(4), "little")), size + size % 2


def _big_endian_chunk(handle: BinaryIO) -> tuple[bytes, int, int]:
    return handle.read(4), (size := int.from_bytes(handle.read(4), "big")), size + size % 2


def _core_audio_chunk(handle: BinaryIO) -> tuple[bytes, int, int]:
    return handle.read(4), (size := int.from_bytes(handle.read(8), "big")), size


def _find_chunk(
    handle: BinaryIO, name: bytes, offset: int, read_header: _ChunkHeader
) -> tuple[int, int] | None:
    """Begin and size of chunk `name`, from `offset`; `read_header` gives name, size, step."""
    file_size = handle.seek(0, io.SEEK_END)
    for _ in range(_MAX_CHUNKS):
        if offset >= file_size:
            return None
        handle.seek(offset)
        found, size, step = read_header(handle)
        begin = handle.tell()
        if found == name:
            return begin, size
        offset = begin + step
    return None


def _chunks_follow(handle: BinaryIO, offset: int) -> bool:
    """Whether nothing but chunks of RIFF stands from `offset` to the end; a few bytes may."""
    size = handle.seek(0, io.SEEK_END)
    for _ in range(_MAX_CHUNKS):
        if size - offset < 8:
            return True
        handle.seek(offset)
        name, _, step = _little_endian_chunk(handle)
        if not re.fullmatch(rb"[\x20-\x7e]{4}", name):
            return False
        offset = handle.tell() + step
    return True


def _nist_span(handle: BinaryIO) -> tuple[int, int] | None:
    handle.seek(0)
    header = handle.read(1024)
    fields = dict(re.findall(rb"^(\w+) -i (\d{1,15})\s*$", header, re.MULTILINE))
    coding = re.search(rb"^sample_coding -s\d+ (\S+)", header, re.MULTILINE)
    if coding and coding[1] not in (b"pcm", b"ulaw", b"alaw", b"mu-law"):
        return None  # compressed ("shorten"): the count says nothing about bytes
    try:
        count, width = int(fields[b"sample_count"]), int(fields[b"sample_n_bytes"])
    except KeyError:
        return None
    return 1024, count * width * int(fields.get(b"channel_count", b"1"))


def _mp3_span(handle: BinaryIO) -> tuple[int, int] | None:
    """The stream of an MP3 whose first frame counts its bytes (Xing, Info)."""
    handle.seek(0)
    head = handle.read(64)
    found = re.search(rb"Xing|Info", head)
    if not found or not head[found.end() + 3] & 2:
        return None
    place = found.end() + (8 if head[found.end() + 3] & 1 else 4)
    return 0, int.from_bytes(head[place : place + 4], "big")


def _ogg_is_complete(handle: BinaryIO, size: int) -> bool:
    """Whether the last page carries the end-of-stream flag and is all there."""
    handle.seek(max(0, size - _OGG_TAIL_BYTES))
    tail = handle.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:
        return False
    segments = page[26]
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])
