"""Pretrained recognisers, which are systems like any other: Whisper and its kin, and CTC models."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
from transformers.models.whisper.tokenization_whisper import TASK_IDS, TO_LANGUAGE_CODE

from isthmus.decoding.recogniser import Recogniser, Speech
from isthmus.decoding.timestamps import CTC_TYPES, load_ctc
from isthmus.decoding.transcript import Segment
from isthmus.errors import IsthmusError, suggest
from isthmus.model.ctc_head import CTCHead, own_tokenizer
from isthmus.model.device import choose_device
from isthmus.model.encoder import Encoder, load_extractor
from isthmus.model.features import padded
from isthmus.model.parts import (
    load_network,
    loading,
    model_type,
    quiet,
)
from isthmus.settings.search import RecogniserSettings
from isthmus.speech.audio import SAMPLE_RATE

START_OF_ENGLISH = 50257  # <|startoftranscript|> in Whispers of English, in others 50258
SHORTEST = SAMPLE_RATE // 10  # samples; a shorter utterance is followed by silence up to there
log = logging.getLogger(__name__)


class PretrainedDecodeSettings(RecogniserSettings):
    """How a pretrained recogniser is asked."""

    chunk_seconds: float = Field(60.0, ge=2)
    """Longer recordings are decoded in chunks; more than any utterance of the usual corpora has."""


class Seq2SeqSettings(PretrainedDecodeSettings):
    """How Whisper and its kin are asked."""

    beam_size: int | None = Field(None, ge=1)
    """Hypotheses kept, 1 is greedy; as the model's own generation_config has it unless given."""
    language: str | None = None
    """What is spoken; unless given, what the corpus says, or else what the model hears."""


class CTCRecogniser(Recogniser):
    """The best path of an encoder's CTC head."""

    encoder: Encoder

    def __init__(
        self, encoder: Encoder, settings: RecogniserSettings, aligner: Encoder | None = None
    ):
        self.encoder = encoder.eval()
        self.settings = settings
        self.ctc = encoder.ctc
        self.aligner = aligner

    @property
    def longest(self) -> float:
        return self.settings.chunk_seconds

    @torch.inference_mode()
    def _decode(self, speech: Sequence[Speech], words: bool) -> list[Segment]:
        ctc = self.ctc
        assert ctc is not None
        device = next(self.encoder.parameters()).device
        waveforms, num_samples = padded([one.waveform for one in speech])
        frames, lengths = self.encoder(waveforms.to(device), num_samples.to(device))
        rows = zip(speech, frames, lengths.tolist(), strict=True)
        return [
            self._segment(one, ctc, ctc.log_probs(own[None, :length])[0].cpu(), words)
            for one, own, length in rows
        ]

    def _segment(self, speech: Speech, ctc: CTCHead, log_probs: Tensor, words: bool) -> Segment:
        text = ctc.text(ctc.best_path(log_probs))
        segment = Segment(0.0, speech.seconds, text, ctc_text=text)
        found = self._timed(speech, segment, log_probs) if words else ()
        return replace(segment, words=found, ctc_words=found)


