"""The main job on the shipped tiny models, from nothing to a page to look at, in a few minutes."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from isthmus.analysis.alignment import Alignment, align
from isthmus.analysis.emergence import Emergence, EmergenceMonitor
from isthmus.analysis.evaluate import Evaluation, evaluate
from isthmus.analysis.report import Example, Part, Report, render
from isthmus.decoding.transcriber import Transcriber, load
from isthmus.display import TrainingDisplay, training_display
from isthmus.errors import IsthmusError
from isthmus.files import write_atomic
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import Recipe, dump_recipe, load_recipe
from isthmus.speech.audio import load_audio
from isthmus.speech.corpora import load_cut
from isthmus.speech.synthesis import draw_texts, synthesise_corpus
from isthmus.training.batches import transcript
from isthmus.training.runs import train

DOMAINS = {"digit": 1.0, "digits": 2.0, "command": 2.0, "keyword": 1.0, "order": 2.0}
TRAIN_UTTERANCES, HELD_OUT_UTTERANCES = 1200, 60
SHOWN = 8  # examples on the terminal


@dataclass
class Watch:
    """Sees every training step: draws it, keeps the curve, and marks the emergence."""

    display: TrainingDisplay
    console: Console
    curve: list[dict[str, Any]]
    monitor: EmergenceMonitor

    def __call__(self, metrics: dict[str, Any]) -> None:
        self.display(metrics)
        self.curve.append(metrics)
        found = self.monitor.update(metrics["step"], metrics["accuracy"])
        if found is not None:
            self.console.print(
                f"[bold]Emergence at step {found.step}[/]: next-token accuracy rose from "
                f"{found.before:.0%} to {found.after:.0%}. The language model has begun to listen."
            )


def run(folder: Path, audio: Sequence[Path] = ()) -> dict[str, Any]:
    """Synthesise, train, decode and report into `folder`; returns the figures.

    Raises IsthmusError when one of the user's recordings cannot be read (before anything is made).
    """
    console = Console(stderr=True, highlight=False)
    own = {str(path): load_audio(path) for path in audio}
    recipe = load_recipe("tiny/quickstart", [f"data.train=['{folder}/speech/train']"])
    seconds = {}

    started = time.perf_counter()
    console.print(f"[bold]1[/] Synthesising {TRAIN_UTTERANCES} utterances, and {HELD_OUT_UTTERANCES} by other voices")
    held_out = _speech(folder / "speech")
    seconds["synthesis"] = time.perf_counter() - started

    started = time.perf_counter()
    console.print("[bold]2[/] Training the projector between two frozen models")
    curve, found = _train(recipe, folder / "run", console)
    seconds["training"] = time.perf_counter() - started

    started = time.perf_counter()
    console.print(f"[bold]3[/] Reading {HELD_OUT_UTTERANCES} utterances of voices it never heard, beam {recipe.decode.beam_size}")
    transcriber = load(folder / "run")
    evaluation = evaluate(transcriber, [str(held_out)])
    own_texts = transcriber.transcribe_waveforms(list(own.values())) if own else []
    seconds["decoding"] = time.perf_counter() - started

    yours = {name: text.text for name, text in zip(own, own_texts, strict=True)}
    page = folder / "report.html"
    report = _report(recipe, transcriber, evaluation, (curve, found), seconds, yours)
    write_atomic(page, render(report))
    _print_results(console, evaluation, yours, page, folder / "run")
    score = evaluation.scores.pooled
    return {
        **score.to_dict(),
        "emergence_step": found.step if found else None,
        "seconds": seconds,
        "run": str(folder / "run"),
        "report": str(page),
        "transcripts": yours,
    }


def _speech(folder: Path) -> Path:
    """The two synthetic corpora, made once; returns the held-out manifest."""
    for name, count, seed in (("train", TRAIN_UTTERANCES, 11), ("held-out", HELD_OUT_UTTERANCES, 12)):
        if not (folder / name / "manifest.jsonl").exists():
            texts = draw_texts(count, seed, DOMAINS)
            synthesise_corpus(folder / name, texts, seed, held_out=name == "held-out")
    return folder / "held-out" / "manifest.jsonl"


def free_folder(folder: Path = Path("runs/quickstart")) -> Path:
    """`folder`, or the first of folder-2, folder-3, … that does not exist."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], names) if not path.exists())


def _train(
    recipe: Recipe, folder: Path, console: Console
) -> tuple[list[dict[str, Any]], Emergence | None]:
    monitor = EmergenceMonitor()
    with training_display(recipe.train.steps, console) as display:
        watch = Watch(display, console, [], monitor)
        train(recipe, folder, on_step=watch)
    return watch.curve, monitor.found
