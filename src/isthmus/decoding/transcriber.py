"""From audio to text with a trained run."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar, overload

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from isthmus.decoding.beam import FinishReason, Hypothesis, beam_search
from isthmus.errors import IsthmusError
from isthmus.model.parts import ASSETS
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import DecodeSettings
from isthmus.speech.audio import SAMPLE_RATE, AudioError, audio_info, load_audio
from isthmus.speech.corpora import load_cut
from isthmus.training.batches import collate
from isthmus.training.data import feature_cache
from isthmus.training.features import FeatureCache
from isthmus.training.runs import load_run

DEFAULT = "default"
Audio: TypeAlias = str | Path | bytes | np.ndarray | Cut
Heard = TypeVar("Heard")


@dataclass(frozen=True)
class Transcript:
    """What was heard."""

    text: str
    score: float  # log-probability of the text divided by its length in tokens
    finish_reason: FinishReason
    duration: float  # seconds of audio


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


class Transcriber:
    """A model with its decoding settings; the text of an utterance depends on nothing else.

    With a `cache`, the encoder's frames of cuts are read from it and kept in it.
    """

    def __init__(
        self, model: SpeechLLM, settings: DecodeSettings, cache: FeatureCache | None = None
    ):
        self.model = model.eval()
        self.settings = settings
        self.cache = cache

    @overload
    def transcribe(self, audio: Audio) -> Transcript: ...

    @overload
    def transcribe(self, audio: list[Audio]) -> list[Transcript]: ...

    def transcribe(self, audio: Audio | list[Audio]) -> Transcript | list[Transcript]:
        """One transcript, or a list for a list.

        Audio is a path, bytes, 16 kHz samples (S,), or a cut of a corpus. Raises IsthmusError for
        what cannot be read or is too long; `results` goes on with the others.
        """
        items = audio if isinstance(audio, list) else [audio]
        transcripts: dict[int, Transcript] = {}
        for result in self.results(items):
            if isinstance(result.found, IsthmusError):
                raise result.found
            transcripts[result.index] = result.found
        in_order = [transcripts[index] for index in range(len(items))]
        return in_order if isinstance(audio, list) else in_order[0]

    def results(self, audio: Sequence[Audio]) -> Iterator[Result[Transcript]]:
        """A transcript or a fault of each, as soon as it is known: the shortest audio first."""
        return self.each_batch(audio, self._transcribe_batch)

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
        """The waveform (S,), 16 kHz mono float32, of audio that can be transcribed.

        Raises AudioError where it cannot be read, or is too long to leave the language model room
        for the longest transcript.
        """
        waveform = _waveform(audio)
        seconds = len(waveform) / SAMPLE_RATE
        fault = self.model.fault(seconds, self._budget(seconds))
        if fault:
            raise AudioError(
                "too_long",
                f"{_name(audio)} ({seconds:.1f} s) is too long: {fault}. Cut it into shorter ones.",
            )
        return waveform

    @torch.inference_mode()
    def _transcribe_batch(self, speech: Sequence[Speech]) -> list[Transcript]:
        model, settings = self.model, self.settings
        audio = model.project(self._frames(speech))
        durations = [len(one.waveform) / SAMPLE_RATE for one in speech]
        found = beam_search(
            model.llm,
            [model.sequence(embeddings)[0] for embeddings in audio],
            [self._budget(seconds) for seconds in durations],
            model.llm.end_tokens(model.end_token),
            beam_size=settings.beam_size,
            length_penalty=settings.length_penalty,
        )
        return [self._transcript(n[0], d) for n, d in zip(found, durations, strict=True)]

    def _frames(self, speech: Sequence[Speech]) -> list[Tensor]:
        """The encoder's frames (T, D) of each."""
        model, cache = self.model, self.cache
        device = next(model.projector.parameters()).device
        if cache is None or any(one.key is None for one in speech):
            batch = collate([""] * len(speech), [one.waveform for one in speech], [])
            return model.encode(batch.waveforms.to(device), batch.num_samples.to(device))
        waveforms = [torch.from_numpy(one.waveform).to(device) for one in speech]
        return [
            cache.frames(one.key or "", partial(model.encode_alone, waveform)).to(device)
            for one, waveform in zip(speech, waveforms, strict=True)
        ]

    def _key(self, audio: Audio) -> str | None:
        return self.cache.key(audio) if self.cache is not None and isinstance(audio, Cut) else None

    def _budget(self, seconds: float) -> int:
        """Tokens that a transcript may have, its end token among them."""
        return math.ceil(seconds * self.settings.tokens_per_second) + self.settings.extra_tokens

    def _transcript(self, best: Hypothesis, seconds: float) -> Transcript:
        text = self.model.llm.tokenizer.decode(best.tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return Transcript(text.strip(), best.score, best.finish_reason, seconds)


def load(
    run: str | Path = DEFAULT,
    *,
    beam_size: int | None = None,
    batch_size: int | None = None,
    cached: bool = False,
) -> Transcriber:
    """The transcriber of a run folder, or of the shipped tiny system (`default`).

    `cached`: the encoder's frames of a corpus are taken from the run's feature cache, if it has
    one.
    """
    model, recipe = load_run(run_folder(run))
    changes = {"beam_size": beam_size, "batch_size": batch_size}
    given = {name: value for name, value in changes.items() if value is not None}
    settings = DecodeSettings.model_validate(recipe.decode.model_dump() | given)
    return Transcriber(model, settings, feature_cache(recipe, model) if cached else None)


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


def _name(audio: Audio) -> str:
    """What an error calls it."""
    if isinstance(audio, Cut):
        return f"utterance {audio.id!r}"
    return str(audio) if isinstance(audio, str | Path) else "the audio"
