"""What a recipe takes before anything is downloaded: sizes, memory, arithmetic, hours."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lhotse.cut import Cut

from isthmus.errors import IsthmusError
from isthmus.lab.language_model import LanguageTask
from isthmus.lab.placeholders import UNITS, Producers, missing_models, shipped_producers
from isthmus.lab.sizes import (
    activation_bytes,
    frame_bytes,
    layer_values,
    mean_batch,
    sized_model,
    sized_pretraining,
    token_count,
    uses_cache,
    weight_bytes,
)
from isthmus.model.conformer import ConformerCTC
from isthmus.model.encoder import WhisperEncoder, parameters
from isthmus.model.fetch import is_fetched
from isthmus.model.llm import LLM
from isthmus.model.presets import PRESETS, stand_in_tokenizer
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import CTCRecipe, Experiment, LanguageRecipe, Recipe
from isthmus.settings.datasets import Corpus, DataSettings
from isthmus.settings.encoders import PairSettings
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.speech.corpora import read_corpus
from isthmus.speech.cuts import (
    language,
    transcript,
)
from isthmus.training.hardware import named_peak
from isthmus.training.languages import (
    allotment,
    check_named,
    chosen,
)

HOURS = 960.0  # LibriSpeech ...
MEAN_SECONDS = 12.3  # ... and its mean utterance
LETTERS_A_SECOND = 14.4  # of read English, spaces among them
ENGLISH = "the quick brown fox jumps over the lazy dog and runs back to the hills again "
COUNTED_TEXTS = 1000  # transcripts whose tokens are counted
COUNTED_EXAMPLES = 200  # the same, of what a language model is trained on
WINDOW_SECONDS = 30.0
OPTIMISER_BYTES = 12  # of a trained parameter: gradient and two moments of AdamW, in float32


@dataclass(frozen=True)
class Speech:
    """What an epoch hears."""

    hours: float
    mean_seconds: float
    mean_tokens: float  # of a transcript, its end among them
    source: str

    @property
    def utterances(self) -> int:
        return max(1, round(self.hours * 3600 / self.mean_seconds))


@dataclass(frozen=True)
class Hardware:
    """GPUs, and the share of their peak that training is thought to reach."""

    gpu: str = "h200"
    count: int = 1
    mfu: float = 0.35

    def flops_an_hour(self) -> float:
        """Raises IsthmusError for a GPU without a known peak."""
        return named_peak(self.gpu) * 3600 * self.count * self.mfu


@dataclass(frozen=True)
class Part:
    """One part of the model."""

    name: str
    parameters: int  # Whisper's fixed positions are not among them
    trained: int
    weight_bytes: int  # as training holds them


@dataclass(frozen=True)
class Work:
    """An epoch, or all steps."""

    steps: int
    tokens: int  # of transcripts
    positions: int  # of the language model
    flops: float
    hours: float


@dataclass(frozen=True)
class Plan:
    """What a recipe takes."""

    name: str
    parts: dict[str, Part]  # encoder, projector, llm
    llm_width: int | None
    embeddings_per_second: float | None
    speech: Speech | None
    batch: float  # utterances of a batch, on the mean
    memory: dict[str, int]  # bytes of each GPU: weights, optimiser, activations, total
    cache: dict[str, float] | None  # bytes of a frozen encoder's frames, and hours to fill it
    epoch: Work
    run: Work
    hardware: Hardware
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        speech = self.speech and asdict(self.speech) | {"utterances": self.speech.utterances}
        return asdict(self) | {"speech": speech}

    def lines(self) -> Iterator[str]:
        """A table of the parts, and a line for each of the rest."""
        yield from table(
            ["", "parameters", "trained", "weights", ""],
            [
                [
                    label,
                    short(part.parameters),
                    short(part.trained),
                    gigabytes(part.weight_bytes),
                    part.name,
                ]
                for label, part in self.parts.items()
            ],
        )
        speech, memory, epoch = self.speech, self.memory, self.epoch
        hardware = f"{self.hardware.count} x {self.hardware.gpu} at {self.hardware.mfu:.0%}"
        facts = {}
        if self.llm_width is not None:
            facts["llm width"] = f"{self.llm_width}"
            facts["embeddings"] = f"{self.embeddings_per_second:.2f} a second of audio"
        if speech is not None:
            facts["data"] = (
                f"{speech.hours:,.2f} h: {speech.utterances:,} utterances of "
                f"{speech.mean_seconds:.1f} s, {speech.mean_tokens:.0f} tokens ({speech.source})"
            )
        facts |= {
            "memory": f"{gigabytes(memory['total'])} of each GPU: weights "
            f"{gigabytes(memory['weights'])}, optimiser {gigabytes(memory['optimiser'])}, "
            f"activations about {gigabytes(memory['activations'])}",
            "feature cache": f"{gigabytes(self.cache['bytes'])}, "
            f"filled in {self.cache['hours']:.2f} h"
            if self.cache
            else "none: the encoder is trained",
            "step": f"{self.batch:.1f} {'utterances' if speech else 'texts'} a batch",
            "epoch": f"{epoch.steps:,} steps, {epoch.tokens:,} tokens, "
            f"{epoch.positions:,} positions, {epoch.flops:.2e} FLOP, {epoch.hours:.2f} h",
            "run": f"{self.run.steps:,} steps, {self.run.flops:.2e} FLOP, "
            f"{self.run.hours:.2f} h on {hardware} of the peak",
        }
        yield ""
        yield from (f"{name:14} {text}" for name, text in facts.items())
        yield from (f"note: {note}" for note in self.notes)


def make_plan(
    recipe: Experiment,
    hardware: Hardware | None = None,
    *,
    hours: float | None = None,
    mean_seconds: float | None = None,
    producers: Producers | None = None,
) -> Plan:
    """What training by `recipe` takes; docs/plan.md has the formulas.

    With `hours` or `mean_seconds` the data are read English in that amount, else what data.train
    says, if it can be read here. A model that is not here, but one of the recipes in `producers`
    (the shipped ones unless given) makes it, has the size that it will have. Nothing is downloaded
    and no weight is read. Raises IsthmusError for models that are not known offline, and for
    other GPUs.
    """
    hardware = hardware or Hardware()
    hardware.flops_an_hour()
    producers = shipped_producers() if producers is None else producers
    if isinstance(recipe, Recipe):
        return _plan(recipe, hardware, hours, mean_seconds, producers)
    assert isinstance(recipe, CTCRecipe | LanguageRecipe)
    return _plan_pretraining(recipe, hardware, hours, mean_seconds, producers)


def _plan(
    recipe: Recipe,
    hardware: Hardware,
    hours: float | None,
    mean_seconds: float | None,
    producers: Producers,
) -> Plan:
    an_hour = hardware.flops_an_hour()
    with sized_model(recipe, producers) as model:
        limit = model.encoder.max_seconds
        speech = heard_speech(recipe.data, model.llm.tokenizer, limit, hours, mean_seconds)
        seconds, tokens = speech.mean_seconds, math.ceil(speech.mean_tokens)
        positions = model.positions(seconds, tokens)
        flops = model.flops(positions, tokens, [] if uses_cache(recipe) else [seconds])
        filling = model.flops(0, 0, [seconds])
        batch = mean_batch(recipe.train, seconds, positions)
        activations = round(batch * activation_bytes(model, recipe, seconds, tokens))
        parts = _parts(recipe, model, hardware)  # last: it quantises

    def work(steps: int, utterances: float) -> Work:
        total = flops * utterances
        counted = round(speech.mean_tokens * utterances), round(positions * utterances)
        return Work(steps, *counted, total, total / an_hour)

    step = batch * recipe.train.batches(hardware.count)
    cache = {
        "bytes": speech.utterances * frame_bytes(recipe, model.encoder, seconds),
        "hours": speech.utterances * filling / an_hour,
    }
    return Plan(
        name=recipe.name,
        parts=parts,
        llm_width=model.llm.dim,
        embeddings_per_second=model.audio_tokens(WINDOW_SECONDS) / WINDOW_SECONDS,
        speech=speech,
        batch=batch,
        memory=_memory(parts, activations),
        cache=cache if recipe.encoder.tune == "frozen" else None,
        epoch=work(math.ceil(speech.utterances / step), speech.utterances),
        run=work(recipe.train.steps, recipe.train.steps * step),
        hardware=hardware,
        notes=[*_notes(recipe, model), *_placeholder_notes(recipe, producers)],
    )


def _plan_pretraining(
    recipe: CTCRecipe | LanguageRecipe,
    hardware: Hardware,
    hours: float | None,
    mean_seconds: float | None,
    producers: Producers,
) -> Plan:
    """Of a model that is trained alone, whole: 6 FLOP for each weight and position."""
    speech = None
    with sized_pretraining(recipe, producers) as model:
        if isinstance(recipe, CTCRecipe):
            assert isinstance(model, ConformerCTC)
            speech = heard_speech(recipe.data, stand_in_tokenizer(), math.inf, hours, mean_seconds)
            seconds = speech.mean_seconds
            positions: float = model.output_length(int(seconds * SAMPLE_RATE))
            batch = mean_batch(recipe.train, seconds, round(positions))
            items = speech.utterances
        else:
            assert isinstance(model, LLM)
            some = LanguageTask(model, recipe.model_copy(update={"sentences": COUNTED_EXAMPLES}))
            tokens = [len(example) for example, _ in some.examples(recipe.seed, 0)]
            positions = sum(tokens) / len(tokens)
            batch = recipe.tokens_per_batch / positions
            items = recipe.sentences
        step = batch * recipe.train.batches(hardware.count)
        count, trained = parameters(model)
        number = 2 if recipe.train.precision == "bfloat16" else 4
        kept = sum(layer_values(model.network, model.dim))

    def work(steps: int, number_of_items: float) -> Work:
        total = round(positions * number_of_items)
        flops = 6.0 * count * total
        told = round(speech.mean_tokens * number_of_items) if speech else total
        return Work(steps, told, total, flops, flops / hardware.flops_an_hour())

    parts = {"model": Part(recipe.start_from or "new", count, trained, 4 * count)}
    return Plan(
        name=recipe.name,
        parts=parts,
        llm_width=None,
        embeddings_per_second=None,
        speech=speech,
        batch=batch,
        memory=_memory(parts, round(batch * positions * kept * number)),
        cache=None,
        epoch=work(math.ceil(items / step), items),
        run=work(recipe.train.steps, recipe.train.steps * step),
        hardware=hardware,
        notes=[*_training_notes(recipe), *_placeholder_notes(recipe, producers)],
    )


def heard_speech(
    data: DataSettings,
    tokenizer: Any,
    limit: float | None,
    hours: float | None,
    mean_seconds: float | None,
) -> Speech:
    """What data.train holds, or read English of so many hours in utterances of so many seconds.

    Raises IsthmusError where data.languages leaves nothing of what data.train holds.
    """
    source = "read English is supposed"
    if hours is None and mean_seconds is None and data.train:
        try:
            cuts = _manifests(data, limit)
        except (IsthmusError, OSError):
            source = "data.train cannot be read here: read English is supposed"
        else:
            return _drawn(data, cuts, tokenizer)
    seconds = mean_seconds or MEAN_SECONDS
    letters = round(seconds * LETTERS_A_SECOND)
    text = (ENGLISH * (letters // len(ENGLISH) + 1))[:letters]
    return Speech(hours or HOURS, seconds, token_count(tokenizer, [text]), source)


def _manifests(data: DataSettings, limit: float | None) -> list[Cut]:
    """Utterances of data.train that are not too long, as often as each is repeated."""
    limit = min(data.max_seconds, limit or math.inf)
    cuts: list[Cut] = []
    for entry in data.train:
        corpus = Corpus(path=entry, repeat=1) if isinstance(entry, str) else entry
        found = read_corpus(corpus.path)
        fitting = [cut for cut in found if cut.supervisions and 0 < cut.duration <= limit]
        cuts += fitting * corpus.repeat
    if not cuts:
        raise IsthmusError("data.train holds nothing to train on.")
    return cuts


def _drawn(data: DataSettings, cuts: Sequence[Cut], tokenizer: Any) -> Speech:
    """What an epoch of utterances holds, each language as often as it is drawn."""
    cuts = chosen(cuts, data.languages, "data.train")
    temperature = data.language_temperature
    if temperature is not None:
        check_named(cuts)
    groups: dict[str, list[Cut]] = {}
    for cut in cuts:
        groups.setdefault("" if temperature is None else language(cut), []).append(cut)
    counts = {name: len(group) for name, group in groups.items()}
    seconds = tokens = 0.0
    for name, number in allotment(counts, temperature or 1).items():
        group = groups[name]
        seconds += number * math.fsum(cut.duration for cut in group) / len(group)
        some = group[:: math.ceil(len(group) / COUNTED_TEXTS)]
        tokens += number * token_count(tokenizer, [transcript(cut) for cut in some])
    source = "data.train" + (", drawn by data.language_temperature" if temperature else "")
    return Speech(seconds / 3600, seconds / len(cuts), tokens / len(cuts), source)


def _parts(recipe: Recipe, model: SpeechLLM, hardware: Hardware) -> dict[str, Part]:
    counts = {name: parameters(part) for name, part in model.named_children()}
    weights = weight_bytes(recipe, model)
    if recipe.train.shard:
        weights["llm"] //= hardware.count
    names = {
        "encoder": " + ".join(_encoder_names(recipe)),
        "projector": recipe.projector.type,
        "llm": recipe.llm.path,
    }
    return {name: Part(names[name], *counts[name], weights[name]) for name in names}


def _memory(parts: dict[str, Part], activations: int) -> dict[str, int]:
    memory = {
        "weights": sum(part.weight_bytes for part in parts.values()),
        "optimiser": OPTIMISER_BYTES * sum(part.trained for part in parts.values()),
        "activations": activations,
    }
    return memory | {"total": sum(memory.values())}


def _encoder_names(recipe: Recipe) -> list[str]:
    encoder = recipe.encoder
    each = [encoder.first, encoder.second] if isinstance(encoder, PairSettings) else [encoder]
    return [str(getattr(one, "path", one.type)) for one in each]


def _notes(recipe: Recipe, model: SpeechLLM) -> Iterator[str]:
    if any(isinstance(part, WhisperEncoder) for part in model.encoder.modules()):
        yield "Whisper's fixed sinusoidal positions are no parameters here, but they are weights."
    if recipe.llm.path in PRESETS and not is_fetched(recipe.llm.path):
        yield f"{recipe.llm.path}: its tokenizer is not here; a token for every 4 letters."
    for path in _encoder_names(recipe):
        if path in PRESETS and PRESETS[path].note:
            yield f"{path}: {PRESETS[path].note}."
    if recipe.data.feature_cache != "none" and not uses_cache(recipe):
        yield "data.feature_cache is off: the audio, or the encoder, changes."
    yield from _training_notes(recipe)


def _placeholder_notes(recipe: Experiment, producers: Producers) -> Iterator[str]:
    for name in missing_models(recipe, producers):
        made = f"what {producers[name].name} makes" if name in producers else f"{UNITS:,} units"
        yield f"{name} is not here yet: the plan is with {made}."


def _training_notes(recipe: Experiment) -> Iterator[str]:
    if recipe.train.precision == "float32":
        yield "hours are those of train.precision: bfloat16; this recipe's float32 takes longer."
    if fault := recipe.train.warmup_fault():
        yield fault


def table(heads: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Columns of text: the first to the left, numbers to the right, the last as it comes."""
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads) - 1)]
    for first, *middle, last in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(middle, widths[1:], strict=True)]
        yield "  ".join([f"{first:{widths[0]}}", *cells, last]).rstrip()


def short(count: int) -> str:
    """A number of parameters as papers write it: 17.31M, 6.74B."""
    if count < 10_000:
        return str(count)
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
