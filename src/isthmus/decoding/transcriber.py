"""From audio to text with a trained run."""

import importlib.util
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

import numpy as np
import torch
from torch import Tensor

from isthmus.decoding.asking import prompt_for, prompts_to_ask, tokens_beyond
from isthmus.decoding.beam import Hypothesis, Scorer, SearchOptions, beam_search
from isthmus.decoding.confidence import word_confidences
from isthmus.decoding.draft import draft_search
from isthmus.decoding.fusion import Hotwords, NGram, NGramFusion, read_arpa
from isthmus.decoding.inputs import recording_seconds
from isthmus.decoding.joint import CANDIDATES, CTCPrefixScorer, CTCSpelling
from isthmus.decoding.longform import OVERLAP_SECONDS, Chunk, Chunks, joined, split
from isthmus.decoding.timestamps import CTCModel, align_words, load_ctc
from isthmus.decoding.transcript import Alternative, Segment, Transcript, Word
from isthmus.errors import IsthmusError
from isthmus.model.features import padded
from isthmus.model.parts import download
from isthmus.model.prompt import special_tokens
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import change_settings
from isthmus.recipe_settings import DecodeSettings
from isthmus.speech.activity import Region, has_speech, speech_regions
from isthmus.speech.audio import (
    SAMPLE_RATE,
    audio_blocks,
    check_samples,
    load_audio,
)
from isthmus.training.folder import DEFAULT, local_run
from isthmus.training.stored import load_run, stored_recipe

if TYPE_CHECKING:  # a recording needs no corpus, and what reads one is half a second of imports
    from lhotse.cut import Cut

    from isthmus.training.features import FeatureCache

