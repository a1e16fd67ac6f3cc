"""From utterances to batches: an epoch is a plan, a batch is a function of (epoch, indices)."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from isthmus.recipe import JoinSettings, TrainSettings
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.speech.augment import Augmentation
from isthmus.speech.corpora import load_cut

BUCKET_BATCHES = 50  # batches whose utterances are sorted together


@dataclass(frozen=True)
class Batch:
    """Utterances as the encoder takes them; padding is zero and is never looked at."""

    ids: list[str]
    waveforms: Tensor  # (B, S) float32, 16 kHz
    num_samples: Tensor  # (B,) int64
    texts: list[str]  # transcripts

    def to(self, device: torch.device) -> "Batch":
        """The same batch, its tensors on `device`."""
        waveforms, num_samples = self.waveforms.to(device), self.num_samples.to(device)
        return replace(self, waveforms=waveforms, num_samples=num_samples)

    @property
    def seconds(self) -> float:
        """Audio in the batch, without padding."""
        return float(self.num_samples.sum()) / SAMPLE_RATE


Group = tuple[int, ...]  # utterances that are heard as one, usually a single one
# What is wrong with utterances heard as one: (seconds of each, transcript), None if nothing is.
Fits = Callable[[Sequence[float], str], str | None]


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


def plan_epoch(
    durations: Sequence[float],
    *,
    seed: int,
    epoch: int,
    batch_size: int | None = None,
    max_duration: float | None = None,
) -> list[list[int]]:
    """Batches of indices, each utterance once: a pure function of its arguments.

    Utterances are shuffled, neighbours of like duration are put together within pools of
    BUCKET_BATCHES batches, and the batches are shuffled again. `max_duration` bounds the padded
    seconds of a batch (longest x count); an utterance beyond it stands alone.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(durations)).tolist()
    mean = sum(durations) / max(1, len(durations))
    expected = batch_size or max(1, int((max_duration or mean) / max(mean, 1e-3)))
    pool = expected * BUCKET_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        current: list[int] = []
        for index in sorted(order[start : start + pool], key=lambda i: (durations[i], i)):
            full = batch_size is not None and len(current) >= batch_size
            # durations rise within a pool, so this utterance would be the longest of the batch
            heavy = (
                max_duration is not None and durations[index] * (len(current) + 1) > max_duration
            )
            if current and (full or heavy):
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
        fits: Fits = lambda durations, text: None,
    ):
        self.cuts = cuts
        self.durations = [float(cut.duration) for cut in cuts]
        self.seed = seed
        self.augmentation = augmentation
        self.join = join
        self.fits = fits

    def digest(self) -> str:
        """SHA-256 over id, duration and text of the utterances, in order."""
        rows = [[cut.id, float(cut.duration), transcript(cut)] for cut in self.cuts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def plan(self, settings: TrainSettings, epoch: int) -> list[list[Group]]:
        """The training batches of an epoch."""
        groups = join_utterances(
            self.durations, self.join, seed=self.seed, epoch=epoch, fits=self._group_fits
        )
        seconds = [self._seconds(group) for group in groups]
        batches = plan_epoch(
            seconds,
            seed=self.seed,
            epoch=epoch,
            batch_size=settings.batch_size,
            max_duration=settings.max_duration,
        )
        return [[groups[index] for index in batch] for batch in batches]

    def batch(self, groups: Sequence[Group], epoch: int | None = None) -> Batch:
        """Load utterances; with an epoch they are augmented, each from its own random stream."""
        waveforms = [
            np.concatenate([self._waveform(index, epoch) for index in group]) for group in groups
        ]
        ids = ["+".join(self.cuts[index].id for index in group) for group in groups]
        return collate(ids, waveforms, [self._text(group) for group in groups])

    def _group_fits(self, group: Sequence[int]) -> bool:
        return self.fits([self.durations[index] for index in group], self._text(group)) is None

    def _seconds(self, group: Sequence[int]) -> float:
        return sum(self.durations[index] for index in group)

    def _text(self, group: Sequence[int]) -> str:
        return " ".join(transcript(self.cuts[index]) for index in group)

    def _waveform(self, index: int, epoch: int | None) -> np.ndarray:
        waveform = load_cut(self.cuts[index])
        if self.augmentation is None or epoch is None:
            return waveform
        return self.augmentation(waveform, np.random.default_rng([self.seed, epoch, index]))


def transcript(cut: Cut) -> str:
    return (cut.supervisions[0].text or "") if cut.supervisions else ""


def collate(ids: list[str], waveforms: Sequence[np.ndarray], texts: list[str]) -> Batch:
    """Pad waveforms (S,) at the end to one tensor (B, S)."""
    lengths = [len(waveform) for waveform in waveforms]
    padded = torch.zeros(len(waveforms), max(lengths))
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return Batch(ids, padded, torch.tensor(lengths), texts)
