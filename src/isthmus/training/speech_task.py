"""Training of the projector (and of parts that are not frozen) on transcripts."""

import itertools
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import kaldialign
import torch
from torch import Tensor, nn

from isthmus.model.layers import checkpoint_layers, compile_layers, recompute_gates
from isthmus.model.speech_llm import SpeechLLM
from isthmus.model.token_ctc import needed_embeddings
from isthmus.recipe import Recipe
from isthmus.runs.feature_cache import FeatureCache
from isthmus.settings.optimisation import SpeechTrainSettings
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.training.batches import Batch, Group, SpeechData
from isthmus.training.loop import Loss
from isthmus.training.parallel import Ranks

log = logging.getLogger(__name__)

STAND_IN_SAMPLES = 16_000  # of silence, where nothing of a batch could be loaded


@dataclass(frozen=True)
class Said:
    """What CTC makes of the utterances that have room for their tokens."""

    total: Tensor  # () loss, summed
    labels: list[list[int]]  # tokens of their transcripts
    tokens: list[list[int]]  # that are said instead
    without_room: tuple[str, ...]  # a line for each other utterance


def weighted(loss: Tensor, weight: float) -> Tensor:
    """A loss whose gradient has a weight, and whose value has none."""
    return loss if weight == 1 else weight * loss + (1 - weight) * loss.detach()


class SpeechTask:
    """Cross-entropy (nats; units are transcript tokens) and next-token accuracy."""

    def __init__(self, model: SpeechLLM, train: SpeechData, dev: SpeechData | None, recipe: Recipe):
        self.module = model
        self.train = train
        self.dev = dev
        self.settings = recipe.train
        self.seed = recipe.seed
        self.bad_fraction = recipe.data.max_bad_fraction

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return self.module.trainable()

    def state(self) -> Mapping[str, Tensor]:
        return self.module.trained_state()

    def plan(self, epoch: int) -> list[list[Group]]:
        return self.train.plan(self.settings, epoch)

    def dev_plan(self) -> list[list[Group]]:
        return self.dev.plan(self.settings, 0) if self.dev else []

    def load(self, groups: Sequence[Group], epoch: int | None) -> Batch:
        data = self.dev if epoch is None else self.train
        assert data is not None
        return data.batch(groups, epoch)

    def describe(self, groups: Sequence[Group]) -> str:
        return self.train.names(groups)

    def use_cache(self, cache: FeatureCache | None) -> None:
        """Read the encoder's frames from a cache, and write there what it lacks."""
        for data in filter(None, (self.train, self.dev)):
            data.cache = cache

    @torch.no_grad()
    def fill_cache(self, ranks: Ranks, on_utterance: Callable[[int, int], None]) -> None:
        """Put the frames of all utterances into the cache, each once, by all ranks together."""
        self.module.eval()
        for data in filter(None, (self.train, self.dev)):
            own = range(ranks.rank, len(data.cuts), ranks.world)
            for done, index in enumerate(own, start=1):
                batch = data.batch([(index,)])
                for line in batch.rejected:
                    log.warning("left out: %s", line)
                if batch.ids:
                    self._frames(batch.to(ranks.device))
                on_utterance(done, len(own))

    def loss(self, batch: Batch) -> Loss:
        model = self.module
        encoded = [] if self.train.cache else (batch.num_samples / SAMPLE_RATE).tolist()
        batch = batch.to(next(model.projector.parameters()).device)
        if not batch.ids:  # sharded blocks want the same passes on all ranks
            silence = torch.zeros(STAND_IN_SAMPLES, device=batch.waveforms.device)
            found = model.transcript_loss(model.project([model.encode_alone(silence)]), [""])
            return Loss(found.total * 0, 0, 0, rejected=batch.rejected)
        training, settings = model.training, self.settings
        spoken = model.spoken(self._frames(batch))
        if settings.llm_weight == 0:
            return self._ctc_alone(spoken, batch)
        masking = [settings.masking(language) for language in batch.languages]
        found = model.transcript_loss(
            model.audio(spoken),
            batch.texts,
            prompts=[model.prompts[number % len(model.prompts)] for number in batch.draws],
            masking=masking if training and any(masking) else None,
        )
        total, ctc, rejected = found.total, torch.zeros_like(found.total), batch.rejected
        if training:  # the gradient of both, the value of the cross-entropy, as validation has it
            total = weighted(total, settings.llm_weight)
        if training and settings.ctc_weight:
            said = self._ctc(spoken, batch)
            ctc = said.total.detach()
            total = total + settings.ctc_weight * (said.total - ctc)
            rejected += said.without_room
        return Loss(
            total,
            found.tokens,
            found.correct,
            ctc=ctc,
            seconds=batch.seconds,
            positions=found.positions,
            padding=found.padding,
            flops=model.flops(found.positions - found.padding, found.tokens, encoded),
            rejected=rejected,
        )

    def _ctc_alone(self, spoken: Sequence[Tensor], batch: Batch) -> Loss:
        """The loss of what says the transcripts by itself; wrong are the edits of its tokens."""
        said = self._ctc(spoken, batch)
        units = sum(map(len, said.labels))
        pairs = zip(said.labels, said.tokens, strict=True)
        edits = sum(kaldialign.edit_distance(own, heard)["total"] for own, heard in pairs)
        return Loss(
            weighted(said.total, self.settings.ctc_weight),
            units,
            max(0, units - edits),
            seconds=batch.seconds,
            rejected=batch.rejected + said.without_room,
        )

    def _ctc(self, spoken: Sequence[Tensor], batch: Batch) -> "Said":
        """What the projector's CTC head makes of the transcripts.

        Augmentation, or a projector that joins frames, may leave an utterance without room for
        its tokens: a bad item.
        """
        model = self.module
        head = model.projector.ctc
        assert head is not None
        tokens = [model.transcript_tokens(text) for text in batch.texts]
        room = [needed_embeddings(own) <= len(one) for one, own in zip(spoken, tokens, strict=True)]
        lines = tuple(
            f"utterance {name!r}: its text has more tokens than the audio has embeddings for CTC"
            for name in itertools.compress(batch.ids, map(operator.not_, room))
        )
        if not any(room):
            return Said(spoken[0].sum() * 0, [], [], lines)
        labels = list(itertools.compress(tokens, room))
        total, said = head.loss(list(itertools.compress(spoken, room)), labels)
        return Said(total, labels, said, lines)

    def _frames(self, batch: Batch) -> list[Tensor]:
        """Frames (T, D) of each utterance: from the cache, into which new ones go."""
        cache = self.train.cache
        if cache is None:
            return self.module.encode(batch.waveforms, batch.num_samples)
        device = batch.waveforms.device

        def compute(row: int) -> Tensor:
            # alone, so that an entry is the same whoever made it
            return self.module.encode_alone(batch.waveforms[row, : int(batch.num_samples[row])])

        rows = enumerate(zip(batch.keys, batch.frames_each(), strict=True))
        return [
            cache.frames(key, partial(compute, row), found).to(device) for row, (key, found) in rows
        ]


