"""How much audio a file promises, read from its container, to notice a file that was cut short.

libsndfile and FFmpeg decode what is left of a truncated file without a word, so the promise has to
be read from the bytes: the size of the data chunk (WAV, RF64, W64, AIFF, AU, CAF, NIST) or the flag
on the last page (Ogg).
"""

import io
import re
from collections.abc import Callable
from typing import BinaryIO

# Sizes that writers to a pipe leave behind because they cannot know the length yet.
_UNKNOWN_SIZES = {0, 0x7FFFF000, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}
_MAX_CHUNKS = 1000  # a hostile file may hold millions of empty chunks
_OGG_TAIL_BYTES = 1 << 17  # two of the largest pages (65,307 bytes) fit


def missing_fraction(handle: BinaryIO) -> float:
    """Share of the promised data that is not in the file: 0.0 (complete, or no promise) to 1.0."""
    handle.seek(0)
    head = handle.read(40)
    size = handle.seek(0, io.SEEK_END)
    if head[:4] == b"OggS":
        return 0.0 if _ogg_is_complete(handle, size) else 1.0
    span = _data_span(handle, head)
    if span is None or span[1] in _UNKNOWN_SIZES:
        return 0.0
    begin, length = span
    return max(0, begin + length - size) / length


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
    return None


def _little_endian_chunk(handle: BinaryIO) -> tuple[bytes, int, int]:
    return handle.read(4), (size := int.from_bytes(handle.read(4), "little")), size + size % 2


def _big_endian_chunk(handle: BinaryIO) -> tuple[bytes, int, int]:
    return handle.read(4), (size := int.from_bytes(handle.read(4), "big")), size + size % 2


def _core_audio_chunk(handle: BinaryIO) -> tuple[bytes, int, int]:
    return handle.read(4), (size := int.from_bytes(handle.read(8), "big")), size


def _find_chunk(
    handle: BinaryIO,
    name: bytes,
    offset: int,
    read_header: Callable[[BinaryIO], tuple[bytes, int, int]],
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


def _ogg_is_complete(handle: BinaryIO, size: int) -> bool:
    """Whether the last page carries the end-of-stream flag and is all there."""
    handle.seek(max(0, size - _OGG_TAIL_BYTES))
    tail = handle.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:
        return False
    segments = page[26]
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])
