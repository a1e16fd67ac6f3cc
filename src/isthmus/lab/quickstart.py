"""The main job on the shipped tiny models, from nothing to a page to look at, in a few minutes."""

import itertools
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isthmus.build import build_model
from isthmus.decoding.evaluate import Evaluation, evaluate
from isthmus.decoding.transcriber import Transcriber, load
from isthmus.display import TrainingDisplay, training_display
from isthmus.files import write_atomic
from isthmus.lab.alignment import align
from isthmus.lab.emergence import EmergenceMonitor, find_emergence
from isthmus.lab.report import Curves, Part, Report, pick_examples, render
from isthmus.lab.synthesis import draw_texts, synthesise_corpus
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import Recipe, dump_recipe, load_recipe
from isthmus.runs.folder import ASSETS, default_system
from isthmus.speech.corpora import load_cut, read_corpus
from isthmus.speech.cuts import (
    transcript,
)
from isthmus.training.runs import train

DOMAINS = {"digit": 1.0, "digits": 2.0, "command": 2.0, "keyword": 1.0, "order": 2.0}
TRAIN_UTTERANCES, HELD_OUT_UTTERANCES = 1200, 60
SHOWN = 8  # examples on the terminal
SAMPLE = ASSETS / "speech" / "manifest.jsonl"
NEXT = {
    "isthmus transcribe a.wav --model RUN": "read a recording with this run",
    "isthmus transcribe a.wav": "read it with the shipped system, trained for longer",
    "isthmus quickstart --real DATA": "give that system ears for recordings of yours with texts",
    "isthmus recipes": "see what else can be trained",
    "isthmus cp tiny/projector my.yaml": "copy a recipe, to change it",
    "isthmus train my.yaml": "train it",
}


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

    Raises IsthmusError, before anything is made, when one of the user's recordings cannot be read
    or is too long.
    """
    console = Console(stderr=True, highlight=False)
    recipe = quickstart_recipe(folder)
    untrained = Transcriber(build_model(recipe), recipe.decode)
    own = {str(path): untrained.load(path) for path in audio}
    system = default_system()  # first, as it may be downloaded
    seconds = {}

    started = time.perf_counter()
    console.print(f"[bold]1[/] Speaking {TRAIN_UTTERANCES} sentences with espeak-ng")
    held_out = _speech(folder / "speech")
    seconds["synthesis"] = time.perf_counter() - started

    started = time.perf_counter()
    console.print("[bold]2[/] Training the projector between two frozen models")
    curve = _train(recipe, folder / "run", console)
    found = find_emergence([m["step"] for m in curve], [m["accuracy"] for m in curve])
    seconds["training"] = time.perf_counter() - started

    started = time.perf_counter()
    console.print(f"[bold]3[/] Reading {HELD_OUT_UTTERANCES} sentences of voices it never heard")
    transcriber = load(folder / "run")
    evaluation = evaluate(transcriber, [str(held_out)])
    own_texts = transcriber.transcribe(list(own.values()))
    seconds["decoding"] = time.perf_counter() - started

    yours = {name: text.text for name, text in zip(own, own_texts, strict=True)}
    page = folder / "report.html"
    report = _report(recipe, transcriber, evaluation, Curves.read(curve, found), yours)
    report = replace(
        report,
        training_seconds=seconds["training"],
        commands=_next(folder / "run"),
        files=str(folder),
    )
    write_atomic(page, render(report))
    _print_results(console, evaluation, yours)
    started = time.perf_counter()
    console.print(f"[bold]4[/] Reading people with {system}, which ships")
    read = _read(system, own, console)
    seconds["reading"] = time.perf_counter() - started
    _print_next(console, folder / "run", page)
    score = evaluation.scores.pooled
    return {
        **score.to_dict(),
        "emergence_step": found.step if found else None,
        "seconds": seconds,
        "run": str(folder / "run"),
        "report": str(page),
        "transcripts": yours,
        "system": system,
        "read": read,
    }


def quickstart_recipe(folder: Path) -> Recipe:
    """The shipped recipe, to train on the speech in `folder`."""
    recipe = load_recipe("tiny/quickstart")
    data = recipe.data.model_copy(update={"train": (str(folder / "speech" / "train"),)})
    return recipe.model_copy(update={"data": data})


def _speech(folder: Path) -> Path:
    """The two synthetic corpora, made once; returns the held-out manifest."""
    for name, count, seed in (
        ("train", TRAIN_UTTERANCES, 11),
        ("held-out", HELD_OUT_UTTERANCES, 12),
    ):
        if not (folder / name / "manifest.jsonl").exists():
            texts = draw_texts(count, seed, DOMAINS)
            synthesise_corpus(folder / name, texts, seed, held_out=name == "held-out")
    return folder / "held-out" / "manifest.jsonl"


def free_folder(folder: Path = Path("runs/quickstart")) -> Path:
    """`folder`, or the first of folder-2, folder-3, … that does not exist."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], names) if not path.exists())


