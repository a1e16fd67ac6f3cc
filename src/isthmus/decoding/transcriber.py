"""From audio to text with a trained run."""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar, overload

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from isthmus.decoding.beam import Hypothesis, SearchOptions, beam_search
from isthmus.decoding.draft import draft_search
from isthmus.decoding.longform import OVERLAP_SECONDS, Chunk, Chunks, audio_blocks, joined, split
from isthmus.decoding.timestamps import CTCModel, align_words, load_ctc
from isthmus.decoding.transcript import Alternative, Segment, Transcript, Word
from isthmus.errors import IsthmusError
from isthmus.model.parts import ASSETS
from isthmus.model.prompt import special_tokens
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import DecodeSettings, change_settings
from isthmus.speech.activity import Region, speech_regions
from isthmus.speech.audio import SAMPLE_RATE, AudioError, audio_info, load_audio
from isthmus.speech.corpora import load_cut
from isthmus.training.batches import collate
from isthmus.training.data import feature_cache
from isthmus.training.features import FeatureCache
from isthmus.training.runs import load_run

DEFAULT = "default"
CHUNK_SECONDS_AT_LEAST = 2.0  # a model that cannot hear that much cannot hear a recording in parts
Audio: TypeAlias = str | Path | bytes | np.ndarray | Cut
Heard = TypeVar("Heard")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result(Generic[Heard]):
    """What was heard in the audio at place `index`, or why nothing could be."""

    index: int
    found: Heard | IsthmusError
    seconds: float = 0.0  # of computing, its share of the batch's


@dataclass(frozen=True)
class Speech:
    """One utterance, loaded."""

    waveform: np.ndarray  # (S,) float32, 16 kHz
    key: str | None = None  # in the feature cache, if it may be there

    @property
    def seconds(self) -> float:
        return len(self.waveform) / SAMPLE_RATE