RUN_FILES = ["recipe.yaml", "*.json", "best/*"]  # of a run folder on the hub
CHUNK_SECONDS_AT_LEAST = 2.0  # a model that cannot hear that much cannot hear a recording in parts
FILE = (str, Path, bytes)  # audio that is still to be decoded
Audio: TypeAlias = "str | Path | bytes | np.ndarray | Cut"
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
    words their times; the encoder's own CTC head does where there is one. `ngram` is what
    `settings.ngram` names, if that was read already.
    """

    def __init__(
        self,
        model: SpeechLLM,
        settings: DecodeSettings,
        cache: "FeatureCache | None" = None,
        aligner: CTCModel | None = None,
        ngram: NGram | None = None,
    ):
        self.model = model.eval()
        self.settings = settings
        self.cache = cache
        # The head of an encoder that was trained on does not know what its frames became.
        self.ctc = model.encoder.ctc if model.tune["encoder"] == "frozen" else None
        self.aligner = aligner.to(self._device) if aligner is not None else self.ctc
        self.prompts = prompts_to_ask(model, settings.instruction)
        self.ends = model.llm.end_tokens(model.end_token)
        self.scorers = _scorers(settings, model.llm.tokenizer, ngram)
        self.joint = self._joint()
        alone = self.joint is not None and not self.scorers
        self.options = SearchOptions(
            early_stopping=settings.early_stopping,
            forbidden=tuple(sorted(special_tokens(model.llm.tokenizer) - set(self.ends))),
            deadline=settings.deadline,
            strict=settings.strict,
            candidates=CANDIDATES if alone else SearchOptions.candidates,
        )
        greedy = settings.beam_size == 1 and not self.scorers and self.joint is None
        self.drafts = settings.drafts and greedy and self.ctc is not None
        if self.drafts:
            log.info("greedy search reads drafts of the encoder's CTC head")

    @property
    def _device(self) -> torch.device:
        return next(self.model.projector.parameters()).device

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

    def results(
        self, audio: Sequence[Audio], *, word_timestamps: bool = False
    ) -> Iterator[Result[Transcript]]:
        """A transcript or a fault of each, as soon as it is known: the shortest audio first."""
        self.check_words(word_timestamps)
        durations: dict[int, float] = {}
        for index, one in enumerate(audio):
            try:
                durations[index] = _seconds(one)
            except IsthmusError as error:
                yield Result(index, error)
        short = [index for index in durations if durations[index] <= self.longest]

        def hear(speech: list[Speech]) -> list[Transcript]:
            heard = iter(self._hear([one for one in speech if self.fits(one)], word_timestamps))
            found = [
                (next(heard).timed_by_words(),)
                if self.fits(one)  # else it is longer than was said of it
                else tuple(self._segments(self.chunks(one.waveform), word_timestamps))
                for one in speech
            ]
            return [Transcript(own, one.seconds) for own, one in zip(found, speech, strict=True)]

        batches = self.each_batch([audio[i] for i in short], [durations[i] for i in short], hear)
        for result in batches:
            found = result.found
            if isinstance(found, Transcript):
                found = replace(found, seconds=result.seconds)
            yield replace(result, index=short[result.index], found=found)
        for index in sorted(durations.keys() - set(short)):
            yield self._long(index, audio[index], word_timestamps)

    def stream(self, audio: Audio, *, word_timestamps: bool = False) -> Iterator[Segment]:
        """The segments of a recording of any length, in order, as they are decoded."""
        self.check_words(word_timestamps)
        yield from self._segments(self.chunks(audio), word_timestamps)

    def each_batch(
        self,
        audio: Sequence[Audio],
        durations: Sequence[float],
        hear: Callable[[list[Speech]], list[Heard]],
    ) -> Iterator[Result[Heard]]:
        """What `hear` finds in batches of utterances of like length, or the fault of each."""
        order = sorted(range(len(audio)), key=lambda index: durations[index])
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
                f"Word timestamps need a CTC model, and {self.without_ctc}. Name one with "
                "--align-model."
            )

    @property
    def without_ctc(self) -> str:
        """Why the encoder cannot spell by itself, where it cannot."""
        if self.model.encoder.ctc is None:
            return "this run's encoder has no CTC head"
        return "this run trained its encoder (encoder.tune), for which its CTC head is too old"

    def _joint(self) -> CTCSpelling | None:
        """What spells hypotheses for the encoder's CTC head, if that has a say in the search."""
        weight = self.settings.ctc_weight
        if weight and self.ctc is None:
            raise IsthmusError(
                f"decode.ctc_weight is {weight}, but {self.without_ctc}. Set it to 0."
            )
        return CTCSpelling(self.model.llm.tokenizer, self.ctc) if weight and self.ctc else None

    @cached_property
    def longest(self) -> float:
        """Seconds of audio that are decoded as one."""
        seconds = self.settings.chunk_seconds
        more = tokens_beyond(self.model, self.prompts)
        while self.model.fault(seconds, self._budget(seconds) + more):
            seconds *= 0.95
            if seconds < CHUNK_SECONDS_AT_LEAST:
                fault = self.model.fault(seconds, self._budget(seconds) + more)
                raise IsthmusError(
                    f"The model cannot take {seconds:.1f} s of audio and the longest transcript "
                    f"of it: {fault}. Lower decode.tokens_per_second or decode.extra_tokens."
                )
        return seconds

    def _long(self, index: int, audio: Audio, words: bool) -> Result[Transcript]:
        """A recording that is decoded in chunks."""
        started = time.perf_counter()
        try:
            chunks = self.chunks(audio)
            segments = tuple(self._segments(chunks, words))
        except IsthmusError as error:
            return Result(index, error)
        seconds = time.perf_counter() - started
        return Result(index, Transcript(segments, chunks.duration, seconds=seconds), seconds)

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

    def _regions(self, waveform: np.ndarray) -> list[Region]:
        """Where somebody speaks; everywhere, without a gate."""
        gate = self.settings.gate
        if gate == "none":
            return [(0.0, len(waveform) / SAMPLE_RATE)]
        if not waveform.any():  # hours of nothing are over at once
            return []
        return speech_regions(waveform, gate)

    def _segments(self, chunks: Iterator[Chunk], words: bool) -> Iterator[Segment]:
        def decoded() -> Iterator[tuple[Segment, float]]:
            while batch := list(itertools.islice(chunks, self.settings.batch_size)):
                # The gate has let them pass already.
                heard = self._decode([Speech(chunk.waveform) for chunk in batch], words)
                for chunk, segment in zip(batch, heard, strict=True):
                    yield segment.shifted(chunk.start), chunk.overlap

        for segment in joined(decoded()):  # which goes by the times of the chunks
            yield segment.timed_by_words()

    def _hear(self, speech: Sequence[Speech], words: bool) -> list[Segment]:
        """A segment for each; one without text, decoded by nobody, where nobody speaks."""
        gate = self.settings.gate
        spoken = [one for one in speech if gate == "none" or has_speech(one.waveform, gate)]
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
        prompts = [
            model.sequence(embeddings, prompt=prompt_for(self.prompts, one.waveform))[0]
            for one, embeddings in zip(speech, audio, strict=True)
        ]
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
        scorers = self.scorers
        if self.joint is not None:
            heard = [self._ctc_log_probs(own) for own in frames]
            scorers = [*scorers, CTCPrefixScorer(self.joint, heard, settings.ctc_weight)]
        return beam_search(
            model.llm,
            prompts,
            limits,
            self.ends,
            beam_size=settings.beam_size,
            length_penalty=settings.length_penalty,
            options=self.options,
            scorers=scorers,
        )

    def _draft(self, frames: Tensor) -> list[int]:
        """What the encoder's CTC head reads in frames (T, D), in tokens of the LLM."""
        assert self.ctc is not None
        length = torch.tensor([len(frames)])
        (text,) = self.ctc.greedy(self._ctc_log_probs(frames)[None], length)
        tokenizer = self.model.llm.tokenizer
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _ctc_log_probs(self, frames: Tensor) -> Tensor:
        """Log-probabilities (T, V) of the units of the encoder's CTC head in frames (T, D)."""
        ctc = self.ctc
        assert ctc is not None
        return ctc.log_probs(frames[None].to(ctc.network.dtype))[0].cpu()

    def _words(self, speech: Speech, frames: Tensor, segment: Segment) -> tuple[Word, ...]:
        ctc = self.aligner
        assert ctc is not None
        if ctc is not self.ctc:
            samples = torch.from_numpy(speech.waveform)[None].to(self._device)
            own, lengths = ctc(samples, torch.tensor([samples.shape[1]], device=self._device))
            frames = own[0, : int(lengths[0])]
        log_probs = ctc.log_probs(frames[None].to(next(ctc.parameters()).dtype))[0]
        words = align_words(log_probs.cpu(), segment.text, ctc, speech.waveform)
        if len(words) != len(segment.confidences):
            return words
        pairs = zip(words, segment.confidences, strict=True)
        return tuple(replace(word, confidence=sure) for word, sure in pairs)

    def _frames(self, speech: Sequence[Speech]) -> list[Tensor]:
        """The encoder's frames (T, D) of each."""
        model, cache, device = self.model, self.cache, self._device
        waveforms = [torch.from_numpy(one.waveform).to(device) for one in speech]
        if cache is not None and all(one.key is not None for one in speech):
            return [
                cache.frames(one.key or "", partial(model.encode_alone, waveform)).to(device)
                for one, waveform in zip(speech, waveforms, strict=True)
            ]
        if self.settings.strict:
            return [model.encode_alone(waveform) for waveform in waveforms]
        rows, num_samples = padded([one.waveform for one in speech])
        return model.encode(rows.to(device), num_samples.to(device))

    def _key(self, audio: Audio) -> str | None:
        if self.cache is None or isinstance(audio, (*FILE, np.ndarray)):
            return None
        return self.cache.key(audio)

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
            confidences=self._confidences(best),
            alternatives=tuple(
                Alternative(self._text(one), one.score)
                for one in hypotheses[1 : self.settings.nbest]
            ),
        )

    def _confidences(self, hypothesis: Hypothesis) -> tuple[float, ...]:
        tokenizer = self.model.llm.tokenizer
        found = word_confidences(tokenizer, hypothesis.tokens, hypothesis.log_probs)
        return tuple(sure for _, sure in found)

    def _text(self, hypothesis: Hypothesis) -> str:
        text = self.model.llm.tokenizer.decode(hypothesis.tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text.strip()


class DecodeChanges(TypedDict, total=False):
    """Settings under `decode`, each to be replaced; None leaves the run's own."""

    beam_size: int | None
    length_penalty: float | None
    tokens_per_second: float | None
    extra_tokens: int | None
    batch_size: int | None
    early_stopping: bool | None
    drafts: bool | None
    strict: bool | None
    gate: Literal["auto", "silero", "energy", "none"] | None
    chunk_seconds: float | None
    hotwords: tuple[str, ...] | None
    hotword_bonus: float | None
    ngram: str | None
    ngram_weight: float | None
    ctc_weight: float | None
    deadline: float | None
    nbest: int | None
    instruction: str | None


def load(
    run: str | Path = DEFAULT,
    *,
    cached: bool = False,
    align_model: str | None = None,
    **settings: Unpack[DecodeChanges],
) -> Transcriber:
    """The transcriber of a run folder, or of the shipped tiny system (`default`).

    `cached`: the encoder's frames of a corpus are taken from the run's feature cache, if it has
    one. `align_model`: a CTC model that tells when words were said. Further arguments are those of
    DecodeChanges, such as `beam_size=1`. Raises IsthmusError for one that is not valid.
    """
    folder = run_folder(run)
    decode = decode_settings(folder, settings)
    ngram = read_arpa(decode.ngram) if decode.ngram is not None else None
    model, recipe = load_run(folder)
    cache = None
    if cached:
        from isthmus.training.data import feature_cache

        cache = feature_cache(recipe, model)
    return Transcriber(
        model,
        decode,
        cache,
        load_ctc(align_model) if align_model else None,
        ngram,
    )


def decode_settings(run: Path, changes: Mapping[str, Any]) -> DecodeSettings:
    """The run's own, some of them replaced; None leaves one. No model is loaded.

    Raises IsthmusError for one that is not valid, or that needs what is not installed.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    settings = change_settings(stored_recipe(run).decode, given)
    if settings.gate == "silero" and importlib.util.find_spec("silero_vad") is None:
        raise IsthmusError(
            "decode.gate (--gate) is silero, which is not installed. Install the extra: pip "
            "install 'isthmus[vad]', or choose energy."
        )
    return settings


def _scorers(settings: DecodeSettings, tokenizer: Any, ngram: NGram | None) -> list[Scorer]:
    """What else has a say in the search."""
    found: list[Scorer] = []
    if settings.hotwords:
        found.append(Hotwords(settings.hotwords, tokenizer, settings.hotword_bonus))
    if settings.ngram is not None:
        ngram = ngram or read_arpa(settings.ngram)
        found.append(NGramFusion(ngram, tokenizer, settings.ngram_weight))
    return found


def run_folder(run: str | Path) -> Path:
    """The folder of a run; `default` is the shipped one, `owner/name` one of the hub."""
    return local_run(run) or download(str(run), None, RUN_FILES)


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


def _cut(audio: object) -> "Cut":
    """What is neither a file nor samples; raises IsthmusError unless it is a cut of a corpus."""
    from lhotse.cut import Cut

    if isinstance(audio, Cut):
        return audio
    raise IsthmusError(
        f"Audio cannot be of type {type(audio).__name__}. Give a path, bytes, a numpy array of "
        "16 kHz samples or a cut of a corpus."
    )
