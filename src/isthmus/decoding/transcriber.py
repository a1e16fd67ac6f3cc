"""From audio to text with a trained run."""

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from isthmus.decoding.asking import prompt_for, prompts_to_ask, tokens_beyond
from isthmus.decoding.beam import Hypothesis, Scorer, SearchOptions, beam_search, ranked
from isthmus.decoding.confidence import text_distance, word_confidences
from isthmus.decoding.draft import draft_search
from isthmus.decoding.forced import Given, forced_hypotheses
from isthmus.decoding.fusion import Hotwords, NGram, NGramFusion, read_arpa
from isthmus.decoding.joint import (
    CANDIDATES,
    CTCPrefixScorer,
    Spelling,
    TextSpelling,
    TokenSpelling,
)
from isthmus.decoding.recogniser import Recogniser, Speech
from isthmus.decoding.timestamps import load_ctc
from isthmus.decoding.token_head import TokenHead
from isthmus.decoding.transcript import Alternative, Segment
from isthmus.errors import IsthmusError
from isthmus.model.adapters import merge_adapters
from isthmus.model.ctc_head import CTCHead, LogProbs
from isthmus.model.device import on_device
from isthmus.model.encoder import Encoder
from isthmus.model.features import padded
from isthmus.model.hub import download
from isthmus.model.posterior import PosteriorProjector
from isthmus.model.prompt import special_tokens
from isthmus.model.speech_llm import SpeechLLM
from isthmus.model.spelling import letters_known
from isthmus.recipe import change_settings
from isthmus.runs.folder import DEFAULT, local_run
from isthmus.runs.loading import load_run, run_source, stored_recipe
from isthmus.settings.search import DecodeSettings
from isthmus.speech.activity import has_speech

if TYPE_CHECKING:  # a recording needs no corpus, and what reads one is half a second of imports
    from isthmus.runs.feature_cache import FeatureCache

RUN_FILES = ["recipe.yaml", "*.json", "best/*"]  # of a run folder on the hub
CHUNK_SECONDS_AT_LEAST = 2.0  # a model that cannot hear that much cannot hear a recording in parts
log = logging.getLogger(__name__)


