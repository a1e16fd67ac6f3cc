"""Frames of a frozen encoder kept on disk: computed once for each utterance, then read.

A folder belongs to one encoder. Each process that writes has shards of its own there, raw data in
`.bin` beside an index in `.jsonl`, and what is written is never changed: any number of processes
and machines share a folder without a lock. An entry counts from its index line on, which is
written last, and only while its SHA-256 is right: whatever else is found (a torn line, a short or
damaged shard) counts as missing and is computed again.

Shapes: T encoder frames, D encoder width.
"""

import hashlib
import json
import logging
import math
import os
import platform
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from lhotse import MonoCut
from lhotse.cut import Cut
from pydantic import NonNegativeInt, TypeAdapter
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.files import CACHE_VARIABLE, read_json, user_cache, write_atomic
from isthmus.model.parts import sources
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import Recipe
from isthmus.settings.base import Precision
from isthmus.settings.encoders import EncoderSettings
from isthmus.speech.corpora import load_cut

FRONT_END_VERSION = 1  # raise it whenever the code that turns audio into frames changes
SHARD_BYTES = 1_000_000_000
DESCRIPTION = "encoder.json"

log = logging.getLogger(__name__)


def encoder_description(
    settings: EncoderSettings, *, dtype: str, precision: Precision
) -> dict[str, Any]:
    """All that decides the frames of an utterance, for JSON.

    `dtype` is what the encoder computes in, `precision` what its frames are stored in. Models are
    told apart by their files: where they lie and what they are called makes no difference.
    Raises IsthmusError for an encoder that is tuned, because its frames change in training.
    """
    if settings.tune != "frozen":
        raise IsthmusError(
            f"encoder.tune is {settings.tune!r}: only the frames of a frozen encoder stay the "
            "same and can be kept. Switch the feature cache off, or set encoder.tune: frozen."
        )
    files = {
        f"{name}/{file}".lstrip("/"): digest
        for name, part in sources(settings).items()
        for file, digest in part.sha256.items()
    }
    names = dict.fromkeys(("tune", "path", "revision"), True)
    return {
        "encoder": settings.model_dump(
            mode="json", exclude={**names, "first": names, "second": names}
        ),
        "sha256": files,
        "dtype": dtype,
        "precision": precision,
        "input": "16 kHz",
        "front_end_version": FRONT_END_VERSION,
    }


def cache_folder(description: Mapping[str, Any]) -> Path:
    """Where the frames of an encoder are kept, in the user's cache."""
    return user_cache("features") / f"{description['encoder']['type']}-{_digest(description)[:16]}"


def utterance_key(cut: Cut) -> str:
    """SHA-256 that changes with whatever decides the waveform of a cut, not with a file's name.

    The content of its audio file and the part of it; where there is no plain file, or more is
    done to the audio, the waveform itself. Raises IsthmusError as `load_cut`.
    """
    recording = cut.recording if isinstance(cut, MonoCut) and cut.has_recording else None
    if recording is not None and len(recording.sources) == 1 and not recording.transforms:
        (audio,) = recording.sources
        if audio.type == "file":
            try:
                content = _file_digest(audio.source, _identity(audio.source))
            except OSError:
                load_cut(cut)  # says what is wrong with the file
                raise
            channel = cut.channel if recording.num_channels > 1 else None
            # load_cut reads a whole recording to its end, and a part as long as it says
            return _digest([content, cut.start, cut.duration, recording.duration, channel])
    return hashlib.sha256(load_cut(cut).tobytes()).hexdigest()


def _identity(path: str) -> tuple[int, ...]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino


@cache
def _file_digest(path: str, identity: tuple[int, ...]) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of an index: where frames (T, D) lie in the shard, and the SHA-256 of all this."""

    key: str
    offset: NonNegativeInt
    shape: tuple[NonNegativeInt, NonNegativeInt]
    dtype: Precision
    sha256: str


@dataclass(frozen=True)
class Verification:
    """Utterances with sound frames and their bytes, and entries or index lines that are broken."""

    sound: int
    broken: int
    bytes: int


_LINE = TypeAdapter(Entry)


class FeatureCache:
    """Frames (T, D) by utterance, in one folder of one encoder.

    It may be forked and pickled into other processes, which see what is put later; within a
    process it is for one thread. When the folder cannot be written it says so once and goes on
    reading; with `strict` it raises IsthmusError instead.
    """

    key = staticmethod(utterance_key)

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, Any],
        *,
        strict: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ):
        """`description` is of `encoder_description`; a shard ends when it reaches `shard_bytes`.

        Raises IsthmusError for a folder that another encoder filled.
        """
        self.folder = folder
        self.precision: Precision = description["precision"]
        self.strict = strict
        self.shard_bytes = shard_bytes
        self.read_only = False
        self.broken = 0  # entries and index lines found broken
        self._entries: dict[str, list[tuple[str, Entry]]] = {}  # with their shards, newest last
        self._read: dict[str, int] = {}  # bytes of each shard's index known here
        self._warned: set[str] = set()
        self._writer: _Writer | None = None
        self._claim(dict(description))
        self._refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None}  # every process has its own

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry; only reading it tells whether it is sound."""
        if key not in self._entries:
            self._refresh()
        return key in self._entries

    def get(self, key: str) -> Tensor | None:
        """Frames (T, D) in the precision of the cache, in memory of their own; None if missing."""
        frames = self._newest(key)
        if frames is None:
            self._refresh()
            frames = self._newest(key)
        return frames

    def put(self, key: str, frames: Tensor) -> Tensor:
        """Store frames (T, D), from any device; returns them as `get` will, rounded alike."""
        assert frames.ndim == 2, frames.shape
        stored = torch.empty(frames.shape, dtype=getattr(torch, self.precision))
        stored.copy_(frames.detach())
        if self.read_only:
            return stored
        if not stored.isfinite().all():
            self._warn("numbers", "frames with NaN or infinite numbers are not stored.")
            return stored
        try:
            if self._writer is None or self._writer.pid != os.getpid():
                self._writer = _Writer(self.folder, self.shard_bytes)
            entry = self._writer.append(key, stored, self.precision)
        except OSError as error:
            self._stop_writing(error)
            return stored
        self._entries.setdefault(key, []).append((self._writer.shard, entry))
        self._read[self._writer.shard] = self._writer.index_size
        return stored

    def frames(
        self, key: str, compute: Callable[[], Tensor], found: Tensor | None = None
    ) -> Tensor:
        """Frames (T, D) as `found`, or else as kept, or else computed and kept from now on."""
        if found is None:
            found = self.get(key)
        return self.put(key, compute()) if found is None else found

    def verify(self) -> Verification:
        """Read all that is there; what was computed again after damage counts as sound."""
        self._entries.clear()
        self._read.clear()
        known = self.broken
        self._refresh()
        sound = size = 0
        for key in list(self._entries):
            frames = self._newest(key)
            if frames is not None:
                sound += 1
                size += frames.nbytes
        return Verification(sound, self.broken - known, size)

    def close(self) -> None:
        """Close what this process writes; some file systems report a full disk only now."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._stop_writing(error)

    def _claim(self, description: dict[str, Any]) -> None:
        """Make the folder this encoder's, or see that it is."""
        file = self.folder / DESCRIPTION
        remedy = f"Delete this folder, or set {CACHE_VARIABLE} to another."
        try:
            used = any(self.folder.glob("*.jsonl"))  # asked first: a shard comes after its owner
            if not file.exists():
                if used:
                    raise IsthmusError(f"{self.folder} holds frames but no {DESCRIPTION}. {remedy}")
                self.folder.mkdir(parents=True, exist_ok=True)
                own = file.with_name(f"{_unique_name()}.json")  # others may write at the same time
                write_atomic(own, json.dumps(description, indent=2) + "\n")
                os.replace(own, file)
            held = read_json(file)
        except OSError as error:
            self._stop_writing(error)
            return
        if held != description:
            raise IsthmusError(
                f"{self.folder} holds the frames of another encoder (see its {DESCRIPTION}). "
                f"{remedy}"
            )

    def _newest(self, key: str) -> Tensor | None:
        """The newest sound entry of those known; broken ones are forgotten."""
        entries = self._entries.get(key, [])
        while entries:
            frames = self._load(*entries[-1])
            if frames is not None:
                return frames
            entries.pop()
        self._entries.pop(key, None)
        return None

    def _load(self, shard: str, entry: Entry) -> Tensor | None:
        """Read into memory and check there: a map of a file that shrinks would kill the process."""
        dtype: torch.dtype = getattr(torch, entry.dtype)
        size = math.prod(entry.shape) * dtype.itemsize
        reason = "is damaged (the SHA-256 differs)"
        try:
            with _data_file(self.folder, shard).open("rb") as stream:
                if os.fstat(stream.fileno()).st_size >= entry.offset + size:
                    frames = torch.empty(entry.shape, dtype=dtype)
                    stream.seek(entry.offset)
                    stream.readinto(_bytes(frames))
                    if _checksum(entry.key, frames) == entry.sha256:
                        return frames
                else:
                    reason = "is shorter than its index says"
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        self._found_broken(shard, reason)
        return None

    def _refresh(self) -> None:
        """Take in the index lines that any process appended since, of older shards first."""
        try:
            with os.scandir(self.folder) as items:
                found = [(i.stat(), i.name) for i in items if i.name.endswith(".jsonl")]
        except OSError as error:
            if not self.read_only:  # else it was said
                self._warn("folder", f"it cannot be listed ({error.strerror}).")
            return
        for stat, name in sorted(found, key=lambda item: item[0].st_mtime_ns):
            shard = name.removesuffix(".jsonl")
            done = self._read.get(shard, 0)
            if stat.st_size <= done:
                continue
            try:
                with (self.folder / name).open("rb") as stream:
                    stream.seek(done)
                    text = stream.read()
            except OSError as error:
                self._found_broken(shard, f"has an index that cannot be read ({error.strerror})")
                continue
            whole = text[: text.rfind(b"\n") + 1]  # the rest is torn, or still being written
            self._read[shard] = done + len(whole)
            for line in whole.splitlines():
                try:
                    entry = _LINE.validate_json(line, strict=True)
                except ValueError:
                    self._found_broken(shard, "has a damaged line in its index")
                    continue
                self._entries.setdefault(entry.key, []).append((shard, entry))

    def _found_broken(self, shard: str, reason: str) -> None:
        self.broken += 1
        self._warn(shard, f"{shard} {reason}. What is missing is computed again.")

    def _warn(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            log.warning("feature cache %s: %s", self.folder, message)

    def _stop_writing(self, error: OSError) -> None:
        self._writer = None
        message = (
            f"feature cache: {error.filename or self.folder} cannot be written: {error.strerror}. "
            f"Make room or give permission there, or set {CACHE_VARIABLE} to a folder on another "
            "disk."
        )
        if self.strict:
            raise IsthmusError(message) from error
        if not self.read_only:
            log.warning("%s Going on without storing frames.", message)
        self.read_only = True


class _Writer:
    """The shards of one process: nobody else ever writes them."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.pid = os.getpid()
        self.name = _unique_name()
        self.number = 0
        self._begin()

    def _begin(self) -> None:
        self.shard = f"{self.name}-{self.number}"
        # unbuffered: after an error nothing is left behind that is written later
        self.data = _data_file(self.folder, self.shard).open("xb", buffering=0)
        self.index = (self.folder / f"{self.shard}.jsonl").open("xb", buffering=0)
        self.data_size = self.index_size = 0

    def append(self, key: str, frames: Tensor, precision: Precision) -> Entry:
        """Raises OSError; then the index has no whole line for the entry."""
        if self.data_size >= self.shard_bytes:
            self.close()
            self.number += 1
            self._begin()
        shape = (frames.shape[0], frames.shape[1])
        entry = Entry(key, self.data_size, shape, precision, _checksum(key, frames))
        self.data_size += _write(self.data, _bytes(frames))
        self.index_size += _write(self.index, memoryview(_LINE.dump_json(entry) + b"\n"))
        return entry

    def close(self) -> None:
        self.data.close()
        self.index.close()


def _unique_name() -> str:
    """A name that no other process on any machine has."""
    host = re.sub(r"[^\w-]", "-", platform.node())
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def _data_file(folder: Path, shard: str) -> Path:
    return folder / f"{shard}.bin"


def _write(stream: FileIO, data: memoryview) -> int:
    size = len(data)
    while data:
        data = data[os.write(stream.fileno(), data) :]
    return size


def _bytes(frames: Tensor) -> memoryview:
    """The memory of contiguous frames, to read from or into."""
    return frames.view(torch.uint8).numpy().reshape(-1).data


def _checksum(key: str, frames: Tensor) -> str:
    """SHA-256 of the bytes, and of what the index says of them."""
    digest = hashlib.sha256(f"{key} {list(frames.shape)} {frames.dtype} ".encode())
    digest.update(_bytes(frames))
    return digest.hexdigest()


def feature_cache(recipe: Recipe, model: SpeechLLM, *, strict: bool = False) -> FeatureCache | None:
    """The cache of a recipe's encoder; None, with the reason in the log, where it has none.

    `strict`: what cannot be written is an error instead of a warning.
    """
    precision = recipe.data.feature_cache
    if precision == "none":
        return None
    acting = [name for name in ("augment", "join") if getattr(recipe.data, name) is not None]
    if acting or recipe.encoder.tune != "frozen":
        reason = f"data.{acting[0]} changes the audio" if acting else "the encoder is trained"
        log.warning("feature cache: off, because %s.", reason)
        return None
    dtype = str(next(model.encoder.parameters(), torch.empty(0)).dtype).removeprefix("torch.")
    description = encoder_description(recipe.encoder, dtype=dtype, precision=precision)
    cache = FeatureCache(cache_folder(description), description, strict=strict)
    log.info("feature cache: %s", cache.folder)
    return cache
