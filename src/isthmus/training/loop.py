"""The training loop: one for the projector, the CTC encoder and the language model alike."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.recipe import TrainSettings
from isthmus.training import checkpoint
from isthmus.training.checkpoint import Progress

BEST = "best"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
NON_FINITE_IN_A_ROW = 3


@dataclass(frozen=True)
class Loss:
    """Sums over the supervised units (tokens) of a batch."""

    total: Tensor  # () differentiable
    units: int
    correct: int
    seconds: float = 0.0  # audio


class Task(Protocol):
    """What can be trained: a module, its batches, its loss."""

    module: nn.Module

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """The parameters that the optimiser moves, by name."""

    def state(self) -> Mapping[str, Tensor]:
        """All that training changes, to be stored: trainable parameters and running statistics."""

    def plan(self, epoch: int) -> Sequence[Any]:
        """The batches of an epoch, as `loss` takes them: the same for the same epoch."""

    def loss(self, batch: Any, epoch: int) -> Loss:
        """Loss of one training batch."""

    def dev_losses(self) -> Sequence[Callable[[], Loss]]:
        """The validation batches, in a fixed order; empty without validation."""

    def describe(self, batch: Any) -> str:
        """The utterances of a batch, for messages."""


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Rate of update `step` (from 0): linear warm-up, then constant, linear or cosine decay."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    done = max(0, step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": max(0.0, 1.0 - done),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))),
    }[settings.schedule]
    return settings.learning_rate * warm * decay


def fit(
    task: Task,
    settings: TrainSettings,
    folder: Path,
    *,
    resume: bool = False,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> Progress:
    """Train until `steps`, or until the validation loss no longer falls; returns where it ended.

    `folder` receives `checkpoints/step-N` (to resume), `best` (weights of the lowest validation
    loss, or the last ones) and `metrics.jsonl`. `on_step` sees each line of metrics.
    """
    weights = task.trainable()
    if not weights:
        raise IsthmusError("Nothing to train: every part is frozen. Set `tune` of a part.")
    optimiser = torch.optim.AdamW(
        weights.values(), betas=settings.betas, weight_decay=settings.weight_decay
    )
    progress = _start(task, optimiser, folder, resume)
    task.module.train()
    for dev_loss in list(task.dev_losses())[:2]:  # a broken validation fails now, not in an hour
        with torch.no_grad():
            dev_loss()
    non_finite = 0
    with (folder / METRICS).open("a", encoding="utf-8") as log:
        plan = task.plan(progress.epoch)
        while progress.step < settings.steps and progress.stale <= settings.patience:
            if progress.position >= len(plan):
                progress.epoch, progress.position = progress.epoch + 1, 0
                plan = task.plan(progress.epoch)
            started = time.perf_counter()
            rate = learning_rate(settings, progress.step)
            for group in optimiser.param_groups:
                group["lr"] = rate
            batches = plan[progress.position : progress.position + settings.accumulate]

            # --- one optimiser step: sum over the batches, divide by all their units
            optimiser.zero_grad(set_to_none=True)
            losses = [_backward(task, batch, progress.epoch, settings.precision) for batch in batches]
            units = sum(loss.units for loss in losses)
            for parameter in weights.values():
                if parameter.grad is not None:
                    parameter.grad /= max(1, units)
            norm = nn.utils.clip_grad_norm_(weights.values(), settings.clip_norm or math.inf)
            mean = float(sum(loss.total.detach() for loss in losses)) / max(1, units)
            finite = math.isfinite(mean) and math.isfinite(float(norm))
            if finite:
                optimiser.step()
            non_finite = 0 if finite else non_finite + 1

            # --- count, log, validate, save
            progress.step += 1
            progress.position += len(batches)
            seconds = sum(loss.seconds for loss in losses)
            progress.audio_seconds += seconds
            metrics: dict[str, Any] = {
                "step": progress.step,
                "epoch": progress.epoch,
                "loss": mean,
                "accuracy": sum(loss.correct for loss in losses) / max(1, units),
                "learning_rate": rate,
                "gradient_norm": float(norm),
                "units": units,
                "audio_seconds": seconds,
                "step_seconds": time.perf_counter() - started,
            }
            if not finite:
                metrics["skipped"] = [task.describe(batch) for batch in batches]
            if progress.step % settings.eval_every == 0 or progress.step == settings.steps:
                metrics |= _validate(task, progress, folder)
            _write_line(log, metrics)
            if not finite and non_finite >= NON_FINITE_IN_A_ROW:
                raise IsthmusError(
                    f"Loss or gradient was not finite {non_finite} times in a row, last at step "
                    f"{progress.step} with {metrics['skipped']}. No such step was applied. Lower "
                    "train.learning_rate, or look at these utterances."
                )
            if progress.step % settings.save_every == 0 or progress.step == settings.steps:
                _save(task, progress, optimiser, folder, settings.keep)
            on_step(metrics)
    if not task.dev_losses():
        checkpoint.save_checkpoint(folder / BEST, task.state(), progress)
    if progress.step % settings.save_every and progress.step != settings.steps:
        _save(task, progress, optimiser, folder, settings.keep)
    return progress


def _backward(task: Task, batch: Any, epoch: int, precision: str) -> Loss:
    device = next(task.module.parameters()).device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        loss = task.loss(batch, epoch)
    loss.total.backward()
    return loss


def _validate(task: Task, progress: Progress, folder: Path) -> dict[str, float]:
    """Mean validation loss and accuracy; keeps the best weights."""
    dev = task.dev_losses()
    if not dev:
        return {}
    random_state = torch.get_rng_state()
    task.module.eval()
    with torch.no_grad():
        losses = [dev_loss() for dev_loss in dev]
    task.module.train()
    torch.set_rng_state(random_state)
    units = max(1, sum(loss.units for loss in losses))
    mean = float(sum(loss.total for loss in losses)) / units
    if progress.best_loss is None or mean < progress.best_loss:
        progress.best_loss, progress.best_step, progress.stale = mean, progress.step, 0
        checkpoint.save_checkpoint(folder / BEST, task.state(), progress)
    else:
        progress.stale += 1
    return {"dev_loss": mean, "dev_accuracy": sum(loss.correct for loss in losses) / units}


def _save(
    task: Task, progress: Progress, optimiser: torch.optim.Optimizer, folder: Path, keep: int
) -> None:
    target = folder / CHECKPOINTS / f"step-{progress.step:06d}"
    checkpoint.save_checkpoint(
        target, task.state(), progress, checkpoint.optimiser_state(optimiser, task.trainable())
    )
    checkpoint.retire(folder / CHECKPOINTS, keep)


def _start(
    task: Task, optimiser: torch.optim.Optimizer, folder: Path, resume: bool
) -> Progress:
    """Progress to go on from: of the newest sound checkpoint when resuming, else none."""
    if not resume:
        return Progress()
    newest, faults = checkpoint.newest_checkpoint(folder / CHECKPOINTS)
    if newest is None:
        if checkpoint.checkpoints(folder / CHECKPOINTS):
            raise IsthmusError("No checkpoint is sound: " + " ".join(faults))
        (folder / METRICS).unlink(missing_ok=True)  # stopped before its first checkpoint
        return Progress()
    progress = checkpoint.restore(newest, task.state(), task.trainable(), optimiser)
    _cut_log(folder / METRICS, progress.step)
    return progress


def _cut_log(path: Path, step: int) -> None:
    """Drop the lines of steps that will be made again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the line that a crash cut short
    path.write_text("".join(kept), encoding="utf-8")


def _write_line(log: Any, metrics: dict[str, Any]) -> None:
    log.write(json.dumps(metrics) + "\n")
    log.flush()
