"""Pretraining of a Conformer encoder with CTC."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.model.conformer import ConformerCTC
from isthmus.recipe import CTCRecipe
from isthmus.training.batches import Batch, Group, SpeechData
from isthmus.training.loop import Loss

# a batch, and the stream of random numbers that its masks come from
Loaded = tuple[Batch, np.random.Generator | None]


class CTCTask:
    """CTC loss (nats, summed); correct are the spelling units of texts got right."""

    def __init__(
        self,
        model: ConformerCTC,
        train: SpeechData,
        dev: SpeechData | None,
        recipe: CTCRecipe,
    ):
        self.module = model
        self.train = train
        self.dev = dev
        self.settings = recipe.train
        self.spec_augment = recipe.data.spec_augment
        self.seed = recipe.seed
        self.bad_fraction = recipe.data.max_bad_fraction

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def state(self) -> Mapping[str, Tensor]:
        return self.module.state_dict()  # with the running statistics of batch norm

    def plan(self, epoch: int) -> list[list[Group]]:
        return self.train.plan(self.settings, epoch)

    def dev_plan(self) -> list[list[Group]]:
        return self.dev.plan(self.settings, 0) if self.dev else []

    def load(self, groups: Sequence[Group], epoch: int | None) -> Loaded:
        if epoch is None:
            assert self.dev is not None
            return self.dev.batch(groups), None
        masks = np.random.default_rng([self.seed, epoch, *groups[0], 2])
        return self.train.batch(groups, epoch), masks

    def describe(self, groups: Sequence[Group]) -> str:
        return self.train.names(groups)

    def loss(self, loaded: Loaded) -> Loss:
        batch, rng = loaded
        if not batch.ids:
            return Loss(torch.tensor(0.0), 0, 0, rejected=batch.rejected)
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
            zero_infinity=True,  # augmentation may leave fewer frames than units, for once
        )
        hypotheses = model.greedy(log_probs.detach(), num_frames)
        pairs = zip(batch.texts, hypotheses, labels, strict=True)
        right = sum(len(label) for text, hypothesis, label in pairs if text == hypothesis)
        return Loss(
            total, int(lengths.sum()), right, seconds=batch.seconds, rejected=batch.rejected
        )
