"""Progress for people: a bar on a terminal, plain lines in a log, curves in TensorBoard."""

import gc
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from isthmus.errors import IsthmusError

LINES_EVERY = 50  # steps between lines in a log
PATIENCE = 0.5  # seconds without a word on a terminal
WINDOW = 20  # steps averaged for display

errors = Console(stderr=True)
log = logging.getLogger(__name__)

Metrics = dict[str, Any]


class TrainingDisplay:
    """Shows the metrics of training steps, with whatever of them there is."""

    def __init__(self, console: Console, bar: Progress | None, total: int):
        self.console = console
        self.bar = bar
        self.task = bar.add_task("training", total=total, text="") if bar else None
        self.recent: deque[Metrics] = deque(maxlen=WINDOW)
        self.total = total
        self.left_out = 0

    def __call__(self, metrics: Metrics) -> None:
        step = metrics["step"]
        self.recent.append(metrics)
        self.left_out += len(metrics.get("rejected", ()))  # the training itself names them
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, text=self._line())
        elif step % LINES_EVERY == 0 or step == self.total:
            self._print(f"step {step}/{self.total} | {self._line()}")
        if "dev_loss" in metrics:
            self._print(
                f"step {step}: validation loss {metrics['dev_loss']:.4f}, accuracy "
                f"{metrics['dev_accuracy']:.1%}"
            )
        if "skipped" in metrics:
            self._print(
                f"step {step}: loss or gradient not finite, step skipped: "
                f"{'; '.join(metrics['skipped'])}"
            )

    def _print(self, line: str) -> None:
        """As it is: no colours, no markup, and a line stays a line in a log of any width."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _line(self) -> str:
        """What matters most comes first: a narrow terminal cuts the end off."""
        applied = [metrics for metrics in self.recent if "skipped" not in metrics]
        units = max(1, sum(metrics.get("units", 0) for metrics in applied))
        parts = [
            f"loss {_mean(applied, 'loss', 'units'):.3f}",
            f"accuracy {_mean(applied, 'accuracy', 'units'):.1%}",
        ]
        seconds = sum(metrics.get("step_seconds", 0.0) for metrics in self.recent)
        if seconds:
            left = (self.total - self.recent[-1]["step"]) * seconds / len(self.recent)
            audio = sum(metrics.get("audio_seconds", 0.0) for metrics in self.recent)
            speed = f"{audio / seconds:.0f} s audio" if audio else f"{units / seconds:.0f} tokens"
            parts += [f"{timedelta(seconds=round(left))} left", f"{speed}/s"]
        if any("padding" in metrics for metrics in self.recent):
            parts.append(f"padding {_mean(self.recent, 'padding'):.1%}")
        if "memory_gb" in self.recent[-1]:
            parts.append(f"{self.recent[-1]['memory_gb']:.1f} GB")
        if any("mfu" in metrics for metrics in self.recent):
            parts.append(f"MFU {_mean(self.recent, 'mfu', 'step_seconds'):.1%}")
        if self.left_out:
            parts.append(f"left out {self.left_out}")
        return " | ".join(parts)


def _mean(steps: Iterable[Metrics], key: str, weight: str | None = None) -> float:
    """Mean of a figure over the steps that have it; not a number where none has."""
    pairs = [(step[key], step.get(weight, 0) if weight else 1) for step in steps if key in step]
    total = sum(share for _, share in pairs)
    return sum(value * share for value, share in pairs) / total if total else math.nan


@contextmanager
def training_display(total: int, console: Console | None = None) -> Iterator[TrainingDisplay]:
    """A display for `total` steps; give it to a training job as `on_step`."""
    console = console or errors
    if not console.is_terminal:
        yield TrainingDisplay(console, None, total)
        return
    columns = (
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[text]}", table_column=Column(ratio=1)),  # only this is cut
    )
    with Progress(*columns, console=console, expand=True) as bar:
        yield TrainingDisplay(console, bar, total)


@contextmanager
def training_observer(
    total: int, curves: Path | None = None
) -> Iterator[Callable[[Metrics], None]]:
    """Shows the metrics of training steps, and draws them for TensorBoard in folder `curves`."""
    board = TensorBoard(curves) if curves else None
    with training_display(total) as display, board or nullcontext():

        def observe(metrics: Metrics) -> None:
            display(metrics)
            if board is not None:
                board(metrics)

        yield observe


CURVES = {  # their names in TensorBoard, where what stands before the stroke makes a group
    "loss": "loss/train",
    "dev_loss": "loss/validation",
    "accuracy": "accuracy/train",
    "dev_accuracy": "accuracy/validation",
    "learning_rate": "optimiser/learning rate",
    "gradient_norm": "optimiser/gradient norm",
    "audio_speed": "speed/audio seconds a second",
    "tflops": "speed/model TFLOP a second",
    "mfu": "speed/model FLOP utilisation",
    "padding": "speed/padding",
    "memory_gb": "memory/peak GB",
}


class TensorBoard:
    """Writes the metrics of training steps as curves; a context, as which it is closed.

    Give it to a training job as `on_step`. `folder` is made at the first step. What TensorBoard
    already has there of that step and later ones is void: a run that was resumed makes them again.
    """

    def __init__(self, folder: Path):
        """Raises IsthmusError where TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise IsthmusError(
                f"Curves for TensorBoard need the extra `log` ({error.name} is not installed). "
                "Install it: pip install 'isthmus[log]'"
            ) from error
        self._open = partial(SummaryWriter, str(folder))
        self._writer: SummaryWriter | None = None
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._forgiving():
            if self._writer is not None:
                self._writer.close()

    def __call__(self, metrics: Metrics) -> None:
        with self._forgiving():
            if self._writer is None and not self._failed:
                self._writer = self._open(purge_step=metrics["step"])
            if self._writer is not None:
                for name, value in _curves(metrics).items():
                    self._writer.add_scalar(CURVES[name], value, metrics["step"])

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Training does not end for curves, which metrics.jsonl holds too."""
        try:
            yield
        except OSError as error:
            self._writer, self._failed = None, True
            log.warning("TensorBoard's files cannot be written: %s. Going on without them.", error)


def _curves(metrics: Metrics) -> dict[str, float]:
    found = {name: metrics[name] for name in CURVES if name in metrics}
    if metrics.get("audio_seconds") and metrics.get("step_seconds"):
        found["audio_speed"] = metrics["audio_seconds"] / metrics["step_seconds"]
    return found


@contextmanager
def loading(what: str, console: Console | None = None) -> Iterator[None]:
    """Says on a terminal what it waits for, where that takes more than a moment."""
    console = console or errors
    line = f"loading {what} …"
    timer = Timer(PATIENCE, console.print, (line,), {"highlight": False, "markup": False})
    timer.daemon = True
    if console.is_terminal:
        timer.start()
    gc.disable()  # what is loaded stays: to search it for garbage, now and again, takes seconds
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        timer.cancel()


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A counter of `what` to call with (done, total)."""
    if not errors.is_terminal:
        yield lambda done, total: None
        return
    with Progress(
        BarColumn(), TextColumn("{task.completed}/{task.total} " + what), console=errors
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output, its first column to the left, the others to the right."""
    table = Table(box=None)
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def print_scores(report: dict[str, Any], own: Mapping[str, Any] | None = None) -> None:
    """A table of error rates: each set, and all where there are several.

    Of the decoding settings the beam is named, and what is not as in the run's `own`.
    """
    table = Table(box=None)
    for column in ("set", "WER %", "95 %", "CER %", "sub", "ins", "del", "words"):
        table.add_column(column, justify="left" if column == "set" else "right")
    rows = _rows(report)
    rows += [(f"language {name}", score) for name, score in report.get("languages", {}).items()]
    if "ctc" in report:
        rows += [(f"{name} (CTC)", score) for name, score in _rows(report["ctc"])]
    for name, score in rows:
        interval = score["interval"]
        between = "" if interval is None else f"{interval[0] * 100:.1f}-{interval[1] * 100:.1f}"
        counts = [str(score[key]) for key in ("sub", "ins", "del", "words")]
        table.add_row(name, _percent(score["wer"]), between, _percent(score["cer"]), *counts)
    if "macro" in report:
        rates = report["macro"]
        table.add_row("mean of languages", _percent(rates["wer"]), "", _percent(rates["cer"]))
    Console().print(table)
    Console().print(f"normaliser: {report['normaliser']}", highlight=False)
    if decode := report.get("decode"):
        other = [name for name, value in (own or decode).items() if decode[name] != value]
        changed = [f"{name} {decode[name]}" for name in other if name != "beam_size"]
        beam = [f"beam {decode['beam_size']}"] if decode.get("beam_size") else []
        if beam or changed:
            line = f"decode: {', '.join([*beam, *changed])}"
            Console().print(line, highlight=False, markup=False, soft_wrap=True)
    for key, what in (
        ("left_out", "left out of {}"),
        ("unheard", "not heard in {}, their words counted as deleted"),
    ):
        for name, reasons in report.get(key, {}).items():
            if reasons:
                summary = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
                line = f"{what.format(name)}: {summary}"
                Console().print(line, highlight=False, markup=False, soft_wrap=True)


def print_comparison(report: dict[str, Any]) -> None:
    """A table of two systems' error rates: each set, and all where there are several."""
    titles = ("set", "WER % a", "WER % b", "a - b", "95 %", "p", "wins", "losses", "ties")
    rows = []
    for name, one in _rows(report):
        low, high = (f"{100 * value:+.2f}" for value in one["difference_interval"])
        counts = [str(one[key]) for key in ("wins", "losses", "ties")]
        difference = f"{100 * one['difference']:+.2f}"
        rates = [_percent(one["wer_a"]), _percent(one["wer_b"]), difference, f"{low} to {high}"]
        rows.append([name, *rates, f"{one['p_value']:.2g}", *counts])
    print_table(titles, rows)
    Console().print(f"normaliser: {report['normaliser']}", highlight=False)


def _rows(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The scores of each set, and of all where there are several."""
    rows = list(report["sets"].items())
    return rows if len(rows) == 1 else [*rows, ("all", report)]


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate * 100:.2f}"