class Transcriber(Recogniser):
    """A run's model with its decoding settings.

    `ctc` is the head of its encoder, if that can spell and is as it was trained, else that of its
    projector, if that was taught to say tokens. `ngram` is what `settings.ngram` names, if that was
    read already.
    """

    settings: DecodeSettings
    encoder: Encoder

    def __init__(
        self,
        model: SpeechLLM,
        settings: DecodeSettings,
        cache: "FeatureCache | None" = None,
        aligner: Encoder | None = None,
        ngram: NGram | None = None,
    ):
        self.model = model.eval()
        self.settings = settings
        if isinstance(model.projector, PosteriorProjector):
            model.projector.temperature = settings.posterior_temperature
        elif settings.posterior_temperature != 1:
            log.warning("decode.posterior_temperature has no effect: there are no soft tokens.")
        self.cache = cache
        self.encoder = model.encoder
        self.ctc = _head(model)
        self.ctc_delay = settings.ctc_delay
        self.aligner = aligner.to(self._device) if aligner is not None else None
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
            log.info("greedy search reads drafts of a CTC head")

    @property
    def _device(self) -> torch.device:
        return next(self.model.projector.parameters()).device

    @property
    def without_ctc(self) -> str:
        if self.encoder.ctc is None:
            return "this run has no CTC head, neither its encoder nor its projector"
        if self.encoder.ctc.tokenizer is None:
            return "the CTC head of this run's encoder has no tokenizer to spell with"
        return "this run trained its encoder (encoder.tune), for which its CTC head is too old"

    def _joint(self) -> Spelling | None:
        """How the CTC head spells hypotheses, if it has a say in the search."""
        weight, ctc = self.settings.ctc_weight, self.ctc
        if not weight:
            return None
        if ctc is None:
            raise IsthmusError(
                f"decode.ctc_weight is {weight}, but {self.without_ctc}. Set it to 0."
            )
        if isinstance(ctc, TokenHead):
            return TokenSpelling(ctc)
        return TextSpelling(self.model.llm.tokenizer, ctc)

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
        keep = words or self.joint is not None
        audio, said, heard = self._listen(self._frames(speech), keep=keep)
        hypotheses = self._search(speech, audio, said, heard)
        segments = list(map(self._segment, speech, hypotheses, said or [[]] * len(speech)))
        segments = [replace(one, doubtful=self._doubts(one)) for one in segments]
        if not words:
            return segments
        return [
            replace(
                segment,
                words=self._timed(one, segment, own),
                ctc_words=self._timed(one, segment.as_by_ctc, own) if segment.ctc_text else (),
            )
            for one, segment, own in zip_longest(speech, segments, heard)
        ]

    def _listen(
        self, frames: Sequence[Tensor], *, keep: bool
    ) -> tuple[list[Tensor], list[list[int]], list[LogProbs]]:
        """Frames (T, D) to audio embeddings (A, E), and what the CTC head makes of them, if any.

        That is the units of its best paths and, to `keep`, its log-probabilities (T, V). What the
        projector's head reads is made of each utterance alone: no company rounds its path to
        another.
        """
        model, ctc = self.model, self.ctc
        audio, said, heard = list[Tensor](), list[list[int]](), list[LogProbs]()
        for own in () if ctc is None else frames:
            assert ctc is not None
            read = model.spoken([own]) if isinstance(ctc, TokenHead) else [own]
            log_probs = ctc.log_probs(read[0][None])[0]
            said.append(ctc.best_path(log_probs))
            if keep:
                heard.append(ctc.kept(read[0], log_probs))
            if isinstance(ctc, TokenHead):
                audio += model.audio(read, [log_probs])
        if not isinstance(ctc, TokenHead):
            groups = [[one] for one in frames] if self.settings.strict else [list(frames)]
            audio = [embeddings for group in groups for embeddings in model.project(group)]
        return audio, said, heard

    def _doubts(self, segment: Segment) -> bool:
        """Whether it is less certain, or farther from what the CTC head heard, than allowed."""
        distance, settings = segment.ctc_distance, self.settings
        if segment.confidence < settings.min_confidence:
            return True
        return distance is not None and distance > settings.max_ctc_distance

    def _search(
        self,
        speech: Sequence[Speech],
        audio: Sequence[Tensor],
        said: Sequence[list[int]],
        heard: Sequence[LogProbs],
    ) -> list[list[Hypothesis]]:
        """From what `_listen` gives."""
        model, settings = self.model, self.settings
        prompts = [
            model.sequence(embeddings, prompt=prompt_for(self.prompts, one.waveform))[0]
            for one, embeddings in zip(speech, audio, strict=True)
        ]
        limits = [self._budget(one.seconds) for one in speech]
        if self.drafts:
            return draft_search(
                model.llm,
                prompts,
                list(map(self._tokens, said)),
                limits,
                self.ends,
                length_penalty=settings.length_penalty,
                options=self.options,
            )
        scorers = self.scorers
        if self.joint is not None:
            scorers = [*scorers, CTCPrefixScorer(self.joint, heard, settings.ctc_weight)]
        found = beam_search(
            model.llm,
            prompts,
            limits,
            self.ends,
            beam_size=settings.beam_size,
            length_penalty=settings.length_penalty,
            options=self.options,
            scorers=scorers,
        )
        if self.joint is None:
            return found
        paths = [
            Given(place, path)
            for place, path in enumerate(map(self._tokens, said))
            if len(path) < limits[place] and not self._is_found(path, found[place])
        ]
        return self._with_paths(found, prompts, paths, scorers)

    def _with_paths(
        self,
        found: list[list[Hypothesis]],
        prompts: Sequence[Tensor],
        paths: Sequence[Given],
        scorers: Sequence[Scorer],
    ) -> list[list[Hypothesis]]:
        """The hypotheses of each utterance, with best paths of CTC among them.

        The LLM that says a word wrong may never come back to what both find likely.
        """
        penalty = self.settings.length_penalty
        groups: list[Sequence[Given]] = [[one] for one in paths]
        if paths and not self.settings.strict:
            groups = [paths]
        for group in groups:
            scored = forced_hypotheses(
                self.model.llm, prompts, group, self.ends, length_penalty=penalty, scorers=scorers
            )
            for one, hypothesis in zip(group, scored, strict=True):
                beams = [*found[one.utterance], hypothesis]
                found[one.utterance] = ranked(beams)[: self.settings.beam_size]
        return found

    def _is_found(self, path: Sequence[int], beams: Sequence[Hypothesis]) -> bool:
        """Whether the search has come to the same end itself, or may not."""
        never = {*self.options.forbidden, *self.ends}
        ended = [one.tokens for one in beams if one.finish_reason == "stop"]
        late = any(one.finish_reason == "deadline" for one in beams)
        return late or list(path) in ended or not never.isdisjoint(path)

    def _tokens(self, units: list[int]) -> list[int]:
        """What the CTC head says, in tokens of the LLM."""
        assert self.ctc is not None
        if isinstance(self.ctc, TokenHead):
            return units
        text = self.ctc.text(units)
        capital = not any(map(str.islower, letters_known(self.ctc.tokenizer)))
        return self.model.transcript_tokens(text.lower() if capital else text)

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

    def _budget(self, seconds: float) -> int:
        """Tokens that a transcript may have, its end token among them."""
        return math.ceil(seconds * self.settings.tokens_per_second) + self.settings.extra_tokens

    def _segment(
        self, speech: Speech, hypotheses: Sequence[Hypothesis], said: Sequence[int]
    ) -> Segment:
        best, ctc = hypotheses[0], self.ctc
        text, heard = self._text(best), "" if ctc is None else ctc.text(said)
        return Segment(
            0.0,
            speech.seconds,
            text,
            score=best.score,
            finish_reason=best.finish_reason,
            tokens=tuple(best.tokens),
            token_log_probs=tuple(best.log_probs),
            confidences=self._confidences(best),
            ctc_text=heard,
            ctc_distance=None if ctc is None else text_distance(text, heard),
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


def _head(model: SpeechLLM) -> CTCHead | None:
    """The CTC head that knows what a model's frames are."""
    own = model.encoder.ctc
    # That of an encoder that was trained on does not know what its frames became.
    if own is not None and own.tokenizer is not None and model.tune["encoder"] == "frozen":
        return own
    return TokenHead(model) if model.projector.ctc is not None else None


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
    ctc_delay: float | None
    deadline: float | None
    nbest: int | None
    instruction: str | None
    posterior_temperature: float | None
    min_confidence: float | None
    max_ctc_distance: float | None


def load(
    run: str | Path = DEFAULT,
    *,
    cached: bool = False,
    align_model: str | None = None,
    ears: str | Path | None = None,
    device: str | None = None,
    **settings: Unpack[DecodeChanges],
) -> Transcriber:
    """The transcriber of a run, `base` and `tiny` among them, or what reads best here (`default`).

    `cached`: the encoder's frames of a corpus are taken from the run's feature cache, if it has
    one. `align_model`: a CTC model that tells when words were said. `ears`: a run whose
    encoder and projector take the places of this one's. `device`: auto (a GPU by CUDA, else the
    CPU), cpu, cuda, cuda:N or mps. Further arguments are those of
    DecodeChanges, such as `beam_size=1`. Raises IsthmusError for one that is not valid, and for a
    device that is not there.
    """
    folder = run_folder(run)
    changes = {name: value for name, value in settings.items() if value is not None}
    decode = decode_settings(folder, changes, None if ears is None else run_folder(ears))
    return open_run(
        folder, decode, cached=cached, align_model=align_model, ears=ears, device=device
    )


def open_run(
    folder: Path,
    decode: DecodeSettings,
    *,
    cached: bool = False,
    align_model: str | None = None,
    ears: str | Path | None = None,
    device: str | None = None,
) -> Transcriber:
    """The transcriber of a run folder, with these settings; arguments are those of `load`."""
    of_ears = None if ears is None else run_folder(ears)
    ngram = read_arpa(decode.ngram) if decode.ngram is not None else None
    with on_device(device):
        model, recipe = load_run(folder, of_ears)
    if recipe.llm.mergeable and model.llm.dtype == torch.float32:
        merge_adapters(model.llm)  # in half precision the sum would round the adapters off
    cache = None
    if cached:
        from isthmus.runs.feature_cache import (
            feature_cache,
        )

        cache = feature_cache(recipe, model)
    aligner = load_ctc(align_model) if align_model else None
    transcriber = Transcriber(model, decode, cache, aligner, ngram)
    transcriber.ears = None if of_ears is None else run_source(str(ears), of_ears)
    return transcriber


def decode_settings(
    run: Path, changes: Mapping[str, Any], ears: Path | None = None
) -> DecodeSettings:
    """The run's own, some of them replaced. No model is loaded.

    Labels come as late as those of the `ears` do, where they are another run's. Raises IsthmusError
    for one that is not valid, or that needs what is not installed.
    """
    own = {} if ears is None else {"ctc_delay": stored_recipe(ears).decode.ctc_delay}
    settings = change_settings(stored_recipe(run).decode, {**own, **changes}, "decode")
    if settings.gate == "silero" and importlib.util.find_spec("silero_vad") is None:
        raise IsthmusError(
            "decode.gate is silero, which is not installed. Install the extra: pip "
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
    """The folder of a run; `base`, `tiny` and `default` ship, `owner/name` is one of the hub."""
    return local_run(run) or download(str(run), None, RUN_FILES)
