"""Progress for people: a bar on a terminal, plain lines in a log."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

LINES_EVERY = 50  # steps between lines in a log
WINDOW = 20  # steps averaged for display

errors = Console(stderr=True)


class TrainingDisplay:
    """Shows the metrics of training steps."""

    def __init__(self, console: Console, bar: Progress | None, total: int):
        self.console = console
        self.bar = bar
        self.task = bar.add_task("training", total=total, text="") if bar else None
        self.recent: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self.total = total

    def __call__(self, metrics: dict[str, Any]) -> None:
        self.recent.append(metrics)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=metrics["step"], text=self._line())
        elif metrics["step"] % LINES_EVERY == 0:
            self.console.print(
                f"step {metrics['step']}/{self.total} | {self._line()}", highlight=False
            )
        if "dev_loss" in metrics:
            self.console.print(
                f"step {metrics['step']}: validation loss {metrics['dev_loss']:.4f}, accuracy "
                f"{metrics['dev_accuracy']:.1%}",
                highlight=False,
            )
        if "skipped" in metrics:
            self.console.print(f"step {metrics['step']}: not finite, skipped {metrics['skipped']}")

    def _line(self) -> str:
        units = max(1, sum(m["units"] for m in self.recent))
        seconds = sum(m["step_seconds"] for m in self.recent)
        audio = sum(m["audio_seconds"] for m in self.recent)
        loss = sum(m["loss"] * m["units"] for m in self.recent) / units
        accuracy = sum(m["accuracy"] * m["units"] for m in self.recent) / units
        speed = (
            f" | {audio / seconds:.0f} s audio/s" if audio else f" | {units / seconds:.0f} tokens/s"
        )
        return f"loss {loss:.3f} | accuracy {accuracy:.1%}{speed}"


@contextmanager
def training_display(total: int, console: Console | None = None) -> Iterator[TrainingDisplay]:
    """A display for `total` steps; give it to a training job as `on_step`."""
    console = console or errors
    if not console.is_terminal:
        yield TrainingDisplay(console, None, total)
        return
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield TrainingDisplay(console, bar, total)


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


def print_scores(report: dict[str, Any]) -> None:
    """A table of error rates: each set, and all."""
    table = Table(box=None)
    for column in ("set", "WER %", "95 %", "CER %", "sub", "ins", "del", "words"):
        table.add_column(column, justify="left" if column == "set" else "right")
    rows = [*report["sets"].items(), ("all", report)]
    if "ctc" in report:
        rows += [
            (f"{n} (CTC)", s) for n, s in [*report["ctc"]["sets"].items(), ("all", report["ctc"])]
        ]
    for name, score in rows:
        interval = score["interval"]
        between = "" if interval is None else f"{interval[0] * 100:.1f}-{interval[1] * 100:.1f}"
        counts = [str(score[key]) for key in ("sub", "ins", "del", "words")]
        table.add_row(name, _percent(score["wer"]), between, _percent(score["cer"]), *counts)
    Console().print(table)
    Console().print(f"normaliser: {report['normaliser']}", highlight=False)
    for name, reasons in report["left_out"].items():
        if reasons:
            summary = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
            Console().print(f"left out of {name}: {summary}", highlight=False, markup=False)


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate * 100:.2f}"
