"""From audio to text with a trained run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch

from isthmus.decoding.beam import FinishReason, Hypothesis, beam_search
from isthmus.errors import IsthmusError
from isthmus.model.parts import ASSETS
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import DecodeSettings
from isthmus.speech.audio import SAMPLE_RATE, load_audio
from isthmus.training.batches import collate
from isthmus.training.runs import load_run

DEFAULT = "default"
Audio = str | Path | bytes | np.ndarray


@dataclass(frozen=True)
class Transcript:
    """What was heard."""

    text: str
    score: float  # log-probability of the text divided by its length in tokens
    finish_reason: FinishReason
    duration: float  # seconds of audio


class Transcriber:
    """A model with its decoding settings; the text of an utterance depends on nothing else."""

    def __init__(self, model: SpeechLLM, settings: DecodeSettings):
        self.model = model.eval()
        self.settings = settings

    @overload
    def transcribe(self, audio: Audio) -> Transcript: ...

    @overload
    def transcribe(self, audio: list[Audio]) -> list[Transcript]: ...

    def transcribe(self, audio: Audio | list[Audio]) -> Transcript | list[Transcript]:
        """One transcript, or a list for a list; audio is a path, bytes, or 16 kHz samples (S,)."""
        if isinstance(audio, list):
            return self.transcribe_waveforms([_waveform(item) for item in audio])
        return self.transcribe_waveforms([_waveform(audio)])[0]

    def transcribe_waveforms(self, waveforms: Sequence[np.ndarray]) -> list[Transcript]:
        """Transcripts of waveforms (S,), 16 kHz mono float32, in the order given."""
        for number, waveform in enumerate(waveforms):
            self._check_length(waveform, number)
        order = sorted(range(len(waveforms)), key=lambda i: len(waveforms[i]))
        results: dict[int, Transcript] = {}
        for start in range(0, len(order), self.settings.batch_size):
            rows = order[start : start + self.settings.batch_size]
            transcripts = self._transcribe_batch([waveforms[i] for i in rows])
            results.update(zip(rows, transcripts, strict=True))
        return [results[i] for i in range(len(waveforms))]

    @torch.inference_mode()
    def _transcribe_batch(self, waveforms: Sequence[np.ndarray]) -> list[Transcript]:
        model, settings = self.model, self.settings
        batch = collate([""] * len(waveforms), waveforms, [""] * len(waveforms))
        device = next(model.projector.parameters()).device
        audio = model.embed_audio(batch.waveforms.to(device), batch.num_samples.to(device))
        durations = [len(waveform) / SAMPLE_RATE for waveform in waveforms]
        prompts = [model.sequence(embeddings)[0] for embeddings in audio]
        limits = [self._limit(d, len(p)) for d, p in zip(durations, prompts, strict=True)]
        found = beam_search(
            model.llm,
            prompts,
            limits,
            model.llm.end_tokens(model.end_token),
            beam_size=settings.beam_size,
            length_penalty=settings.length_penalty,
        )
        return [self._transcript(n[0], d) for n, d in zip(found, durations, strict=True)]

    def _limit(self, seconds: float, prompt: int) -> int:
        """Tokens that a transcript may have: by duration, and by the model's longest sequence."""
        limit = math.ceil(seconds * self.settings.tokens_per_second) + self.settings.extra_tokens
        longest = self.model.llm.max_tokens
        room = limit if longest is None else longest - prompt
        if room < 1:
            raise IsthmusError(
                f"An utterance of {seconds:.1f} s fills the LLM's {longest} positions. "
                "Cut it into shorter ones."
            )
        return min(limit, room)

    def _transcript(self, best: Hypothesis, seconds: float) -> Transcript:
        text = self.model.llm.tokenizer.decode(best.tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return Transcript(text.strip(), best.score, best.finish_reason, seconds)

    def _check_length(self, waveform: np.ndarray, number: int) -> None:
        limit = self.model.encoder.max_seconds
        if limit is not None and len(waveform) > limit * SAMPLE_RATE:
            raise IsthmusError(
                f"Utterance {number} is {len(waveform) / SAMPLE_RATE:.1f} s long, the encoder "
                f"takes {limit:g} s. Cut it into shorter ones."
            )


def load(
    run: str | Path = DEFAULT, *, beam_size: int | None = None, batch_size: int | None = None
) -> Transcriber:
    """The transcriber of a run folder, or of the shipped tiny system (`default`)."""
    model, recipe = load_run(run_folder(run))
    changes = {"beam_size": beam_size, "batch_size": batch_size}
    given = {name: value for name, value in changes.items() if value is not None}
    settings = DecodeSettings.model_validate(recipe.decode.model_dump() | given)
    return Transcriber(model, settings)


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
    if isinstance(audio, np.ndarray):
        if audio.ndim != 1 or not len(audio):
            raise IsthmusError(f"Samples must have shape (S,), 16 kHz mono; got {audio.shape}.")
        return audio.astype(np.float32, copy=False)
    return load_audio(audio)
