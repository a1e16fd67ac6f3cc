"""What all recognisers have in common: any audio comes in, in any number, and transcripts go out.

A recogniser says how it decodes a few utterances. From loading and batches to long recordings cut
into chunks, the way there is the same for runs and for pretrained models.
"""

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

from isthmus.decoding.inputs import recording_seconds
from isthmus.decoding.longform import OVERLAP_SECONDS, Chunk, Chunks, joined, split
from isthmus.decoding.timestamps import align_words
from isthmus.decoding.transcript import Segment, Transcript, Word
from isthmus.errors import IsthmusError
from isthmus.model.ctc_head import CTCHead, LogProbs
from isthmus.model.encoder import Encoder
from isthmus.model.parts import Source
from isthmus.settings.search import RecogniserSettings
from isthmus.speech.activity import Region, speech_regions
from isthmus.speech.audio import (
    SAMPLE_RATE,
    Recording,
    audio_blocks,
    check_samples,
    load_audio,
)

if TYPE_CHECKING:  # a recording needs no corpus, and what reads one is half a second of imports
    from lhotse.cut import Cut

    from isthmus.runs.feature_cache import FeatureCache

FILE = (str, Path, bytes, Recording)  # audio that is still to be decoded
Audio: TypeAlias = "str | Path | bytes | Recording | np.ndarray | Cut"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Result:
    """What was heard in the audio at place `index`, or why nothing could be."""

    index: int
    found: Transcript | IsthmusError
    seconds: float = 0.0  # of computing, its share of the batch's


@dataclass(frozen=True)
class Speech:
    """One utterance, loaded."""

    waveform: np.ndarray  # (S,) float32, 16 kHz
    key: str | None = None  # in the feature cache, if it may be there
    language: str = ""  # as its corpus has it, "" where that does not say

    @property
    def seconds(self) -> float:
        return len(self.waveform) / SAMPLE_RATE


