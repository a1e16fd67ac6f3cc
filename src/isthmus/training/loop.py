"""The training loop: one for the projector, the CTC encoder and the language model alike."""

import contextlib
import errno
import json
import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError, RetryLater
from isthmus.files import remove_folder, write_atomic
from isthmus.runs import checkpoint
from isthmus.runs.checkpoint import Progress
from isthmus.runs.folder import BEST, CHECKPOINTS
from isthmus.settings.optimisation import LoopSettings
from isthmus.training.hardware import peak_flops
from isthmus.training.parallel import Ranks
from isthmus.training.stream import Item, Loader, dev_orders, load_ahead, orders, take

METRICS = "metrics.jsonl"
NON_FINITE_IN_A_ROW = 3
NON_FINITE_SHARE = 0.001  # of all steps, beyond the first three
GPU_WORKERS = 4

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
    correct: Tensor | int
    seconds: float = 0.0  # audio
    positions: int = 0  # that the network works on, padding among them
    padding: int = 0
    flops: float = 0.0  # of the model, forward and backward
    ctc: Tensor | float = 0.0  # () a second loss, in the gradient of total alone
    rejected: tuple[str, ...] = ()  # what could not be loaded, and why


class Task(Loader, Protocol):
    """What can be trained: a module, its batches, its loss."""

    @property
    def module(self) -> nn.Module:
        """What is put into training and evaluation mode."""

    @property
    def bad_fraction(self) -> float:
        """Share of an epoch's utterances that may turn out to be unreadable."""

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """The parameters that the optimiser moves, by name."""

    def state(self) -> Mapping[str, Tensor]:
        """All that training changes, to be stored: trainable parameters and running statistics."""

    def plan(self, epoch: int) -> Sequence[Any]:
        """The batches of an epoch, as `load` takes them: the same for the same epoch."""

    def dev_plan(self) -> Sequence[Any]:
        """The validation batches; empty without validation."""

    def loss(self, loaded: Any) -> Loss:
        """Loss of a loaded batch."""

    def describe(self, batch: Any) -> str:
        """The utterances of a batch, for messages."""


@dataclass
class _Run:
    """What the functions of the loop share."""

    task: Task
    settings: LoopSettings
    folder: Path
    ranks: Ranks
    optimiser: torch.optim.Optimizer
    progress: Progress = field(default_factory=Progress)
    signals: list[int] = field(default_factory=list)  # that came to this process
    dev: Sequence[Any] = ()  # validation batches

    @property
    def workers(self) -> int:
        if self.settings.workers is not None:
            return self.settings.workers
        return GPU_WORKERS if self.ranks.device.type == "cuda" else 0

    def stopping(self) -> bool:
        """Whether a signal came, to this or another process."""
        return self.ranks.any(bool(self.signals))


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
    ranks: Ranks | None = None,
) -> Progress:
    """Train until `steps`, or until the validation loss no longer falls; returns where it ended.

    `folder` receives `checkpoints/step-N` (to resume), `best` (what was trained, at the lowest
    validation loss, or at the end without validation) and `metrics.jsonl`, a line a step. `on_step`
    sees each line. Raises Interrupted after a step in which SIGINT or SIGTERM came; a second signal
    acts at once. Under torchrun every process calls it; the first writes and reports.
    """
    run = _Run(task, settings, folder, ranks or Ranks(), _optimiser(task, settings))
    run.dev = task.dev_plan()
    fault = settings.warmup_fault()
    if fault and run.ranks.leads:
        log.warning("%s", fault)
    _start(run, resume)
    progress = run.progress
    plan = lru_cache(maxsize=2)(task.plan)
    width = settings.batches(run.ranks.world)
    _check_plan(run, plan(progress.epoch))
    place = progress.epoch, progress.position, width, run.ranks.rank, run.ranks.world
    loading = contextlib.closing(load_ahead(task, orders(plan, *place), run.workers))
    with _metrics_lines(run) as write, _signals(run.signals), loading as items:
        _dev_loss(run, first=2)  # a broken validation fails now, not in an hour
        while progress.pending is not None or _goes_on(run):
            if progress.pending is None:
                if progress.position >= len(plan(progress.epoch)):
                    progress.epoch, progress.position, progress.rejected = progress.epoch + 1, 0, 0
                count = min(width, len(plan(progress.epoch)) - progress.position)
                progress.pending = _step(run, items, count)
                progress.step += 1
                progress.position += count
            metrics, last = progress.pending, progress.step == settings.steps
            if last or progress.step % settings.eval_every == 0:
                dev = _validate(run)
                if dev is None:  # a signal: validate again when resumed
                    _save(run)
                    raise _interrupted(run)
                metrics |= dev
            progress.pending = None
            write(metrics)
            _check_budgets(run, metrics, plan(progress.epoch))
            last = last or progress.stale == settings.patience
            stop = run.stopping()
            if last or stop or progress.step % settings.save_every == 0:
                _save(run)
            if run.ranks.leads:
                on_step(metrics)
            if stop:
                raise _interrupted(run)
    if progress.best_loss is None:
        run.ranks.lead(lambda: checkpoint.save_checkpoint(folder / BEST, task.state(), progress))
    return progress


