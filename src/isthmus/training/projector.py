"""Training of the projector (and of parts that are not frozen) on transcripts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import TrainSettings
from isthmus.training.batches import Batch, Group, SpeechData
from isthmus.training.loop import Loss


class SpeechTask:
    """Cross-entropy (nats; units are transcript tokens) and next-token accuracy."""

    def __init__(
        self, model: SpeechLLM, train: SpeechData, dev: SpeechData | None, settings: TrainSettings
    ):
        self.module = model
        self.train = train
        self.dev = dev
        self.settings = settings

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return self.module.trainable()

    def state(self) -> Mapping[str, Tensor]:
        return self.module.trained_state()

    def plan(self, epoch: int) -> list[list[Group]]:
        return self.train.plan(self.settings, epoch)

    def loss(self, groups: Sequence[Group], epoch: int) -> Loss:
        return self._loss(self.train.batch(groups, epoch))

    def dev_losses(self) -> Sequence[Callable[[], Loss]]:
        if self.dev is None:
            return []
        return [partial(self._dev_loss, groups) for groups in self.dev.plan(self.settings, 0)]

    def describe(self, groups: Sequence[Group]) -> str:
        return ", ".join(self.train.cuts[index].id for group in groups for index in group)

    def _dev_loss(self, groups: Sequence[Group]) -> Loss:
        assert self.dev is not None
        return self._loss(self.dev.batch(groups))

    def _loss(self, batch: Batch) -> Loss:
        batch = batch.to(next(self.module.projector.parameters()).device)
        total, units, correct = self.module.loss(batch.waveforms, batch.num_samples, batch.texts)
        return Loss(total, units, correct, batch.seconds)
