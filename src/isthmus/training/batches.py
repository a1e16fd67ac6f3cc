"""From utterances to batches: an epoch is a plan, a batch is a function of (epoch, indices)."""

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.model.features import padded
from isthmus.runs.feature_cache import FeatureCache
from isthmus.settings.datasets import JoinSettings
from isthmus.settings.optimisation import SpeechTrainSettings, TrainSettings
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.speech.augment import Augmentation
from isthmus.speech.corpora import load_cut
from isthmus.speech.cuts import (
    language,
    transcript,
)
from isthmus.training.languages import (
    draw,
)

MISSING = -1  # number of frames of an utterance that is not in the cache
BUCKET_BATCHES = 50  # batches whose utterances are sorted together


@dataclass(frozen=True)
class Batch:
    """Utterances as the encoder takes them; padding is zero and is never looked at.

    With a feature cache, `frames` are what it holds, and only the waveforms of the others have
    samples.
    """

    ids: list[str]
    waveforms: Tensor  # (B, S) float32, 16 kHz
    num_samples: Tensor  # (B,) int64
    texts: list[str]  # transcripts
    seconds: float = 0.0  # of audio, without padding
    rejected: tuple[str, ...] = ()  # what could not be loaded, and why
    languages: tuple[str, ...] = ()  # of each, "" where it is not known or there are several
    draws: tuple[int, ...] = ()  # a random number for each, to choose by
    keys: tuple[str, ...] = ()  # in the feature cache, where there is one
    frames: Tensor | None = None  # (T, D) of those that are there, one behind the other
    num_frames: tuple[int, ...] = ()  # of each, MISSING if it is not there

    def to(self, device: torch.device) -> "Batch":
        """The same batch, its tensors on `device`."""
        return replace(
            self,
            waveforms=self.waveforms.to(device, non_blocking=True),
            num_samples=self.num_samples.to(device, non_blocking=True),
            frames=None if self.frames is None else self.frames.to(device, non_blocking=True),
        )

    def frames_each(self) -> list[Tensor | None]:
        """Cached frames (T, D) of each utterance, None where there are none."""
        there = [length for length in self.num_frames if length != MISSING]
        pieces = iter(() if self.frames is None else self.frames.split(there))
        return [None if length == MISSING else next(pieces) for length in self.num_frames]


Group = tuple[int, ...]  # utterances that are heard as one, usually a single one
# What is wrong with utterances heard as one: (seconds of each, transcript), None if nothing is.
Fits = Callable[[Sequence[float], str], str | None]
# LLM positions of utterances heard as one: (seconds of each, transcript).
Positions = Callable[[Sequence[float], str], int]


def join_utterances(
    durations: Sequence[float],
    join: JoinSettings | None,
    *,
    seed: int,
    epoch: int,
    fits: Callable[[Sequence[int]], bool] = lambda group: True,
) -> list[Group]:
    """Each utterance once; with `join`, random ones one behind the other (arXiv 2309.13963).

    A joined utterance has `join.max_seconds` at most, and `fits` says that the model can take it.
    """
    if join is None:
        return [(index,) for index in range(len(durations))]
    rng = np.random.default_rng([seed, epoch, 1])
    groups: list[list[int]] = []
    room = 0.0
    for index in rng.permutation(len(durations)).tolist():
        joined = groups and durations[index] <= room and rng.random() < join.probability
        if joined and fits([*groups[-1], index]):
            groups[-1].append(index)
        else:
            groups.append([index])
            room = join.max_seconds
        room -= durations[index]
    return [tuple(group) for group in groups]


@dataclass(frozen=True)
class Budget:
    """When a batch is full: by its utterances, by its padded seconds, or by its LLM positions."""

    batch_size: int | None = None
    max_duration: float | None = None
    max_tokens: int | None = None

    @classmethod
    def of(cls, settings: TrainSettings) -> "Budget":
        tokens = settings.max_tokens if isinstance(settings, SpeechTrainSettings) else None
        return cls(settings.batch_size, settings.max_duration, tokens)

    def exceeded(self, durations: Sequence[float], positions: Sequence[int]) -> bool:
        """Whether utterances of rising duration, with so many LLM positions each, are too much."""
        return bool(
            (self.batch_size and len(durations) > self.batch_size)
            or (self.max_duration and durations[-1] * len(durations) > self.max_duration)
            or (self.max_tokens and sum(positions) > self.max_tokens)
        )

    def expected(self, durations: Sequence[float], positions: Sequence[int]) -> int:
        """Utterances of an average batch."""
        count = max(1, len(durations))
        if self.max_duration:
            return max(1, int(self.max_duration * count / max(sum(durations), 1e-3)))
        if self.max_tokens:
            return max(1, self.max_tokens * count // max(1, sum(positions)))
        return self.batch_size or 1


def plan_epoch(
    durations: Sequence[float],
    budget: Budget,
    *,
    seed: int,
    epoch: int,
    positions: Sequence[int] | None = None,
) -> list[list[int]]:
    """Batches of indices, each utterance once: a pure function of its arguments.

    Utterances are shuffled, neighbours of like duration are put together within pools of
    BUCKET_BATCHES batches, and the batches are shuffled again. An utterance beyond the budget
    stands alone. `positions` are the utterances' LLM positions, for a budget of them.
    """
    sizes = positions if positions is not None else [0] * len(durations)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(durations)).tolist()
    pool = budget.expected(durations, sizes) * BUCKET_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        current: list[int] = []
        for index in sorted(order[start : start + pool], key=lambda i: (durations[i], i)):
            more = [*current, index]
            if current and budget.exceeded([durations[i] for i in more], [sizes[i] for i in more]):
                batches.append(current)
                current = []
            current.append(index)
        batches.append(current)
    return [batches[i] for i in rng.permutation(len(batches)).tolist()]