def _goes_on(run: _Run) -> bool:
    progress, settings = run.progress, run.settings
    return progress.step < settings.steps and progress.stale < settings.patience


def _optimiser(task: Task, settings: LoopSettings) -> torch.optim.Optimizer:
    trainable = task.trainable()
    if not trainable:
        raise IsthmusError("Nothing to train: every part is frozen. Set `tune` of a part.")
    return torch.optim.AdamW(
        trainable.values(), betas=settings.betas, weight_decay=settings.weight_decay
    )


def _step(run: _Run, items: Iterator[Item], count: int) -> dict[str, Any]:
    """One optimiser step on the sum of the batches' losses over all their units; its metrics.

    The `count` batches are those of all ranks. A step whose loss or gradient is not finite on any
    of them changes nothing, and is listed as skipped.
    """
    started = time.perf_counter()
    task, settings, ranks, optimiser = run.task, run.settings, run.ranks, run.optimiser
    trainable = task.trainable()
    parameters = list(trainable.values())
    running = {name: value for name, value in task.state().items() if name not in trainable}
    before = {name: value.clone() for name, value in running.items()}
    optimiser.zero_grad(set_to_none=True)
    own = take(items, -(-count // ranks.world))
    losses = [_backward(run, item) for item in own]
    counted = [loss for loss, item in zip(losses, own, strict=True) if item.order.counts]
    ranks.sum_gradients(parameters)
    ranks.average(running.values())
    sums = _sums(ranks, counted)
    units = max(1.0, sums["units"])
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= units
    norm = float(nn.utils.clip_grad_norm_(parameters, settings.clip_norm or math.inf))
    mean = sums["total"] / units
    rate = learning_rate(settings, run.progress.step)
    finite = math.isfinite(mean) and math.isfinite(norm)
    if finite:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
    else:
        for name, value in before.items():
            running[name].copy_(value)
    run.progress.audio_seconds += sums["seconds"]
    seconds = time.perf_counter() - started
    metrics: dict[str, Any] = {
        "step": run.progress.step + 1,
        "epoch": run.progress.epoch,
        "loss": mean,
        "accuracy": sums["correct"] / units,
        "learning_rate": rate,
        "gradient_norm": norm,
        "units": int(sums["units"]),
        "audio_seconds": sums["seconds"],
        "step_seconds": seconds,
        "memory_gb": peak_memory(ranks.device) / 1e9,
    } | _work(sums, seconds, ranks)
    if sums["ctc"]:
        metrics["ctc_loss"] = sums["ctc"] / units
    if sums["rejected"]:
        metrics["rejected"] = ranks.gather([line for loss in counted for line in loss.rejected])
    if not finite:
        metrics["skipped"] = _not_finite(run, own, losses)
    return metrics


def _work(sums: Mapping[str, float], seconds: float, ranks: Ranks) -> dict[str, float]:
    """Padding, speed and utilisation of the GPUs, where the task counts them."""
    found = {"padding": sums["padding"] / sums["positions"]} if sums["positions"] else {}
    if sums["flops"]:
        found["tflops"] = sums["flops"] / seconds / 1e12
        peak = peak_flops(ranks.device)
        if peak is not None:
            found["mfu"] = sums["flops"] / seconds / (peak * ranks.world)
    return found


def _backward(run: _Run, item: Item) -> Loss:
    """Loss of a batch, its gradient added to the parameters'."""
    torch.manual_seed(item.seed)
    with _autocast(run):
        loss = run.task.loss(item.loaded)
    if loss.total.requires_grad:
        (loss.total * float(item.order.counts)).backward()
    return replace(loss, total=loss.total.detach())


def _sums(ranks: Ranks, losses: Sequence[Loss]) -> dict[str, float]:
    """The losses' figures summed over batches and ranks."""
    names = ("total", "units", "correct", "seconds", "positions", "padding", "flops", "ctc")
    own = [float(sum(getattr(loss, name) for loss in losses)) for name in names]
    rejected = float(sum(len(loss.rejected) for loss in losses))
    return dict(zip([*names, "rejected"], ranks.sum([*own, rejected]), strict=True))


def _not_finite(run: _Run, items: Sequence[Item], losses: Sequence[Loss]) -> list[str]:
    """The batches whose loss is not finite; all of the step, where only the gradient is not."""
    pairs = [(item.order, loss) for item, loss in zip(items, losses, strict=True)]
    bad = [order for order, loss in pairs if order.counts and not loss.total.isfinite()]
    named = run.ranks.gather([run.task.describe(order.batch) for order in bad])
    return named or run.ranks.gather([run.task.describe(o.batch) for o, _ in pairs if o.counts])


def _check_plan(run: _Run, batches: Sequence[Any]) -> None:
    if not batches:
        raise IsthmusError("There is nothing to train on: the epoch has no batch.")
    if len(batches) < run.ranks.world:
        raise IsthmusError(
            f"An epoch has {len(batches)} batches for {run.ranks.world} processes. Start fewer, or "
            "make batches smaller (train.batch_size, train.max_duration, train.max_tokens)."
        )


def _check_budgets(run: _Run, metrics: Mapping[str, Any], batches: Sequence[Any]) -> None:
    """Raise IsthmusError when too many steps were not finite, or too many recordings are bad."""
    progress = run.progress
    rejected = metrics.get("rejected", ())
    for line in rejected:
        log.warning("step %d: left out: %s", progress.step, line)
    progress.rejected += len(rejected)
    utterances = sum(len(batch) for batch in batches)
    if progress.rejected > run.task.bad_fraction * utterances:
        raise IsthmusError(
            f"{progress.rejected} of the epoch's {utterances} utterances could not be loaded, more "
            f"than data.max_bad_fraction ({run.task.bad_fraction:.1%}) allows. The log names them, "
            "and `isthmus check` does."
        )
    if "skipped" not in metrics:
        progress.not_finite_in_a_row = 0
        return
    progress.not_finite += 1
    progress.not_finite_in_a_row += 1
    many = progress.not_finite > NON_FINITE_IN_A_ROW + NON_FINITE_SHARE * progress.step
    if many or progress.not_finite_in_a_row >= NON_FINITE_IN_A_ROW:
        raise IsthmusError(
            f"Loss or gradient was not finite {progress.not_finite_in_a_row} times in a row and "
            f"{progress.not_finite} times in all, last at step {progress.step} with "
            f"{metrics['skipped']}. None of these steps was applied. Lower train.learning_rate, or "
            "look at these utterances."
        )


@contextlib.contextmanager
def _metrics_lines(run: _Run) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Appends to metrics.jsonl; a full disk ends the run with one clear line."""
    if not run.ranks.leads:
        yield lambda metrics: None
        return
    path = run.folder / METRICS
    with path.open("ab", buffering=0) as lines:

        def write(metrics: Mapping[str, Any]) -> None:
            line = (json.dumps(_without_nan(metrics)) + "\n").encode()
            try:
                if lines.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise RetryLater(
                    f"{path} cannot be written ({error.strerror}). Make room, then go on with "
                    "--resume from the last checkpoint."
                ) from error

        yield write


def _without_nan(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no word for numbers that are not finite."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }


@contextlib.contextmanager
def _signals(received: list[int]) -> Iterator[None]:
    """Notes SIGINT and SIGTERM; the second of a kind acts as it would without."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can listen
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
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(run: _Run) -> Interrupted:
    log.warning("Stopped after step %d; --resume goes on from it.", run.progress.step)
    return Interrupted(next(iter(run.signals), signal.SIGTERM), run.progress.step)


def _autocast(run: _Run) -> torch.autocast:
    half = run.settings.precision == "bfloat16"
    return torch.autocast(run.ranks.device.type, torch.bfloat16, enabled=half)


def _dev_loss(run: _Run, first: int | None = None) -> Loss | None:
    """Loss of the validation batches together, or of the `first` of them.

    None without validation, and when a signal comes meanwhile. Leaves no trace.
    """
    task, ranks = run.task, run.ranks
    wanted = list(dev_orders(run.dev[:first], ranks.rank, ranks.world))
    task.module.eval()
    losses = []
    with contextlib.closing(load_ahead(task, wanted, run.workers if first is None else 0)) as items:
        for item in items:
            if run.stopping():
                break
            torch.manual_seed(item.seed)
            with torch.no_grad(), _autocast(run):
                losses.append(task.loss(item.loaded))
    task.module.train()
    if len(losses) < len(wanted) or not wanted:
        return None
    counted = [loss for loss, order in zip(losses, wanted, strict=True) if order.counts]
    sums = _sums(ranks, counted)
    _check_dev(run, sums, ranks.gather([line for loss in counted for line in loss.rejected]))
    return Loss(torch.tensor(sums["total"]), int(sums["units"]), int(sums["correct"]))


def _check_dev(run: _Run, sums: Mapping[str, float], rejected: Sequence[str]) -> None:
    """Raise IsthmusError where too little of the validation set was heard to judge by."""
    for line in rejected:
        log.warning("left out of validation: %s", line)
    utterances = sum(len(batch) for batch in run.dev)
    if len(rejected) > run.task.bad_fraction * utterances or not sums["units"]:
        raise IsthmusError(
            f"{len(rejected)} of {utterances} utterances to validate on could not be loaded, more "
            f"than data.max_bad_fraction ({run.task.bad_fraction:.1%}) allows. The log names them."
        )


def _validate(run: _Run) -> dict[str, float] | None:
    """Mean validation loss and accuracy; keeps what gave the lowest, if it is finite.

    Empty without validation, None if a signal came.
    """
    progress, task = run.progress, run.task
    loss = _dev_loss(run)
    if loss is None:
        return None if run.dev else {}
    mean = float(loss.total) / loss.units
    if math.isfinite(mean) and (progress.best_loss is None or mean < progress.best_loss):
        progress.best_loss, progress.best_step, progress.stale = mean, progress.step, 0
        best, kept = run.folder / BEST, replace(progress, pending=None)
        run.ranks.lead(lambda: checkpoint.save_checkpoint(best, task.state(), kept))
    else:
        progress.stale += 1
    return {"dev_loss": mean, "dev_accuracy": float(loss.correct) / loss.units}


def _save(run: _Run) -> None:
    """A checkpoint to resume from; older ones are deleted when it is sound."""
    target = run.folder / CHECKPOINTS / f"step-{run.progress.step:06d}"
    task = run.task

    def write() -> None:
        with (run.folder / METRICS).open("rb") as lines:
            os.fsync(lines.fileno())  # a checkpoint must not know more steps than the log
        tensors = checkpoint.optimiser_state(run.optimiser, task.trainable())
        checkpoint.save_checkpoint(target, task.state(), run.progress, tensors)
        checkpoint.retire(run.folder / CHECKPOINTS, run.settings.keep)

    run.ranks.lead(write)


def _start(run: _Run, resume: bool) -> None:
    """Set progress to that of the newest sound checkpoint when resuming.

    Newer ones that are not sound are removed, lest they count among those to keep.
    """
    if not resume:
        return
    run.ranks.lead(lambda: _clear_unsound(run.folder))
    newest, _ = checkpoint.newest_checkpoint(run.folder / CHECKPOINTS)
    seen = sorted(set(run.ranks.gather([newest.name if newest else "none"])))
    if len(seen) > 1:
        raise IsthmusError(
            f"{run.folder}: its processes see different checkpoints, {', '.join(seen)}. Put the "
            "run folder on a file system that all machines share."
        )
    if newest is None:
        log.info("%s has no checkpoint yet: it starts at step 1.", run.folder)
        return
    task = run.task
    run.progress = checkpoint.restore(newest, task.state(), task.trainable(), run.optimiser)
    log.info("Going on from %s.", newest)
    run.ranks.lead(lambda: _cut_log(run.folder / METRICS, _last_line(run.progress)))


def _clear_unsound(folder: Path) -> None:
    newest, faults = checkpoint.newest_checkpoint(folder / CHECKPOINTS)
    found = checkpoint.checkpoints(folder / CHECKPOINTS)
    if newest is None:
        if found:
            raise IsthmusError(
                f"No checkpoint is sound: {' '.join(faults)} Begin again in another folder, or "
                "with --overwrite."
            )
        (folder / METRICS).unlink(missing_ok=True)  # stopped before its first checkpoint
        return
    for path in found[found.index(newest) + 1 :]:
        remove_folder(path)
    for fault in faults:
        log.warning("%s It is removed; training goes on from %s.", fault, newest.name)


def _last_line(progress: Progress) -> int:
    """The step of the last line that is true of `progress`: one that is pending has none yet."""
    return progress.step - (progress.pending is not None)


def _cut_log(path: Path, step: int) -> None:
    """Drop the lines of steps that will be made again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the line that a crash cut short
    write_atomic(path, "".join(kept))


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
