"""Pretraining of a Conformer encoder with CTC."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.model.conformer import ConformerCTC
from isthmus.recipe import TrainSettings
from isthmus.speech.augment import SpecAugment
from isthmus.training.batches import Batch, Group, SpeechData
from isthmus.training.loop import Loss


class CTCTask:
    """CTC loss (nats, summed; units are letters); correct are the letters of texts got right."""

    def __init__(
        self,
        model: ConformerCTC,
        train: SpeechData,
        dev: SpeechData | None,
        settings: TrainSettings,
        spec_augment: SpecAugment | None = None,
    ):
        self.module = model
        self.train = train
        self.settings = settings
        self.spec_augment = spec_augment
        self.dev = dev

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def state(self) -> Mapping[str, Tensor]:
        return self.module.state_dict()  # with the running statistics of batch norm

    def plan(self, epoch: int) -> list[list[Group]]:
        return self.train.plan(self.settings, epoch)

    def loss(self, groups: Sequence[Group], epoch: int) -> Loss:
        return self._loss(
            self.train.batch(groups, epoch),
            np.random.default_rng([self.train.seed, epoch, *groups[0], 2]),
        )

    def dev_losses(self) -> Sequence[Callable[[], Loss]]:
        if self.dev is None:
            return []
        return [partial(self._dev_loss, groups) for groups in self.dev.plan(self.settings, 0)]

    def _dev_loss(self, groups: Sequence[Group]) -> Loss:
        assert self.dev is not None
        return self._loss(self.dev.batch(groups), None)

    def describe(self, groups: Sequence[Group]) -> str:
        return ", ".join(self.train.cuts[index].id for group in groups for index in group)

    def _loss(self, batch: Batch, rng: np.random.Generator | None) -> Loss:
        model = self.module
        batch = batch.to(next(model.parameters()).device)
        features, num_features = model.features(batch.waveforms, batch.num_samples)
        if self.spec_augment is not None and rng is not None:
            features = self.spec_augment(features, num_features, rng)
        frames, num_frames = model.encode(features, num_features)
        log_probs = model.log_probs(frames)  # (B, T, V)
        labels = [model.tokenizer.encode(text, add_special_tokens=False) for text in batch.texts]
        lengths = torch.tensor([len(label) for label in labels])
        total = nn.functional.ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor([unit for label in labels for unit in label], device=log_probs.device),
            num_frames,
            lengths,
            blank=model.blank,
            reduction="sum",
            zero_infinity=True,  # augmentation may leave fewer frames than letters, for once
        )
        hypotheses = model.greedy(log_probs.detach(), num_frames)
        right = sum(len(t) for t, h in zip(batch.texts, hypotheses, strict=True) if t == h)
        return Loss(total, int(lengths.sum()), right, batch.seconds)