class Recogniser(ABC):
    """Waveforms to text; the text of an utterance depends on nothing but itself and the settings.

    `ctc` is the head, where there is one, that labels what it hears. It gives words their times,
    or else `aligner` does, an encoder with a head of its own. With a `cache`, the encoder's frames
    of cuts are read from it and kept in it.
    """

    settings: RecogniserSettings
    ctc: CTCHead | None = None
    ctc_delay: float | None = None  # seconds, in place of the head's own
    aligner: Encoder | None = None
    ears: Source | None = None  # the run whose encoder and projector it has in place of its own
    cache: "FeatureCache | None" = None

    @property
    @abstractmethod
    def longest(self) -> float:
        """Seconds of audio that are decoded as one."""

    @property
    def without_ctc(self) -> str:
        """Why it cannot spell by CTC, where it cannot."""
        return "this model has no CTC head"

    @abstractmethod
    def _decode(self, speech: Sequence[Speech], words: bool) -> list[Segment]:
        """A segment for each utterance, none longer than `longest`; its words, if wanted."""

    def _hear(self, speech: Sequence[Speech], words: bool) -> list[Segment]:
        """The same for whole utterances, in which perhaps nobody speaks."""
        return self._decode(speech, words)

    def check_language(self, language: str) -> None:  # noqa: B027  # most take any
        """Raise IsthmusError for the language of a corpus ("" if not known) that it cannot read."""

    @overload
    def transcribe(self, audio: Audio, *, word_timestamps: bool = False) -> Transcript: ...

    @overload
    def transcribe(
        self, audio: Sequence[Audio], *, word_timestamps: bool = False
    ) -> list[Transcript]: ...

    def transcribe(
        self, audio: "Audio | Sequence[Audio]", *, word_timestamps: bool = False
    ) -> Transcript | list[Transcript]:
        """One transcript, or a list for a list, a tuple or another sequence.

        Audio is a path, bytes, 16 kHz samples (S,) as floats of full scale 1, or a cut of a corpus,
        of any length. Raises IsthmusError for what cannot be read; `results` goes on with the
        others.
        """
        alone = not isinstance(audio, Sequence) or isinstance(audio, str | bytes | bytearray)
        items = cast(Sequence[Audio], [audio] if alone else audio)
        transcripts: dict[int, Transcript] = {}
        for result in self.results(items, word_timestamps=word_timestamps):
            if isinstance(result.found, IsthmusError):
                raise result.found
            transcripts[result.index] = result.found
        in_order = [transcripts[index] for index in range(len(items))]
        return in_order[0] if alone else in_order

    def results(self, audio: Sequence[Audio], *, word_timestamps: bool = False) -> Iterator[Result]:
        """A transcript or a fault of each, as soon as it is known: the shortest audio first."""
        self.check_words(word_timestamps)
        durations: dict[int, float] = {}
        for index, one in enumerate(audio):
            try:
                self.check_language(_language(one))
                durations[index] = _seconds(one)
            except IsthmusError as error:
                yield Result(index, error)
        short = [index for index in durations if durations[index] <= self.longest]
        for batch in _batches(sorted(short, key=durations.__getitem__), self.settings.batch_size):
            loaded: dict[int, Speech] = {}
            for index in batch:
                try:
                    loaded[index] = self._speech(audio[index])
                except IsthmusError as error:
                    yield Result(index, error)
            started = time.perf_counter()
            found = self._transcripts(list(loaded.values()), word_timestamps)
            share = (time.perf_counter() - started) / max(1, len(loaded))
            for index, transcript in zip(loaded, found, strict=True):
                yield Result(index, replace(transcript, seconds=share), share)
        for index in sorted(durations.keys() - set(short)):
            yield self._long(index, audio[index], word_timestamps)

    def stream(self, audio: Audio, *, word_timestamps: bool = False) -> Iterator[Segment]:
        """The segments of a recording of any length, in order, as they are decoded."""
        self.check_words(word_timestamps)
        yield from self._segments(self.chunks(audio), word_timestamps, _language(audio))

    def load(self, audio: Audio) -> np.ndarray:
        """The waveform (S,), 16 kHz mono float32. Raises AudioError where it cannot be read."""
        return _waveform(audio)

    @property
    def tells_times(self) -> bool:
        """Whether it can tell when words were said."""
        head = self.ctc if self.aligner is None else self.aligner.ctc
        return head is not None and head.frame_rate is not None

    def check_words(self, wanted: bool) -> None:
        """Raise IsthmusError if words are wanted and nothing can tell when they were said."""
        head = self.ctc if self.aligner is None else self.aligner.ctc
        if wanted and not self.tells_times:
            reason = self.without_ctc if head is None else "this run's has no steady rate of labels"
            raise IsthmusError(
                f"Word timestamps need a CTC model, and {reason}. Name one with "
                "--align-model, such as isthmus/tiny-conformer."
            )

    def fits(self, speech: Speech) -> bool:
        """Whether it can be decoded as one."""
        return speech.seconds <= self.longest

    def chunks(self, audio: Audio) -> Chunks:
        """The speech in a recording of any length, in pieces that can be decoded as one."""
        overlap = min(OVERLAP_SECONDS, self.longest / 4)
        cut = partial(
            split, max_seconds=self.longest, overlap_seconds=overlap, detect=self._regions
        )
        if isinstance(audio, FILE):
            return cut(audio_blocks(audio))
        return cut(_waveform(audio))

    def _timed(
        self, speech: Speech, segment: Segment, log_probs: LogProbs | None = None
    ) -> tuple[Word, ...]:
        """The words of a segment with their times; `log_probs` (T, V) are those of `ctc`."""
        head, delay = self.ctc, self.ctc_delay
        if self.aligner is not None:
            log_probs, head, delay = self._aligned(speech.waveform), self.aligner.ctc, None
        assert head is not None
        assert log_probs is not None
        words = align_words(log_probs, segment.text, head, speech.waveform, delay)
        if len(words) != len(segment.confidences):
            return words
        pairs = zip(words, segment.confidences, strict=True)
        return tuple(replace(word, confidence=sure) for word, sure in pairs)

    def _aligned(self, waveform: np.ndarray) -> Tensor:
        """Log-probabilities (T, V) of the aligner's units in a waveform (S,)."""
        assert self.aligner is not None
        assert self.aligner.ctc is not None
        samples = torch.from_numpy(waveform)[None].to(next(self.aligner.parameters()).device)
        frames, lengths = self.aligner(samples, torch.tensor([samples.shape[1]]).to(samples.device))
        return self.aligner.ctc.log_probs(frames[:, : int(lengths[0])])[0].cpu()

    def _speech(self, audio: Audio) -> Speech:
        waveform = self.load(audio)
        key = self.cache.key(_cut(audio)) if self.cache is not None and _is_cut(audio) else None
        return Speech(waveform, key, _language(audio))

    def _transcripts(self, speech: Sequence[Speech], words: bool) -> list[Transcript]:
        whole = [one for one in speech if self.fits(one)]
        heard = iter(self._hear(whole, words) if whole else [])
        found = [
            (next(heard).timed_by_words(),)
            if self.fits(one)  # else it is longer than was said of it
            else tuple(self._segments(self.chunks(one.waveform), words, one.language))
            for one in speech
        ]
        return [Transcript(own, one.seconds) for own, one in zip(found, speech, strict=True)]

    def _long(self, index: int, audio: Audio, words: bool) -> Result:
        """A recording that is decoded in chunks."""
        started = time.perf_counter()
        try:
            chunks = self.chunks(audio)
            segments = tuple(self._segments(chunks, words, _language(audio)))
        except IsthmusError as error:
            return Result(index, error)
        seconds = time.perf_counter() - started
        return Result(index, Transcript(segments, chunks.duration, seconds=seconds), seconds)

    def _segments(self, chunks: Iterator[Chunk], words: bool, language: str) -> Iterator[Segment]:
        def decoded() -> Iterator[tuple[Segment, float]]:
            for batch in _batches(chunks, self.settings.batch_size):
                # What the cutting found to be speech is not asked again whether it is.
                speech = [Speech(chunk.waveform, language=language) for chunk in batch]
                # Times tell where chunks join: asked for or not, lest the text depend on it.
                heard = self._decode(speech, words or self.tells_times)
                for chunk, segment in zip(batch, heard, strict=True):
                    yield segment.shifted(chunk.start), chunk.overlap

        for segment in joined(decoded()):  # which goes by the times of the chunks
            yield segment.timed_by_words() if words else replace(segment, words=())

    def _regions(self, waveform: np.ndarray) -> list[Region]:
        """Where somebody speaks; everywhere, without a gate."""
        gate = self.settings.gate
        if gate == "none":
            return [(0.0, len(waveform) / SAMPLE_RATE)]
        if not waveform.any():  # hours of nothing are over at once
            return []
        return speech_regions(waveform, gate)


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in order, `size` at a time."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _language(audio: Audio) -> str:
    """The language of a cut as its corpus has it, else ""."""
    if not _is_cut(audio):
        return ""
    from isthmus.speech.cuts import (
        language,
    )

    return language(_cut(audio))