class Transcriber:
    """A model with its decoding settings; the text of an utterance depends on nothing else.

    With a `cache`, the encoder's frames of cuts are read from it and kept in it. `aligner` gives
    words their times; the encoder's own CTC head does where there is one.
    """

    def __init__(
        self,
        model: SpeechLLM,
        settings: DecodeSettings,
        cache: FeatureCache | None = None,
        aligner: CTCModel | None = None,
    ):
        self.model = model.eval()
        self.settings = settings
        self.cache = cache
        self.aligner = aligner or model.encoder.ctc
        self.ends = model.llm.end_tokens(model.end_token)
        self.options = SearchOptions(
            early_stopping=settings.early_stopping,
            forbidden=tuple(sorted(special_tokens(model.llm.tokenizer) - set(self.ends))),
            deadline=settings.deadline,
            strict=settings.strict,
        )
        self.drafts = settings.drafts and settings.beam_size == 1 and model.encoder.ctc is not None
        if self.drafts:
            log.info("greedy search reads drafts of the encoder's CTC head: same text, fewer steps")

    @overload
    def transcribe(self, audio: Audio, *, word_timestamps: bool = False) -> Transcript: ...

    @overload
    def transcribe(
        self, audio: list[Audio], *, word_timestamps: bool = False
    ) -> list[Transcript]: ...

    def transcribe(
        self, audio: Audio | list[Audio], *, word_timestamps: bool = False
    ) -> Transcript | list[Transcript]:
        """One transcript, or a list for a list.

        Audio is a path, bytes, 16 kHz samples (S,), or a cut of a corpus, of any length. Raises
        IsthmusError for what cannot be read; `results` goes on with the others.
        """
        items = audio if isinstance(audio, list) else [audio]
        transcripts: dict[int, Transcript] = {}
        for result in self.results(items, word_timestamps=word_timestamps):
            if isinstance(result.found, IsthmusError):
                raise result.found
            transcripts[result.index] = result.found
        in_order = [transcripts[index] for index in range(len(items))]
        return in_order if isinstance(audio, list) else in_order[0]

    def results(
        self, audio: Sequence[Audio], *, word_timestamps: bool = False
    ) -> Iterator[Result[Transcript]]:
        """A transcript or a fault of each, as soon as it is known: the shortest audio first."""
        self.check_words(word_timestamps)
        long = {i for i, one in enumerate(audio) if _seconds(one) > self.longest}
        short = [index for index in range(len(audio)) if index not in long]

        def hear(speech: list[Speech]) -> list[Transcript]:
            if any(one.seconds > self.longest for one in speech):  # their headers did not say so
                chunks = [self._split(one.waveform) for one in speech]
                found = [tuple(self._segments(own, word_timestamps)) for own in chunks]
            else:
                found = [(segment,) for segment in self._hear(speech, word_timestamps)]
            return [Transcript(own, one.seconds) for own, one in zip(found, speech, strict=True)]

        for result in self.each_batch([audio[index] for index in short], hear):
            found = result.found
            if isinstance(found, Transcript):
                found = replace(found, seconds=result.seconds)
            yield replace(result, index=short[result.index], found=found)
        for index in sorted(long):
            yield self._long(index, audio[index], word_timestamps)

    def stream(self, audio: Audio, *, word_timestamps: bool = False) -> Iterator[Segment]:
        """The segments of a recording of any length, in order, as they are decoded."""
        self.check_words(word_timestamps)
        yield from self._segments(self._chunks(audio), word_timestamps)

    def each_batch(
        self, audio: Sequence[Audio], hear: Callable[[list[Speech]], list[Heard]]
    ) -> Iterator[Result[Heard]]:
        """What `hear` finds in batches of utterances of like length, or the fault of each."""
        order = sorted(range(len(audio)), key=lambda index: _seconds(audio[index]))
        for start in range(0, len(order), self.settings.batch_size):
            loaded: dict[int, Speech] = {}
            for index in order[start : start + self.settings.batch_size]:
                try:
                    loaded[index] = Speech(self.load(audio[index]), self._key(audio[index]))
                except IsthmusError as error:
                    yield Result(index, error)
            if loaded:
                started = time.perf_counter()
                found = hear(list(loaded.values()))
                share = (time.perf_counter() - started) / len(loaded)
                for index, heard in zip(loaded, found, strict=True):
                    yield Result(index, heard, share)

    def load(self, audio: Audio) -> np.ndarray:
        """The waveform (S,), 16 kHz mono float32. Raises AudioError where it cannot be read."""
        return _waveform(audio)

    def check_words(self, wanted: bool) -> None:
        """Raise IsthmusError if words are wanted and nothing can tell when they were said."""
        if wanted and self.aligner is None:
            raise IsthmusError(
                "Word timestamps need a CTC model, and this run's encoder has no CTC head. Name "
                "one with --align-model."
            )

    @cached_property
    def longest(self) -> float:
        """Seconds of audio that are decoded as one."""
        seconds = self.settings.chunk_seconds
        while self.model.fault(seconds, self._budget(seconds)):
            seconds *= 0.95
            if seconds < CHUNK_SECONDS_AT_LEAST:
                fault = self.model.fault(seconds, self._budget(seconds))
                raise IsthmusError(
                    f"The model cannot take {seconds:.1f} s of audio and the longest transcript "
                    f"of it: {fault}. Lower decode.tokens_per_second or decode.extra_tokens."
                )
        return seconds

    def _long(self, index: int, audio: Audio, words: bool) -> Result[Transcript]:
        """A recording that is decoded in chunks."""
        started = time.perf_counter()
        try:
            chunks = self._chunks(audio)
            segments = tuple(self._segments(chunks, words))
        except IsthmusError as error:
            return Result(index, error)
        seconds = time.perf_counter() - started
        return Result(index, Transcript(segments, chunks.duration, seconds=seconds), seconds)

    def _chunks(self, audio: Audio) -> Chunks:
        if isinstance(audio, str | Path | bytes):
            return self._split(audio_blocks(audio))
        return self._split(_waveform(audio))

    def _split(self, source: np.ndarray | Iterator[np.ndarray]) -> Chunks:
        overlap = min(OVERLAP_SECONDS, self.longest / 4)
        return split(source, self.longest, overlap_seconds=overlap, detect=self._regions)

    def _regions(self, waveform: np.ndarray) -> list[Region]:
        """Where somebody speaks; everywhere, without a gate."""
        gate = self.settings.gate
        if gate == "none":
            return [(0.0, len(waveform) / SAMPLE_RATE)]
        return speech_regions(waveform, gate)

    def _segments(self, chunks: Iterator[Chunk], words: bool) -> Iterator[Segment]:
        def decoded() -> Iterator[tuple[Segment, float]]:
            while batch := list(itertools.islice(chunks, self.settings.batch_size)):
                heard = self._hear([Speech(chunk.waveform) for chunk in batch], words)
                for chunk, segment in zip(batch, heard, strict=True):
                    yield segment.shifted(chunk.start), chunk.overlap

        yield from joined(decoded())

    def _hear(self, speech: Sequence[Speech], words: bool) -> list[Segment]:
        """A segment for each; one without text, decoded by nobody, where nobody speaks."""
        spoken = [one for one in speech if self._regions(one.waveform)]
        found = iter(self._decode(spoken, words) if spoken else [])
        nothing = [Segment(0.0, one.seconds, "", finish_reason="no_speech") for one in speech]
        heard = set(map(id, spoken))
        return [
            next(found) if id(one) in heard else empty
            for one, empty in zip(speech, nothing, strict=True)
        ]

    @torch.inference_mode()
    def _decode(self, speech: Sequence[Speech], words: bool) -> list[Segment]:
        frames = self._frames(speech)
        segments = [
            self._segment(one, hypotheses)
            for one, hypotheses in zip(speech, self._search(speech, frames), strict=True)
        ]
        if not words:
            return segments
        return [
            replace(segment, words=self._words(one, own, segment))
            for one, own, segment in zip(speech, frames, segments, strict=True)
        ]

    def _search(self, speech: Sequence[Speech], frames: Sequence[Tensor]) -> list[list[Hypothesis]]:
        model, settings = self.model, self.settings
        groups = [[one] for one in frames] if settings.strict else [list(frames)]
        audio = [embeddings for group in groups for embeddings in model.project(group)]
        prompts = [model.sequence(embeddings)[0] for embeddings in audio]
        limits = [self._budget(one.seconds) for one in speech]
        if self.drafts:
            return draft_search(
                model.llm,
                prompts,
                [self._draft(own) for own in frames],
                limits,
                self.ends,
                length_penalty=settings.length_penalty,
                options=self.options,
            )
        return beam_search(
            model.llm,
            prompts,
            limits,
            self.ends,
            beam_size=settings.beam_size,
            length_penalty=settings.length_penalty,
            options=self.options,
        )

    def _draft(self, frames: Tensor) -> list[int]:
        """What the encoder's CTC head reads in frames (T, D), in tokens of the LLM."""
        ctc = self.model.encoder.ctc
        assert ctc is not None
        length = torch.tensor([len(frames)])
        (text,) = ctc.greedy(ctc.log_probs(frames[None].to(ctc.network.dtype)), length)
        tokenizer = self.model.llm.tokenizer
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _words(self, speech: Speech, frames: Tensor, segment: Segment) -> tuple[Word, ...]:
        ctc = self.aligner
        assert ctc is not None
        device = next(self.model.projector.parameters()).device
        if ctc is not self.model.encoder.ctc:
            samples = torch.from_numpy(speech.waveform)[None].to(device)
            own, lengths = ctc(samples, torch.tensor([samples.shape[1]], device=device))
            frames = own[0, : int(lengths[0])]
        log_probs = ctc.log_probs(frames[None].to(next(ctc.parameters()).dtype))[0]
        return align_words(log_probs.cpu(), segment.text, ctc, speech.waveform)

    def _frames(self, speech: Sequence[Speech]) -> list[Tensor]:
        """The encoder's frames (T, D) of each."""
        model, cache = self.model, self.cache
        device = next(model.projector.parameters()).device
        waveforms = [torch.from_numpy(one.waveform).to(device) for one in speech]
        if cache is not None and all(one.key is not None for one in speech):
            return [
                cache.frames(one.key or "", partial(model.encode_alone, waveform)).to(device)
                for one, waveform in zip(speech, waveforms, strict=True)
            ]
        if self.settings.strict:
            return [model.encode_alone(waveform) for waveform in waveforms]
        batch = collate([""] * len(speech), [one.waveform for one in speech], [])
        return model.encode(batch.waveforms.to(device), batch.num_samples.to(device))

    def _key(self, audio: Audio) -> str | None:
        return self.cache.key(audio) if self.cache is not None and isinstance(audio, Cut) else None

    def _budget(self, seconds: float) -> int:
        """Tokens that a transcript may have, its end token among them."""
        return math.ceil(seconds * self.settings.tokens_per_second) + self.settings.extra_tokens

    def _segment(self, speech: Speech, hypotheses: Sequence[Hypothesis]) -> Segment:
        best = hypotheses[0]
        return Segment(
            0.0,
            speech.seconds,
            self._text(best),
            score=best.score,
            finish_reason=best.finish_reason,
            tokens=tuple(best.tokens),
            token_log_probs=tuple(best.log_probs),
            alternatives=tuple(
                Alternative(self._text(one), one.score)
                for one in hypotheses[1 : self.settings.nbest]
            ),
        )

    def _text(self, hypothesis: Hypothesis) -> str:
        text = self.model.llm.tokenizer.decode(hypothesis.tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text.strip()


def load(
    run: str | Path = DEFAULT,
    *,
    cached: bool = False,
    align_model: str | None = None,
    **settings: Any,
) -> Transcriber:
    """The transcriber of a run folder, or of the shipped tiny system (`default`).

    `cached`: the encoder's frames of a corpus are taken from the run's feature cache, if it has
    one. `align_model`: a CTC model that tells when words were said. Further arguments replace those
    of the run's `decode` settings, such as `beam_size=1`; IsthmusError for one that is not valid.
    """
    model, recipe = load_run(run_folder(run))
    given = {name: value for name, value in settings.items() if value is not None}
    return Transcriber(
        model,
        change_settings(recipe.decode, given),
        feature_cache(recipe, model) if cached else None,
        load_ctc(align_model) if align_model else None,
    )


def run_folder(run: str | Path) -> Path:
    """The folder of a run; `default` is the shipped one."""
    if str(run) == DEFAULT:
        return ASSETS / DEFAULT
    if not Path(run).is_dir():
        raise IsthmusError(
            f"No run folder {str(run)!r}. Name one that `isthmus train` made, or `default`."
        )
    return Path(run)


def _waveform(audio: Audio) -> np.ndarray:
    if isinstance(audio, Cut):
        return load_cut(audio)
    if isinstance(audio, np.ndarray):
        if audio.ndim != 1 or not len(audio):
            raise IsthmusError(f"Samples must have shape (S,), 16 kHz mono; got {audio.shape}.")
        return audio.astype(np.float32, copy=False)
    return load_audio(audio)


def _seconds(audio: Audio) -> float:
    """Its length as far as that is known without decoding, to sort by; 0 if it is not."""
    if isinstance(audio, Cut):
        return float(audio.duration)
    if isinstance(audio, np.ndarray):
        return audio.size / SAMPLE_RATE
    with contextlib.suppress(AudioError):
        return audio_info(audio).duration
    return 0.0
