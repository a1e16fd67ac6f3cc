"""The training loop: one for the projector, the CTC encoder and the language model alike."""

import contextlib
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.files import write_atomic
from isthmus.recipe import LoopSettings
from isthmus.training import checkpoint
from isthmus.training.checkpoint import Progress

BEST = "best"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
NON_FINITE_IN_A_ROW = 3

OnStep = Callable[[dict[str, Any]], None]
log = logging.getLogger(__name__)


class Interrupted(SystemExit):
    """SIGINT or SIGTERM came: the step is finished and a checkpoint saved, to resume from.

    Not caught, it ends the process as a shell expects: exit code 130 or 143.
    """

    def __init__(self, number: int, step: int):
        super().__init__(128 + number)
        self.step = step


@dataclass(frozen=True)
class Loss:
    """Sums over the supervised units (tokens) of a batch."""

    total: Tensor  # () differentiable
    units: int
    correct: int
    seconds: float = 0.0  # audio


class Task(Protocol):
    """What can be trained: a module, its batches, its loss."""

    @property
    def module(self) -> nn.Module:
        """What is put into training and evaluation mode."""

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


def learning_rate(settings: LoopSettings, step: int) -> float:
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
    settings: LoopSettings,
    folder: Path,
    *,
    resume: bool = False,
    on_step: OnStep = lambda metrics: None,
) -> Progress:
    """Train until `steps`, or until the validation loss no longer falls; returns where it ended.

    `folder` receives `checkpoints/step-N` (to resume), `best` (what was trained, at the lowest
    validation loss, or at the end without validation) and `metrics.jsonl`, a line a step. `on_step`
    sees each line. Raises Interrupted after a step in which SIGINT or SIGTERM came; a second signal
    acts at once.
    """
    trainable = task.trainable()
    if not trainable:
        raise IsthmusError("Nothing to train: every part is frozen. Set `tune` of a part.")
    optimiser = torch.optim.AdamW(
        trainable.values(), betas=settings.betas, weight_decay=settings.weight_decay
    )
    _dev_loss(task, settings, first=2)  # a broken validation fails now, not in an hour
    progress = _start(task, optimiser, folder, resume)
    task.module.train()
    plan = task.plan(progress.epoch)
    non_finite = 0
    with (folder / METRICS).open("a", encoding="utf-8") as lines, _signals() as received:
        while progress.step < settings.steps and progress.stale < settings.patience:
            if progress.position >= len(plan):
                progress.epoch, progress.position = progress.epoch + 1, 0
                plan = task.plan(progress.epoch)
            batches = plan[progress.position : progress.position + settings.accumulate]
            metrics = _step(task, settings, optimiser, batches, progress)
            progress.step += 1
            progress.position += len(batches)
            last = progress.step == settings.steps
            if last or progress.step % settings.eval_every == 0:
                metrics |= _validate(task, settings, progress, folder)
            lines.write(json.dumps(metrics) + "\n")
            lines.flush()
            non_finite = non_finite + 1 if "skipped" in metrics else 0
            if non_finite == NON_FINITE_IN_A_ROW:
                raise IsthmusError(
                    f"Loss or gradient was not finite {non_finite} times in a row, last at step "
                    f"{progress.step} with {metrics['skipped']}. None of these steps was applied. "
                    "Lower train.learning_rate, or look at these utterances."
                )
            last = last or progress.stale == settings.patience
            stop = next(iter(received), None)
            if last or stop or progress.step % settings.save_every == 0:
                _save(task, progress, optimiser, folder, settings.keep)
            on_step(metrics)
            if stop:
                log.warning("Stopped after step %d; --resume goes on from it.", progress.step)
                raise Interrupted(stop, progress.step)
    if progress.best_loss is None:
        checkpoint.save_checkpoint(folder / BEST, task.state(), progress)
    return progress


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGINT and SIGTERM that came meanwhile; the second of a kind acts as it would without."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can listen
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    found = {int(n): signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    # what the shell lets a background job ignore stays ignored
    before = {n: handler for n, handler in found.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _autocast(task: Task, settings: LoopSettings) -> torch.autocast:
    device = next(iter(task.trainable().values())).device.type
    return torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bfloat16")


def _step(
    task: Task,
    settings: LoopSettings,
    optimiser: torch.optim.Optimizer,
    batches: Sequence[Any],
    progress: Progress,
) -> dict[str, Any]:
    """One optimiser step on the sum of the batches' losses over all their units; its metrics.

    A step whose loss or gradient is not finite changes nothing, and is listed as skipped.
    """
    started = time.perf_counter()
    rate = learning_rate(settings, progress.step)
    trainable = task.trainable()
    parameters = list(trainable.values())
    buffers = {name: v.clone() for name, v in task.state().items() if name not in trainable}
    optimiser.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        with _autocast(task, settings):
            loss = task.loss(batch, progress.epoch)
        loss.total.backward()
        losses.append(replace(loss, total=loss.total.detach()))
    units = max(1, sum(loss.units for loss in losses))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= units
    norm = float(nn.utils.clip_grad_norm_(parameters, settings.clip_norm or math.inf))
    mean = float(sum(loss.total for loss in losses)) / units
    finite = math.isfinite(mean) and math.isfinite(norm)
    if finite:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
    else:
        state = task.state()
        for name, value in buffers.items():
            state[name].copy_(value)
    seconds = sum(loss.seconds for loss in losses)
    progress.audio_seconds += seconds
    metrics = {
        "step": progress.step + 1,
        "epoch": progress.epoch,
        "loss": mean,
        "accuracy": sum(loss.correct for loss in losses) / units,
        "learning_rate": rate,
        "gradient_norm": norm,
        "units": units,
        "audio_seconds": seconds,
        "step_seconds": time.perf_counter() - started,
    }
    return metrics if finite else metrics | {"skipped": [task.describe(b) for b in batches]}


def _dev_loss(task: Task, settings: LoopSettings, first: int | None = None) -> Loss | None:
    """Loss of the validation batches together, or of the `first` of them; leaves no trace."""
    task.module.eval()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad(), _autocast(task, settings):
        losses = [dev_loss() for dev_loss in task.dev_losses()[:first]]
    task.module.train()
    if not losses:
        return None
    total = torch.stack([loss.total for loss in losses]).sum()
    units = max(1, sum(loss.units for loss in losses))
    return Loss(total, units, sum(loss.correct for loss in losses))


def _validate(
    task: Task, settings: LoopSettings, progress: Progress, folder: Path
) -> dict[str, float]:
    """Mean validation loss and accuracy; keeps what gave the lowest, if it is finite."""
    loss = _dev_loss(task, settings)
    if loss is None:
        return {}
    mean = float(loss.total) / loss.units
    if math.isfinite(mean) and (progress.best_loss is None or mean < progress.best_loss):
        progress.best_loss, progress.best_step, progress.stale = mean, progress.step, 0
        checkpoint.save_checkpoint(folder / BEST, task.state(), progress)
    else:
        progress.stale += 1
    return {"dev_loss": mean, "dev_accuracy": loss.correct / loss.units}


def _save(
    task: Task, progress: Progress, optimiser: torch.optim.Optimizer, folder: Path, keep: int
) -> None:
    target = folder / CHECKPOINTS / f"step-{progress.step:06d}"
    checkpoint.save_checkpoint(
        target, task.state(), progress, checkpoint.optimiser_state(optimiser, task.trainable())
    )
    checkpoint.retire(folder / CHECKPOINTS, keep)


def _start(task: Task, optimiser: torch.optim.Optimizer, folder: Path, resume: bool) -> Progress:
    """Progress to go on from: of the newest sound checkpoint when resuming, else none.

    Newer ones that are not sound are removed, lest they count among those to keep.
    """
    if not resume:
        return Progress()
    newest, faults = checkpoint.newest_checkpoint(folder / CHECKPOINTS)
    if newest is None:
        if checkpoint.checkpoints(folder / CHECKPOINTS):
            raise IsthmusError("No checkpoint is sound: " + " ".join(faults))
        (folder / METRICS).unlink(missing_ok=True)  # stopped before its first checkpoint
        return Progress()
    found = checkpoint.checkpoints(folder / CHECKPOINTS)
    for path in found[found.index(newest) + 1 :]:
        shutil.rmtree(path)
    for fault in faults:
        log.warning("%s It is removed; training goes on from %s.", fault, newest.name)
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
    write_atomic(path, "".join(kept))