def _waveform(audio: Audio) -> np.ndarray:
    if isinstance(audio, np.ndarray):
        if audio.ndim != 1 or not len(audio):
            raise IsthmusError(f"Samples must have shape (S,), 16 kHz mono; got {audio.shape}.")
        if not np.issubdtype(audio.dtype, np.floating):
            raise IsthmusError(
                f"Samples must be floats of full scale 1, such as float32; got {audio.dtype}. "
                "Divide integers by their full scale (32768 for int16)."
            )
        check_samples(audio, f"array of {len(audio)} samples")
        return audio.astype(np.float32, copy=False)
    if isinstance(audio, FILE):
        return load_audio(audio)
    from isthmus.speech.cuts import load_cut

    return load_cut(_cut(audio))


def _seconds(audio: Audio) -> float:
    """Its length as its header or its manifest says; raises IsthmusError for what is no audio."""
    if isinstance(audio, np.ndarray):
        return audio.size / SAMPLE_RATE
    if isinstance(audio, FILE):
        return recording_seconds(audio)
    return float(_cut(audio).duration)


def _is_cut(audio: object) -> bool:
    return not isinstance(audio, (*FILE, np.ndarray))


def _cut(audio: object) -> "Cut":
    """What is neither a file nor samples; raises IsthmusError unless it is a cut of a corpus."""
    from lhotse.cut import Cut

    if isinstance(audio, Cut):
        return audio
    raise IsthmusError(
        f"Audio cannot be of type {type(audio).__name__}. Give a path, bytes, a numpy array of "
        "16 kHz samples or a cut of a corpus."
    )
