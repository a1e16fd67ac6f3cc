"""Accuracy of runs side by side, and where each began to listen (SLAM-ASR, figures 2 to 4)."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.files import write_atomic
from isthmus.lab.emergence import Emergence, find_emergence
from isthmus.lab.figures import DASH
from isthmus.lab.report import STYLE, page
from isthmus.lab.svg import RunCurve, moving_mean, runs_chart
from isthmus.recipe_files import read_yaml
from isthmus.runs.folder import RECIPE
from isthmus.training.loop import METRICS

SMOOTH = 60  # windows of the moving mean in the longest curve
PAGE, DRAWING = ".html", ".svg"
EXPLAINED = (
    "Next-token accuracy in training, the mean of {window} steps. A dashed line is a jump from one "
    "plateau to another: there the language model began to listen."
)


@dataclass(frozen=True)
class RunAccuracy:
    """What a run has measured so far."""

    name: str  # unlike those of the runs beside it
    folder: str
    steps: tuple[int, ...]
    accuracy: tuple[float, ...]  # next-token, a fraction
    planned: int | None  # steps of its recipe; fewer where it stopped early or still goes on
    emergence: Emergence | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "folder": self.folder,
            "step": self.steps[-1],
            "planned_steps": self.planned,
            "emergence": asdict(self.emergence) if self.emergence else None,
        }

    @property
    def progress(self) -> str:
        """Its steps, in words."""
        last = f"{self.steps[-1]:,}"
        planned = self.planned
        return last if planned in (None, self.steps[-1]) else f"{last} of {planned:,}"


def read_runs(folders: Sequence[Path]) -> list[RunAccuracy]:
    """The accuracy curves of runs, finished or not.

    Raises IsthmusError for a folder without metrics, or none of a finite loss in them.
    """
    names = _names([folder.resolve() for folder in folders])
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The end of each path that no other shares, as short as can be; the whole for one twice."""
    names = []
    for folder in folders:
        for length in range(1, len(folder.parts) + 1):
            ends = [other.parts[-length:] for other in folders]
            if ends.count(folder.parts[-length:]) == 1:
                break
        names.append("/".join(folder.parts[-length:]).removeprefix("//"))
    return names


def _read_run(folder: Path, name: str) -> RunAccuracy:
    file = folder / METRICS
    if not file.is_file():
        raise IsthmusError(
            f"{folder} has no {METRICS}. Name a run folder that `isthmus train` made."
        )
    accuracy = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            metrics = json.loads(line)
            finite = metrics["loss"] is not None and math.isfinite(metrics["accuracy"])
            if finite and "skipped" not in metrics:
                accuracy[int(metrics["step"])] = float(metrics["accuracy"])
        except (ValueError, KeyError, TypeError):
            continue  # the last line, which is still being written or was cut short
    if not accuracy:
        raise IsthmusError(f"{file} holds no step yet. Wait until the run has made some.")
    steps = sorted(accuracy)
    curve = [accuracy[step] for step in steps]
    return RunAccuracy(
        name,
        str(folder),
        tuple(steps),
        tuple(curve),
        _planned(folder),
        find_emergence(steps, curve),
    )


def _planned(folder: Path) -> int | None:
    """Steps of the run's recipe, of whatever kind it is."""
    try:
        steps = read_yaml(folder / RECIPE)["train"]["steps"]
    except (OSError, IsthmusError, KeyError, TypeError):
        return None
    return int(steps)


def emergence_svg(runs: Sequence[RunAccuracy]) -> str:
    """One drawing of all runs."""
    window = _window(runs)
    curves = [
        RunCurve(
            run.name,
            _note(run),
            run.steps,
            moving_mean(run.accuracy, window),
            run.emergence.step if run.emergence else None,
        )
        for run in runs
    ]
    return runs_chart(curves, label="Next-token accuracy by training step")


def _window(runs: Sequence[RunAccuracy]) -> int:
    """Steps of the moving mean, the same for all, so that their jumps look alike."""
    return max(5, max(len(run.steps) for run in runs) // SMOOTH)


def write_emergence(runs: Sequence[RunAccuracy], file: Path) -> None:
    """A page (.html) or a drawing alone (.svg). Raises IsthmusError as `check_output` does."""
    check_output(file)
    drawing = emergence_svg(runs)
    if file.suffix == DRAWING:
        style = f"<style>{STYLE.read_text(encoding='utf-8')}svg {{ background: var(--paper); }}"
        write_atomic(file, drawing.replace(">", f">{style}</style>", 1) + "\n")
        return
    lead = EXPLAINED.format(window=_window(runs))
    head = f'<header><h1>Capability emergence</h1><p class="lead">{lead}</p></header>'
    titles = ("Run", "Steps", "Jump at step", "From %", "To %")
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in emergence_row(run))}</tr>"
        for run in runs
    )
    names = "".join(f"<th>{title}</th>" for title in titles)
    table = f'<table class="runs"><thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table>'
    sections = [
        head,
        f"<section><figure>{drawing}</figure></section>",
        f"<section>{table}</section>",
    ]
    write_atomic(file, page("Capability emergence", sections, ", ".join(r.folder for r in runs)))


def check_output(file: Path, kinds: Sequence[str] = (PAGE, DRAWING)) -> None:
    """Raise IsthmusError for a file of another kind, and for one that exists."""
    if file.suffix not in kinds:
        raise IsthmusError(f"--output {file} does not end in {' or '.join(kinds)}. Name another.")
    if file.exists():
        raise IsthmusError(f"{file} exists. Name another file with --output, or delete it.")


def emergence_row(run: RunAccuracy) -> tuple[str, str, str, str, str]:
    """Name, steps, step of the jump, accuracy before and after in percent."""
    found = run.emergence
    if found is None:
        return run.name, run.progress, "none", DASH, DASH
    before, after = f"{100 * found.before:.1f}", f"{100 * found.after:.1f}"
    return run.name, run.progress, f"{found.step:,}", before, after


def _note(run: RunAccuracy) -> str:
    found = run.emergence
    if found is None:
        return f"no jump in {run.progress} steps"
    return f"step {found.step:,}, from {100 * found.before:.0f} % to {100 * found.after:.0f} %"