def _train(recipe: Recipe, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Train into `folder`; returns the metrics of all steps."""
    with training_display(recipe.train.steps, console) as display:
        watch = Watch(display, console, [], EmergenceMonitor())
        train(recipe, folder, on_step=watch)
    return watch.curve


def _report(
    recipe: Recipe,
    transcriber: Transcriber,
    evaluation: Evaluation,
    curves: Curves,
    yours: dict[str, str],
) -> Report:
    """The page about the run."""
    model = transcriber.model
    longest = max(evaluation.sets["held-out/manifest"], key=lambda item: item.transcript.duration)
    shown = [next(iter(evaluation.sets["held-out/manifest"])), longest]
    return Report(
        title="isthmus quickstart",
        summary=(
            "Between a frozen speech encoder and a frozen language model, a small projector was "
            f"trained on {TRAIN_UTTERANCES} synthetic utterances, and tested on other voices."
        ),
        parts=_parts(recipe, model),
        scores=evaluation.scores,
        calibration=evaluation.calibration,
        curves=curves,
        examples=pick_examples(evaluation.scores.pooled, 12),
        alignments=[align(model, load_cut(item.cut), transcript(item.cut)) for item in shown],
        transcripts=yours,
        settings=dump_recipe(recipe),
    )


def _parts(recipe: Recipe, model: SpeechLLM) -> list[Part]:
    """Sizes of the three parts, and what each hands on."""
    rate = model.encoder.frame_rate
    embeddings = rate * model.projector.output_length(1000) / 1000
    rows = [
        (
            "Encoder",
            recipe.encoder.type,
            model.encoder,
            f"{rate:g} a second × {model.encoder.dim}",
        ),
        (
            "Projector",
            recipe.projector.type,
            model.projector,
            f"{embeddings:g} a second × {model.llm.dim}",
        ),
        ("LLM", recipe.llm.path, model.llm, "tokens"),
    ]
    return [
        Part(
            role,
            name,
            sum(value.numel() for value in part.parameters()),
            sum(value.numel() for value in part.parameters() if value.requires_grad),
            output,
        )
        for role, name, part, output in rows
    ]


def _print_results(console: Console, evaluation: Evaluation, yours: dict[str, str]) -> None:
    """References and hypotheses side by side, the error rate, and the user's own files."""
    table = Table("reference", "hypothesis", box=None, pad_edge=False)
    for example in pick_examples(evaluation.scores.pooled, SHOWN):
        right = example.reference == example.hypothesis
        table.add_row(
            Text(example.reference), Text(example.hypothesis, style="" if right else "red")
        )
    console.print(table)
    score = evaluation.scores.pooled
    assert score.wer is not None  # the corpus is ours and has words
    assert score.interval is not None
    low, high = score.interval
    console.print(
        f"[bold]WER {score.wer:.1%}[/] (95 % interval {low:.1%} to {high:.1%}) on "
        f"{len(score.utterances)} utterances of held-out voices"
    )
    for name, text in yours.items():
        console.print(Text(f"{name}: {text}"))


def _read(system: str, own: dict[str, Any], console: Console) -> dict[str, str]:
    """The recording that ships and the user's own, as a shipped system reads them."""
    (sample,) = read_corpus(SAMPLE)
    found = load(system).transcribe([sample, *own.values()])
    heard = dict(zip([sample.id, *own], found, strict=True))
    console.print(Text(f"{sample.id} says: {transcript(sample)}"))
    for name, one in heard.items():
        mark = " (out of its depth)" if one.doubtful else ""
        console.print(Text(f"{name}: {one.text}{mark}"))
    return {name: one.text for name, one in heard.items()}


def _next(run: Path) -> dict[str, str]:
    """What to type next, and what for."""
    return {
        command.replace("RUN", shlex.quote(str(run))): purpose for command, purpose in NEXT.items()
    }


def _print_next(console: Console, run: Path, page: Path) -> None:
    console.print(f"\nThe report: [bold]{page}[/]", soft_wrap=True)
    console.print("What to type next:")
    for command, purpose in _next(run).items():
        console.print(Text(f"  {command}\n      {purpose}"), soft_wrap=True)