def place(model: SpeechLLM, settings: SpeechTrainSettings, ranks: Ranks) -> None:
    """Bring the model to its device; spread over the processes first, where it need not fit."""
    model.eval()  # dropout would make a layer unlike itself
    recompute_gates(model.llm.network)
    if settings.shard:
        ranks.shard(model.llm.network)
        log.info("LLM: its frozen blocks are spread over %d processes (FSDP2)", ranks.world)
    model.to(ranks.device)


def prepare(
    model: SpeechLLM, settings: SpeechTrainSettings, ranks: Ranks, *, cached: bool = False
) -> list[str]:
    """Make the model ready to be trained fast; the decisions, each with its reason.

    `cached`: the encoder's frames come from a cache, into which everybody computes the same.
    """
    model.eval()
    lines = []
    if settings.packing:
        half = settings.precision == "bfloat16"
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=half):
            lines.append(f"batches: {model.pack()}")
    else:
        lines.append("batches: padded, because train.packing is false")
    if settings.compile:
        compile_layers(model.llm.network)
        if not cached and any(True for _ in model.encoder.parameters()):
            compile_layers(model.encoder)
        parts = "LLM" if cached else "encoder and LLM"
        lines.append(f"compiled: the blocks of {parts}; the first steps take minutes")
    if settings.checkpointing:
        checkpoint_layers(model.llm.network)
        lines.append("activations: of block borders only, the others are computed twice")
    return lines


def arithmetic(model: SpeechLLM, recipe: Recipe, ranks: Ranks) -> list[str]:
    """What a step is made of, in words."""
    train = recipe.train
    encoder = next((value.dtype for value in model.encoder.parameters()), torch.float32)
    held = [str(dtype).removeprefix("torch.") for dtype in (encoder, model.llm.dtype)]
    products = "bfloat16" if train.precision == "bfloat16" else "that of their weights"
    measures = {
        "utterances": train.batch_size,
        "padded seconds": train.max_duration,
        "LLM positions": train.max_tokens,
    }
    unit, size = next((unit, size) for unit, size in measures.items() if size is not None)
    batches = train.batches(ranks.world)
    return [
        f"precision: products in {products}; weights of the encoder in {held[0]}, of the LLM in "
        f"{held[1]} (quantised: {recipe.llm.quantise}); what is trained is in float32",
        f"step: {size:g} {unit} a batch x {batches // ranks.world} accumulated x {ranks.world} "
        f"processes = at most {size * batches:g} {unit}",
    ]