class SpeechData:
    """The utterances of a list of manifests, loaded when asked for."""

    def __init__(
        self,
        cuts: Sequence[Cut],
        *,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        join: JoinSettings | None = None,
        temperature: float | None = None,
        fits: Fits = lambda durations, text: None,
        positions: Positions | None = None,
    ):
        self.cuts = cuts
        self.durations = [float(cut.duration) for cut in cuts]
        self.seed = seed
        self.augmentation = augmentation
        self.join = join
        self.temperature = temperature
        self.fits = fits
        self.positions = positions
        self.cache: FeatureCache | None = None

    def digest(self) -> str:
        """SHA-256 over id, duration, text and language of the utterances, in order."""
        rows = [[cut.id, float(cut.duration), transcript(cut), language(cut)] for cut in self.cuts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def plan(self, settings: TrainSettings, epoch: int) -> list[list[Group]]:
        """The training batches of an epoch."""
        drawn = self._drawn(epoch)
        places = join_utterances(
            self._durations(drawn),
            self.join,
            seed=self.seed,
            epoch=epoch,
            fits=lambda group: self._group_fits([drawn[place] for place in group]),
        )
        groups = [tuple(drawn[place] for place in group) for group in places]
        seconds = [sum(self._durations(group)) for group in groups]
        budget, positions = Budget.of(settings), None
        if budget.max_tokens is not None:
            assert self.positions is not None, "a budget of LLM positions without an LLM"
            measure = self.positions
            positions = [measure(self._durations(group), self._text(group)) for group in groups]
        batches = plan_epoch(seconds, budget, seed=self.seed, epoch=epoch, positions=positions)
        return [[groups[index] for index in batch] for batch in batches]

    def batch(self, groups: Sequence[Group], epoch: int | None = None) -> Batch:
        """Load utterances; with an epoch they are augmented, each from its own random stream.

        What cannot be loaded is left out, and said in the batch.
        """
        rows: list[_Row] = []
        rejected = []
        for group in groups:
            try:
                rows.append(self._row(group, epoch))
            except IsthmusError as error:
                rejected.append(str(error))
        found = [row.frames for row in rows if row.frames is not None]
        ids, texts = [row.id for row in rows], [row.text for row in rows]
        return replace(
            collate(ids, [row.samples for row in rows], texts),
            seconds=sum(row.seconds for row in rows),
            rejected=tuple(rejected),
            languages=tuple(row.language for row in rows),
            draws=tuple(row.draw for row in rows),
            keys=tuple(row.key for row in rows) if self.cache else (),
            # one tensor: each would take a file of shared memory on its way from a worker
            frames=torch.cat(found) if found else None,
            num_frames=tuple(MISSING if r.frames is None else len(r.frames) for r in rows),
        )

    def names(self, groups: Sequence[Group]) -> str:
        """The utterances of a batch, for messages."""
        return ", ".join(self._cut(index).id for group in groups for index in group)

    def _drawn(self, epoch: int) -> Sequence[int]:
        """The utterances of an epoch; where one comes again, under another number (see `draw`)."""
        if self.temperature is None:
            return range(len(self.cuts))
        languages = [language(cut) for cut in self.cuts]
        return draw(languages, self.temperature, seed=self.seed, epoch=epoch)

    def _cut(self, index: int) -> Cut:
        return self.cuts[index % len(self.cuts)]

    def _row(self, group: Group, epoch: int | None) -> "_Row":
        cuts = [self._cut(index) for index in group]
        name = "+".join(cut.id for cut in cuts)
        if epoch is None:
            number = zlib.crc32(name.encode())
        else:
            number = int(np.random.SeedSequence([self.seed, epoch, *group, 3]).generate_state(1)[0])
        spoken = {language(cut) for cut in cuts}
        row = partial(
            _Row, name, self._text(group), spoken.pop() if len(spoken) == 1 else "", number
        )
        if self.cache is None:
            samples = np.concatenate([self._waveform(index, epoch) for index in group])
            return row(len(samples) / SAMPLE_RATE, samples)
        (cut,) = cuts  # joined and augmented utterances are not cached
        key = self.cache.key(cut)
        frames = self.cache.get(key)
        samples = self._waveform(group[0], None) if frames is None else np.empty(0, np.float32)
        return row(float(cut.duration), samples, key, frames)

    def _group_fits(self, group: Sequence[int]) -> bool:
        return self.fits(self._durations(group), self._text(group)) is None

    def _durations(self, group: Sequence[int]) -> list[float]:
        return [self.durations[index % len(self.cuts)] for index in group]

    def _text(self, group: Sequence[int]) -> str:
        return " ".join(transcript(self._cut(index)) for index in group)

    def _waveform(self, index: int, epoch: int | None) -> np.ndarray:
        waveform = load_cut(self._cut(index))
        if self.augmentation is None or epoch is None:
            return waveform
        return self.augmentation(waveform, np.random.default_rng([self.seed, epoch, index]))


@dataclass(frozen=True)
class _Row:
    """One utterance of a batch."""

    id: str
    text: str
    language: str
    draw: int
    seconds: float
    samples: np.ndarray  # (S,), none where its frames are cached
    key: str = ""
    frames: Tensor | None = None  # (T, D)


def collate(ids: list[str], waveforms: Sequence[np.ndarray], texts: list[str]) -> Batch:
    """A batch of waveforms (S,)."""
    return Batch(ids, *padded(waveforms), texts)