class Seq2SeqRecogniser(Recogniser):
    """An encoder and a decoder of transformers, searched by their own `generate`.

    Utterances whose inputs have one shape are decoded together (Whisper's all have), others alone:
    so none is padded but as the model's own front end pads it.
    """

    settings: Seq2SeqSettings

    def __init__(
        self,
        network: Any,
        extractor: Any,
        tokenizer: Any,
        settings: Seq2SeqSettings,
        aligner: Encoder | None = None,
    ):
        """Raises IsthmusError for a language that the model does not know."""
        self.network: Any = network.eval()
        self.extractor = extractor
        self.tokenizer = tokenizer
        beams = settings.beam_size or self.network.generation_config.num_beams or 1
        self.settings = settings.model_copy(update={"beam_size": beams})
        self.aligner = aligner
        # that Whisper is told of; a Whisper of English has none, nor have other models
        self.languages: Mapping[str, int] = getattr(network.generation_config, "lang_to_id", {})
        english = network.config.model_type == "whisper" and not self.languages
        self.known = {"en"} if english else {token.strip("<|>") for token in self.languages}
        if settings.language and not self.known:
            log.warning("language has no effect: this model knows one language only.")
        self.check_language("")

    @property
    def longest(self) -> float:
        """The front end of Whisper would cut off what is longer than its 30 s."""
        own = getattr(self.extractor, "chunk_length", self.settings.chunk_seconds)
        return min(float(own), self.settings.chunk_seconds)

    def check_language(self, language: str) -> None:
        language = self.settings.language or language
        if self.known and language and self._code(language) is None:
            codes = sorted(self.known)
            raise IsthmusError(
                f"This model does not know the language {language!r}.{suggest(language, codes)} "
                f"Name one that it knows with --language: {', '.join(codes)}."
            )

    def _code(self, language: str) -> str | None:
        """Whisper's code of a language that is called by its code, with a country, or its name."""
        name = language.lower().replace("_", "-").partition("-")[0]
        code = TO_LANGUAGE_CODE.get(name, name)
        return code if code in self.known else None

    @torch.inference_mode()
    def _decode(self, speech: Sequence[Speech], words: bool) -> list[Segment]:
        inputs = [self._inputs(one.waveform) for one in speech]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, (one, own) in enumerate(zip(speech, inputs, strict=True)):
            shapes = tuple(value.shape for value in own.values())
            spoken = self._code(self.settings.language or one.language)
            groups.setdefault((spoken, *shapes), []).append(index)
        found: dict[int, Segment] = {}
        for (spoken, *_), indices in groups.items():
            together = [inputs[index] for index in indices]
            batch = {name: torch.cat([own[name] for own in together]) for name in together[0]}
            rows = self._generate(batch, spoken)
            for index, row in zip(indices, rows, strict=True):
                found[index] = self._segment(speech[index], row)
        segments = [found[index] for index in range(len(speech))]
        if not words:
            return segments
        pairs = zip(speech, segments, strict=True)
        return [replace(own, words=self._timed(one, own)) for one, own in pairs]

    def _inputs(self, waveform: np.ndarray) -> dict[str, Tensor]:
        """What the model's front end makes of an utterance (S,), with a batch axis of 1."""
        waveform = np.pad(waveform, (0, max(0, SHORTEST - len(waveform))))
        found = self.extractor(waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return {name: value.to(self.network.device) for name, value in found.items()}

    def _generate(self, batch: Mapping[str, Tensor], language: str | None) -> list[list[int]]:
        """The tokens of each utterance, those before and behind its text among them."""
        options: dict[str, Any] = {"num_beams": self.settings.beam_size}
        if self.languages:
            options |= {"language": language, "task": "transcribe"}
        try:
            with quiet():
                out = self.network.generate(**batch, **options, return_dict_in_generate=True)
        except (TypeError, ValueError) as error:
            raise IsthmusError(
                f"This {self.network.config.model_type} model cannot write what it hears without "
                f"more than audio: {error}"
            ) from error
        rows: list[list[int]] = out.sequences.tolist()
        return rows

    def _segment(self, speech: Speech, tokens: Sequence[int]) -> Segment:
        ends = self.network.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        ended = not ends.isdisjoint(tokens[1:])  # the first begins the text; it may be the same one
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        return Segment(0.0, speech.seconds, text, finish_reason="stop" if ended else "length")


def pretrained_settings(folder: Path) -> PretrainedDecodeSettings:
    """The default settings of the recogniser in a folder; raises IsthmusError if there is none."""
    kind = model_type(folder)
    if kind in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
        return Seq2SeqSettings()
    if kind in CTC_TYPES:
        return PretrainedDecodeSettings()
    raise IsthmusError(
        f"{folder} holds a {kind!r} model, which recognises no speech by itself. Name a run, a "
        f"model such as Whisper or Moonshine, or one with CTC: {', '.join(CTC_TYPES)}."
    )


def complete_generation(generation: Any, tokenizer: Any) -> None:
    """What the generation config of a Whisper lacks, as its tokenizer has it.

    That of a Whisper of English has the languages too, behind a vocabulary that is a token smaller.
    """
    tokens: dict[str, int] = tokenizer.get_vocab()
    languages = {f"<|{code}|>" for code in TO_LANGUAGE_CODE.values()} & tokens.keys()
    tasks = {name: tokens[f"<|{name}|>"] for name in TASK_IDS if f"<|{name}|>" in tokens}
    multilingual = languages and tokens.get("<|startoftranscript|>") != START_OF_ENGLISH
    found: dict[str, Any] = {"no_timestamps_token_id": tokens.get("<|notimestamps|>")}
    if getattr(generation, "is_multilingual", multilingual):
        found["lang_to_id"] = {name: tokens[name] for name in languages}
        found |= {"task_to_id": tasks, "is_multilingual": True}
    for name, value in found.items():
        if value and not hasattr(generation, name):
            setattr(generation, name, value)


def load_pretrained(
    folder: Path, settings: RecogniserSettings, name: str, align_model: str | None = None
) -> Recogniser:
    """The recogniser in a folder, computing in float32; raises IsthmusError."""
    device = choose_device()
    aligner = load_ctc(align_model).to(device) if align_model else None
    if not isinstance(settings, Seq2SeqSettings):
        encoder = load_ctc(str(folder)).float().to(device)
        return CTCRecogniser(encoder, settings, aligner)
    with loading(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not config.is_encoder_decoder:
        raise IsthmusError(
            f"{name} is a {config.model_type!r} model, an LLM that hears and has to be asked. Name "
            "one that transcribes by itself, such as Whisper."
        )
    network = load_network(AutoModelForSpeechSeq2Seq, folder, name, "float32")
    extractor = load_extractor(folder, name)
    written = int(network.config.get_text_config(decoder=True).vocab_size)
    tokenizer = own_tokenizer(folder, name, written)
    if config.model_type == "whisper":
        complete_generation(network.generation_config, tokenizer)
    return Seq2SeqRecogniser(network.to(device), extractor, tokenizer, settings, aligner)
